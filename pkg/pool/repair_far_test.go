package pool

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// far is another host that has one image.
type far struct {
	m    *vdi.Map
	data []byte
	err  error // of Pull
}

func (f *far) FetchMap(_ context.Context, digest string) (*vdi.Map, error) {
	if f.m == nil || f.m.Digest() != digest {
		return nil, errors.New("no host that is there has the image")
	}
	return f.m, nil
}

func (f *far) Pull(_ context.Context, _ *vdi.Map, dst *os.File, resume bool, _ func(done, total int64)) error {
	if f.err != nil || !resume {
		return errors.Join(f.err, errors.New("not pulled"))
	}
	_, err := dst.WriteAt(f.data, 0)
	return err
}

func TestAnImageIsRepairedFromOtherHosts(t *testing.T) {
	r := newRig(t)
	data := noise(1, 3*vdi.MapBlock)
	ref := r.mapped(r.sr(r.fileSpec("a")), "golden", data)
	want := r.contents(ref)
	m, err := r.VDIMap(t.Context(), ref)
	r.must(err)
	other := &far{}
	r.Fetcher = other

	r.flip(ref, sr.Live, 5)
	r.wantCode("nobody has it", r.VDIRepair(t.Context(), ref), xapi.VDIContentChanged)
	other.m, other.data, other.err = m, want, errors.New("it gives nothing")
	r.wantCode("nobody gives it", r.VDIRepair(t.Context(), ref), xapi.VDIContentChanged)
	other.err = nil
	r.must(r.VDIRepair(t.Context(), ref))
	r.good("from another host", ref, want)

	r.flip(ref, sr.Live, 7)
	r.drop(ref, mapOf)
	r.must(r.VDIRepair(t.Context(), ref))
	r.good("map and blocks from another host", ref, want)
}

func TestAHostThatRepairsMayReadThatImage(t *testing.T) {
	r := newRig(t)
	host, on := r.otherHost()
	golden, _ := r.golden(r.sr(r.memorySpec("m")), []byte("golden"))
	rec := get[VDI](r, ClassVDI, golden)
	its := r.replica(rec, on)
	_, err := r.Sources(t.Context(), host, rec.Map, true)
	r.wantCode("without a job", err, xapi.OperationNotAllowed)
	r.must(r.leaveCall(t.Context(), host, callRepair, its))
	_, err = r.Sources(t.Context(), host, rec.Map, true)
	r.must(err)
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error { tx.Delete(ClassVDI, its); return nil }))
	_, err = r.Sources(t.Context(), host, rec.Map, true)
	r.wantCode("of an image that is gone", err, xapi.OperationNotAllowed)
}

package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/dom0/dom0test"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// mappedPatch is patch with a block map beside its golden image.
func (r *rig) mappedPatch() (ref xapi.Ref, rec pool.Patch) {
	r.t.Helper()
	ref, rec = r.patch()
	size := int64(3 * vdi.MapBlock)
	var m *vdi.Map
	_, err := r.pool.NewVDI(r.t.Context(), pool.NewVDI{
		SR: r.sr, VDI: pool.VDI{NameLabel: "golden"}, VirtualSize: size,
		Fill: func(ctx context.Context, f *os.File, _ string) (err error) {
			if _, err = f.WriteAt(r.payload[rec.UUID], vdi.MapBlock); err == nil {
				m, err = vdi.BuildMap(ctx, f, size)
			}
			return err
		},
		Map: func() *vdi.Map { return m },
		Commit: func(tx *store.Tx, made xapi.Ref) error {
			rec.VDI = made
			tx.Put(pool.ClassPatch, ref, rec)
			return nil
		},
	})
	r.must(err)
	return ref, rec
}

func (r *rig) vdi(ref xapi.Ref) (rec pool.VDI) {
	r.must(r.store.View(func(v *store.View) (err error) {
		rec, err = store.Get[pool.VDI](v, pool.ClassVDI, ref)
		return err
	}))
	return rec
}

// flip changes one byte of a volume of a VDI behind patchd's back.
func (r *rig) flip(ref xapi.Ref, name func(xapi.UUID) sr.Name, off int64) {
	r.t.Helper()
	repo, err := r.pool.Repository(r.sr)
	r.must(err)
	f, err := repo.Open(r.t.Context(), name(r.vdi(ref).UUID), sr.ReadWrite)
	r.must(err)
	defer f.Close()
	b := []byte{0}
	_, err = f.ReadAt(b, off)
	r.must(err)
	b[0]++
	_, err = f.WriteAt(b, off)
	r.must(err)
	r.must(f.Sync())
}

func mapOf(id xapi.UUID) sr.Name { return sr.Live(id).Map() }

func TestEveryByteOfAnImageIsCheckedBeforeItRuns(t *testing.T) {
	t.Parallel()
	for _, clones := range []bool{true, false} {
		for what, at := range map[string]struct {
			name func(xapi.UUID) sr.Name
			off  int64
			says string
		}{
			"payload":   {sr.Live, vdi.MapBlock + 3, "one block of 1 MiB is damaged"},
			"before it": {sr.Live, 0, "one block of 1 MiB is damaged"},
			"a hole":    {sr.Live, 3*vdi.MapBlock - 1, "one block of 1 MiB is damaged"},
			"the map":   {mapOf, 50, pool.DamagedMap},
		} {
			r := newRigOf(t, clones)
			r.begin()
			ref, rec := r.mappedPatch()
			r.flip(rec.VDI, at.name, at.off)
			for range 2 {
				_, err := r.apply(ref)
				if e := wantCode(t, err, xapi.VDIContentChanged); e.Params[0] != string(rec.VDI) || !strings.Contains(e.Params[1], at.says) {
					t.Errorf("%s, clones %v: %v", what, clones, e)
				}
			}
			if got := r.vdi(rec.VDI).Damage; !strings.Contains(got, at.says) {
				t.Errorf("%s, clones %v: recorded is %q", what, clones, got)
			}
			if n := r.countOf(pool.ClassMessage); n != 1 || r.effects != 0 {
				t.Errorf("%s, clones %v: %d messages, %d effects", what, clones, n, r.effects)
			}
			err := r.pool.VDIRepair(t.Context(), rec.VDI)
			if what == "payload" { // of which there is no copy
				wantCode(t, err, xapi.VDIContentChanged)
			} else {
				r.must(err)
				_, err := r.apply(ref)
				r.must(err)
			}
			r.tidy(what)
			r.end()
		}
	}
}

func (r *rig) countOf(class string) (n int) {
	r.must(r.store.View(func(v *store.View) error { n = v.Count(class); return nil }))
	return n
}

// What a host has attested is not read through the mount again: there it would
// find another payload.
func TestAnAttestedImageNeedsOnlyToEqualItsMap(t *testing.T) {
	t.Parallel()
	for _, clones := range []bool{true, false} {
		r := newRigOf(t, clones)
		r.begin()
		ref, rec := r.mappedPatch()
		good := r.payload[rec.UUID]
		if _, err := r.precheck(ref); err != nil {
			t.Fatal(err)
		}
		r.payload[rec.UUID] = []byte("another")
		if _, err := r.precheck(ref); err != nil {
			t.Errorf("clones %v: attested, and yet %v", clones, err)
		}
		// Neither another host's word nor another record counts.
		r.must(os.Rename(string(r.agent.Attested), string(r.agent.Attested)+".away"))
		_, err := r.precheck(ref)
		wantCode(t, err, xapi.VDIContentChanged)
		r.must(os.Rename(string(r.agent.Attested)+".away", string(r.agent.Attested)))
		r.agent.Pinned = nil
		r.payload[rec.UUID] = good
		_, err = r.precheck(ref)
		wantCode(t, err, xapi.InvalidPatch)
		r.tidy("in the end")
		r.end()
	}
}

func TestADamagedImageIsNotAttested(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	ref, rec := r.mappedPatch()
	r.payload[rec.UUID] = []byte("another")
	_, err := r.precheck(ref)
	wantCode(t, err, xapi.VDIContentChanged)
	if names, err := os.ReadDir(string(r.agent.Attested)); err == nil && len(names) > 0 {
		t.Errorf("attested: %v", names)
	}
	r.payload[rec.UUID] = nil
	r.tidy("in the end")
}

// A recorded damage is not passed over because the file was good once: a disk
// that loses bytes changes nothing else.
func TestRecordedDamageVoidsTheRememberedCheck(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	ref, rec := r.mappedPatch()
	id, err := identify(t.Context(), r.repository(), sr.Live(r.vdi(rec.VDI).UUID))
	r.must(err)
	r.agent.checks.await("x", id, rec.Digest)
	r.agent.checks.confirm("x")
	r.must(r.pool.VDIDamaged(t.Context(), rec.VDI, "a scrub has found it"))
	r.payload[rec.UUID] = []byte("another")
	_, err = r.precheck(ref)
	wantCode(t, err, xapi.VDIContentChanged)
	r.payload[rec.UUID] = nil
	r.tidy("in the end")
}

func (r *rig) repository() sr.Repository {
	repo, err := r.pool.Repository(r.sr)
	r.must(err)
	return repo
}

func TestAScratchRoomThatFailsIsAFailureOfTheVerb(t *testing.T) {
	t.Parallel()
	for what, breaks := range map[string]func(d *dom0test.Dom0){
		"read-only": func(d *dom0test.Dom0) {
			d.Room = func(path string) (dom0.Space, error) {
				return dom0.Space{Total: 1 << 40, Free: 1 << 40, ReadOnly: filepath.Base(path) == dirMount}, nil
			}
		},
		"not to be looked at": func(d *dom0test.Dom0) {
			d.Room = func(path string) (dom0.Space, error) { return dom0.Space{}, errors.New("stale") }
		},
	} {
		r := newRig(t)
		r.begin()
		ref, _ := r.patch()
		r.prepare = breaks
		_, err := r.precheck(ref)
		if e := wantCode(t, err, xapi.PrecheckFailedUnknownError); len(e.Params) != 2 || !strings.Contains(e.Params[1], "scratch room") {
			t.Errorf("%s: %v", what, e)
		}
		broken := false
		r.prepare = func(d *dom0test.Dom0) {
			d.Room = func(string) (dom0.Space, error) {
				r.mu.Lock()
				defer r.mu.Unlock()
				broken = r.effects > 0
				return dom0.Space{Total: 1 << 40, Free: 1 << 40, ReadOnly: broken}, nil
			}
		}
		_, err = r.apply(ref)
		if e := wantCode(t, err, xapi.PatchApplyFailed); !strings.Contains(e.Params[0], "read-only") {
			t.Errorf("%s: %v", what, e)
		}
		r.tidy(what)
	}
}

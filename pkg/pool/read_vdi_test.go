package pool

import (
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// onOther makes a golden image whose SR is on another host, with an equal VDI here.
func (r *rig) onOther(here xapi.Ref, data []byte) (host, golden, equal xapi.Ref) {
	r.t.Helper()
	host, on := r.otherHost()
	equal, patch := r.golden(here, data)
	golden = xapi.NewRef()
	r.must(r.Store.Update(r.t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[VDI](tx, ClassVDI, equal)
		if err != nil {
			return err
		}
		p, err := store.Read[Patch](tx, ClassPatch, patch)
		if err != nil {
			return err
		}
		p.VDI = golden
		tx.Put(ClassPatch, patch, p)
		first := rec
		first.UUID, first.SR, first.NameLabel, first.OtherConfig = xapi.NewUUID(), on, "the golden one", map[string]string{}
		rec.OtherConfig = map[string]string{KeyReplica: string(first.UUID)}
		tx.Put(ClassVDI, golden, first)
		tx.Put(ClassVDI, equal, rec)
		return nil
	}))
	return host, golden, equal
}

func TestAnImageOnAnotherHostIsReadFromItsReplicaHere(t *testing.T) {
	r := newRig(t)
	here := r.sr(r.memorySpec("m"))
	data := []byte("an image on a host that is away")
	host, golden, equal := r.onOther(here, data)
	r.Connected = func(h xapi.Ref) bool { return h != host }

	r.holds(golden, data)
	m, err := r.VDIMap(t.Context(), golden)
	r.must(err)
	if rec := get[VDI](r, ClassVDI, golden); m == nil || m.Digest() != rec.Map {
		t.Error("the map is of another image")
	}
	made, err := r.VDICopy(t.Context(), golden, here, xapi.NullRef, xapi.NullRef)
	r.must(err)
	r.holds(made, data)
	r.wantVerified(made)
	if rec := get[VDI](r, ClassVDI, made); rec.NameLabel != "the golden one" || rec.OtherConfig[KeyReplica] != "" {
		t.Errorf("the copy is %+v", rec)
	}
	made, err = r.VDICopy(t.Context(), equal, here, xapi.NullRef, xapi.NullRef)
	r.must(err)
	if rec := get[VDI](r, ClassVDI, made); rec.OtherConfig[KeyReplica] != "" {
		t.Error("a copy of a replica is a replica, and would go with it")
	}
	_, _, err = r.VDIFile(t.Context(), golden, sr.ReadWrite)
	r.wantCode("to write", err, xapi.SRNotAttached)
}

func TestAnImageThatIsNotHereNamesItsHosts(t *testing.T) {
	r := newRig(t)
	host, golden, equal := r.onOther(r.sr(r.memorySpec("m")), []byte("golden"))
	r.must(r.VDIDestroy(t.Context(), equal))
	on := get[VDI](r, ClassVDI, golden).SR
	says := func(words ...string) {
		t.Helper()
		_, err := r.VDIMap(t.Context(), golden)
		_, _, ferr := r.VDIForExport(t.Context(), string(golden))
		for _, err := range []error{err, ferr} {
			r.wantCode("read", err, xapi.SRNotAttached)
			for _, w := range append(words, string(on)) {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Errorf("%v does not say %q", err, w)
				}
			}
		}
	}
	says("but on other (" + string(get[Host](r, ClassHost, host).UUID) + ")")
	r.Connected = func(xapi.Ref) bool { return false }
	says("which is away")
}

func TestAPatchWhoseImageIsOnAHostThatIsAwayCanGo(t *testing.T) {
	for name, call := range map[string]func(*rig, xapi.Ref) error{
		"pool_clean": func(r *rig, patch xapi.Ref) error { return r.PatchPoolClean(t.Context(), patch) },
		"destroy":    func(r *rig, patch xapi.Ref) error { return r.PatchDestroy(t.Context(), patch) },
	} {
		r := newRig(t)
		host, golden, equal := r.onOther(r.sr(r.memorySpec("m")), []byte("golden"))
		var patch xapi.Ref
		r.must(r.Store.View(func(v *store.View) error { patch = v.Refs(ClassPatch, "VDI", string(golden))[0]; return nil }))
		r.Connected = func(h xapi.Ref) bool { return h != host }
		r.wantCode("VDI.destroy", r.VDIDestroy(t.Context(), golden), xapi.HostOffline, string(host))
		r.must(call(r, patch))
		if j := r.leftCall(host, "VDIDestroy"); string(j.Job.Args) != `"`+string(golden)+`"` {
			t.Errorf("%s: the host that is away is told %s", name, j.Job.Args)
		}
		if _, err := r.vdi(equal); !xapi.Is(err, xapi.HandleInvalid) {
			t.Errorf("%s: the replica is left", name)
		}
		if rec, err := r.patch(patch); name == "destroy" && err == nil || name == "pool_clean" && !rec.VDI.IsNull() {
			t.Errorf("%s: the patch is %+v", name, rec)
		}
	}
}

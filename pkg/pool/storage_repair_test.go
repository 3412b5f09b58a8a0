package pool

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// After a kill: what was begun is undone, what is foreign stays, what is
// missing is marked, sizes are true.
func TestRepairAfterAKill(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	dir := filepath.Join(r.dir, "sr")
	vdi := r.filled(ref, 1<<20, []byte("kept"))
	lost := r.filled(ref, 1<<20, []byte("lost"))
	r.must(os.Remove(filepath.Join(dir, string(get[VDI](r, ClassVDI, lost).UUID)+".img")))

	repo, err := r.Repository(ref)
	r.must(err)
	make := func(n sr.Name) sr.Name {
		_, err := repo.Create(ctx, n, 4096)
		r.must(err)
		return n
	}
	owner := func(pool, host, job xapi.UUID) sr.Owner { return sr.Owner{Pool: pool, Host: host, Job: job} }
	begun := r.intent(Intent{Kind: IntentCreate, SR: ref, VDI: xapi.NewUUID()})
	named := r.intent(Intent{Kind: IntentCreate, SR: ref, VDI: xapi.NewUUID()})
	dropped := r.intent(Intent{Kind: IntentDestroy, SR: ref, VDI: xapi.NewUUID()})
	elsewhere := Intent{UUID: xapi.NewUUID(), Kind: IntentCreate, SR: ref, VDI: xapi.NewUUID(), Host: xapi.NewRef()}
	job := Job{UUID: xapi.NewUUID(), Host: r.Self, State: JobClaimed}
	r.must(r.Store.Update(ctx, func(tx *store.Tx) error {
		tx.Put(ClassIntent, xapi.NewRef(), elsewhere)
		tx.Put(ClassJob, xapi.NewRef(), job)
		return nil
	}))
	make(r.part(begun))
	make(sr.Live(named.VDI))
	make(sr.Live(dropped.VDI))
	make(sr.Work(owner(r.PoolUUID, r.SelfUUID, xapi.NewUUID()), xapi.NewUUID()))
	make(sr.Part(owner(r.PoolUUID, r.SelfUUID, xapi.NewUUID()), xapi.NewUUID()))
	stay := map[sr.Name]bool{
		sr.Live(get[VDI](r, ClassVDI, vdi).UUID):                                         true,
		make(sr.Live(xapi.NewUUID())):                                                    true, // nobody's
		make(sr.Live(elsewhere.VDI)):                                                     true, // another host undoes it
		make(sr.Work(owner(r.PoolUUID, r.SelfUUID, job.UUID), xapi.NewUUID())):           true, // of a job that lives
		make(sr.Work(owner(r.PoolUUID, xapi.NewUUID(), xapi.NewUUID()), xapi.NewUUID())): true, // of another host
		make(sr.Part(owner(xapi.NewUUID(), r.SelfUUID, xapi.NewUUID()), xapi.NewUUID())): true, // of another pool
		make(sr.Part(owner(r.PoolUUID, r.SelfUUID, elsewhere.UUID), xapi.NewUUID())):     true, // of an open intent
	}
	r.must(os.WriteFile(filepath.Join(dir, "readme"), []byte("foreign"), 0o600))

	r.restart()
	r.wantVolumes(ref, stay)
	if _, err := os.Stat(filepath.Join(dir, "readme")); err != nil {
		t.Errorf("a foreign file is gone: %v", err)
	}
	if r.count(ClassIntent) != 1 {
		t.Errorf("%d intents are left, want that of the other host", r.count(ClassIntent))
	}
	if get[VDI](r, ClassVDI, vdi).Missing || !get[VDI](r, ClassVDI, lost).Missing || r.count(ClassVDI) != 2 {
		t.Error("missing VDIs are not marked, or strangers were introduced")
	}
	r.holds(vdi, []byte("kept"))

	// A scan introduces what is nobody's, and only that.
	r.must(r.SRScan(ctx, ref))
	if r.count(ClassVDI) != 3 {
		t.Errorf("%d VDIs after a scan, want 3", r.count(ClassVDI))
	}
}

// wantVolumes fails unless an SR holds exactly those volumes.
func (r *rig) wantVolumes(ref xapi.Ref, want map[sr.Name]bool) {
	r.t.Helper()
	for _, n := range r.volumes(ref) {
		if !want[n] {
			r.t.Errorf("volume %s is left", n)
		}
		delete(want, n)
	}
	for n := range want {
		r.t.Errorf("volume %s is gone", n)
	}
}

func (r *rig) intent(in Intent) Intent {
	r.t.Helper()
	ref, in := r.newIntent(in)
	r.must(r.Store.Update(r.t.Context(), func(tx *store.Tx) error { tx.Put(ClassIntent, ref, in); return nil }))
	return in
}

// An SR whose filesystem is not there at start keeps nobody from the rest; it
// is tried again at the next start.
func TestAnSRThatCannotBePluggedAtStart(t *testing.T) {
	r := newRig(t)
	ref, other := r.sr(r.fileSpec("sr")), r.sr(r.fileSpec("other"))
	vdi := r.filled(ref, 4096, []byte("x"))
	pbd := r.pbdOf(ref)
	away := filepath.Join(r.dir, "away")
	r.must(os.Rename(filepath.Join(r.dir, "sr"), away))
	r.must(os.Mkdir(filepath.Join(r.dir, "sr"), 0o700)) // the empty mount point
	for range 2 {
		r.restart()
		rec := get[PBD](r, ClassPBD, pbd)
		if rec.CurrentlyAttached || rec.OtherConfig[keyPlugFailed] == "" {
			t.Errorf("PBD of an SR that is not there: %+v", rec)
		}
		if r.count(ClassMessage) != 1 {
			t.Errorf("%d messages, want one", r.count(ClassMessage))
		}
	}
	if get[VDI](r, ClassVDI, vdi).Missing {
		t.Error("a VDI of an SR that is not plugged counts as missing")
	}
	_, err := r.Repository(ref)
	r.wantCode("repository", err, xapi.SRNotAttached, string(ref))
	r.filled(other, 4096, nil)

	r.must(os.Remove(filepath.Join(r.dir, "sr")))
	r.must(os.Rename(away, filepath.Join(r.dir, "sr")))
	r.restart()
	if rec := get[PBD](r, ClassPBD, pbd); !rec.CurrentlyAttached || rec.OtherConfig[keyPlugFailed] != "" {
		t.Errorf("PBD of an SR that is back: %+v", rec)
	}
	r.holds(vdi, []byte("x"))
}

// One that was unplugged by hand stays so.
func TestAnUnpluggedSRStaysUnplugged(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	r.must(r.PBDUnplug(t.Context(), r.pbdOf(ref)))
	r.restart()
	_, err := r.Repository(ref)
	r.wantCode("repository", err, xapi.SRNotAttached)
}

// An intent about an SR that was forgotten says nothing any more.
func TestIntentsOfForgottenSRsGo(t *testing.T) {
	r := newRig(t)
	r.intent(Intent{Kind: IntentCreate, SR: xapi.NewRef(), VDI: xapi.NewUUID()})
	r.intent(Intent{Kind: IntentMakeSR, SR: xapi.NewRef(), SRUUID: xapi.NewUUID(), Type: "file", Device: map[string]string{"location": "/etc/x"}})
	r.restart()
	r.wantTidy("after the start")
}

// The hourly sweep takes up what failed while the daemon ran on.
func TestSweepRepeatsAFailedUndo(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.memorySpec("sr"))
	r.point = func(name string) error {
		if name == "sr.rename" || name == "sr.destroy" {
			return xapi.NewError(xapi.VDIIOError, "disk")
		}
		return nil
	}
	_, err := r.NewVDI(t.Context(), NewVDI{SR: ref, VirtualSize: 4096})
	r.wantCode("NewVDI on a failing disk", err, xapi.VDIIOError)
	if r.count(ClassIntent) != 1 {
		t.Fatal("what could not be undone was forgotten")
	}
	r.point = nil
	r.must(r.Sweep(t.Context()))
	r.wantTidy("after the sweep")
}

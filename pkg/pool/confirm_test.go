package pool

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// unconfirmed makes a patch whose upload waits for copies hosts.
func (r *rig) unconfirmed(on xapi.Ref, copies int) (vdi, patch xapi.Ref) {
	r.t.Helper()
	r.Copies, r.CopiesTimeout = copies, time.Minute
	vdi, patch = r.golden(on, []byte("golden"))
	r.must(r.Store.Update(r.t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[Patch](tx, ClassPatch, patch)
		rec.Unconfirmed = &Unconfirmed{Since: r.Now()}
		tx.Put(ClassPatch, patch, rec)
		return err
	}))
	return vdi, patch
}

// takes records that a host has staged the image of a VDI in its SR.
func (r *rig) takes(vdi, on xapi.Ref) {
	r.t.Helper()
	r.must(r.Store.Update(r.t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[VDI](tx, ClassVDI, vdi)
		rec.UUID, rec.SR = xapi.NewUUID(), on
		tx.Put(ClassVDI, xapi.NewRef(), rec)
		return err
	}))
}

func TestAnUploadIsConfirmedByCopies(t *testing.T) {
	r := newRig(t)
	sr := r.sr(r.memorySpec("m"))
	host, on := r.otherHost()
	third, its := r.otherHost()
	vdi, patch := r.unconfirmed(sr, 2)
	r.wantCode("before", r.PatchConfirmed(patch), xapi.OtherOperationInProgress)
	_, err := r.PatchApply(t.Context(), patch, r.Self)
	r.wantCode("apply before", err, xapi.OtherOperationInProgress)
	_, err = r.PatchPrecheck(t.Context(), patch, host)
	r.wantCode("precheck before", err, xapi.OtherOperationInProgress)
	if waiting, err := r.UnconfirmedPatches(); err != nil || len(waiting) != 1 {
		t.Errorf("%v %v", waiting, err)
	}

	var asked []xapi.Ref
	r.StageOn = func(_ context.Context, p, h xapi.Ref) error {
		asked = append(asked, h)
		if p != patch || len(asked) == 1 {
			return errors.New("its disk is full")
		}
		r.takes(vdi, map[xapi.Ref]xapi.Ref{host: on, third: its}[h])
		return nil
	}
	r.must(r.Confirm(t.Context(), patch))
	if len(asked) != 2 || asked[0] == asked[1] || slices.Contains(asked, r.Self) {
		t.Errorf("asked %v", asked)
	}
	r.must(r.PatchConfirmed(patch))
	r.must(r.Confirm(t.Context(), patch)) // again: nothing is to do
	if len(asked) != 2 {
		t.Errorf("asked %v", asked)
	}
}

func TestASharedSRIsEnoughCopies(t *testing.T) {
	r := newRig(t)
	sr := r.sr(r.memorySpec("m"))
	host, _ := r.otherHost()
	_, patch := r.unconfirmed(sr, 2)
	r.StageOn = func(context.Context, xapi.Ref, xapi.Ref) error { return errors.New("nobody is to be asked") }
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		tx.Put(ClassPBD, xapi.NewRef(), PBD{UUID: xapi.NewUUID(), Host: host, SR: sr, CurrentlyAttached: true, OtherConfig: map[string]string{}})
		return nil
	}))
	r.must(r.Confirm(t.Context(), patch))
	r.must(r.PatchConfirmed(patch))
}

func TestFewerHostsThanCopies(t *testing.T) {
	r := newRig(t)
	sr := r.sr(r.memorySpec("m"))
	vdi, patch := r.unconfirmed(sr, 3)
	r.StageOn = func(context.Context, xapi.Ref, xapi.Ref) error { return errors.New("nobody is there") }
	r.must(r.Confirm(t.Context(), patch))
	r.must(r.VDIDestroy(t.Context(), vdi))

	// A host that is not connected is waited for until it is known to be away.
	host, _ := r.otherHost()
	asked := make(chan bool, 100)
	r.Connected = func(h xapi.Ref) bool { asked <- true; return h != host }
	vdi, patch = r.unconfirmed(sr, 3)
	done := make(chan error, 1)
	go func() { done <- r.Confirm(t.Context(), patch) }()
	<-asked
	<-asked
	r.wantCode("while it may come", r.PatchConfirmed(patch), xapi.OtherOperationInProgress)
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, host)
		rec.Away = r.Now()
		tx.Put(ClassHost, host, rec)
		return err
	}))
	r.must(<-done)
	r.must(r.VDIDestroy(t.Context(), vdi))
	r.Connected, r.StageOn = nil, nil
	_, patch = r.unconfirmed(sr, 3)
	r.must(r.Confirm(t.Context(), patch))
	r.must(r.PatchConfirmed(patch))
}

func TestAnUploadThatIsNotConfirmedIsUndone(t *testing.T) {
	r := newRig(t)
	sr := r.sr(r.memorySpec("m"))
	host, _ := r.otherHost()
	_, patch := r.unconfirmed(sr, 2)
	r.StageOn = func(_ context.Context, _, h xapi.Ref) error {
		if h != host {
			t.Errorf("asked %s", h)
		}
		return errors.New("its disk is full")
	}
	r.wantCode("confirm", r.Confirm(t.Context(), patch), xapi.OperationNotAllowed)
	if n := r.count(ClassPatch) + r.count(ClassVDI); n != 0 {
		t.Errorf("%d records are left", n)
	}
	r.wantTidy("undone")

	_, patch = r.unconfirmed(sr, 2)
	stopped, stop := context.WithCancelCause(t.Context())
	r.StageOn = func(ctx context.Context, _, _ xapi.Ref) error {
		stop(errors.New("patchd is stopping"))
		<-ctx.Done()
		return context.Cause(ctx)
	}
	if err := r.Confirm(stopped, patch); err == nil {
		t.Error("confirmed although it was stopped")
	}
	r.wantCode("stopped", r.PatchConfirmed(patch), xapi.OtherOperationInProgress)

	// Whoever leads next cannot reach the image: its host is to destroy it.
	r.must(r.DetachStorage(context.Background()))
	r.StageOn = func(context.Context, xapi.Ref, xapi.Ref) error { return errors.New("nobody has it") }
	r.wantCode("elsewhere", r.Confirm(t.Context(), patch), xapi.OperationNotAllowed)
	if n := r.count(ClassPatch) + r.count(ClassVDI); n != 0 || r.count(ClassIntent) != 1 {
		t.Errorf("%d records are left, %d intents", n, r.count(ClassIntent))
	}
	r.restart()
	r.wantTidy("after its host has started")
}

func TestTheCopiesOfAnUploadThatFailsGoToo(t *testing.T) {
	r := newRig(t)
	sr := r.sr(r.memorySpec("m"))
	host, on := r.otherHost()
	r.otherHost()
	vdi, patch := r.unconfirmed(sr, 3)
	golden := get[VDI](r, ClassVDI, vdi)
	var staging xapi.Ref
	r.StageOn = func(_ context.Context, _, h xapi.Ref) error {
		if h != host {
			return errors.New("its disk is full")
		}
		r.replica(golden, on)
		r.must(r.Store.Update(t.Context(), func(tx *store.Tx) (err error) { // one that was not waited for
			args, _ := json.Marshal(StageSpec{Map: golden.Map})
			staging, err = r.newJob(t.Context(), tx, Job{Kind: JobCall, Host: host, Call: callStage, Args: args})
			return err
		}))
		return nil
	}
	r.Connected = func(xapi.Ref) bool { return true }
	done := make(chan error, 1)
	go func() { done <- r.Confirm(t.Context(), patch) }()
	var job Assignment
	r.must(r.Store.Until(t.Context(), func(*store.View) (bool, error) { // the host is asked to destroy its copy
		jobs, _, err := r.Jobs(host)
		for _, j := range jobs {
			if j.Job.Call == "VDIDestroy" {
				job = j
			}
		}
		return job.Ref != "", err
	}))
	r.must(r.finish(t.Context(), job.Ref, Outcome{}))
	r.wantCode("confirm", <-done, xapi.OperationNotAllowed)
	if j, err := r.Job(staging); err != nil || !j.Cancel {
		t.Errorf("what makes a further copy goes on: %+v %v", j, err)
	}
	if n := r.count(ClassPatch); n != 0 {
		t.Errorf("%d patches are left", n)
	}

	// One that went away keeps the job.
	vdi, patch = r.unconfirmed(sr, 3)
	golden = get[VDI](r, ClassVDI, vdi)
	left := r.replica(golden, on)
	r.StageOn = func(context.Context, xapi.Ref, xapi.Ref) error { return errors.New("its disk is full") }
	r.Connected = func(h xapi.Ref) bool { return h != host }
	r.wantCode("confirm", r.Confirm(t.Context(), patch), xapi.OperationNotAllowed)
	if j := r.leftCall(host, "VDIDestroy"); string(j.Job.Args) != `"`+string(left)+`"` {
		t.Errorf("the host that is away is told %+v", j)
	}
}

// replica records that a host has a replica of a golden image in its SR.
func (r *rig) replica(golden VDI, on xapi.Ref) xapi.Ref {
	r.t.Helper()
	ref, rec := xapi.NewRef(), ReplicaSpec(golden, Patch{}).VDI
	rec.UUID, rec.SR, rec.Map = xapi.NewUUID(), on, golden.Map
	r.must(r.Store.Update(r.t.Context(), func(tx *store.Tx) error { tx.Put(ClassVDI, ref, rec); return nil }))
	return ref
}

// leftCall is the open call of that name that a host has, or fails the test.
func (r *rig) leftCall(host xapi.Ref, name string) Assignment {
	r.t.Helper()
	jobs, _, err := r.Jobs(host)
	r.must(err)
	i := slices.IndexFunc(jobs, func(j Assignment) bool { return j.Job.Call == name })
	if i < 0 {
		r.t.Fatalf("host %s has no call %s", host, name)
	}
	return jobs[i]
}

func TestTheFirstSROfAHost(t *testing.T) {
	r := newRig(t)
	for range 2 { // again: nothing is to do
		r.must(r.EnsureFirstSR(t.Context(), r.fileSpec("local")))
		r.must(r.EnsureDefaultSR(t.Context()))
		if n := r.count(ClassSR); n != 1 {
			t.Fatalf("%d SRs", n)
		}
	}
	_, pool, err := r.Record()
	r.must(err)
	first := pool.DefaultSR
	if own, err := r.ownSR(); err != nil || own != first {
		t.Errorf("own SR %s, default %s, %v", own, first, err)
	}
	// The default of the pool is that of another host: ours takes its place here.
	_, on := r.otherHost()
	r.must(r.SetDefaultSR(t.Context(), on))
	if def, _, err := r.SRCandidates(t.Context()); err != nil || def != first {
		t.Errorf("default %s, %v", def, err)
	}
	r.must(r.PBDUnplug(t.Context(), r.pbdOf(first)))
	if def, _, err := r.SRCandidates(t.Context()); err != nil || def != on {
		t.Errorf("default %s, %v", def, err)
	}
}

func TestLeadMakesTheMaster(t *testing.T) {
	r := newRig(t)
	host, _ := r.otherHost()
	ref, _, err := r.Record()
	r.must(err)
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[PoolRecord](tx, ClassPool, ref)
		rec.Master = host
		tx.Put(ClassPool, ref, rec)
		return err
	}))
	for range 2 {
		r.must(r.Lead(t.Context()))
	}
	if _, rec, err := r.Record(); err != nil || rec.Master != r.Self {
		t.Errorf("master %s, %v", rec.Master, err)
	}
}

func TestTheKeysOfAHost(t *testing.T) {
	var h Host
	for n, key := range []string{"a", "a", "b", "c", "b"} {
		h.addKey([]byte(key), time.Unix(int64(n), 0))
	}
	h.addKey(nil, time.Now())
	if len(h.Keys) != 2 || string(h.Keys[0].SPKI) != "c" || string(h.Keys[1].SPKI) != "b" {
		t.Errorf("%+v", h.Keys)
	}
}

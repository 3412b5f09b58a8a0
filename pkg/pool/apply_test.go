package pool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// host plays the agent of the only host.
type host struct {
	files map[string]Patch // what Inspect finds, by name
	calls []string
	fail  error
}

func (h *host) Place(path string) (string, error) {
	h.calls = append(h.calls, "place")
	return filepath.Base(path), h.fail
}

func (h *host) Unplace(string, string) error { h.calls = append(h.calls, "unplace"); return h.fail }

func (h *host) Inspect(_ context.Context, name string) (Patch, error) {
	rec, ok := h.files[name]
	if !ok {
		return rec, xapi.NewError(xapi.InvalidPatch)
	}
	rec.Filename = name
	return rec, nil
}

func (h *host) Files() (names []string, err error) {
	for name := range h.files {
		names = append(names, name)
	}
	return append(names, "no-patch"), h.fail
}

func (h *host) Settle(_ Patch, applied bool) error {
	h.calls = append(h.calls, map[bool]string{true: "stamp", false: "unstamp"}[applied])
	return h.fail
}

func (h *host) ResyncStamps(context.Context) error { return nil }

// patched gives a rig with a host and a patch in a VDI.
func patched(t *testing.T) (r *rig, h *host, patch, vdi xapi.Ref) {
	t.Helper()
	r = newRig(t)
	h = &host{files: map[string]Patch{}}
	r.Local = h
	vdi, patch = r.golden(r.sr(r.memorySpec("mem")), []byte("x"))
	return r, h, patch, vdi
}

// asked runs a call that waits for a job, and gives that job once it is there.
func (r *rig) asked(call func(context.Context) error) (job xapi.Ref, done chan error) {
	r.t.Helper()
	done = make(chan error, 1)
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	go func() { defer cancel(); done <- call(ctx) }()
	for {
		jobs, rev, err := r.Jobs(r.Self)
		r.must(err)
		if len(jobs) > 0 {
			return jobs[0].Ref, done
		}
		r.must(r.WaitChange(ctx, rev))
	}
}

func (r *rig) apply(patch xapi.Ref, out *string) (xapi.Ref, chan error) {
	return r.asked(func(ctx context.Context) error {
		text, err := r.PatchApply(ctx, patch, r.Self)
		if out != nil {
			*out = text
		}
		return err
	})
}

// hostPatches gives those of a patch.
func (r *rig) hostPatches(patch xapi.Ref) (refs []xapi.Ref, recs []HostPatch) {
	r.must(r.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassHostPatch, "pool_patch", string(patch)) {
			hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
			if err != nil {
				return err
			}
			refs, recs = append(refs, ref), append(recs, hp)
		}
		return nil
	}))
	return refs, recs
}

func TestApplyIsAJob(t *testing.T) {
	t.Parallel()
	r, _, patch, vdi := patched(t)
	var out string
	job, done := r.apply(patch, &out)
	rec, err := r.Job(job)
	r.must(err)
	if rec.State != JobQueued || rec.Kind != JobApply || rec.Patch != patch || rec.VDI != vdi || rec.Resumes {
		t.Errorf("%+v", rec)
	}
	if _, hps := r.hostPatches(patch); len(hps) != 1 || hps[0].Applied {
		t.Errorf("%+v", hps)
	}
	ctx := t.Context()
	_, err = r.PatchApply(ctx, patch, r.Self)
	r.wantCode("a second apply", err, xapi.OtherOperationInProgress)
	r.wantCode("a pool_apply", r.PatchPoolApply(ctx, patch), xapi.OtherOperationInProgress)
	r.wantCode("destroy", r.PatchDestroy(ctx, patch), xapi.PatchIsApplied)
	r.wantCode("pool_clean", r.PatchPoolClean(ctx, patch), xapi.VDIInUse)
	r.wantCode("VDI.destroy", r.VDIDestroy(ctx, vdi), xapi.VDIInUse)
	refs, _ := r.hostPatches(patch)
	r.wantCode("host_patch.destroy", r.HostPatchDestroy(ctx, refs[0]), xapi.OtherOperationInProgress)
	r.wantCode("settle", r.PatchSettle(ctx, patch, r.Self, true), xapi.OperationNotAllowed)

	attempt, err := r.JobClaim(ctx, job)
	if attempt != 1 || err != nil {
		t.Error(attempt, err)
	}
	_, err = r.JobClaim(ctx, job)
	r.wantCode("a second claim", err, xapi.OtherOperationInProgress)
	r.must(r.JobReport(ctx, job, 0.5, "half"))
	if !r.JobAlive(rec.UUID) {
		t.Error("the job is not alive")
	}
	r.must(r.finish(ctx, job, Outcome{Output: "did it"}))
	r.must(r.finish(ctx, job, Outcome{Err: xapi.NewError(xapi.PatchApplyFailed)})) // repeated: nothing
	if err := <-done; err != nil || out != "did it" {
		t.Errorf("%q %v", out, err)
	}
	p := get[Patch](r, ClassPatch, patch)
	if _, hps := r.hostPatches(patch); len(hps) != 1 || !hps[0].Applied || hps[0].TimestampApplied.IsZero() || !p.PoolApplied {
		t.Errorf("%+v %+v", hps, p)
	}
	_, err = r.PatchApply(ctx, patch, r.Self)
	r.wantCode("apply again", err, xapi.PatchAlreadyApplied, string(patch))
	r.must(r.JobRequeue(ctx, job)) // done stays done
	r.must(r.JobCancel(ctx, job))
	if rec, _ = r.Job(job); rec.State != JobDone || rec.Cancel || r.JobAlive(rec.UUID) {
		t.Errorf("%+v", rec)
	}
	r.must(r.HostPatchDestroy(ctx, refs[0]))
	if p := get[Patch](r, ClassPatch, patch); p.PoolApplied {
		t.Error("pool_applied without a host_patch")
	}
	r.must(r.PatchDestroy(ctx, patch))
	r.wantTidy("at the end")
	r.must(r.CollectJobs(ctx))
	if r.count(ClassJob) != 1 {
		t.Error("a job that ended just now is gone")
	}
	r.Now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	r.must(r.CollectJobs(ctx))
	if r.count(ClassJob) != 0 {
		t.Error("an old job stays")
	}
	for _, err := range []error{r.finish(ctx, job, Outcome{}), r.JobReport(ctx, job, 1, ""), r.JobCancel(ctx, job), r.JobRequeue(ctx, job)} {
		if err != nil && !xapi.Is(err, xapi.HandleInvalid) {
			t.Error(err)
		}
	}
}

// What a host that is not there has not claimed ends without it; what it has
// claimed is its own to end.
func TestCancelWithoutTheHost(t *testing.T) {
	t.Parallel()
	r, _, patch, _ := patched(t)
	ctx := t.Context()
	there := true
	r.Connected = func(xapi.Ref) bool { return there }
	job, done := r.apply(patch, nil)
	there = false
	r.must(r.JobCancel(ctx, job))
	r.wantCode("cancelled", <-done, xapi.TaskCancelled)
	if _, err := r.JobClaim(ctx, job); err == nil {
		t.Error("it can be claimed")
	}
	if _, hps := r.hostPatches(patch); len(hps) != 0 {
		t.Errorf("%+v", hps)
	}

	there = true
	job, done = r.apply(patch, nil)
	if _, err := r.JobClaim(ctx, job); err != nil {
		t.Fatal(err)
	}
	there = false
	r.must(r.JobCancel(ctx, job))
	if rec, err := r.Job(job); err != nil || rec.State != JobClaimed || !rec.Cancel {
		t.Errorf("%+v %v", rec, err)
	}
	r.must(r.finish(ctx, job, Outcome{}))
	r.must(<-done)
}

func TestApplyFails(t *testing.T) {
	t.Parallel()
	r, h, patch, _ := patched(t)
	ctx := t.Context()
	job, done := r.apply(patch, nil)
	r.must(r.finish(ctx, job, Outcome{Err: xapi.NewError(xapi.PatchApplyFailed, "text")}))
	r.wantCode("apply", <-done, xapi.PatchApplyFailed, "text")
	if refs, _ := r.hostPatches(patch); len(refs) != 0 {
		t.Error("a host_patch of a failure stays")
	}
	unknown := func() {
		job, done := r.apply(patch, nil)
		_, err := r.JobClaim(ctx, job)
		r.must(err)
		r.must(r.finish(ctx, job, Outcome{Unknown: true, Err: xapi.NewError(xapi.PatchApplyFailed, "died")}))
		r.wantCode("apply", <-done, xapi.PatchApplyFailed)
		if _, hps := r.hostPatches(patch); len(hps) != 1 || hps[0].Applied || hps[0].OtherConfig[KeyState] != StateUnknown {
			t.Errorf("%+v", hps)
		}
	}
	unknown()
	unknown() // to apply again is to be asked
	r.must(r.PatchSettle(ctx, patch, r.Self, false))
	if refs, _ := r.hostPatches(patch); len(refs) != 0 {
		t.Error("settled as not applied, and there is a host_patch")
	}
	unknown()
	h.fail = errors.New("disk full")
	if err := r.PatchSettle(ctx, patch, r.Self, true); !errors.Is(err, h.fail) {
		t.Errorf("%v", err)
	}
	h.fail = nil
	r.must(r.PatchSettle(ctx, patch, r.Self, true))
	if _, hps := r.hostPatches(patch); len(hps) != 1 || !hps[0].Applied || hps[0].OtherConfig[KeyState] != "" {
		t.Errorf("%+v", hps)
	}
	if !slices.Equal(h.calls, []string{"unstamp", "stamp", "stamp"}) {
		t.Errorf("%v", h.calls)
	}
	_, err := r.PatchApply(ctx, "OpaqueRef:none", r.Self)
	r.wantCode("no patch", err, xapi.HandleInvalid)
	_, err = r.PatchPrecheck(ctx, patch, "OpaqueRef:none")
	r.wantCode("no host", err, xapi.HandleInvalid)
}

func TestCancelReachesTheJob(t *testing.T) {
	t.Parallel()
	r, _, patch, _ := patched(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	job, done := r.asked(func(context.Context) error {
		_, err := r.PatchPrecheck(ctx, patch, r.Self)
		return err
	})
	cancel(xapi.NewError(xapi.TaskCancelled, "task"))
	r.must(r.Store.Until(t.Context(), func(v *store.View) (bool, error) {
		rec, err := store.Get[Job](v, ClassJob, job)
		return rec.Cancel, err
	}))
	_, err := r.JobClaim(t.Context(), job)
	r.wantCode("a claim of what is cancelled", err, xapi.TaskCancelled)
	r.must(r.finish(t.Context(), job, Outcome{Err: xapi.NewError(xapi.TaskCancelled)}))
	r.wantCode("precheck", <-done, xapi.TaskCancelled, "task")
	if r.count(ClassHostPatch) != 0 {
		t.Error("a precheck makes a host_patch")
	}
}

// A caller that stops waiting leaves the job as it is.
func TestCallerGoes(t *testing.T) {
	t.Parallel()
	r, _, patch, _ := patched(t)
	ctx, cancel := context.WithCancel(t.Context())
	job, done := r.asked(func(context.Context) error {
		_, err := r.PatchApply(Resuming(ctx), patch, r.Self)
		return err
	})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	rec, err := r.Job(job)
	if err != nil || rec.Cancel || rec.State != JobQueued || !rec.Resumes {
		t.Errorf("%+v %v", rec, err)
	}
	_, err = r.JobClaim(t.Context(), job)
	r.must(err)
	r.must(r.JobRequeue(t.Context(), job))
	if n, err := r.JobClaim(t.Context(), job); n != 2 || err != nil {
		t.Error(n, err)
	}
	r.must(r.finish(t.Context(), job, Outcome{Output: "x"}))
	if out, err := r.JobResult(t.Context(), job); out != "x" || err != nil {
		t.Error(out, err)
	}
	byTask, err := r.TaskJobs()
	if err != nil || len(byTask) != 0 {
		t.Errorf("%v %v", byTask, err)
	}
}

func TestPoolApply(t *testing.T) {
	t.Parallel()
	r, _, patch, _ := patched(t)
	ctx := t.Context()
	poolApply := func(ctx context.Context) error { return r.PatchPoolApply(ctx, patch) }
	job, done := r.asked(poolApply)
	r.must(r.finish(ctx, job, Outcome{Err: xapi.NewError(xapi.PatchApplyFailed, "no")}))
	r.wantCode("pool_apply", <-done, xapi.PatchApplyFailed, "no")
	if _, runs, err := r.Runs(); err != nil || len(runs) != 1 || runs[0].State != RunStopped || runs[0].Counts[HostFailed] != 1 {
		t.Errorf("a run that failed: %+v %v", runs, err)
	}

	// The process stops; the job ends; the run is taken up and asks nobody twice.
	stop, cancel := context.WithCancel(ctx)
	job, done = r.asked(func(context.Context) error { return poolApply(stop) })
	cancel()
	<-done
	refs, runs, err := r.OpenRuns()
	if err != nil || len(runs) != 1 || runs[0].Patch != patch || runs[0].Total != 1 {
		t.Fatalf("%+v %v", runs, err)
	}
	r.must(r.finish(ctx, job, Outcome{}))
	r.must(r.ContinueRun(ctx, refs[0]))
	if jobs, _, _ := r.Jobs(r.Self); len(jobs) != 0 || r.count(ClassRun) != 2 || r.count(ClassJob) != 2 {
		t.Errorf("%v", jobs)
	}
	if p := get[Patch](r, ClassPatch, patch); !p.PoolApplied {
		t.Error("not applied to the pool")
	}
	r.must(r.PatchPoolApply(ctx, patch)) // nothing is left to do
	r.wantCode("a run that is gone", r.ContinueRun(ctx, "OpaqueRef:none"), xapi.HandleInvalid)
	r.must(r.ContinueRun(ctx, refs[0])) // one that has ended
	r.wantCode("no patch", r.PatchPoolApply(ctx, "OpaqueRef:none"), xapi.HandleInvalid)
}

func TestClassicFiles(t *testing.T) {
	t.Parallel()
	r, h, _, _ := patched(t)
	ctx := t.Context()
	r.must(os.MkdirAll(r.PatchDir, 0o755))
	name := "a.patch"
	r.must(os.WriteFile(filepath.Join(r.PatchDir, name), []byte("signed"), 0o600))
	id := xapi.NewUUID()
	h.files[name] = Patch{UUID: id, NameLabel: "classic", AfterApplyGuidance: []xapi.Guidance{}}
	for range 2 {
		r.must(r.ImportPatchDir(ctx))
	}
	patch, rec, err := r.PatchByUUID(id)
	if err != nil || rec.Filename != name || rec.VDI != xapi.NullRef {
		t.Fatalf("%+v %v", rec, err)
	}
	f, size, err := r.PatchFile(id)
	r.must(err)
	f.Close()
	if size != 6 {
		t.Error(size)
	}
	_, err = r.PatchImport(ctx, "/x/"+name)
	r.wantCode("import of what is there", err, xapi.PatchAlreadyExists, string(id))
	_, err = r.PatchImport(ctx, "/x/no-patch")
	r.wantCode("import of what is none", err, xapi.InvalidPatch)
	if !slices.Equal(h.calls, []string{"place", "unplace", "place", "unplace"}) {
		t.Errorf("%v", h.calls)
	}
	r.must(r.PatchCleanOnHost(ctx, patch, r.Self))
	_, _, err = r.PatchFile(id)
	r.wantCode("the file after clean", err, xapi.CannotFindPatch)
	r.must(r.PatchClean(ctx, patch))
	r.must(os.WriteFile(filepath.Join(r.PatchDir, name), []byte("signed"), 0o600))
	r.must(r.PatchPoolClean(ctx, patch))
	if _, err := os.Stat(filepath.Join(r.PatchDir, name)); err == nil {
		t.Error("pool_clean leaves the file")
	}
	// It takes the place of the cleaned one under its ref.
	again, err := r.PatchImport(ctx, "/x/"+name)
	if err != nil || again != patch {
		t.Errorf("%s, then %s: %v", patch, again, err)
	}
	r.must(r.PatchDestroy(ctx, patch))
	for what, err := range map[string]error{
		"clean": r.PatchClean(ctx, patch), "clean_on_host": r.PatchCleanOnHost(ctx, patch, r.Self),
		"pool_clean": r.PatchPoolClean(ctx, patch), "destroy": r.PatchDestroy(ctx, patch),
	} {
		r.wantCode(what+" of what is gone", err, xapi.HandleInvalid)
	}
	_, _, err = r.PatchFile(id)
	r.wantCode("the file of what is gone", err, xapi.UUIDInvalid)
}

func TestResync(t *testing.T) {
	t.Parallel()
	r, _, patch, _ := patched(t)
	ctx := t.Context()
	rec := get[Patch](r, ClassPatch, patch)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	other := xapi.NewUUID()
	stamps := []Stamp{
		{Patch: Patch{UUID: rec.UUID}, Applied: at},
		{Patch: Patch{UUID: other, NameLabel: "rolled up", AfterApplyGuidance: []xapi.Guidance{"restartHVM", "restartPV"}}, Applied: at},
		{Patch: Patch{UUID: xapi.NewUUID()}, Garbled: true},
	}
	for range 2 {
		r.must(r.Resync(ctx, r.Self, stamps))
	}
	_, hps := r.hostPatches(patch)
	if len(hps) != 1 || !hps[0].Applied || !hps[0].TimestampApplied.Equal(at) || !get[Patch](r, ClassPatch, patch).PoolApplied {
		t.Errorf("%+v", hps)
	}
	ref, _, err := r.PatchByUUID(other)
	r.must(err)
	if _, hps := r.hostPatches(ref); len(hps) != 1 || hps[0].OtherConfig[KeyGuidance] != "restartHVM restartPV" {
		t.Errorf("%+v", hps)
	}
	if n := r.count(ClassPatch); n != 2 {
		t.Errorf("%d patches", n)
	}
	stamps[0].Garbled = true
	r.must(r.Resync(ctx, r.Self, stamps))
	if _, hps := r.hostPatches(patch); len(hps) != 1 {
		t.Error("garbage takes a record away")
	}
	r.must(r.Resync(ctx, r.Self, nil))
	if n := r.count(ClassHostPatch); n != 0 || get[Patch](r, ClassPatch, patch).PoolApplied {
		t.Errorf("%d host_patches without a stampfile", n)
	}
	// An apply in progress is left alone, and a stampfile settles what is unknown.
	r.must(r.Resync(ctx, r.Self, manyStamps(70)))
	r.must(r.Resync(ctx, r.Self, nil))
	if n := r.count(ClassHostPatch); n != 0 {
		t.Errorf("%d host_patches of many are left", n)
	}
	job, done := r.apply(patch, nil)
	r.must(r.Resync(ctx, r.Self, nil))
	if n := r.count(ClassHostPatch); n != 1 {
		t.Error("the host_patch of an apply in progress is gone")
	}
	r.must(r.finish(ctx, job, Outcome{Unknown: true, Err: xapi.NewError(xapi.PatchApplyFailed)}))
	<-done
	r.must(r.Resync(ctx, r.Self, nil))
	r.must(r.Resync(ctx, r.Self, []Stamp{{Patch: Patch{UUID: rec.UUID}, Applied: at}}))
	if _, hps := r.hostPatches(patch); len(hps) != 1 || !hps[0].Applied || hps[0].OtherConfig[KeyState] != "" {
		t.Errorf("%+v", hps)
	}
}

func manyStamps(n int) (stamps []Stamp) {
	for range n {
		stamps = append(stamps, Stamp{Patch: Patch{UUID: xapi.NewUUID(), AfterApplyGuidance: []xapi.Guidance{}}, Applied: time.Now()})
	}
	return stamps
}

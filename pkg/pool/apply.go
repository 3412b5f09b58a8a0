package pool

import (
	"context"
	"fmt"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// ClassRun is the class of Run records, never on the wire.
const ClassRun = "run"

// Run is one pool_apply: the hosts it still has to see to. It is a record so
// that it goes on after this process dies.
type Run struct {
	UUID  xapi.UUID  `json:"uuid"`
	Patch xapi.Ref   `json:"patch"`
	Task  xapi.Ref   `json:"task,omitempty"`
	Hosts []xapi.Ref `json:"hosts"` // in the order they are patched
}

// PatchPrecheck runs the patch's precheck on host and gives what it printed.
// Codes: HANDLE_INVALID, CANNOT_FIND_PATCH, CANNOT_FETCH_PATCH, INVALID_PATCH,
// INVALID_PATCH_WITH_LOG, OUT_OF_SPACE, PATCH_PRECHECK_FAILED_*, TASK_CANCELLED.
func (p *Pool) PatchPrecheck(ctx context.Context, patch, host xapi.Ref) (string, error) {
	var ref xapi.Ref
	err := p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		ref, err = p.newJob(ctx, tx, Job{Kind: JobPrecheck, Patch: patch, Host: host})
		return err
	})
	if err != nil {
		return "", err
	}
	return p.JobResult(ctx, ref)
}

// PatchApply applies the patch to host and gives what it printed. One
// transaction checks that the host neither has it nor is getting it, and
// begins. Codes: those of PatchPrecheck, PATCH_ALREADY_APPLIED [patch],
// OTHER_OPERATION_IN_PROGRESS ["Pool_patch", patch, text], PATCH_APPLY_FAILED,
// PATCH_APPLY_FAILED_BACKUP_FILES_EXIST.
func (p *Pool) PatchApply(ctx context.Context, patch, host xapi.Ref) (string, error) {
	var ref xapi.Ref
	err := p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		ref, err = p.beginApply(ctx, tx, patch, host, "")
		return err
	})
	if err != nil {
		return "", err
	}
	return p.JobResult(ctx, ref)
}

// JobResult waits for a job to end and gives its output or its failure. The
// task of ctx shows how it gets on; when that is cancelled, so is the job.
func (p *Pool) JobResult(ctx context.Context, ref xapi.Ref) (string, error) {
	job, err := p.waitJob(ctx, ref)
	if err != nil {
		return "", err
	}
	return job.Output, job.Err()
}

type resumesKey struct{}

// Resuming marks a call that nobody waits for on a connection: what it began
// and could not start goes on after a restart. Calls without the mark are
// undone then.
func Resuming(ctx context.Context) context.Context {
	return context.WithValue(ctx, resumesKey{}, true)
}

func resumes(ctx context.Context) bool {
	on, _ := ctx.Value(resumesKey{}).(bool)
	return on
}

// newJob checks the refs and puts a queued job; the fields of j that are set
// are kept.
func (p *Pool) newJob(ctx context.Context, tx *store.Tx, j Job) (xapi.Ref, error) {
	if !tx.Has(ClassHost, j.Host) {
		return "", xapi.NewError(xapi.HandleInvalid, ClassHost, string(j.Host))
	}
	if j.Kind != JobCall {
		var patch Patch
		if err := tx.Get(ClassPatch, j.Patch, &patch); err != nil {
			return "", err
		}
		if err := patch.assertConfirmed(j.Patch); err != nil {
			return "", err
		}
		if tx.Has(ClassVDI, patch.VDI) {
			j.VDI = patch.VDI
		}
	}
	t := task.FromContext(ctx)
	j.UUID, j.State, j.Created = xapi.NewUUID(), JobQueued, p.Now()
	j.Task, j.Resumes = t.Ref(), resumes(ctx)
	ref := xapi.NewRef()
	tx.Put(ClassJob, ref, j)
	return ref, nil
}

// beginApply writes the host_patch that says "in progress" and the job. run is
// the uuid of the Run it is part of, or "".
func (p *Pool) beginApply(ctx context.Context, tx *store.Tx, patch, host xapi.Ref, run xapi.UUID) (xapi.Ref, error) {
	if !tx.Has(ClassPatch, patch) {
		return "", xapi.NewError(xapi.HandleInvalid, ClassPatch, string(patch))
	}
	if err := p.assertNotApplied(tx, patch, host); err != nil {
		return "", err
	}
	hp := xapi.NewRef()
	tx.Put(ClassHostPatch, hp, HostPatch{
		UUID: xapi.NewUUID(), Host: host, PoolPatch: patch, OtherConfig: map[string]string{},
	})
	return p.newJob(ctx, tx, Job{Kind: JobApply, Patch: patch, Host: host, HostPatch: hp, Run: run})
}

// assertNotApplied refuses when host has patch or is getting it. What is left
// of an apply whose end is unknown is cleared: to apply again is to be asked.
func (p *Pool) assertNotApplied(tx *store.Tx, patch, host xapi.Ref) error {
	for _, ref := range tx.Refs(ClassHostPatch, "pool_patch", string(patch)) {
		var hp HostPatch
		if err := tx.Get(ClassHostPatch, ref, &hp); err != nil {
			return err
		}
		switch {
		case hp.Host != host:
		case hp.Applied:
			return xapi.NewError(xapi.PatchAlreadyApplied, string(patch))
		case hp.OtherConfig[KeyState] == StateUnknown:
			tx.Delete(ClassHostPatch, ref)
		default:
			return p.inProgress(tx, patch, host)
		}
	}
	return nil
}

func (p *Pool) inProgress(tx *store.Tx, patch, host xapi.Ref) error {
	var h Host
	if err := tx.Get(ClassHost, host, &h); err != nil {
		return err
	}
	return xapi.NewError(xapi.OtherOperationInProgress, "Pool_patch", string(patch),
		fmt.Sprintf("the patch is being applied to host %s (%s)", h.NameLabel, h.UUID))
}

// PatchPoolApply applies the patch to every host that lacks it, one after
// another, and stops at the first that fails. Hosts that have it are passed
// over. It marks the patch as applied to the pool also when nothing was left
// to do. Codes: those of PatchApply.
func (p *Pool) PatchPoolApply(ctx context.Context, patch xapi.Ref) error {
	ref := xapi.NewRef()
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		run := Run{UUID: xapi.NewUUID(), Patch: patch, Task: task.FromContext(ctx).Ref()}
		var err error
		if run.Hosts, err = p.hostsLacking(tx, patch); err != nil {
			return err
		}
		tx.Put(ClassRun, ref, run)
		return nil
	})
	if err != nil {
		return err
	}
	return p.ContinueRun(ctx, ref)
}

// hostsLacking lists the hosts without the patch, in database order. It
// refuses when a host is getting it.
func (p *Pool) hostsLacking(tx *store.Tx, patch xapi.Ref) ([]xapi.Ref, error) {
	if !tx.Has(ClassPatch, patch) {
		return nil, xapi.NewError(xapi.HandleInvalid, ClassPatch, string(patch))
	}
	hosts := []xapi.Ref{}
	for _, it := range tx.List(ClassHost) {
		switch err := p.assertNotApplied(tx, patch, it.Ref); {
		case err == nil:
			hosts = append(hosts, it.Ref)
		case !xapi.Is(err, xapi.PatchAlreadyApplied):
			return nil, err
		}
	}
	return hosts, nil
}

// ContinueRun carries a run to its end: for each of its hosts it begins an
// apply, or joins the one it had begun before it was interrupted. The record
// goes when the run ends, but stays when this process is told to stop.
func (p *Pool) ContinueRun(ctx context.Context, ref xapi.Ref) error {
	var run Run
	err := p.Store.View(func(v *store.View) (err error) {
		run, err = store.Get[Run](v, ClassRun, ref)
		return err
	})
	if err != nil {
		return err
	}
	err = p.runHosts(ctx, run)
	if ctx.Err() != nil && !xapi.Is(context.Cause(ctx), xapi.TaskCancelled) {
		return err
	}
	end := p.Store.Update(context.WithoutCancel(ctx), func(tx *store.Tx) error {
		tx.Delete(ClassRun, ref)
		if err != nil || !tx.Has(ClassPatch, run.Patch) {
			return nil
		}
		return p.refreshPoolApplied(tx, run.Patch, "")
	})
	if err != nil {
		return err
	}
	return end
}

func (p *Pool) runHosts(ctx context.Context, run Run) error {
	for _, host := range run.Hosts {
		var job xapi.Ref
		err := p.Store.Update(ctx, func(tx *store.Tx) (err error) {
			if job = p.jobOfRun(tx, run, host); job != "" {
				return nil
			}
			job, err = p.beginApply(ctx, tx, run.Patch, host, run.UUID)
			return err
		})
		if xapi.Is(err, xapi.PatchAlreadyApplied) {
			continue
		}
		if err != nil {
			return err
		}
		if _, err := p.JobResult(ctx, job); err != nil {
			return err
		}
	}
	return nil
}

// jobOfRun finds the apply that this run began on host, also one that has ended
// while this process was down: a run asks a host once.
func (p *Pool) jobOfRun(tx *store.Tx, run Run, host xapi.Ref) xapi.Ref {
	for _, ref := range tx.Refs(ClassJob, "patch", string(run.Patch)) {
		var job Job
		if tx.Get(ClassJob, ref, &job) == nil && job.Run == run.UUID && job.Host == host {
			return ref
		}
	}
	return ""
}

// PatchSettle says how an apply ended whose outcome is unknown, and makes the
// host's stampfile say the same. Codes: HANDLE_INVALID, OPERATION_NOT_ALLOWED
// when the outcome is known.
func (p *Pool) PatchSettle(ctx context.Context, patch, host xapi.Ref, applied bool) error {
	rec, err := p.patch(patch)
	if err != nil {
		return err
	}
	if err := p.assertUnknown(patch, host); err != nil {
		return err
	}
	if host == p.Self {
		// First the host's own memory: a crash in between is mended by Resync.
		if err := p.Local.Settle(rec, applied); err != nil {
			return err
		}
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error { return p.settle(tx, patch, host, applied) })
}

var errKnown = xapi.NewError(xapi.OperationNotAllowed, "the outcome of this patch on this host is not unknown")

func (p *Pool) assertUnknown(patch, host xapi.Ref) error {
	return p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassHostPatch, "pool_patch", string(patch)) {
			hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
			if err != nil {
				return err
			}
			if hp.Host == host && hp.OtherConfig[KeyState] == StateUnknown {
				return nil
			}
		}
		return errKnown
	})
}

func (p *Pool) settle(tx *store.Tx, patch, host xapi.Ref, applied bool) error {
	for _, ref := range tx.Refs(ClassHostPatch, "pool_patch", string(patch)) {
		var hp HostPatch
		if err := tx.Get(ClassHostPatch, ref, &hp); err != nil {
			return err
		}
		if hp.Host != host || hp.OtherConfig[KeyState] != StateUnknown {
			continue
		}
		if !applied {
			tx.Delete(ClassHostPatch, ref)
			return nil
		}
		delete(hp.OtherConfig, KeyState)
		hp.Applied, hp.TimestampApplied = true, p.Now()
		tx.Put(ClassHostPatch, ref, hp)
		return p.refreshPoolApplied(tx, patch, ref)
	}
	return errKnown
}

// OpenRuns lists the runs that were begun and have not ended.
func (p *Pool) OpenRuns() (refs []xapi.Ref, runs []Run, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassRun) {
			var run Run
			if err := it.Decode(&run); err != nil {
				return err
			}
			refs, runs = append(refs, it.Ref), append(runs, run)
		}
		return nil
	})
	return refs, runs, err
}

package pool

import (
	"context"
	"fmt"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

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
	if job.Kind == JobApply && job.Err() == nil {
		if err := p.settlePoolApplied(ctx, job.Patch); err != nil {
			return "", err
		}
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
	for _, ref := range hostPatchesOf(tx, patch, host) {
		var hp HostPatch
		if err := tx.Get(ClassHostPatch, ref, &hp); err != nil {
			return err
		}
		switch {
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

// hostPatchesOf gives the host_patches of one patch on one host: one, or none.
func hostPatchesOf(tx *store.Tx, patch, host xapi.Ref) []xapi.Ref {
	return tx.RefsBoth(ClassHostPatch, [2]string{"host", string(host)}, [2]string{"pool_patch", string(patch)})
}

func (p *Pool) inProgress(tx *store.Tx, patch, host xapi.Ref) error {
	var h Host
	if err := tx.Get(ClassHost, host, &h); err != nil {
		return err
	}
	return xapi.NewError(xapi.OtherOperationInProgress, "Pool_patch", string(patch),
		fmt.Sprintf("the patch is being applied to host %s (%s)", h.NameLabel, h.UUID))
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
	err = p.Store.Update(ctx, func(tx *store.Tx) error { return p.settle(tx, patch, host, applied) })
	if err != nil {
		return err
	}
	return p.settlePoolApplied(ctx, patch)
}

var errKnown = xapi.NewError(xapi.OperationNotAllowed, "the outcome of this patch on this host is not unknown")

func (p *Pool) assertUnknown(patch, host xapi.Ref) error {
	return p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassHostPatch, "host", string(host)) {
			hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
			if err != nil {
				return err
			}
			if hp.PoolPatch == patch && hp.OtherConfig[KeyState] == StateUnknown {
				return nil
			}
		}
		return errKnown
	})
}

func (p *Pool) settle(tx *store.Tx, patch, host xapi.Ref, applied bool) error {
	for _, ref := range hostPatchesOf(tx, patch, host) {
		var hp HostPatch
		if err := tx.Get(ClassHostPatch, ref, &hp); err != nil {
			return err
		}
		if hp.OtherConfig[KeyState] != StateUnknown {
			continue
		}
		if !applied {
			tx.Delete(ClassHostPatch, ref)
			return nil
		}
		delete(hp.OtherConfig, KeyState)
		hp.Applied, hp.TimestampApplied = true, p.Now()
		tx.Put(ClassHostPatch, ref, hp)
		return nil
	}
	return errKnown
}

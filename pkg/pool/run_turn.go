package pool

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// turnRun puts an open run into a state. Code: OPERATION_NOT_ALLOWED when it has
// ended, or goes to its end and cannot be turned.
func (p *Pool) turnRun(ctx context.Context, ref xapi.Ref, to RunState, why, by string) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		run, err := store.Read[Run](tx, ClassRun, ref)
		if err != nil || run.State == to {
			return err
		}
		if run.State.Ended() {
			return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("run %s has ended: %s", run.UUID, run.State))
		}
		if to != RunCancelling && run.State != RunRunning && run.State != RunPaused {
			return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("run %s is %s", run.UUID, run.State))
		}
		run.State, run.Since, run.Reason, run.By = to, p.Now(), why, by
		tx.Put(ClassRun, ref, run)
		return nil
	})
}

// RunPause lets a run begin nothing more; what is at work goes on to its end. by is
// who asked. Codes: UUID_INVALID, OPERATION_NOT_ALLOWED.
func (p *Pool) RunPause(ctx context.Context, id xapi.UUID, by string) error {
	ref, _, err := p.runByUUID(id)
	if err != nil {
		return err
	}
	why := "paused"
	if by != "" {
		why += " by " + by
	}
	return p.turnRun(ctx, ref, RunPaused, why, by)
}

// RunResume lets a paused run go on. Codes: UUID_INVALID, OPERATION_NOT_ALLOWED.
func (p *Pool) RunResume(ctx context.Context, id xapi.UUID) error {
	ref, _, err := p.runByUUID(id)
	if err != nil {
		return err
	}
	return p.turnRun(ctx, ref, RunRunning, "", "")
}

// RunCancel cancels what a run has at work, and begins nothing more. Codes:
// UUID_INVALID, OPERATION_NOT_ALLOWED.
func (p *Pool) RunCancel(ctx context.Context, id xapi.UUID, by string) error {
	ref, _, err := p.runByUUID(id)
	if err != nil {
		return err
	}
	why := "cancelled"
	if by != "" {
		why += " by " + by
	}
	return p.turnRun(ctx, ref, RunCancelling, why, by)
}

// RunRetry takes a run up again that has ended: the hosts that failed, were away or
// cancelled, and those that never had their turn. With hosts, refs or uuids, only
// those; one whose outcome is unknown only when it is named, since its patch may run
// a second time. Codes: UUID_INVALID, HANDLE_INVALID, OPERATION_NOT_ALLOWED,
// OTHER_OPERATION_IN_PROGRESS, those of Pool.Confirmed.
func (p *Pool) RunRetry(ctx context.Context, id xapi.UUID, hosts []xapi.Ref) error {
	ref, run, err := p.runByUUID(id)
	if err != nil {
		return err
	}
	if p.Confirmed != nil {
		if err := p.Confirmed(run.Patch); err != nil {
			return err
		}
	}
	_, err = p.inTask(ctx, func(t xapi.Ref) (xapi.Ref, xapi.UUID, error) {
		return ref, id, p.reopen(ctx, ref, t, hosts)
	})
	return err
}

// reopen puts hosts of an ended run back to the beginning, then the run. After a
// crash in between they are hosts that never had their turn.
func (p *Pool) reopen(ctx context.Context, ref, t xapi.Ref, names []xapi.Ref) error {
	p.runs.making.Lock()
	defer p.runs.making.Unlock()
	var run Run
	var refs []xapi.Ref
	var hosts []RunHost
	err := p.Store.View(func(v *store.View) (err error) {
		if run, err = store.Get[Run](v, ClassRun, ref); err != nil {
			return err
		}
		if !run.State.Ended() {
			return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("run %s has not ended: it is %s", run.UUID, run.State))
		}
		if refs, hosts, err = runHosts(v, run.UUID); err != nil {
			return err
		}
		named, err := refsOfHosts(v, names)
		if err != nil {
			return err
		}
		refs, hosts, err = run.again(refs, hosts, named)
		if err != nil {
			return err
		}
		return assertFree(v, run, hostsOf(hosts))
	})
	if err != nil {
		return err
	}
	for len(refs) > 0 {
		n := min(setBatch, len(refs))
		err := p.Store.Update(ctx, func(tx *store.Tx) error {
			for i, h := range hosts[:n] {
				h.Job, h.Error, h.Proof = "", nil, nil
				tx.Put(ClassRunHost, refs[i], h.in(HostWaiting, p.Now(), "it waits for its turn, once more"))
			}
			return nil
		})
		if err != nil {
			return err
		}
		refs, hosts = refs[n:], hosts[n:]
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		run, err := store.Read[Run](tx, ClassRun, ref)
		if err != nil {
			return err
		}
		run.State, run.Since, run.Reason, run.By, run.Task = RunRunning, p.Now(), "", "", t
		run.Begun = run.Since
		run.Finished, run.Counts = time.Time{}, nil
		tx.Put(ClassRun, ref, run)
		return nil
	})
}

// again picks the hosts that a retry begins anew.
func (r Run) again(refs []xapi.Ref, hosts []RunHost, named map[xapi.Ref]bool) (picked []xapi.Ref, back []RunHost, err error) {
	retried := []HostState{HostFailed, HostAway, HostCancelled, HostSkipped}
	found := 0
	for i, h := range hosts {
		state, _ := h.Shown(r)
		if named[h.Host] {
			found++
		}
		switch {
		case h.Wave < 0, state == HostApplied, state == HostHad:
		case len(named) > 0 && !named[h.Host], state == HostUnknown && !named[h.Host], !slices.Contains(retried, state) && state != HostUnknown:
		default:
			picked, back = append(picked, refs[i]), append(back, h)
		}
	}
	if found < len(named) {
		return nil, nil, xapi.NewError(xapi.OperationNotAllowed, "a host that was named is not in the run")
	}
	if len(picked) == 0 {
		return nil, nil, xapi.NewError(xapi.OperationNotAllowed, "there is no host to try again; one whose outcome is unknown must be named")
	}
	return picked, back, nil
}

func hostsOf(hosts []RunHost) (refs []xapi.Ref) {
	for _, h := range hosts {
		refs = append(refs, h.Host)
	}
	return refs
}

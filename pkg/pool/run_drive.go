package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// runsInHand are the runs that this process drives, and the right to make one:
// whoever makes a run or takes one up again looks at all others first.
type runsInHand struct {
	making sync.Mutex

	mu   sync.Mutex
	driv map[xapi.Ref]bool
}

func (r *runsInHand) take(ref xapi.Ref) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.driv[ref] {
		return false
	}
	if r.driv == nil {
		r.driv = map[xapi.Ref]bool{}
	}
	r.driv[ref] = true
	return true
}

func (r *runsInHand) give(ref xapi.Ref) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.driv, ref)
}

// ContinueRun carries a run to its end: it takes up the jobs that were begun before
// it was interrupted, and never begins one twice. When this process is told to stop
// the run stays open; when the task of ctx is cancelled, so is the run. The error is
// that of the first host that failed when the run has stopped there. A run that was
// interrupted while it was written down is undone: OPERATION_NOT_ALLOWED.
func (p *Pool) ContinueRun(ctx context.Context, ref xapi.Ref) error {
	var run Run
	err := p.Store.View(func(v *store.View) (err error) {
		run, err = store.Get[Run](v, ClassRun, ref)
		return err
	})
	switch {
	case err != nil:
		return err
	case run.State == RunPreparing:
		if err := p.dropRun(ctx, ref, run.UUID); err != nil {
			return err
		}
		return xapi.NewError(xapi.OperationNotAllowed, "the run was interrupted before it began: nothing was done")
	case run.State.Ended():
		return p.runResult(ref)
	}
	if !p.runs.take(ref) {
		return p.awaitRun(ctx, ref)
	}
	defer p.runs.give(ref)
	d := &driver{pool: p, ref: ref, task: task.FromContext(ctx)}
	err = d.loop(ctx)
	if cause := context.Cause(ctx); err != nil && ctx.Err() != nil && xapi.Is(cause, xapi.TaskCancelled) {
		end, stop := context.WithTimeout(context.WithoutCancel(ctx), 2*cancelWait)
		defer stop()
		if err := p.turnRun(end, ref, RunCancelling, "its task was cancelled", ""); err != nil {
			return errors.Join(cause, err)
		}
		if err = d.loop(end); err != nil {
			return errors.Join(cause, err)
		}
	}
	if err != nil {
		return err
	}
	if err := p.settlePoolApplied(context.WithoutCancel(ctx), d.run.Patch); err != nil {
		return err
	}
	return p.runResult(ref)
}

// awaitRun waits for a run that is driven by somebody else.
func (p *Pool) awaitRun(ctx context.Context, ref xapi.Ref) error {
	err := p.Store.Until(ctx, func(v *store.View) (bool, error) {
		run, err := store.Get[Run](v, ClassRun, ref)
		return run.State.Ended(), err
	})
	if err != nil {
		return err
	}
	return p.runResult(ref)
}

// runResult is the outcome of a run that has ended.
func (p *Pool) runResult(ref xapi.Ref) error {
	var run Run
	var hosts []RunHost
	err := p.Store.View(func(v *store.View) (err error) {
		if run, err = store.Get[Run](v, ClassRun, ref); err == nil && run.State == RunStopped {
			_, hosts, err = runHosts(v, run.UUID)
		}
		return err
	})
	if err != nil || run.State == RunDone {
		return err
	}
	if run.State == RunCancelled {
		return xapi.NewError(xapi.TaskCancelled, string(run.Task.OrNull()))
	}
	var first *RunHost
	for i := range hosts {
		if hosts[i].State.bad() && (first == nil || hosts[i].Since.Before(first.Since)) {
			first = &hosts[i]
		}
	}
	if first == nil || len(first.Error) == 0 {
		return xapi.NewError(xapi.OperationNotAllowed, "the run stopped: "+run.Reason)
	}
	return xapi.NewError(first.Error[0], first.Error[1:]...)
}

// driver does what Run.next says, for one run.
type driver struct {
	pool *Pool
	ref  xapi.Ref
	task *task.Handle

	view  *store.View
	run   Run
	refs  []xapi.Ref // of hosts
	hosts []RunHost
	known map[xapi.Ref]int // the hosts by their ref
	jobs  map[xapi.Ref]int // the hosts by the job they have
	tail  string           // the last output of a job
}

// driveRetry is how long a run waits after the database has failed.
const driveRetry = time.Second

// loop works until the run has ended or ctx has.
func (d *driver) loop(ctx context.Context) error {
	d.view = nil
	for {
		err := d.turn(ctx)
		switch {
		case err == nil && d.run.State.Ended():
			return nil
		case err == nil:
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, store.ErrDeposed), errors.Is(err, store.ErrClosed), xapi.Is(err, xapi.HandleInvalid):
			return err
		default:
			d.pool.Log.WithError(err).WithField("run", d.run.UUID).Error("a run could not go on; it is tried again")
			d.view = nil
			t := time.NewTimer(driveRetry)
			select {
			case <-t.C:
			case <-ctx.Done():
			}
			t.Stop()
		}
	}
}

// turn does what is to be done now, or waits until something is.
func (d *driver) turn(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := d.pool.Store.View(func(v *store.View) error { _, err := d.look(v); return err }); err != nil {
		return err
	}
	steps, wake := d.run.next(d.hosts, d.facts, d.pool.Now())
	d.tell()
	if d.run.State.Ended() {
		return nil
	}
	if len(steps) > 0 {
		return d.do(ctx, steps)
	}
	return d.wait(ctx, wake)
}

// wait returns when something about the run has changed, or at wake.
func (d *driver) wait(ctx context.Context, wake time.Time) error {
	within, stop := ctx, context.CancelFunc(func() {})
	if !wake.IsZero() {
		within, stop = context.WithTimeout(ctx, max(wake.Sub(d.pool.Now()), time.Millisecond))
	}
	defer stop()
	err := d.pool.Store.Until(within, d.look)
	if within.Err() != nil && ctx.Err() == nil {
		return nil
	}
	return err
}

// look takes over what a newer view shows and tells whether it matters.
func (d *driver) look(v *store.View) (matters bool, err error) {
	if d.view == nil {
		return true, d.load(v)
	}
	changes, ok := v.Since(d.view.Revision())
	if !ok || d.view.StoreID() != v.StoreID() {
		return true, d.load(v)
	}
	d.view = v
	for _, c := range changes {
		switch c.Class {
		case ClassRun:
			if c.Ref == d.ref {
				matters = true
				if d.run, err = store.Get[Run](v, ClassRun, d.ref); err != nil {
					return true, err
				}
			}
		case ClassHost:
			_, ours := d.known[c.Ref]
			matters = matters || ours
		case ClassJob:
			if _, ours := d.jobs[c.Ref]; ours {
				matters = d.watch(c) || matters
			}
		}
	}
	return matters, nil
}

// watch takes over the change of a job of the run. That it gets on is only shown.
func (d *driver) watch(c store.Change) (matters bool) {
	var job Job
	if c.Op == store.Del || c.Item.Decode(&job) != nil {
		return true
	}
	if job.Tail != "" {
		d.tail = job.Tail
	}
	if job.State == JobDone {
		if job.Err() != nil && job.Output != "" {
			d.tail = job.Output
		}
		return true
	}
	if d.run.Policy.AtOnce == 1 && d.task != nil {
		d.show(job.Progress)
	}
	return false
}

// load reads everything anew.
func (d *driver) load(v *store.View) (err error) {
	if d.run, err = store.Get[Run](v, ClassRun, d.ref); err != nil {
		return err
	}
	if d.refs, d.hosts, err = runHosts(v, d.run.UUID); err != nil {
		return err
	}
	d.view, d.known, d.jobs = v, map[xapi.Ref]int{}, map[xapi.Ref]int{}
	for i, h := range d.hosts {
		d.known[h.Host] = i
		if h.State.atWork() {
			d.jobs[h.Job] = i
		}
	}
	return nil
}

// facts is what the newest view and the links say of a host.
func (d *driver) facts(i int) (f hostFacts) {
	h := d.hosts[i]
	rec, err := store.Get[Host](d.view, ClassHost, h.Host)
	f.Gone, f.Away = err != nil, rec.Away
	if h.Host == d.pool.Self {
		f.Away = time.Time{}
	} else if f.Away.IsZero() && d.pool.Connected != nil {
		f.Limbo = !d.pool.Connected(h.Host)
	}
	if h.State.atWork() {
		if job, err := store.Get[Job](d.view, ClassJob, h.Job); err == nil {
			f.Job = &job
			return f
		}
	}
	hp, _, there := hostPatchOf(d.view, d.run.Patch, h.Host)
	f.Has = there && hp.Applied
	return f
}

// hostPatchOf gives the host_patch of one patch on one host.
func hostPatchOf(v *store.View, patch, host xapi.Ref) (hp HostPatch, ref xapi.Ref, there bool) {
	for _, ref := range v.Refs(ClassHostPatch, "host", string(host)) {
		hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
		if err == nil && hp.PoolPatch == patch {
			return hp, ref, true
		}
	}
	return HostPatch{}, "", false
}

// tell shows in the task how the run gets on.
func (d *driver) tell() {
	if d.task == nil {
		return
	}
	d.show(0)
	if d.run.Classic {
		if d.tail != "" {
			d.task.Output(d.tail)
		}
		return
	}
	d.task.Output(summary(d.run, d.hosts))
}

// show puts done / total into the task; part is of the one host at work.
func (d *driver) show(part float64) {
	if len(d.hosts) == 0 {
		return
	}
	if d.run.Classic && d.tail != "" {
		d.task.Output(d.tail)
	}
	d.task.Progress((float64(countOf(d.hosts).final) + part) / float64(len(d.hosts)))
}

// summary is the state of a run in one line.
func summary(run Run, hosts []RunHost) string {
	n := countOf(hosts)
	s := fmt.Sprintf("%s: %d of %s done, %d at work", run.State, n.final, plural(n.all, "host"), n.working)
	if w := currentWave(hosts); w >= 0 && w < len(run.Waves) {
		s += ", " + run.Waves[w]
	}
	if run.Reason != "" {
		s += "; " + run.Reason
	}
	return s
}

// How many hosts one transaction writes, and to how many it gives a job, which
// takes several records each: see store.MaxOps.
const (
	setBatch   = 100
	startBatch = 16
)

// do carries the steps out. Those of one kind go together.
func (d *driver) do(ctx context.Context, steps []runStep) error {
	var sets, starts []runStep
	for _, s := range steps {
		var err error
		switch s.kind {
		case stepSet:
			sets = append(sets, s)
		case stepStart:
			starts = append(starts, s)
		case stepCancel:
			err = d.pool.JobCancel(ctx, d.hosts[s.host].Job)
		case stepWithdraw:
			err = d.pool.withdrawJob(ctx, d.hosts[s.host].Job, xapi.NewError(xapi.HostOffline, string(d.hosts[s.host].Host), s.why))
		case stepState:
			err = d.enter(ctx, s.state, s.why)
		}
		if err != nil {
			return err
		}
	}
	for ; len(sets) > 0; sets = sets[min(setBatch, len(sets)):] {
		if err := d.set(ctx, sets[:min(setBatch, len(sets))]); err != nil {
			return err
		}
	}
	for ; len(starts) > 0; starts = starts[min(startBatch, len(starts)):] {
		if err := d.start(ctx, starts[:min(startBatch, len(starts))]); err != nil {
			return err
		}
	}
	return nil
}

// set writes new states of hosts.
func (d *driver) set(ctx context.Context, steps []runStep) error {
	err := d.pool.Store.Update(ctx, func(tx *store.Tx) error {
		for _, s := range steps {
			tx.Put(ClassRunHost, d.refs[s.host], s.to)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, s := range steps {
		d.take(s.host, s.to)
	}
	return nil
}

// take puts a written state into memory.
func (d *driver) take(i int, h RunHost) {
	delete(d.jobs, d.hosts[i].Job)
	d.hosts[i] = h
	if h.State.atWork() {
		d.jobs[h.Job] = i
	}
}

// start gives hosts their jobs, in the transaction that writes down which: a run
// that was paused or cancelled meanwhile begins nothing.
func (d *driver) start(ctx context.Context, steps []runStep) error {
	var begun []RunHost
	with := ctx
	if !d.run.Classic {
		with = Resuming(ctx)
	}
	err := d.pool.Store.Update(ctx, func(tx *store.Tx) error {
		begun = nil
		run, err := store.Read[Run](tx, ClassRun, d.ref)
		if err != nil || run.State != RunRunning {
			return err
		}
		for _, s := range steps {
			h, err := d.startOne(with, tx, s.to)
			if err != nil {
				return err
			}
			tx.Put(ClassRunHost, d.refs[s.host], h)
			begun = append(begun, h)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, h := range begun {
		d.take(steps[i].host, h)
	}
	return nil
}

// startOne makes the job of a host. What keeps it from being made is the host's end.
func (d *driver) startOne(ctx context.Context, tx *store.Tx, h RunHost) (RunHost, error) {
	var err error
	if h.State == HostApplying {
		h.Job, err = d.pool.beginApply(ctx, tx, d.run.Patch, h.Host, d.run.UUID)
	} else {
		h.Job, err = d.pool.newJob(ctx, tx, Job{Kind: JobPrecheck, Patch: d.run.Patch, Host: h.Host, Run: d.run.UUID})
	}
	var known *xapi.Error
	switch {
	case err == nil:
		return h, nil
	case !errors.As(err, &known):
		return h, err
	case known.Code == xapi.PatchAlreadyApplied:
		return h.in(HostHad, h.Since, "it has the patch"), nil
	}
	return h.because(HostFailed, h.Since, err), nil
}

// enter puts the run into a state, unless it has left the one that this was decided in.
func (d *driver) enter(ctx context.Context, s RunState, why string) error {
	return d.pool.Store.Update(ctx, func(tx *store.Tx) error {
		run, err := store.Read[Run](tx, ClassRun, d.ref)
		if err != nil || run.State != d.run.State {
			return err
		}
		run.State, run.Since = s, d.pool.Now()
		if why != "" || s == RunDone {
			run.Reason = why
		}
		if s.Ended() {
			run.Finished, run.Counts = run.Since, map[HostState]int{}
			for _, h := range d.hosts {
				state, _ := h.Shown(run)
				run.Counts[state]++
			}
		}
		tx.Put(ClassRun, d.ref, run)
		return nil
	})
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// How long to wait before what failed is tried again: twice as long each time.
const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = time.Minute
)

// pause waits for d and tells whether it lasted.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// conclude repeats pass until it works or the daemon stops: then the next
// start takes it up. Once the outcome is recorded the next job has its turn.
func (e *execution) conclude(pass func() error) {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := pass()
		if err == nil || e.stopping() {
			return
		}
		if e.recorded {
			e.yield()
		}
		e.agent.Log.WithError(err).WithField("job", e.id).Errorf("the job could not be concluded; it is tried again in %s", wait)
		if !pause(e.stop, wait) {
			return
		}
	}
}

// undo ends a job that could not be started and removes what was made for it.
// A daemon that goes down leaves it as it is: the next start resumes or ends it.
func (e *execution) undo(entry Entry, cause error) error {
	a := e.agent
	if err := e.killAll(); err != nil {
		return err
	}
	if a.journal.begun(e.id) { // the runner had come that far before its start failed
		return e.settle(entry)
	}
	cleanup := e.clean(entry)
	if e.stopping() {
		return nil
	}
	if !e.recorded {
		job, there, err := a.Coordinator.FindJob(context.WithoutCancel(e.stop), e.id)
		if err != nil {
			return err
		}
		e.attempt = max(e.attempt, job.Attempt) // a claim whose answer was lost
		if cleanup == nil && there && xapi.Is(cause, xapi.CannotContactHost) && job.State != pool.JobDone && !job.Cancel && job.Attempt < maxAttempts {
			// The coordinator died while it was asked: nothing has run, and the
			// next one gives the job once more.
			if err := a.Coordinator.JobRequeue(context.WithoutCancel(e.stop), entry.Assignment.Ref); err != nil {
				return err
			}
			return a.journal.end(e.id)
		}
		if c := context.Cause(e.ctx); c != nil && xapi.Is(c, xapi.TaskCancelled) {
			cause = c
		}
		if err := e.finish(entry.Assignment, pool.Outcome{Err: xapi.AsError(cause), Output: whyFull(cause)}); err != nil {
			return err
		}
	}
	if cleanup != nil {
		e.reportCleanup(entry, cleanup)
		return cleanup
	}
	return a.journal.end(e.id)
}

// whyFull tells which SRs had too little room for a job: the parameters of that
// error have no place for it.
func whyFull(err error) string {
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != xapi.PrecheckFailedOutOfSpace || e.Unwrap() == nil {
		return ""
	}
	return e.Unwrap().Error()
}

func (e *execution) finish(j pool.Assignment, o pool.Outcome) error {
	ctx := context.WithoutCancel(e.stop)
	if err := e.reportDamage(ctx, j, o.Err); err != nil {
		return err
	}
	o.Attempt = e.attempt
	if err := e.agent.Coordinator.JobFinish(ctx, j.Ref, o); err != nil {
		return fmt.Errorf("record the end of the job: %w", err)
	}
	e.recorded = true
	return nil
}

// killAll ends what may be left of runner and patch. Where there are no control
// groups nothing was started.
func (e *execution) killAll() error {
	ctx, a := context.WithoutCancel(e.stop), e.agent
	err := errors.Join(a.Dom0.Kill(ctx, runnerGroup(e.id), a.Timeouts.Grace), a.Dom0.Kill(ctx, patchGroup(e.id), a.Timeouts.Grace))
	if errors.Is(err, dom0.ErrNoGroups) {
		return nil
	}
	return err
}

// settle ends a job whose runner is gone, after a normal end as after a crash.
// It can be repeated: what was done is passed over.
func (e *execution) settle(entry Entry) error {
	a, j := e.agent, entry.Assignment
	defer a.checks.forget(e.id)
	if err := e.killAll(); err != nil {
		return err
	}
	job, known, err := a.Coordinator.FindJob(context.WithoutCancel(e.stop), e.id)
	if err != nil {
		return fmt.Errorf("ask for job %s: %w", e.id, err)
	}
	e.recorded = e.recorded || known && job.State == pool.JobDone
	e.attempt = max(e.attempt, job.Attempt)
	var again bool
	if !e.recorded {
		if again, err = e.record(entry); err != nil {
			return err
		}
	}
	if err := e.clean(entry); err != nil {
		e.reportCleanup(entry, err)
		if again { // whoever waits is told now
			err = errors.Join(err, e.finish(j, pool.Outcome{Err: interrupted(j.Job, "")}))
		}
		return err
	}
	if again {
		// The entry goes last: should the daemon die in between, it comes here again.
		if err := a.Coordinator.JobRequeue(context.WithoutCancel(e.stop), j.Ref); err != nil {
			return err
		}
	}
	if j.Job.Kind == pool.JobApply && !again {
		if err := a.ResyncStamps(context.WithoutCancel(e.stop)); err != nil { // a roll-up drops those of others
			return err
		}
	}
	return a.journal.end(e.id)
}

// record writes the outcome into stampfile and records. again tells that there
// is none: nothing has run, and the job is to be taken once more.
func (e *execution) record(entry Entry) (again bool, err error) {
	a, j := e.agent, entry.Assignment
	outcome, again, err := e.outcome(entry)
	if err != nil || again {
		return again, err
	}
	if outcome.Err == nil && j.Job.Kind == pool.JobApply {
		if err := writeStamp(a.PatchDir, j.Patch.UUID, j.Patch.InfoXML); err != nil {
			return false, fmt.Errorf("write the stampfile of patch %s: %w", j.Patch.UUID, err)
		}
		if outcome.Proof, err = e.proof(j); err != nil {
			return false, fmt.Errorf("read the stampfile of patch %s back: %w", j.Patch.UUID, err)
		}
	}
	// What the client sees next must not find the job's image in its way; a
	// failure shows when it is cleaned again.
	_ = e.clean(entry)
	if err := e.finish(j, outcome); err != nil {
		return false, err
	}
	if outcome.Unknown {
		e.reportUnknown(entry)
	}
	return false, nil
}

// proof is what this host shows for an apply that has worked: its stampfile, read
// back, and the digest that its runner held the payload against.
func (e *execution) proof(j pool.Assignment) (*pool.Proof, error) {
	digest, info, err := stampDigest(e.agent.PatchDir, j.Patch.UUID)
	if err != nil {
		return nil, err
	}
	payload, err := e.agent.journal.payload(e.id)
	if err != nil {
		return nil, err
	}
	return &pool.Proof{Stamp: digest, Payload: payload, UUID: info.Patch.UUID, Version: info.Patch.Version}, nil
}

// outcome reads from the journal how a job ended. again tells that nothing of
// it ran and that it is to be taken once more.
func (e *execution) outcome(entry Entry) (o pool.Outcome, again bool, err error) {
	a, j := e.agent, entry.Assignment
	res, ok, err := a.journal.result(e.id)
	if err != nil {
		return o, false, err
	}
	begun := a.journal.begun(e.id)
	apply := j.Job.Kind == pool.JobApply
	if at, stamped := stampTime(a.PatchDir, j.Patch.UUID); apply && stamped && begun && !at.Before(entry.Created) {
		if res.err() == nil {
			return pool.Outcome{Output: res.Output, At: at}, false, nil
		}
		// The patch has written its own stampfile, and failed after that.
		if err := removeStamp(a.PatchDir, j.Patch.UUID); err != nil {
			return o, false, err
		}
	}
	switch {
	case ok:
		if res.Checked {
			a.checks.confirm(e.id)
		}
		if res.Cleanup != "" {
			a.Log.WithField("job", e.id).Error("the runner could not clean up: " + res.Cleanup)
		}
		if res.Why != "" {
			a.Log.WithField("job", e.id).WithField("patch", j.Patch.UUID).WithField("kind", j.Job.Kind).Warn("the job has failed: " + res.Why)
		}
		return e.resultOutcome(res, j), false, nil
	case apply && begun:
		return pool.Outcome{Unknown: true, Err: xapi.NewError(xapi.PatchApplyFailed,
			"the runner died while the patch was being applied, and how far it came is unknown. "+
				"Look at the host, then say `patchd patch settle` or apply the patch again. Last output: "+
				tailOf(a.journal.path(e.id, fileOutput), maxText))}, false, nil
	}
	job, known, err := a.Coordinator.FindJob(context.WithoutCancel(e.stop), e.id)
	if err != nil {
		return o, false, err
	}
	if known && job.Resumes && job.Attempt < maxAttempts && !job.Cancel {
		return o, true, nil
	}
	return pool.Outcome{Err: interrupted(j.Job, tailOf(a.journal.path(e.id, fileLog), 1<<10))}, false, nil
}

// maxAttempts bounds how often an interrupted job is taken up again.
const maxAttempts = 3

func (e *execution) resultOutcome(res Result, j pool.Assignment) pool.Outcome {
	o := pool.Outcome{Output: res.Output, Err: res.err(), At: res.Finished}
	if o.Err != nil && o.Err.Code == xapi.TaskCancelled {
		o.Err = xapi.NewError(xapi.TaskCancelled, string(j.Job.Task.OrNull()))
	}
	return o
}

// clean removes the private image; the journal folder stays until the outcome
// is recorded.
func (e *execution) clean(entry Entry) error {
	if entry.Plan.Target.IsNull() {
		return nil // the image lies in the journal folder and goes with it
	}
	attached, err := e.agent.Storage.AttachedSRs()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.stop), time.Minute)
	defer cancel()
	for _, s := range attached {
		if s.Ref == entry.Plan.Target {
			return s.Repository.Destroy(ctx, entry.Work)
		}
	}
	return fmt.Errorf("the SR %s that holds the job's image is not plugged", entry.Plan.Target)
}

func (e *execution) reportCleanup(entry Entry, err error) {
	a := e.agent
	if e.reported {
		return
	}
	e.reported = true
	body := fmt.Sprintf("job %s of patch %s (%s): %v", e.id, entry.Assignment.Patch.NameLabel, entry.Assignment.Patch.UUID, err)
	if _, merr := a.Coordinator.MessageCreate(context.WithoutCancel(e.stop), pool.MessageCleanupFailed, 3, "Host", a.SelfUUID, body); merr != nil {
		a.Log.WithError(merr).Error("no message could be left")
	}
}

func (e *execution) reportUnknown(entry Entry) {
	a := e.agent
	body := fmt.Sprintf("patch %s (%s) was being applied when its runner died; see the task, then `patchd patch settle %s %s`",
		entry.Assignment.Patch.NameLabel, entry.Assignment.Patch.UUID, entry.Assignment.Patch.UUID, a.SelfUUID)
	if _, err := a.Coordinator.MessageCreate(context.WithoutCancel(e.stop), pool.MessageApplyUnknown, 2, "Host", a.SelfUUID, body); err != nil {
		a.Log.WithError(err).Error("no message could be left")
	}
}

package agent

import (
	"context"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// call carries out a job of kind call: a method of this host's own pool. It is
// claimed first, so that no second process of this host does it too; one that
// was cut off is begun again where that does no harm, and else has failed.
func (e *execution) call(j pool.Assignment) {
	a := e.agent
	log := a.Log.WithField("job", e.id).WithField("call", j.Job.Call)
	var err error
	if j.Job.Cancel {
		err = xapi.NewError(xapi.TaskCancelled, string(j.Job.Task.OrNull()))
	} else if e.attempt, err = a.Coordinator.JobClaim(e.ctx, j.Ref); err != nil {
		log.WithError(err).Warn("the call could not be claimed")
		if e.stopping() || xapi.Is(err, xapi.OtherOperationInProgress) {
			return // somebody else's
		}
		// The claim may have been granted although its answer was lost: then this
		// is the outcome of that attempt.
		e.conclude(func() error { return e.disclaim(j, err) })
		return
	}
	var o pool.Outcome
	if err == nil {
		o.Output, err = a.Storage.HostCall(e.ctx, j.Job.Call, j.Job.Args)
	}
	if e.stopping() && err != nil {
		return // the next start begins it again, or ends it
	}
	if err != nil {
		log.WithError(err).Info("a call of the coordinator failed")
		if cause := context.Cause(e.ctx); cause != nil && xapi.Is(cause, xapi.TaskCancelled) {
			err = cause
		}
		o.Err = xapi.AsError(err)
	}
	e.conclude(func() error { return e.finish(j, o) })
}

// disclaim ends a call of which nothing has run, whatever became of its claim.
func (e *execution) disclaim(j pool.Assignment, cause error) error {
	job, there, err := e.agent.Coordinator.FindJob(context.WithoutCancel(e.stop), e.id)
	if err != nil || !there || job.State == pool.JobDone {
		return err
	}
	e.attempt = job.Attempt
	return e.finish(j, pool.Outcome{Err: xapi.AsError(cause)})
}

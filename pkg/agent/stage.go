package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// stage makes an image that is as good as the golden one in an SR of this host.
// It is a VDI of its own: when this job is cut off it is left to the next one, and
// what of it is unfinished to the storage's own repair. Codes: those of
// pool.Stage; CANNOT_FETCH_PATCH [uuid] when the blocks cannot be had.
func (e *execution) stage(j pool.Assignment, p Plan) error {
	a := e.agent
	spec := pool.ReplicaSpec(*j.VDI, j.Patch)
	spec.SR = p.Target
	tell, told := e.teller(j)
	defer told()
	spec.Progress = tell
	_, err := a.Storage.Stage(e.ctx, spec)
	var known *xapi.Error
	if err == nil || e.ctx.Err() != nil || errors.As(err, &known) && known.Code != xapi.VDINotAvailable {
		return err
	}
	return xapi.NewError(xapi.CannotFetchPatch, string(j.Patch.UUID)).Because(err)
}

// teller shows how much of an image was fetched, once in a while and without
// keeping anybody waiting. told is to be called in the end.
func (e *execution) teller(j pool.Assignment) (tell func(done, total int64), told func()) {
	a := e.agent
	ctx, stop := context.WithCancel(e.ctx)
	var wg sync.WaitGroup
	var last time.Time
	idle := make(chan struct{}, 1)
	idle <- struct{}{}
	report := func(text string) {
		defer func() { idle <- struct{}{} }()
		if err := a.Coordinator.JobReport(ctx, j.Ref, 0, text); err != nil && ctx.Err() == nil {
			a.Log.WithError(err).WithField("job", e.id).Warn("progress could not be reported")
		}
	}
	return func(done, total int64) {
		if time.Since(last) < reportEvery {
			return
		}
		select {
		case <-idle:
		default:
			return // the one before is still on its way
		}
		last = time.Now()
		text := fmt.Sprintf("the image: %s of %s are here\n", humanize.IBytes(uint64(done)), humanize.IBytes(uint64(total)))
		wg.Go(func() { report(text) })
	}, func() { stop(); wg.Wait() }
}

package upload

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// resumable is one resumable upload, from its creation until nobody needs to
// know any more how it ended. It is parked, with only its draft and log on disk,
// or live, with a run that takes what requests bring.
type resumable struct {
	h      *Handler
	logger logrus.FieldLogger
	task   *task.Handle
	// unhook ends the watch over the task.
	unhook func() bool
	over   chan struct{} // closed when end is set

	// moving is held while the upload goes from parked to live and back, or ends.
	moving sync.Mutex

	plan plan // Wide and Over are the run's

	mu      sync.Mutex // guards what follows
	draft   xapi.UUID
	offset  int64 // bytes received
	fresh   bool  // the draft was made by this process and holds nothing
	expires time.Time
	noted   time.Time // the expiry in the note of the draft
	touched time.Time // when a request was there last
	turn    *visit
	run     *run // nil: parked, or over
	end     *outcome
}

// visit is a request that is at work on an upload.
type visit struct {
	cut  func()        // ends it soon
	left chan struct{} // closed when it has ended
}

// errBusy says that a request is at work.
var errBusy = errors.New("another request is at work on this upload")

// received is Upload-Offset.
func (u *resumable) received() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.offset
}

// add counts bytes that were received and gives all there are.
func (u *resumable) add(n int) int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.offset += int64(n)
	u.expires = u.h.Now().Add(u.h.UploadExpiry)
	u.task.Progress(0.95 * float64(u.offset) / float64(u.plan.Length))
	return u.offset
}

// outcome is how the upload ended, nil while it goes on.
func (u *resumable) outcome() *outcome {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.end
}

// expiry is the one in the draft's note: somewhat later than the one that
// counts, so that it need not be written all the time.
func (u *resumable) expiry() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.noted
}

func (u *resumable) setExpiry(t time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.noted = t
}

func (u *resumable) setDraft(id xapi.UUID, p plan) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.draft, u.plan.Wide, u.plan.Over, u.fresh = id, p.Wide, p.Over, false
}

// turnWait is how long a request that is at work is waited for before it is cut
// off: one whose client has gone ends by then, and all it brought counts.
const turnWait = 300 * time.Millisecond

// enter makes the request the one that is at work on the upload. An earlier one
// that does not end by itself is cut off, if it stands at the same offset: the
// connection of a client that comes again may be half open for long. leave is to
// be called at the end. errBusy: the earlier one goes on, elsewhere.
func (u *resumable) enter(ctx context.Context, offset int64, cut func()) (leave func(), err error) {
	for waited := false; ; waited = true {
		u.mu.Lock()
		t := u.turn
		if t == nil {
			t = &visit{cut: cut, left: make(chan struct{})}
			u.turn, u.touched = t, u.h.Now()
			u.mu.Unlock()
			return func() { u.leave(t) }, nil
		}
		here := u.offset == offset
		u.mu.Unlock()
		if waited && !here {
			return nil, errBusy
		}
		if waited {
			t.cut()
		}
		if err := t.wait(ctx, waited); err != nil {
			return nil, err
		}
	}
}

// wait waits until the visit has ended, for turnWait unless it was cut off.
func (t *visit) wait(ctx context.Context, wasCut bool) error {
	timeout := time.NewTimer(turnWait)
	defer timeout.Stop()
	late := timeout.C
	if wasCut {
		late = nil
	}
	select {
	case <-t.left:
		return nil
	case <-late:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (u *resumable) leave(t *visit) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.turn, u.touched = nil, u.h.Now()
	close(t.left)
}

// live makes sure that the upload has a run, and gives it; nil when it is over.
// Codes: those of pool.OpenDraft, but for a draft that is gone: the upload is
// over then.
func (u *resumable) live(ctx context.Context) (*run, error) {
	u.mu.Lock()
	r := u.run
	u.mu.Unlock()
	if r != nil {
		return r, nil
	}
	leave, err := u.h.place(ctx, u.plan.User)
	if err != nil {
		return nil, err
	}
	u.moving.Lock()
	defer u.moving.Unlock()
	u.mu.Lock()
	r, over := u.run, u.end != nil
	id, fresh := u.draft, u.fresh
	u.fresh = false
	u.mu.Unlock()
	if r != nil || over {
		leave()
		return r, nil
	}
	draft, err := u.h.Drafts.OpenDraft(ctx, id)
	if err != nil {
		leave()
		if xapi.Is(err, xapi.HandleInvalid) || xapi.Is(err, xapi.VDINotAvailable) {
			u.finish(nil, "", err)
			return nil, nil
		}
		return nil, err
	}
	r = &run{u: u, give: make(chan *intake), done: make(chan struct{}), draft: draft, fresh: fresh}
	r.ctx, r.cancel = context.WithCancelCause(u.task.Context())
	u.setRun(r)
	if !u.h.spawn(func() { r.main(leave) }) {
		u.setRun(nil)
		r.cancel(nil)
		leave()
		return nil, errors.Join(task.ErrStopping, draft.Close())
	}
	return r, nil
}

func (u *resumable) setRun(r *run) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.run = r
}

// main is the goroutine of a run.
func (r *run) main(leave func()) {
	defer leave()
	defer r.cancel(nil)
	defer close(r.done)
	defer r.u.setRun(nil)
	ref, err := r.work()
	if r.cur != nil {
		r.letGo(err)
	}
	if r.logf != nil {
		r.logf.Close()
	}
	os.Remove(r.u.h.logPath(r.u.plan.ID) + newSuffix) //nolint:errcheck // seldom there; the next start looks again
	if err != nil && r.goesOn() {
		r.u.reread()
		if cerr := r.draft.Close(); cerr != nil {
			r.u.logger.WithError(cerr).Warn("the image of an upload that waits could not be closed")
		}
		return
	}
	if err != nil && r.ctx.Err() != nil {
		err = context.Cause(r.ctx) // whatever it led to
	}
	r.u.finish(r.draft, ref, err)
}

// reread sets the offset to what can be had again: less than was received when
// the log could not be written.
func (u *resumable) reread() {
	f, err := os.Open(u.h.logPath(u.plan.ID))
	if err != nil {
		return // its next run says so
	}
	defer f.Close()
	if point, err := findResumePoint(f, u.h.boot); err == nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.offset = point.offset
	}
}

// park ends the run of an upload that no request is at work on, unless all
// bytes are there. It can go on later.
func (u *resumable) park() {
	u.moving.Lock()
	defer u.moving.Unlock()
	u.mu.Lock()
	r := u.run
	if u.turn != nil || u.offset == u.plan.Length {
		r = nil
	}
	u.mu.Unlock()
	if r != nil {
		r.cancel(errParked)
		<-r.done
	}
}

// kill ends the upload for good, with that error, and leaves nothing of it. One
// that is over stays as it is.
func (u *resumable) kill(cause error) {
	u.moving.Lock()
	defer u.moving.Unlock()
	u.mu.Lock()
	r := u.run
	u.mu.Unlock()
	if r != nil {
		r.cancel(cause)
		<-r.done
	}
	if u.outcome() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), finishTime)
	defer cancel()
	draft, err := u.h.Drafts.OpenDraft(ctx, u.draft)
	if err != nil {
		// The sweeper takes it once it has expired, or its SR is back.
		u.logger.WithError(err).Debug("the draft of an upload that ends cannot be opened")
		draft = nil
	}
	u.finish(draft, "", cause)
}

// taskEnded is called when the context of the task ends: somebody has cancelled
// it, or patchd stops.
func (u *resumable) taskEnded() {
	cause := context.Cause(u.task.Context())
	if errors.Is(cause, task.ErrStopping) {
		return
	}
	u.h.spawn(func() { u.kill(cause) })
}

// finishTime bounds what is done after an upload has ended.
const finishTime = time.Minute

// finish ends the upload: nothing but the pool_patch, or nothing at all, is left.
func (u *resumable) finish(draft *pool.Draft, ref xapi.Ref, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), finishTime)
	defer cancel()
	u.unhook()
	log := u.logger
	if err != nil && draft != nil {
		if derr := draft.Discard(ctx); derr != nil {
			log.WithError(derr).Warn("what an upload has left is not removed yet; the sweeper tries again")
		}
	}
	if rerr := os.Remove(u.h.logPath(u.plan.ID)); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		log.WithError(rerr).Warn("the log of an upload is not removed yet; the next start tries again")
	}
	cerr := u.h.Tasks.Complete(ctx, u.task.Ref(), "<value>"+string(ref)+"</value>", err)
	if cerr != nil && !xapi.Is(cerr, xapi.HandleInvalid) {
		log.WithError(cerr).Warn("the end of an upload's task is not stored; the next start does it")
	}
	if err != nil {
		log.WithError(err).Info("upload ended")
	} else {
		log.WithField("pool_patch", ref).Info("upload ended")
	}
	end := &outcome{at: u.h.Now(), ref: ref, err: err}
	end.gone = xapi.Is(err, xapi.TaskCancelled) || errors.Is(err, errExpired)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.end = end
	close(u.over)
}

// errExpired is how an upload ends whose client did not come back.
var errExpired = errors.New("the upload has expired")

func expired() error { return xapi.NewError(xapi.Timeout, errExpired.Error()).Because(errExpired) }

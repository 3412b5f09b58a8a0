package upload

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/delta"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// syncEvery is how many bytes are received between two syncs of image and
	// log: what a death of the system loses.
	syncEvery = 64 * mib
	// settleAfter is how long the client sends nothing until what was received
	// is synced.
	settleAfter = 200 * time.Millisecond
	// resumableBuffer is the size of the image writer's buffers, in bytes. What
	// is in all of them has to fit the ring of the log.
	resumableBuffer = 512 << 10
	// sizeSlack is how much longer than asked for an SR may make a volume.
	sizeSlack = 64 * mib
)

// errParked is the cause with which a run is told to stop, to go on later.
var errParked = errors.New("the upload waits for its client")

// intake is what one request brings. The run that has taken it reads it, and
// nobody else, until done is closed.
type intake struct {
	r    io.Reader
	left int64 // bytes that may come
	done chan struct{}
	err  error // why it ended, once done is closed
}

// run is the work on an upload while it is in memory: the pipeline from the
// requests into the draft. One goroutine does it; the fields below ctx are its own.
type run struct {
	u      *resumable
	give   chan *intake
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when the goroutine has ended

	ctx    context.Context
	draft  *pool.Draft
	fresh  bool // the draft holds nothing yet
	logf   *os.File
	log    *uploadLog
	split  splitter
	replay *replay
	cur    *intake
	writer *vdi.Writer
	synced int64 // received when image and log were synced last
	failed error // of Read; stays
	broken bool  // the log was given up, and that was said
}

// work does it all and gives the pool_patch.
func (r *run) work() (xapi.Ref, error) {
	p := r.u.plan
	point, err := r.prepare()
	if err != nil {
		return "", err
	}
	in, release, err := r.input(p)
	if err != nil {
		return "", err
	}
	defer release()
	pu := &patchUpload{h: r.u.h, in: in, length: p.Size, syncs: true, task: p.Task}
	if pu.where, pu.repo, err = r.u.h.findSR(r.ctx, p.SR); err != nil {
		return "", err
	}
	keys, err := r.u.h.Keys()
	if err != nil {
		return "", fmt.Errorf("read trusted keys: %w", err)
	}
	defer func() {
		if r.writer != nil {
			r.writer.Abort()
		}
	}()
	if point.done > 0 && !p.Over {
		if err := r.write(point.done); err != nil {
			return "", pu.noRoom(err)
		}
	}
	if point.offset > 0 {
		r.replay = newReplay(r.logf, point, r.resumeReader())
	}
	leave, err := pu.open(r.ctx, keys)
	if err != nil {
		return "", err
	}
	defer leave()
	if r.writer == nil {
		if err := r.begin(pu.message.Compressed()); err != nil {
			return "", pu.noRoom(err)
		}
	}
	pu.over = r.u.plan.Over
	if err := pu.fill(r.ctx, r.writer, r.draft.Path()); err != nil {
		return "", err
	}
	if _, err := r.draft.Publish(r.ctx, pu.image.Map, pu.commit); err != nil {
		return "", pu.noRoom(err)
	}
	return pu.ref, pu.confirm(r.ctx)
}

// input gives the signed file as the message reader takes it.
func (r *run) input(p plan) (in input, release func(), err error) {
	if !p.Delta {
		return r, func() {}, nil
	}
	base, release, err := r.u.h.openBase(r.ctx, p.Base)
	if err != nil {
		return nil, nil, err
	}
	return &undelta{r: delta.NewDecoder(r, base, base.Size()), feed: r, vdi: base.vdi, most: p.Size}, release, nil
}

// undelta is the signed file that a delta makes of its base.
type undelta struct {
	r    io.Reader
	feed input
	vdi  xapi.Ref // of the base
	most int64    // bytes that were announced, and promised room
	n    int64
}

func (u *undelta) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	if u.n += int64(n); u.n > u.most {
		return 0, xapi.NewError(xapi.InvalidPatch, fmt.Sprintf("the delta gives more than the %d bytes that were announced", u.most))
	}
	if errors.Is(err, delta.ErrBase) {
		err = xapi.NewError(xapi.VDIContentChanged, string(u.vdi), "it is not the base that the delta was made for").Because(err)
	}
	return n, err
}

func (u *undelta) size() int64 { return u.n }

func (u *undelta) end() error {
	var one [1]byte
	if n, err := u.Read(one[:]); n > 0 || err != io.EOF {
		return errors.Join(errors.New("the delta goes on after the end of the message"), err)
	}
	return u.feed.end()
}

// begin makes the image writer of an upload whose first bytes are known.
func (r *run) begin(compressed bool) error {
	if compressed && !r.u.plan.Wide {
		next := r.u.plan
		next.Wide, next.Over = true, false
		if err := r.swap(next); err != nil {
			return err
		}
	}
	return r.write(0)
}

// write makes the image writer, with done bytes of the payload there already.
func (r *run) write(done int64) (err error) {
	p := r.u.plan
	o := vdi.Options{Layout: cmp.Or(p.Layout, r.u.h.Layout), Dom0: r.u.h.Dom0, Buffer: resumableBuffer, Done: done, Over: p.Over}
	if most := vdi.Size(p.expect()) + sizeSlack; !p.Over && r.draft.Size() > most {
		return xapi.NewError(xapi.VDIIOError, fmt.Sprintf("the unfinished image has %d bytes, more than it was made with", r.draft.Size()))
	}
	// What is in the buffers still goes to the disk when the run is told to stop.
	r.writer, err = vdi.NewWriter(context.WithoutCancel(r.ctx), r.draft.File(), r.draft.Size(), p.expect(), o)
	r.fresh = false
	return err
}

// swap gives the upload another draft, an empty one. While both are there a
// restart goes on with the old one, see Start; only where there is no room for
// both a crash just then ends the upload.
func (r *run) swap(next plan) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), finishTime)
	defer cancel()
	old := r.draft
	d, err := r.u.h.newDraft(ctx, next, r.u.expiry())
	if xapi.Is(err, xapi.OutOfSpace) {
		if err := old.Discard(ctx); err != nil {
			return err
		}
		d, err = r.u.h.newDraft(ctx, next, r.u.expiry())
	}
	if err != nil {
		return err
	}
	r.draft, r.fresh = d, true
	r.u.setDraft(d.ID(), next)
	return old.Discard(ctx)
}

// clear makes the draft an empty one.
func (r *run) clear() error {
	if err := r.draft.Clear(); err != nil {
		r.u.logger.WithError(err).Debug("the image of an upload cannot be emptied and is made anew")
		return r.swap(r.u.plan)
	}
	r.fresh = true
	return nil
}

// prepare finds out how far the upload is and makes the log go on from there.
func (r *run) prepare() (resumePoint, error) {
	h := r.u.h
	path := h.logPath(r.u.plan.ID)
	old, err := os.Open(path)
	if err != nil {
		return resumePoint{}, fmt.Errorf("open the log of the upload: %w", err)
	}
	defer old.Close()
	point, err := findResumePoint(old, h.boot)
	if err != nil {
		return point, err
	}
	if point.done == 0 && !r.fresh && !r.u.plan.Over {
		// The image may hold what no log tells of.
		if err := r.clear(); err != nil {
			return point, err
		}
	}
	if r.logf, err = os.OpenFile(path+newSuffix, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600); err != nil {
		return point, fmt.Errorf("make the log of the upload: %w", err)
	}
	r.log = &uploadLog{f: r.logf, room: h.LogRoom}
	if err := r.goOn(point, old); err != nil {
		return point, err
	}
	if err := os.Rename(path+newSuffix, path); err != nil {
		return point, fmt.Errorf("make the log of the upload: %w", err)
	}
	if got := r.u.received(); got != point.offset {
		return point, fmt.Errorf("the log of the upload tells of %d bytes, not %d", point.offset, got)
	}
	r.synced = point.offset
	r.extend()
	return point, nil
}

// goOn makes the log tell what the old one does, and the present boot.
func (r *run) goOn(point resumePoint, old io.ReaderAt) error {
	if err := point.copyTo(r.log, old); err != nil {
		return err
	}
	if point.boot != r.u.h.boot {
		// All that counts of another boot was synced, and holds in this one.
		r.log.entry(entrySynced, 0)
		r.log.boot(r.u.h.boot)
	}
	if err := r.log.write(point.done); err != nil {
		return err
	}
	if err := r.logf.Sync(); err != nil {
		return fmt.Errorf("sync the log of the upload: %w", err)
	}
	return nil
}

func (r *run) resumeReader() io.Reader {
	if r.writer == nil {
		return strings.NewReader("")
	}
	return r.writer.Resume()
}

// flushed is how much of the payload is in the image.
func (r *run) flushed() int64 {
	if r.writer == nil {
		return 0
	}
	return r.writer.Flushed()
}

func (r *run) size() int64 { return r.u.received() }

// end makes sure that the message ends where the upload does.
func (r *run) end() error {
	if r.replay != nil || r.u.received() != r.u.plan.Length {
		return errors.New("data after the end")
	}
	return nil
}

// Read gives the bytes of the upload: first what was received before this run,
// then what the requests bring, as long as it takes. io.EOF is after its last byte.
func (r *run) Read(p []byte) (int, error) {
	if r.failed != nil || len(p) == 0 {
		return 0, r.failed
	}
	n, err := r.read(p)
	r.failed = err
	return n, err
}

func (r *run) read(p []byte) (int, error) {
	if r.replay != nil {
		n, err := r.replay.Read(p)
		if err != io.EOF {
			r.pass(p[:n])
			return n, errors.Join(err, r.ctx.Err())
		}
		r.replay = nil
	}
	for {
		missing := r.u.plan.Length - r.u.received()
		if missing == 0 {
			return 0, io.EOF
		}
		if r.cur == nil {
			if err := r.wait(); err != nil {
				return 0, err
			}
		}
		n, err := r.cur.r.Read(p[:min(int64(len(p)), missing, r.cur.left)])
		if n > 0 {
			r.took(p[:n])
			r.cur.left -= int64(n)
		}
		if err != nil || r.cur.left == 0 || int64(n) == missing {
			r.letGo(err)
		}
		if n > 0 {
			return n, nil
		}
	}
}

// pass lets bytes go by that were received before.
func (r *run) pass(p []byte) {
	for len(p) > 0 {
		n, _ := r.split.next(p)
		p = p[n:]
	}
}

// took notes bytes that were received just now.
func (r *run) took(p []byte) {
	total := r.u.add(len(p))
	for len(p) > 0 {
		n, payload := len(p), false
		if !r.u.plan.Delta {
			n, payload = r.split.next(p)
		}
		if payload {
			r.log.keep(p[:n])
		} else {
			r.log.bytes(p[:n])
		}
		p = p[n:]
	}
	if total-r.synced >= syncEvery {
		r.settle()
		return
	}
	r.logged(r.log.write(r.flushed()))
}

// logged says once that the log is of no use any more. The upload goes on.
func (r *run) logged(err error) {
	if err != nil && !r.broken {
		r.broken = true
		r.u.logger.WithError(err).Warn("an upload will begin again if patchd is restarted")
	}
}

// letGo ends the present request's part.
func (r *run) letGo(err error) {
	r.cur.err = err
	close(r.cur.done)
	r.cur = nil
}

// settle brings what was received to the disk.
func (r *run) settle() {
	if r.synced == r.u.received() {
		return
	}
	r.synced = r.u.received()
	if r.writer != nil {
		if err := r.writer.Sync(); err != nil {
			return // the next Write says so
		}
	}
	r.logged(r.log.sync(r.flushed()))
	r.extend()
}

// extend moves the expiry of the draft on, now and then.
func (r *run) extend() {
	h := r.u.h
	now := h.Now()
	if r.u.expiry().After(now.Add(h.UploadExpiry)) {
		return
	}
	expires := now.Add(h.UploadExpiry + h.slack())
	if err := r.draft.SetNote(context.WithoutCancel(r.ctx), r.draft.Note(), expires); err != nil {
		r.u.logger.WithError(err).Warn("the expiry of an upload is not moved on")
		return
	}
	r.u.setExpiry(expires)
}

// wait waits for the next request.
func (r *run) wait() error {
	idle := time.NewTimer(settleAfter)
	defer idle.Stop()
	for {
		select {
		case r.cur = <-r.give:
			return nil
		case <-idle.C:
			r.settle()
		case <-r.ctx.Done():
			if r.goesOn() {
				r.settle()
			}
			return context.Cause(r.ctx)
		}
	}
}

// goesOn tells whether the run was told to stop only for now.
func (r *run) goesOn() bool {
	cause := context.Cause(r.ctx)
	return errors.Is(cause, errParked) || errors.Is(cause, task.ErrStopping)
}

// findSR gives an SR that is plugged here.
func (h *Handler) findSR(ctx context.Context, ref xapi.Ref) (sr.Candidate, sr.Repository, error) {
	_, candidates, err := h.Pool.SRCandidates(ctx)
	if err != nil {
		return sr.Candidate{}, nil, err
	}
	repo, err := h.Pool.Repository(ref)
	if err != nil {
		return sr.Candidate{}, nil, err
	}
	for _, c := range candidates {
		if c.Ref == ref {
			return c, repo, nil
		}
	}
	return sr.Candidate{}, nil, xapi.NewError(xapi.HandleInvalid, pool.ClassSR, string(ref))
}

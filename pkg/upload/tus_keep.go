package upload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// Drafts is what resumable uploads ask of the pool; *pool.Pool is one.
type Drafts interface {
	NewDraft(ctx context.Context, n pool.NewVDI, o pool.DraftOptions) (*pool.Draft, error)
	OpenDraft(ctx context.Context, id xapi.UUID) (*pool.Draft, error)
	Drafts() ([]pool.DraftInfo, error)
}

// DefaultUploadExpiry is how long an unfinished upload waits for its client.
const DefaultUploadExpiry = 24 * time.Hour

const (
	// maxLive is how many uploads may be in memory at once: 2 MiB each.
	maxLive = 32
	// maxLivePerUser leaves places for others, however slowly one user sends.
	maxLivePerUser = 16
	// parkAfter is how long a live upload waits for a request. Then it frees
	// its memory and its hold on the SR.
	parkAfter = time.Minute
	// keepOutcome is how long the end of an upload can be asked for, of the
	// last maxOutcomes that ended.
	keepOutcome = time.Hour
	maxOutcomes = 1000
	// maxPerUser and maxUnfinished bound the uploads that are not finished.
	maxPerUser    = 64
	maxUnfinished = 256

	tidyEvery = 15 * time.Second
	newSuffix = ".new"
)

// keeper holds the resumable uploads of a Handler.
type keeper struct {
	boot     string        // id of this boot of the system
	liveOnes chan struct{} // one element for each live upload
	sums     chan struct{} // one for each body that is held until its checksum is known
	stop     context.CancelFunc
	stopped  context.Context

	mu       sync.Mutex // guards what follows
	uploads  map[xapi.UUID]*resumable
	creating map[string]int           // by user: begun, not yet in uploads
	places   map[string]chan struct{} // by user: one element for each live upload
	closed   bool
	wg       sync.WaitGroup // Add only with mu held and closed false
}

func newKeeper() keeper {
	ctx, cancel := context.WithCancel(context.Background())
	return keeper{
		liveOnes: make(chan struct{}, maxLive), sums: make(chan struct{}, maxSums),
		stop: cancel, stopped: ctx, uploads: map[xapi.UUID]*resumable{}, creating: map[string]int{},
		places: map[string]chan struct{}{},
	}
}

// spawn runs f in a goroutine that Close waits for; false after Close.
func (k *keeper) spawn(f func()) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return false
	}
	k.wg.Go(f)
	return true
}

func (k *keeper) isClosed() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.closed
}

func (k *keeper) forget(u *resumable) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.uploads, u.plan.ID)
}

func (k *keeper) find(id xapi.UUID) *resumable {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.uploads[id]
}

// all gives every upload that is known.
func (k *keeper) all() []*resumable {
	k.mu.Lock()
	defer k.mu.Unlock()
	list := make([]*resumable, 0, len(k.uploads))
	for _, u := range k.uploads {
		list = append(list, u)
	}
	return list
}

func (h *Handler) logPath(id xapi.UUID) string { return filepath.Join(h.UploadsDir, string(id)) }

// Start takes up the uploads that an earlier process has left, removes what
// belongs to none, and looks after all of them until Close. It is to be called
// once, before the first request. task.Manager.Repair is to be told of
// DraftTasks. Without Options.Drafts it does nothing.
func (h *Handler) Start(ctx context.Context) error {
	if h.Drafts == nil {
		return nil
	}
	if err := os.MkdirAll(h.UploadsDir, 0o700); err != nil {
		return err
	}
	h.boot = h.bootID()
	drafts, err := h.Drafts.Drafts()
	if err != nil {
		return err
	}
	for _, d := range drafts {
		p, ours, err := readPlan(d.Note)
		if !ours {
			continue
		}
		if err == nil && h.find(p.ID) != nil {
			h.discard(ctx, d.ID) // the crash was in the middle of run.swap
			continue
		}
		if err == nil {
			err = h.takeUp(d, p)
		}
		if err != nil {
			h.Log.WithError(err).WithField("draft", d.ID).Warn("an upload cannot go on after the restart and is removed")
			h.drop(ctx, d.ID, p.Task, err)
		}
	}
	if err := h.removeOrphans(); err != nil {
		return err
	}
	for _, u := range h.all() {
		if u.received() == u.plan.Length { // only its end is missing
			h.spawn(func() { u.live(h.stopped) }) //nolint:errcheck // its client asks again
		}
	}
	h.spawn(h.tidyLoop)
	return nil
}

// slack is how much later than it counts the expiry stands in a note.
func (h *Handler) slack() time.Duration { return max(h.UploadExpiry/16, 5*time.Minute) }

// bootID names this boot of the system; a name of its own where that cannot be
// learned, so that nothing that was not synced is trusted.
func (h *Handler) bootID() string {
	id, err := h.Dom0.BootID()
	if err != nil {
		h.Log.WithError(err).Warn("this boot has no name: uploads go on from what was synced")
		return string(xapi.NewUUID())
	}
	return id
}

// takeUp makes an upload of a draft that an earlier process has left.
func (h *Handler) takeUp(d pool.DraftInfo, p plan) error {
	f, err := os.Open(h.logPath(p.ID))
	if err != nil {
		return err
	}
	defer f.Close()
	point, err := findResumePoint(f, h.boot)
	if err != nil {
		return err
	}
	t, err := h.Tasks.Adopt(p.Task)
	if err != nil {
		return err
	}
	u := h.newResumable(p, d.ID, t)
	u.offset, u.expires, u.noted = point.offset, d.Expires.Add(-h.slack()), d.Expires
	h.mu.Lock()
	h.uploads[p.ID] = u
	h.mu.Unlock()
	u.unhook = context.AfterFunc(t.Context(), u.taskEnded)
	return nil
}

func (h *Handler) newResumable(p plan, draft xapi.UUID, t *task.Handle) *resumable {
	return &resumable{
		h: h, plan: p, draft: draft, task: t, over: make(chan struct{}), touched: h.Now(),
		logger: h.Log.WithField("upload", p.ID).WithField("task_ref", p.Task),
	}
}

// drop removes a draft that nobody can go on with, and ends its task.
func (h *Handler) drop(ctx context.Context, id xapi.UUID, ref xapi.Ref, cause error) {
	h.discard(ctx, id)
	cause = xapi.NewError(xapi.InternalError, "the upload could not go on after a restart of patchd").Because(cause)
	if err := h.Tasks.Complete(ctx, ref, "", cause); err != nil {
		h.Log.WithError(err).WithField("task_ref", ref).Debug("the task of an upload has ended before")
	}
}

// discard removes a draft.
func (h *Handler) discard(ctx context.Context, id xapi.UUID) {
	d, err := h.Drafts.OpenDraft(ctx, id)
	if err == nil {
		err = d.Discard(ctx)
	}
	if err != nil {
		h.Log.WithError(err).WithField("draft", id).Warn("the draft of an upload is not removed yet; the sweeper does it")
	}
}

// removeOrphans removes the logs that belong to no upload.
func (h *Handler) removeOrphans() error {
	entries, err := os.ReadDir(h.UploadsDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if h.find(xapi.UUID(e.Name())) == nil {
			errs = append(errs, os.Remove(filepath.Join(h.UploadsDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// Close parks every upload and waits until nothing of them goes on. Requests
// that come later are refused.
func (h *Handler) Close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.stop()
	for _, u := range h.all() {
		u.mu.Lock()
		if u.run != nil {
			u.run.cancel(errParked)
		}
		u.mu.Unlock()
	}
	h.wg.Wait()
}

func (h *Handler) tidyLoop() {
	tick := time.NewTicker(tidyEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			h.tidy()
		case <-h.stopped.Done():
			return
		}
	}
}

// tidy parks what waits, ends what has expired and forgets what ended long ago.
func (h *Handler) tidy() {
	now := h.Now()
	var ended []*resumable
	for _, u := range h.all() {
		u.mu.Lock()
		idle := u.turn == nil && u.offset < u.plan.Length
		park := idle && u.run != nil && now.Sub(u.touched) > parkAfter
		dead := u.turn == nil && u.end == nil && now.After(u.expires) && (u.run == nil || u.offset < u.plan.Length)
		if u.end != nil {
			ended = append(ended, u)
		}
		u.mu.Unlock()
		switch {
		case dead:
			u.kill(expired())
		case park:
			u.park()
		}
	}
	slices.SortFunc(ended, func(a, b *resumable) int { return b.outcome().at.Compare(a.outcome().at) })
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, u := range ended {
		if i >= maxOutcomes || now.Sub(u.outcome().at) > keepOutcome {
			delete(h.uploads, u.plan.ID)
		}
	}
}

// place waits for a place among the live uploads, and among those of the user.
func (h *Handler) place(ctx context.Context, user string) (leave func(), err error) {
	h.mu.Lock()
	own := h.places[user]
	if own == nil {
		own = make(chan struct{}, maxLivePerUser)
		h.places[user] = own
	}
	h.mu.Unlock()
	leaveOwn, err := h.takePlace(ctx, own, func(u *resumable) bool { return u.plan.User == user })
	if err != nil {
		return nil, err
	}
	leaveAll, err := h.takePlace(ctx, h.liveOnes, func(*resumable) bool { return true })
	if err != nil {
		leaveOwn()
		return nil, err
	}
	return func() { leaveAll(); leaveOwn() }, nil
}

// takePlace waits for one of some places. When there is none, the upload of
// those that has waited longest for its client is parked.
func (h *Handler) takePlace(ctx context.Context, places chan struct{}, of func(*resumable) bool) (leave func(), err error) {
	select {
	case places <- struct{}{}:
		return func() { <-places }, nil
	default:
	}
	var longest *resumable
	var since time.Time
	for _, u := range h.all() {
		u.mu.Lock()
		if u.run != nil && u.turn == nil && u.offset < u.plan.Length && of(u) && (longest == nil || u.touched.Before(since)) {
			longest, since = u, u.touched
		}
		u.mu.Unlock()
	}
	if longest != nil {
		longest.park()
	}
	return enter(ctx, places)
}

// reserve counts a new upload of a user, unless there are too many.
func (h *Handler) reserve(user string) (release func(), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	all, own := 0, h.creating[user]
	for _, n := range h.creating {
		all += n
	}
	for _, u := range h.uploads {
		if u.outcome() != nil {
			continue
		}
		all++
		if u.plan.User == user {
			own++
		}
	}
	switch {
	case h.closed:
		return nil, task.ErrStopping
	case own >= maxPerUser || all >= maxUnfinished:
		return nil, xapi.NewError(xapi.OperationNotAllowed,
			fmt.Sprintf("there are %d unfinished uploads, %d of this user: finish or delete some first (at most %d, %d of one user)", all, own, maxUnfinished, maxPerUser))
	}
	h.creating[user]++
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.creating[user]--; h.creating[user] == 0 {
			delete(h.creating, user)
		}
	}, nil
}

package task

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// ErrStopping is the cause with which the contexts of running tasks end when
// the manager stops.
var ErrStopping = errors.New("patchd is stopping")

// Func is the work of a task. result is the XML-RPC encoding of its value as
// task.result shows it, "<value></value>" for none. ctx ends on cancel and on
// Stop only. A Func that returns an error of a cancelled context, or
// TASK_CANCELLED, ends its task as cancelled; every other error as failure.
type Func func(ctx context.Context, t *Handle) (result string, err error)

// writeTimeout bounds one transaction that no caller waits for.
const writeTimeout = 30 * time.Second

// Manager owns the task records of this coordinator. Its methods may be called
// by many goroutines at once.
type Manager struct {
	store *store.Store
	host  func() xapi.Ref
	log   logrus.FieldLogger
	clock Clock

	base context.Context // ends on Stop
	stop context.CancelCauseFunc

	mu      sync.Mutex // guards what follows
	stopped bool
	handles map[xapi.Ref]*Handle // every driven task of this process
	running sync.WaitGroup       // Add only with mu held and stopped false
}

// Option changes a Manager as it is made.
type Option func(*Manager)

// WithClock replaces the system's clock.
func WithClock(c Clock) Option { return func(m *Manager) { m.clock = c } }

// NewManager makes the manager of s. host names the host that the tasks are
// resident on; it may be nil or give "" before there is one.
func NewManager(s *store.Store, host func() xapi.Ref, log logrus.FieldLogger, opts ...Option) *Manager {
	m := &Manager{store: s, host: host, log: log, clock: realClock{}, handles: map[xapi.Ref]*Handle{}}
	m.base, m.stop = context.WithCancelCause(context.Background())
	for _, o := range opts {
		o(m)
	}
	return m
}

// Stop ends the contexts of all running functions and waits for them. Tasks
// that are cut off by it stay pending. A second Stop waits as well.
func (m *Manager) Stop() {
	m.mu.Lock()
	m.stopped = true
	m.mu.Unlock()
	m.stop(ErrStopping)
	m.running.Wait()

	m.mu.Lock()
	left := make([]*Handle, 0, len(m.handles))
	for _, h := range m.handles { // adopted, never run
		left = append(left, h)
	}
	clear(m.handles)
	m.mu.Unlock()
	for _, h := range left {
		h.close()
	}
}

// Get is the record of a task. It fails with HANDLE_INVALID.
func (m *Manager) Get(ref xapi.Ref) (Record, error) {
	var rec Record
	err := m.store.View(func(v *store.View) (err error) {
		rec, err = store.Get[Record](v, Class, ref)
		return err
	})
	return rec, err
}

// Create makes a pending task that nobody drives yet. It fails with
// VALUE_NOT_SUPPORTED on a text that is too long, HANDLE_INVALID on an unknown
// parent and OPERATION_NOT_ALLOWED when its user has too many tasks.
func (m *Manager) Create(ctx context.Context, spec Spec) (xapi.Ref, error) {
	return m.create(ctx, spec, false)
}

// Begin is Create and Adopt in one transaction: the way to make a task that
// this server is about to Run. Such tasks end by themselves, so their number
// is not limited.
func (m *Manager) Begin(ctx context.Context, spec Spec) (*Handle, error) {
	ref, err := m.create(ctx, spec, true)
	if err != nil {
		return nil, err
	}
	h, err := m.register(ref, false)
	if err != nil {
		return nil, err
	}
	if err := m.noticeCancel(h); err != nil {
		m.forget(h)
		return nil, err
	}
	return h, nil
}

// noticeCancel tells h of a cancel that came before it was registered.
func (m *Manager) noticeCancel(h *Handle) error {
	rec, err := m.Get(h.ref)
	if err != nil {
		return err
	}
	h.uuid = rec.UUID
	if rec.Status == Cancelling {
		h.cancelTask()
	}
	return nil
}

// maxPerUser bounds the tasks of one user, or a loop around task.create would
// fill the memory of the coordinator.
const maxPerUser = 1000

func (m *Manager) create(ctx context.Context, spec Spec, driven bool) (xapi.Ref, error) {
	if err := spec.check(); err != nil {
		return "", err
	}
	if !driven { // those end by themselves
		if err := m.makeRoom(ctx, spec.User); err != nil {
			return "", err
		}
	}
	ref, rec := xapi.NewRef(), spec.record(m.clock.Now(), m.thisHost())
	rec.Driven = driven
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		if !rec.SubtaskOf.IsNull() && !tx.Has(Class, rec.SubtaskOf) {
			return xapi.NewError(xapi.HandleInvalid, Class, string(rec.SubtaskOf))
		}
		tx.Put(Class, ref, rec)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("create task %.64q: %w", spec.Label, err)
	}
	return ref, nil
}

func (m *Manager) thisHost() xapi.Ref {
	if m.host == nil {
		return xapi.NullRef
	}
	return m.host()
}

// makeRoom lets finished tasks go early when user has many, and refuses when
// that does not help.
func (m *Manager) makeRoom(ctx context.Context, user string) error {
	if user == "" || m.countOf(user) < maxPerUser {
		return nil
	}
	if err := m.gc(ctx, 0); err != nil {
		return err
	}
	if n := m.countOf(user); n >= maxPerUser {
		return xapi.NewError(xapi.OperationNotAllowed,
			fmt.Sprintf("user %s has %d tasks already: end or destroy some first", user, n))
	}
	return nil
}

func (m *Manager) countOf(user string) (n int) {
	_ = m.store.View(func(v *store.View) error {
		n = len(v.Refs(Class, "_user", user))
		return nil
	})
	return n
}

// Adopt takes over a task that a client made: from now on the server drives
// it, by Run, Go or Complete. It fails with HANDLE_INVALID, TASK_CANCELLED
// [ref] when the client has cancelled it, OPERATION_NOT_ALLOWED when it has
// finished otherwise, and OTHER_OPERATION_IN_PROGRESS [task, ref] when it is
// driven already. Whoever adopts a task has to end it.
func (m *Manager) Adopt(ref xapi.Ref) (*Handle, error) {
	h, err := m.register(ref, false)
	if err != nil {
		return nil, err
	}
	if _, err := m.claim(h); err != nil {
		m.forget(h)
		return nil, err
	}
	return h, nil
}

// register enters a handle for ref. With run an adopted handle is taken to be
// run; without it any handle is in the way.
func (m *Manager) register(ref xapi.Ref, run bool) (*Handle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return nil, xapi.NewError(xapi.InternalError, ErrStopping.Error()).Because(ErrStopping)
	}
	h := m.handles[ref]
	switch {
	case h == nil:
		h = newHandle(m, ref)
		m.handles[ref] = h
	case !run || h.running:
		return nil, xapi.NewError(xapi.OtherOperationInProgress, Class, string(ref))
	default:
		h.adopted = true
	}
	if run {
		h.running = true
		m.running.Add(1)
	}
	return h, nil
}

// forget takes a handle out and waits for its last write.
func (m *Manager) forget(h *Handle) {
	h.close()
	m.mu.Lock()
	if m.handles[h.ref] == h {
		delete(m.handles, h.ref)
	}
	m.mu.Unlock()
	h.cancel(context.Canceled)
}

// handle is the handle of a task that this process drives, or nil, and whether
// its work runs.
func (m *Manager) handle(ref xapi.Ref) (h *Handle, running bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h = m.handles[ref]; h == nil {
		return nil, false
	}
	return h, h.running
}

// claim marks the task as driven and tells whether it was so before: then its
// work is being taken up again after a restart, and has to run even when a
// cancel was asked, to settle what it had begun. h is registered before claim:
// a Cancel that comes first leaves a finished task, one that comes later finds h.
func (m *Manager) claim(h *Handle) (resumed bool, err error) {
	ctx, cancel := context.WithTimeout(m.base, writeTimeout)
	defer cancel()
	var rec Record
	err = m.store.Update(ctx, func(tx *store.Tx) error {
		rec = Record{}
		if err := tx.Get(Class, h.ref, &rec); err != nil {
			return err
		}
		if err := unfinished(h.ref, rec); err != nil {
			return err
		}
		resumed = rec.Driven
		if !rec.Driven {
			rec.Driven = true
			tx.Put(Class, h.ref, rec)
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("claim task %s: %w", h.ref, err)
	}
	h.uuid = rec.UUID
	if rec.Status == Cancelling {
		h.cancelTask()
	}
	return resumed, nil
}

// unfinished is nil, or says why nothing more can be done with the task.
func unfinished(ref xapi.Ref, rec Record) error {
	switch {
	case rec.Status == Cancelled:
		return taskCancelled(ref)
	case rec.Status.Finished():
		return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("task %s has finished already: %s", rec.UUID, rec.Status))
	}
	return nil
}

func taskCancelled(ref xapi.Ref) *xapi.Error { return xapi.NewError(xapi.TaskCancelled, string(ref)) }

// Run runs f as the work of the task, in the caller's goroutine, and records
// how it ended. ctx gives f its values and nothing else: it is not cancelled
// with ctx, but when ctx comes from the Func of another task, cancelling that
// one cancels this one, too. A panic of f is a failure of the task.
//
// What it returns is what f returned, or, without f having run, the errors of
// Adopt. When f is cut off by Stop the task stays pending.
func (m *Manager) Run(ctx context.Context, ref xapi.Ref, f Func) (string, error) {
	h, err := m.register(ref, true)
	if err != nil {
		return "", err
	}
	defer m.running.Done()
	defer m.forget(h)
	return m.run(ctx, h, f)
}

// Go is Run in a goroutine that Stop waits for. An error that keeps f from
// running is logged; after Stop the task stays pending.
func (m *Manager) Go(ref xapi.Ref, f Func) {
	h, err := m.register(ref, true)
	if err != nil {
		m.log.WithError(err).WithField("task_ref", ref).Warn("task not started")
		return
	}
	go func() {
		defer m.running.Done()
		defer m.forget(h)
		_, _ = m.run(m.base, h, f) // recorded in the task
	}()
}

func (m *Manager) run(ctx context.Context, h *Handle, f Func) (result string, err error) {
	if parent := FromContext(ctx); parent != nil && parent != h {
		defer h.follow(parent)()
	}
	resumed := false
	if !h.adopted {
		if resumed, err = m.claim(h); ended(err) {
			return "", err
		}
	}
	if err == nil && h.ctx.Err() != nil && !resumed {
		err = context.Cause(h.ctx) // cancelled before it began
	}
	if err == nil {
		result, err = call(valued{h.ctx, ctx}, h, f)
	}
	return result, m.finish(h, result, err)
}

// ended tells whether err of claim says that the task has ended without us.
func ended(err error) bool {
	return xapi.Is(err, xapi.TaskCancelled) || xapi.Is(err, xapi.OperationNotAllowed) || xapi.Is(err, xapi.HandleInvalid)
}

// call runs f and turns its panic into an error.
func call(ctx context.Context, h *Handle, f Func) (result string, err error) {
	defer func() {
		if p := recover(); p != nil {
			h.m.log.WithFields(logrus.Fields{"task": h.uuid, "stack": string(debug.Stack())}).Error("a task panicked")
			result, err = "", xapi.Internal("panic: %v", p)
		}
	}()
	return f(ctx, h)
}

// valued ends as its Context does and has the values of both.
type valued struct {
	context.Context
	values context.Context
}

func (v valued) Value(key any) any {
	if x := v.Context.Value(key); x != nil {
		return x
	}
	return v.values.Value(key)
}

package task

import (
	"context"
	"maps"
	"math"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// flushEvery is how often a running task writes what it reports.
	flushEvery = time.Second
	// flushTimeout bounds such a write.
	flushTimeout = 10 * time.Second

	maxOutput      = 16 << 10
	maxDetailKey   = 256
	maxDetailValue = 2 << 10
	maxDetails     = 64
)

// Handle is a driven task as its work sees it: where it reports and learns of
// a cancel. All methods may be called by many goroutines, on a nil Handle
// (there they do nothing), and after the task has ended (there, too).
type Handle struct {
	m      *Manager
	ref    xapi.Ref
	uuid   xapi.UUID // known once claimed
	ctx    context.Context
	cancel context.CancelCauseFunc

	adopted, running bool // guarded by m.mu until run, then constant

	mu       sync.Mutex // guards what follows
	progress float64    // highest reported
	written  float64    // highest in the record
	details  map[string]string
	keys     map[string]bool // every key ever reported
	last     time.Time       // of the last write
	armed    bool            // a flush waits or runs
	closed   bool
	disarm   func() bool
	flushes  sync.WaitGroup
}

type handleKey struct{}

func newHandle(m *Manager, ref xapi.Ref) *Handle {
	h := &Handle{m: m, ref: ref, details: map[string]string{}, keys: map[string]bool{}}
	ctx, cancel := context.WithCancelCause(m.base)
	h.cancel = cancel
	h.ctx = context.WithValue(ctx, handleKey{}, h)
	return h
}

// FromContext is the handle of the task whose Func was given ctx, or nil.
func FromContext(ctx context.Context) *Handle {
	h, _ := ctx.Value(handleKey{}).(*Handle)
	return h
}

// Ref is the task, or the null reference.
func (h *Handle) Ref() xapi.Ref {
	if h == nil {
		return xapi.NullRef
	}
	return h.ref
}

// Context is the context of the task: for work that goes on outside a Func,
// after Adopt. It carries the handle.
func (h *Handle) Context() context.Context {
	if h == nil {
		return context.Background()
	}
	return h.ctx
}

// Cancelled tells whether the task was asked to stop, by task.cancel or by
// Stop.
func (h *Handle) Cancelled() bool { return h != nil && h.ctx.Err() != nil }

// follow lets a cancel of parent cancel h, until the function it returns is
// called.
func (h *Handle) follow(parent *Handle) (stop func() bool) {
	if parent.ctx.Err() != nil {
		h.cancel(context.Cause(parent.ctx))
	}
	return context.AfterFunc(parent.ctx, func() { h.cancel(context.Cause(parent.ctx)) })
}

// cancelTask ends the context as task.cancel does.
func (h *Handle) cancelTask() { h.cancel(taskCancelled(h.ref)) }

// Progress reports how far the work is, from 0 to 1. What is lower than an
// earlier report is ignored. At most one write a second reaches the store, and
// never from the caller's goroutine.
func (h *Handle) Progress(fraction float64) {
	if h == nil || math.IsNaN(fraction) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := bound(fraction); p > h.progress {
		h.progress = p
		h.arm()
	}
}

func bound(fraction float64) float64 { return min(max(fraction, 0), 1) }

// Detail puts key into other_config, as throttled as Progress. Keys are cut to
// 256 bytes, values to their last 2 KiB; after 64 keys new ones are ignored.
func (h *Handle) Detail(key, value string) {
	h.detail(cut(key, maxDetailKey), tail(value, maxDetailValue))
}

// Output shows what the work has printed: the last 16 KiB of text stand in
// other_config under OutputKey. Each call replaces the last.
func (h *Handle) Output(text string) { h.detail(OutputKey, tail(text, maxOutput)) }

func (h *Handle) detail(key, value string) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.keys[key] && len(h.keys) >= maxDetails {
		return
	}
	h.keys[key] = true
	h.details[key] = value
	h.arm()
}

// arm sees to it that what is new gets written. Call it with mu held.
func (h *Handle) arm() {
	if h.closed || h.armed {
		return
	}
	h.armed = true
	h.flushes.Add(1)
	wait := max(0, h.last.Add(flushEvery).Sub(h.m.clock.Now()))
	h.disarm = h.m.clock.AfterFunc(wait, h.flush)
}

func (h *Handle) flush() {
	defer h.flushes.Done()
	h.mu.Lock()
	h.last = h.m.clock.Now()
	progress, details := h.progress, maps.Clone(h.details)
	h.mu.Unlock()

	err := h.write(progress, details)

	h.mu.Lock()
	defer h.mu.Unlock()
	h.armed = false
	if err == nil {
		h.written = progress
		for k, v := range details {
			if h.details[k] == v {
				delete(h.details, k)
			}
		}
	}
	if h.ctx.Err() == nil && (h.progress > h.written || len(h.details) > 0) {
		h.arm()
	}
}

// write puts a report into the record of a task that goes on. That the record
// is gone or finished is no error: there is nothing left to report to.
func (h *Handle) write(progress float64, details map[string]string) error {
	ctx, cancel := context.WithTimeout(h.ctx, flushTimeout)
	defer cancel()
	err := h.m.store.Update(ctx, func(tx *store.Tx) error {
		var rec Record
		if err := tx.Get(Class, h.ref, &rec); err != nil {
			return err
		}
		if rec.Status.Finished() {
			return nil
		}
		rec.Progress = max(rec.Progress, progress)
		rec.addDetails(details)
		tx.Put(Class, h.ref, rec)
		return nil
	})
	if xapi.Is(err, xapi.HandleInvalid) {
		return nil
	}
	return err
}

func (r *Record) addDetails(details map[string]string) {
	if r.OtherConfig == nil {
		r.OtherConfig = map[string]string{}
	}
	maps.Copy(r.OtherConfig, details)
}

// close stops the reporting and waits for a write that is under way. A second
// close only waits.
func (h *Handle) close() {
	h.mu.Lock()
	if !h.closed && h.armed && h.disarm() {
		h.flushes.Done()
	}
	h.closed = true
	h.mu.Unlock()
	h.flushes.Wait()
}

// unwritten is what the record does not hold yet.
func (h *Handle) unwritten() map[string]string {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.details)
}

// cut is the beginning of s, at most n bytes, in whole characters.
func cut(s string, n int) string {
	s = strings.ToValidUTF8(s[:min(len(s), n+utf8.UTFMax)], "\uFFFD")
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// tail is the end of s, at most n bytes, in whole characters.
func tail(s string, n int) string {
	s = strings.ToValidUTF8(s[max(0, len(s)-n-utf8.UTFMax):], "\uFFFD")
	if len(s) <= n {
		return s
	}
	s = s[len(s)-n:]
	for len(s) > 0 && !utf8.RuneStart(s[0]) {
		s = s[1:]
	}
	return s
}

// Detached gives a context that ends with ctx and has no task: what is done in it
// neither reports to the task nor decides how it ends.
func Detached(ctx context.Context) context.Context {
	return context.WithValue(ctx, handleKey{}, (*Handle)(nil))
}

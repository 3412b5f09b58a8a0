package task

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// fakeClock goes only when it is told to.
type fakeClock struct {
	mu     sync.Mutex
	now    time.Time
	timers []*fakeTimer
}

type fakeTimer struct {
	at   time.Time
	f    func()
	over bool
}

func newClock() *fakeClock { return &fakeClock{now: time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)} }

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) AfterFunc(d time.Duration, f func()) func() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &fakeTimer{at: c.now.Add(d), f: f}
	c.timers = append(c.timers, t)
	c.fire()
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		was := !t.over
		t.over = true
		return was
	}
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	c.fire()
}

func (c *fakeClock) fire() {
	for _, t := range c.timers {
		if !t.over && !t.at.After(c.now) {
			t.over = true
			go t.f()
		}
	}
	c.timers = slices.DeleteFunc(c.timers, func(t *fakeTimer) bool { return t.over })
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

var testHost = xapi.NewRef()

type rig struct {
	*Manager
	t     *testing.T
	s     *store.Store
	clock *fakeClock
}

func newRig(t *testing.T) *rig {
	t.Helper()
	before := goleak.IgnoreCurrent()
	s, err := store.Open(t.Context(), store.Options{Dir: t.TempDir(), Indexes: Indexes()})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, s: s, clock: newClock()}
	r.Manager = r.manager()
	t.Cleanup(func() {
		r.Stop()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, before)
	})
	return r
}

// manager is another manager of the same store: a daemon that was started
// again.
func (r *rig) manager() *Manager {
	return NewManager(r.s, func() xapi.Ref { return testHost }, quiet(), WithClock(r.clock))
}

func (r *rig) create(spec Spec) xapi.Ref {
	r.t.Helper()
	ref, err := r.Create(r.t.Context(), spec)
	if err != nil {
		r.t.Fatal(err)
	}
	return ref
}

func (r *rig) get(ref xapi.Ref) Record {
	r.t.Helper()
	rec, err := r.Get(ref)
	if err != nil {
		r.t.Fatal(err)
	}
	return rec
}

func (r *rig) wait(ref xapi.Ref) Record {
	r.t.Helper()
	rec, err := r.Wait(r.t.Context(), ref)
	if err != nil {
		r.t.Fatal(err)
	}
	return rec
}

// until waits for the record to be as wanted, and gives its revision.
func (r *rig) until(ref xapi.Ref, ok func(Record) bool) (rev int64) {
	r.t.Helper()
	err := r.s.Until(r.t.Context(), func(v *store.View) (bool, error) {
		rec, err := store.Get[Record](v, Class, ref)
		it, _ := v.Get(Class, ref)
		rev = it.Modified
		return err == nil && ok(rec), err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return rev
}

func (r *rig) gone(ref xapi.Ref) {
	r.t.Helper()
	if _, err := r.Get(ref); !xapi.Is(err, xapi.HandleInvalid) {
		r.t.Errorf("task is still there: %v", err)
	}
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if code == "" && err == nil || code != "" && xapi.Is(err, code) {
		return
	}
	t.Errorf("error %v, want %q", err, code)
}

func (r *rig) wantEnd(rec Record, status Status, info ...string) {
	r.t.Helper()
	if rec.Status != status || rec.Progress != 1 || !rec.Finished.Equal(r.clock.Now()) ||
		len(rec.AllowedOperations) != 0 || rec.AllowedOperations == nil ||
		len(rec.CurrentOperations) != 0 || rec.CurrentOperations == nil || rec.ErrorInfo == nil {
		r.t.Errorf("not an ended record of status %s: %+v", status, rec)
	}
	if !slices.Equal(rec.ErrorInfo, info) {
		r.t.Errorf("error_info %q, want %q", rec.ErrorInfo, info)
	}
}

// block is work that waits for its context and tells when it began.
func block(began chan<- struct{}) Func {
	return func(ctx context.Context, _ *Handle) (string, error) {
		close(began)
		<-ctx.Done()
		return "", fmt.Errorf("copy: %w", ctx.Err())
	}
}

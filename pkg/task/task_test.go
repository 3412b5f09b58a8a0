package task

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
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

func TestANewTaskIsPending(t *testing.T) {
	r := newRig(t)
	session := xapi.NewRef()
	ref := r.create(Spec{Label: "Patch upload", Description: "a patch", Session: session, User: "joe"})
	rec := r.get(ref)
	want := Record{
		UUID: rec.UUID, NameLabel: "Patch upload", NameDescription: "a patch", Status: Pending,
		AllowedOperations: []string{"cancel", "destroy"}, CurrentOperations: map[string]string{},
		Created: r.clock.Now(), Finished: xapi.Epoch, ResidentOn: testHost, Type: "<none/>",
		ErrorInfo: []string{}, OtherConfig: map[string]string{}, SubtaskOf: xapi.NullRef, Backtrace: "()",
		Session: session, User: "joe",
	}
	if !reflect.DeepEqual(rec, want) {
		t.Errorf("got  %+v\nwant %+v", rec, want)
	}
	if rec.Err() != nil {
		t.Error("a pending task has no error")
	}
	_ = r.s.View(func(v *store.View) error {
		if got := OfSession(v, session); !slices.Equal(got, []xapi.Ref{ref}) {
			t.Errorf("tasks of the session: %v", got)
		}
		return nil
	})
	for _, c := range []struct {
		session xapi.Ref
		user    string
		owned   bool
	}{{session, "", true}, {xapi.NewRef(), "joe", true}, {xapi.NewRef(), "ann", false}, {"", "", false}} {
		if rec.OwnedBy(c.session, c.user) != c.owned {
			t.Errorf("owned by %+v", c)
		}
	}
	if (Record{}).OwnedBy("", "") {
		t.Error("a task of the server belongs to nobody")
	}
}

func TestSpecsAreBounded(t *testing.T) {
	r := newRig(t)
	_, err := r.Create(t.Context(), Spec{Label: strings.Repeat("x", maxLabel+1)})
	wantCode(t, err, xapi.ValueNotSupported)
	_, err = r.Create(t.Context(), Spec{Description: strings.Repeat("x", maxDescription+1)})
	wantCode(t, err, xapi.ValueNotSupported)
	_, err = r.Create(t.Context(), Spec{SubtaskOf: xapi.NewRef()})
	wantCode(t, err, xapi.HandleInvalid)
}

func TestRunRecordsHowTheWorkEnded(t *testing.T) {
	r := newRig(t)
	coded := xapi.NewError(xapi.OutOfSpace, "SR local (1)")
	for _, c := range []struct {
		name   string
		f      Func
		status Status
		info   []string
	}{
		{"a result is success", func(context.Context, *Handle) (string, error) { return "<value>x</value>", nil }, Success, nil},
		{"a code is failure", func(context.Context, *Handle) (string, error) { return "", fmt.Errorf("vdi: %w", coded) },
			Failure, []string{"OUT_OF_SPACE", "SR local (1)"}},
		{"any other error is INTERNAL_ERROR", func(context.Context, *Handle) (string, error) { return "", errors.New("boom") },
			Failure, []string{"INTERNAL_ERROR", "boom"}},
		{"a panic is INTERNAL_ERROR", func(context.Context, *Handle) (string, error) { panic("boom") },
			Failure, []string{"INTERNAL_ERROR", "panic: boom"}},
		{"somebody else's cancelled context is failure", func(context.Context, *Handle) (string, error) { return "", context.Canceled },
			Failure, []string{"INTERNAL_ERROR", "context canceled"}},
		{"an endless result is failure", func(context.Context, *Handle) (string, error) { return strings.Repeat("x", maxResult+1), nil },
			Failure, []string{"INTERNAL_ERROR", "the result of the task is longer than 262144 bytes"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ref := r.create(Spec{Label: c.name})
			_, err := r.Run(t.Context(), ref, c.f)
			rec := r.get(ref)
			r.wantEnd(rec, c.status, c.info...)
			if c.status == Success {
				if err != nil || rec.Err() != nil || rec.Result != "<value>x</value>" {
					t.Errorf("%v %+v", err, rec)
				}
				return
			}
			if rec.Result != "" || rec.Err() == nil {
				t.Errorf("result %q, err %v", rec.Result, rec.Err())
			}
		})
	}
}

func TestErrorInfoIsBounded(t *testing.T) {
	params := make([]string, 100)
	params[0] = strings.Repeat("é", maxErrorParam)
	info := errorInfo(xapi.NewError("CODE", params...))
	if len(info) != 1+maxErrorInfo || len(info[1]) > maxErrorParam || info[0] != "CODE" {
		t.Errorf("%d params, %d bytes", len(info), len(info[1]))
	}
	if info := errorInfo(errors.New("x")); !slices.Equal(info, []string{"INTERNAL_ERROR", "x"}) {
		t.Error(info)
	}
}

type ctxKey struct{}

func TestTheRequestGivesValuesAndNoCancel(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	req, gone := context.WithCancel(context.WithValue(t.Context(), ctxKey{}, "v"))
	gone()
	_, err := r.Run(req, ref, func(ctx context.Context, h *Handle) (string, error) {
		if ctx.Err() != nil || ctx.Value(ctxKey{}) != "v" || FromContext(ctx) != h || h.Ref() != ref {
			t.Errorf("ctx: %v %v", ctx.Err(), ctx.Value(ctxKey{}))
		}
		sub, cancel := context.WithCancel(ctx)
		defer cancel()
		if FromContext(sub) != h || h.Cancelled() {
			t.Error("the handle comes with the context")
		}
		return "", nil
	})
	if err != nil {
		t.Error(err)
	}
	if FromContext(t.Context()) != nil {
		t.Error("no task, no handle")
	}
}

func TestANilHandleDoesNothing(t *testing.T) {
	var h *Handle
	h.Progress(1)
	h.Detail("a", "b")
	h.Output("x")
	if h.Cancelled() || h.Ref() != xapi.NullRef || h.Context().Err() != nil {
		t.Error("a nil handle knows nothing")
	}
}

func TestCancelEndsTheContextOfTheWork(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	began, cause := make(chan struct{}), error(nil)
	r.Go(ref, func(ctx context.Context, h *Handle) (string, error) {
		_, err := block(began)(ctx, h)
		cause = context.Cause(ctx)
		rec := r.get(ref)
		if rec.Status != Cancelling || !slices.Equal(rec.AllowedOperations, []string{"destroy"}) ||
			rec.CurrentOperations[string(ref)] != "cancel" || !h.Cancelled() {
			t.Errorf("while cancelling: %+v", rec)
		}
		return "", err
	})
	<-began
	for range 2 { // twice is fine
		if err := r.Cancel(t.Context(), ref); err != nil && !xapi.Is(err, xapi.OperationNotAllowed) {
			t.Fatal(err)
		}
	}
	r.wantEnd(r.wait(ref), Cancelled, "TASK_CANCELLED", string(ref))
	wantCode(t, cause, xapi.TaskCancelled)
	wantCode(t, r.Cancel(t.Context(), ref), xapi.OperationNotAllowed)
	wantCode(t, r.Cancel(t.Context(), xapi.NewRef()), xapi.HandleInvalid)
}

func TestWorkThatEndsInSpiteOfACancelIsWhatItIs(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct {
		err    error
		status Status
	}{
		{nil, Success},
		{xapi.NewError(xapi.PatchApplyFailed, "out"), Failure},
		{xapi.NewError(xapi.SRBackendFailure, "1").Because(context.Canceled), Cancelled},
		{xapi.NewError(xapi.TaskCancelled, "another"), Cancelled},
	} {
		ref := r.create(Spec{})
		_, err := r.Run(t.Context(), ref, func(ctx context.Context, _ *Handle) (string, error) {
			if err := r.Cancel(context.WithoutCancel(ctx), ref); err != nil {
				t.Error(err)
			}
			return "", c.err
		})
		rec := r.get(ref)
		if rec.Status != c.status {
			t.Errorf("%v: %+v", c.err, rec)
		}
		if c.status == Cancelled {
			r.wantEnd(rec, Cancelled, "TASK_CANCELLED", string(ref))
			wantCode(t, err, xapi.TaskCancelled)
		}
	}
}

func TestAClientsOwnTaskIsCancelledAtOnce(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	if err := r.Cancel(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	r.wantEnd(r.get(ref), Cancelled, "TASK_CANCELLED", string(ref))

	_, err := r.Run(t.Context(), ref, func(context.Context, *Handle) (string, error) {
		t.Error("a cancelled task does not run")
		return "", nil
	})
	wantCode(t, err, xapi.TaskCancelled)
	_, err = r.Adopt(ref)
	wantCode(t, err, xapi.TaskCancelled)
	wantCode(t, r.Complete(t.Context(), ref, "", nil), xapi.TaskCancelled)
	if rec := r.get(ref); rec.Status != Cancelled {
		t.Error(rec.Status)
	}
}

func TestCancelReachesTheSubtasks(t *testing.T) {
	r := newRig(t)
	parent := r.create(Spec{Label: "pool_apply"})
	child := r.create(Spec{SubtaskOf: parent})
	idle := r.create(Spec{SubtaskOf: parent})
	done := r.create(Spec{SubtaskOf: parent})
	if err := r.Complete(t.Context(), done, "", nil); err != nil {
		t.Fatal(err)
	}
	_ = r.s.View(func(v *store.View) error {
		if got := Subtasks(v, parent); !slices.Equal(got, []xapi.Ref{child, idle, done}) {
			t.Errorf("subtasks %v", got)
		}
		return nil
	})
	began, late := make(chan struct{}), r.create(Spec{})
	r.Go(parent, func(ctx context.Context, _ *Handle) (string, error) {
		_, err := r.Run(ctx, child, block(began))
		_, lateErr := r.Run(ctx, late, func(context.Context, *Handle) (string, error) {
			t.Error("nothing begins under a cancelled task")
			return "", nil
		})
		wantCode(t, lateErr, xapi.TaskCancelled)
		return "", err
	})
	<-began
	if err := r.Cancel(t.Context(), parent); err != nil {
		t.Fatal(err)
	}
	r.wantEnd(r.wait(parent), Cancelled, "TASK_CANCELLED", string(parent))
	r.wantEnd(r.wait(child), Cancelled, "TASK_CANCELLED", string(child))
	r.wantEnd(r.wait(late), Cancelled, "TASK_CANCELLED", string(late))
	r.wantEnd(r.wait(idle), Cancelled, "TASK_CANCELLED", string(idle))
	r.wantEnd(r.wait(done), Success)
}

func TestAdoptThenRun(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	h, err := r.Adopt(ref)
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Adopt(ref)
	wantCode(t, err, xapi.OtherOperationInProgress)
	_, err = r.Run(t.Context(), ref, func(ctx context.Context, got *Handle) (string, error) {
		_, err := r.Run(ctx, ref, nil)
		wantCode(t, err, xapi.OtherOperationInProgress)
		if got != h || FromContext(h.Context()) != h {
			t.Error("the work gets the adopted handle")
		}
		return "<value></value>", nil
	})
	if err != nil || r.get(ref).Result != "<value></value>" {
		t.Errorf("%v %+v", err, r.get(ref))
	}
	_, err = r.Adopt(ref)
	wantCode(t, err, xapi.OperationNotAllowed)
	_, err = r.Adopt(xapi.NewRef())
	wantCode(t, err, xapi.HandleInvalid)
}

func TestAdoptThenComplete(t *testing.T) {
	r := newRig(t)
	h, err := r.Begin(t.Context(), Spec{Label: "upload"})
	if err != nil {
		t.Fatal(err)
	}
	h.Detail("k", "v")
	if err := r.Cancel(t.Context(), h.Ref()); err != nil {
		t.Fatal(err)
	}
	if rec := r.get(h.Ref()); rec.Status != Cancelling || !h.Cancelled() {
		t.Errorf("driven, so it is cancelling: %+v", rec)
	}
	if err := r.Complete(t.Context(), h.Ref(), "", fmt.Errorf("read: %w", context.Canceled)); err != nil {
		t.Fatal(err)
	}
	rec := r.get(h.Ref())
	r.wantEnd(rec, Cancelled, "TASK_CANCELLED", string(h.Ref()))
	if rec.OtherConfig["k"] != "v" {
		t.Error(rec.OtherConfig)
	}
	if left, _ := r.handle(h.Ref()); left != nil {
		t.Error("the handle is still there")
	}
}

func TestACancelBetweenAdoptAndRunKeepsTheWorkFromBeginning(t *testing.T) {
	r := newRig(t)
	h, err := r.Begin(t.Context(), Spec{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Cancel(t.Context(), h.Ref()); err != nil {
		t.Fatal(err)
	}
	_, err = r.Run(t.Context(), h.Ref(), func(context.Context, *Handle) (string, error) {
		t.Error("runs")
		return "", nil
	})
	wantCode(t, err, xapi.TaskCancelled)
	r.wantEnd(r.get(h.Ref()), Cancelled, "TASK_CANCELLED", string(h.Ref()))
}

func TestDestroy(t *testing.T) {
	r := newRig(t)
	idle, done, running := r.create(Spec{}), r.create(Spec{}), r.create(Spec{})
	if err := r.Complete(t.Context(), done, "", nil); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []xapi.Ref{idle, done} {
		wantCode(t, r.Destroy(t.Context(), ref), "")
		r.gone(ref)
		wantCode(t, r.Destroy(t.Context(), ref), xapi.HandleInvalid)
	}
	_, err := r.Run(t.Context(), running, func(ctx context.Context, _ *Handle) (string, error) {
		wantCode(t, r.Destroy(ctx, running), "")
		rec := r.get(running)
		if rec.Status != Pending || !slices.Equal(rec.AllowedOperations, []string{"cancel"}) || ctx.Err() != nil {
			t.Errorf("only marked: %+v", rec)
		}
		return "", nil
	})
	wantCode(t, err, "")
	r.gone(running)
	_, err = r.Wait(t.Context(), running)
	wantCode(t, err, xapi.HandleInvalid)
}

// However they race, one terminal status is written and stays.
func TestOneTerminalStatus(t *testing.T) {
	r := newRig(t)
	for n := range 30 {
		ref := r.create(Spec{})
		seen := map[Status]int{}
		var last Record
		watch, stop := context.WithCancel(t.Context())
		watching := make(chan struct{})
		started := make(chan struct{})
		go func() {
			defer close(watching)
			_ = r.s.Until(watch, func(v *store.View) (bool, error) {
				if seen[""] == 0 {
					close(started)
				}
				seen[""]++
				rec, err := store.Get[Record](v, Class, ref)
				if rec.Status.Finished() && !reflect.DeepEqual(rec, last) {
					seen[rec.Status]++
					last = rec
				}
				return false, err
			})
		}()
		<-started
		var wg sync.WaitGroup
		race := []func(){
			func() { _ = r.Cancel(t.Context(), ref) },
			func() { _ = r.Complete(t.Context(), ref, "a", nil) },
			func() { _ = r.Complete(t.Context(), ref, "", errors.New("b")) },
			func() { _ = r.Repair(t.Context(), nil) },
			func() { _ = r.SetStatus(t.Context(), ref, Failure) },
			func() {
				_, _ = r.Run(t.Context(), ref, func(context.Context, *Handle) (string, error) { return "c", nil })
			},
		}
		for i := range race {
			wg.Go(race[(i+n)%len(race)])
		}
		wg.Wait()
		rec := r.wait(ref)
		stop()
		<-watching
		delete(seen, "")
		if len(seen) > 1 || seen[rec.Status] > 1 {
			t.Errorf("terminal writes %v, left %s", seen, rec.Status)
		}
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(xapi.NewError(xapi.SessionInvalid, "x"))
	_, err := r.Wait(ctx, ref)
	wantCode(t, err, xapi.SessionInvalid)
}

package task

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

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
			Failure, []string{"INTERNAL_ERROR", "the result of the task is longer than 131072 bytes"}},
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

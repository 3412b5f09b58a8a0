package task

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

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

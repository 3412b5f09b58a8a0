package task

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const interruptedText = "the operation was interrupted by a restart of patchd"

// A daemon that stops leaves what runs pending; the next one repairs it.
func TestStopLeavesWorkPendingAndRepairEndsIt(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	cut, owned, idle, marked, done := r.create(Spec{}), r.create(Spec{}), r.create(Spec{}), r.create(Spec{}), r.create(Spec{})
	wantCode(t, r.Complete(ctx, done, "x", nil), "")
	for _, ref := range []xapi.Ref{cut, owned, marked} {
		began := make(chan struct{})
		r.Go(ref, block(began))
		<-began
	}
	wantCode(t, r.Destroy(ctx, marked), "")
	asked, err := r.Begin(ctx, Spec{})
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, r.Cancel(ctx, asked.Ref()), "")
	r.Stop()
	r.Stop()
	for _, ref := range []xapi.Ref{cut, owned, marked, idle} {
		if s := r.get(ref).Status; s != Pending {
			t.Errorf("after Stop: %s", s)
		}
	}
	_, err = r.Run(ctx, idle, nil)
	if !errors.Is(err, ErrStopping) {
		t.Errorf("run after Stop: %v", err)
	}
	_, err = r.Adopt(idle)
	wantCode(t, err, xapi.InternalError)
	_, err = r.Begin(ctx, Spec{})
	wantCode(t, err, xapi.InternalError)
	r.Go(idle, nil)

	r.Manager = r.manager()
	live, err := r.Begin(ctx, Spec{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Repair(ctx, func(ref xapi.Ref) bool { return ref == owned }); err != nil {
			t.Fatal(err)
		}
	}
	r.wantEnd(r.get(cut), Failure, "INTERNAL_ERROR", interruptedText)
	r.wantEnd(r.get(idle), Failure, "INTERNAL_ERROR", interruptedText)
	r.wantEnd(r.get(asked.Ref()), Cancelled, "TASK_CANCELLED", string(asked.Ref()))
	r.wantEnd(r.get(done), Success)
	r.gone(marked)
	if r.get(owned).Status != Pending || r.get(live.Ref()).Status != Pending {
		t.Error("what goes on stays pending")
	}

	if _, err := r.Run(ctx, owned, func(context.Context, *Handle) (string, error) { return "y", nil }); err != nil {
		t.Fatal(err)
	}
	r.wantEnd(r.get(owned), Success)
}

// Work that a job takes up again after a restart has to run even when a cancel
// was asked: it settles what it had begun.
func TestResumedWorkLearnsOfACancel(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	began := make(chan struct{})
	r.Go(ref, block(began))
	<-began
	r.Stop()
	r.Manager = r.manager()
	wantCode(t, r.Cancel(t.Context(), ref), "")
	if s := r.get(ref).Status; s != Cancelling {
		t.Fatalf("a driven task without its work is %s", s)
	}
	ran := false
	_, err := r.Run(t.Context(), ref, func(ctx context.Context, _ *Handle) (string, error) {
		ran = true
		<-ctx.Done()
		return "", context.Cause(ctx)
	})
	wantCode(t, err, xapi.TaskCancelled)
	if !ran {
		t.Error("did not run")
	}
	r.wantEnd(r.get(ref), Cancelled, "TASK_CANCELLED", string(ref))
}

func TestStopWaitsForTheWork(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	began := make(chan struct{})
	r.Go(ref, func(ctx context.Context, h *Handle) (string, error) {
		close(began)
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), ErrStopping) || !h.Cancelled() {
			t.Errorf("cause %v", context.Cause(ctx))
		}
		return "done all the same", nil
	})
	<-began
	r.Stop()
	rec := r.get(ref)
	r.wantEnd(rec, Success)
	if rec.Result != "done all the same" {
		t.Error(rec.Result)
	}
}

func TestGC(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	oldPending, driven := r.create(Spec{}), r.create(Spec{})
	if _, err := r.Adopt(driven); err != nil {
		t.Fatal(err)
	}
	r.clock.advance(23 * time.Hour)
	young := r.create(Spec{})
	oldDone := r.create(Spec{})
	wantCode(t, r.Complete(ctx, oldDone, "", nil), "")
	r.clock.advance(65*time.Minute + 1)
	var done []xapi.Ref
	for range maxFinished + 70 {
		ref := r.create(Spec{})
		wantCode(t, r.Complete(ctx, ref, "", nil), "")
		done = append(done, ref)
		r.clock.advance(time.Millisecond)
	}
	wantCode(t, r.GC(ctx), "")
	if all, _ := allRefs(r); len(all) != len(done)+2 {
		t.Errorf("%d left: nobody could have seen how they ended", len(all))
	}
	r.clock.advance(time.Minute)
	wantCode(t, r.GC(ctx), "")
	r.gone(oldPending)
	r.gone(oldDone)
	if r.get(young).Status != Pending || r.get(driven).Status != Pending {
		t.Error("pending ones stay")
	}
	all, err := allRefs(r)
	want := append([]xapi.Ref{driven, young}, done[70:]...)
	if err != nil || !slices.Equal(all, want) {
		t.Errorf("%v: %d left, want %d", err, len(all), len(want))
	}
}

func allRefs(r *rig) (refs []xapi.Ref, err error) {
	err = r.each(func(ref xapi.Ref, _ Record) { refs = append(refs, ref) })
	return refs, err
}

func TestAUserCannotHoldTooManyTasks(t *testing.T) {
	r := newRig(t)
	const n = maxPerUser - 10
	refs := make([]xapi.Ref, n)
	for first := 0; first < n; first += 50 {
		err := r.s.Update(t.Context(), func(tx *store.Tx) error {
			for i := first; i < min(n, first+50); i++ {
				refs[i] = xapi.NewRef()
				tx.Put(Class, refs[i], Spec{Label: fmt.Sprint(i), User: "joe"}.record(r.clock.Now(), ""))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		r.create(Spec{User: "joe"})
	}
	_, err := r.Create(t.Context(), Spec{User: "joe"})
	wantCode(t, err, xapi.OperationNotAllowed)
	h, err := r.Begin(t.Context(), Spec{User: "joe"})
	wantCode(t, err, "")
	wantCode(t, r.Complete(t.Context(), h.Ref(), "", nil), "")
	r.create(Spec{User: "ann"})
	r.create(Spec{})

	r.clock.advance(25 * time.Hour) // the old ones may go
	r.create(Spec{User: "joe"})
	if n := r.countOf("joe"); n != 1 {
		t.Errorf("%d left", n)
	}
}

func TestRecordsThatCannotBeReadHideNoOthers(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	err := r.s.Update(t.Context(), func(tx *store.Tx) error {
		tx.Put(Class, xapi.NewRef(), map[string]any{"status": 7})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Repair(t.Context(), nil); err == nil {
		t.Error("a bad record is reported")
	}
	r.wantEnd(r.get(ref), Failure, "INTERNAL_ERROR", interruptedText)
}

func TestClientsDriveTheirOwnTasks(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.create(Spec{})
	wantCode(t, r.SetProgress(ctx, ref, 0.7), "")
	wantCode(t, r.SetProgress(ctx, ref, 0.2), "")
	if p := r.get(ref).Progress; p != 0.2 {
		t.Errorf("progress %v", p)
	}
	wantCode(t, r.SetResult(ctx, ref, "ok"), "")
	wantCode(t, r.SetErrorInfo(ctx, ref, []string{"CODE", "x"}), "")
	wantCode(t, r.SetStatus(ctx, ref, Pending), "")
	wantCode(t, r.SetStatus(ctx, ref, "gone"), xapi.ValueNotSupported)
	if rec := r.get(ref); rec.Status != Pending || !slices.Equal(rec.ErrorInfo, []string{"CODE", "x"}) {
		t.Errorf("%+v", rec)
	}
	wantCode(t, r.SetErrorInfo(ctx, ref, nil), "")
	wantCode(t, r.SetStatus(ctx, ref, Success), "")
	r.wantEnd(r.get(ref), Success)
	if rec := r.get(ref); rec.Result != "ok" {
		t.Errorf("result %q", rec.Result)
	}
	wantCode(t, r.SetStatus(ctx, ref, Failure), xapi.OperationNotAllowed)
	wantCode(t, r.SetResult(ctx, ref, "late"), xapi.OperationNotAllowed)
	wantCode(t, r.SetErrorInfo(ctx, ref, nil), xapi.OperationNotAllowed)
	wantCode(t, r.SetProgress(ctx, ref, 0.5), "")
	r.wantEnd(r.get(ref), Success)

	driven, err := r.Begin(ctx, Spec{})
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, r.SetStatus(ctx, driven.Ref(), Success), xapi.OperationNotAllowed)
	wantCode(t, r.SetResult(ctx, driven.Ref(), "x"), xapi.OperationNotAllowed)
	wantCode(t, r.SetResult(ctx, ref, string(make([]byte, maxResult+1))), xapi.ValueNotSupported)
	wantCode(t, r.SetProgress(ctx, xapi.NewRef(), 0.5), xapi.HandleInvalid)
	cancelled := r.create(Spec{})
	wantCode(t, r.SetStatus(ctx, cancelled, Cancelling), "")
	if s := r.get(cancelled).Status; s != Cancelled {
		t.Error(s)
	}
}

// Whatever clients have put into other_config: a task ends.
func TestATaskThatIsFullEndsAllTheSame(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	_, err := r.Run(t.Context(), ref, func(ctx context.Context, h *Handle) (string, error) {
		err := r.s.Update(ctx, func(tx *store.Tx) error {
			rec, err := store.Read[Record](tx, Class, ref)
			rec.OtherConfig["big"] = strings.Repeat("x", store.MaxBytes-4096)
			tx.Put(Class, ref, rec)
			return err
		})
		h.Output(strings.Repeat("y", maxOutput))
		return strings.Repeat("z", maxResult), err
	})
	wantCode(t, err, "")
	rec := r.get(ref)
	r.wantEnd(rec, Success)
	if len(rec.Result) != maxResult || len(rec.OtherConfig) != 0 {
		t.Errorf("%d bytes, %d keys", len(rec.Result), len(rec.OtherConfig))
	}
}

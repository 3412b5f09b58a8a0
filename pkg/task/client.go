package task

import (
	"context"
	"fmt"
	"math"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// What a client may do to a task by a call.

// Cancel asks a task, and its unfinished subtasks, to stop. A task that nobody
// drives is cancelled at once; a driven one becomes cancelling, the context of
// its work ends, and it finishes when the work returns. Cancelling twice is
// fine. It fails with HANDLE_INVALID, and OPERATION_NOT_ALLOWED when the task
// has finished.
func (m *Manager) Cancel(ctx context.Context, ref xapi.Ref) error {
	if err := m.cancel(ctx, ref); err != nil {
		return err
	}
	return m.cancelSubtasks(ctx, ref)
}

func (m *Manager) cancel(ctx context.Context, ref xapi.Ref) error {
	var rec Record
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		rec = Record{}
		if err := tx.Get(Class, ref, &rec); err != nil {
			return err
		}
		if rec.Status.Finished() {
			return notAllowed(rec, "finished already: "+string(rec.Status))
		}
		if rec.Status == Cancelling && rec.Driven {
			return nil
		}
		if !rec.Driven {
			rec.end(ref, m.clock.Now(), "", taskCancelled(ref))
			rec.store(tx, ref)
			return nil
		}
		rec.Status = Cancelling
		rec.AllowedOperations = []string{opDestroy}
		rec.CurrentOperations = map[string]string{string(ref): opCancel}
		tx.Put(Class, ref, rec)
		return nil
	})
	if err != nil {
		return fmt.Errorf("cancel task %s: %w", ref, err)
	}
	if h, _ := m.handle(ref); h != nil {
		h.cancelTask()
	}
	return nil
}

// cancelSubtasks goes down the tree of subtasks. Those that finish meanwhile
// are no failure. A parent is always there before its children, so there are
// no circles.
func (m *Manager) cancelSubtasks(ctx context.Context, parent xapi.Ref) error {
	var children []xapi.Ref
	err := m.store.View(func(v *store.View) error {
		children = Subtasks(v, parent)
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range children {
		if err := m.Cancel(ctx, c); err != nil && !ended(err) {
			return err
		}
	}
	return nil
}

func notAllowed(rec Record, why string) error {
	return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("task %s (%s) is %s", rec.UUID, cut(rec.NameLabel, 64), why))
}

// Destroy takes a task's record away. A driven task that has not finished is
// only marked: it goes on, and vanishes when it has finished. It fails with
// HANDLE_INVALID.
func (m *Manager) Destroy(ctx context.Context, ref xapi.Ref) error {
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		var rec Record
		if err := tx.Get(Class, ref, &rec); err != nil {
			return err
		}
		if rec.Status.Finished() || !rec.Driven {
			tx.Delete(Class, ref)
			return nil
		}
		rec.Destroy = true
		rec.AllowedOperations = without(rec.AllowedOperations, opDestroy)
		tx.Put(Class, ref, rec)
		return nil
	})
	if err != nil {
		return fmt.Errorf("destroy task %s: %w", ref, err)
	}
	return nil
}

func without(words []string, word string) []string {
	out := []string{}
	for _, w := range words {
		if w != word {
			out = append(out, w)
		}
	}
	return out
}

// SetProgress is a client reporting how far its own task is, from 0 to 1. On a
// task that the server drives, or that has finished, it changes nothing. It
// fails with HANDLE_INVALID and VALUE_NOT_SUPPORTED.
func (m *Manager) SetProgress(ctx context.Context, ref xapi.Ref, fraction float64) error {
	if math.IsNaN(fraction) {
		return xapi.NewError(xapi.ValueNotSupported, "progress", "nan", "not a number")
	}
	return m.change(ctx, ref, func(rec *Record) error {
		if !rec.Driven && !rec.Status.Finished() {
			rec.Progress = bound(fraction)
		}
		return nil
	})
}

// SetResult is a client storing the result of its own unfinished task. It
// fails with HANDLE_INVALID, VALUE_NOT_SUPPORTED when it is longer than
// 128 KiB, and OPERATION_NOT_ALLOWED on a task that the server drives or that
// has finished.
func (m *Manager) SetResult(ctx context.Context, ref xapi.Ref, result string) error {
	if len(result) > maxResult {
		return xapi.NewError(xapi.ValueNotSupported, "result", cut(result, 64)+"…", fmt.Sprintf("longer than %d bytes", maxResult))
	}
	return m.change(ctx, ref, func(rec *Record) error {
		if err := clients(*rec); err != nil {
			return err
		}
		rec.Result = result
		return nil
	})
}

// SetErrorInfo is a client storing the error of its own unfinished task, code
// first; at most 17 texts, 64 KiB in all, are kept. It fails as SetResult does.
func (m *Manager) SetErrorInfo(ctx context.Context, ref xapi.Ref, info []string) error {
	if len(info) == 0 {
		info = []string{""}
	}
	bounded := errorInfo(xapi.NewError(info[0], info[1:]...))
	return m.change(ctx, ref, func(rec *Record) error {
		if err := clients(*rec); err != nil {
			return err
		}
		rec.ErrorInfo = without(bounded, "")
		return nil
	})
}

// SetStatus is a client ending its own task: success, failure or cancelled are
// final; pending changes nothing, cancelling is Cancel. Result and error_info
// stay as the client has set them. It fails with HANDLE_INVALID,
// VALUE_NOT_SUPPORTED on any other word, and OPERATION_NOT_ALLOWED on a task
// that the server drives or that has finished.
func (m *Manager) SetStatus(ctx context.Context, ref xapi.Ref, status Status) error {
	switch status {
	case Pending, Success, Failure, Cancelled:
	case Cancelling:
		return m.Cancel(ctx, ref)
	default:
		return xapi.NewError(xapi.ValueNotSupported, "status", cut(string(status), 64), "not a status of a task")
	}
	return m.change(ctx, ref, func(rec *Record) error {
		if err := clients(*rec); err != nil {
			return err
		}
		if status == Pending {
			return nil
		}
		result, info := rec.Result, rec.ErrorInfo
		rec.end(ref, m.clock.Now(), "", nil)
		rec.Status, rec.Result, rec.ErrorInfo = status, result, info
		return nil
	})
}

// clients is nil when rec is still the client's to change.
func clients(rec Record) error {
	switch {
	case rec.Status.Finished():
		return notAllowed(rec, "finished already: "+string(rec.Status))
	case rec.Driven:
		return notAllowed(rec, "driven by the server")
	}
	return nil
}

// change is a transaction on one record.
func (m *Manager) change(ctx context.Context, ref xapi.Ref, f func(rec *Record) error) error {
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		var rec Record
		if err := tx.Get(Class, ref, &rec); err != nil {
			return err
		}
		if err := f(&rec); err != nil {
			return err
		}
		rec.storeChanged(tx, ref)
		return nil
	})
	if err != nil {
		return fmt.Errorf("change task %s: %w", ref, err)
	}
	return nil
}

func (r *Record) storeChanged(tx *store.Tx, ref xapi.Ref) {
	if r.Status.Finished() {
		r.store(tx, ref)
		return
	}
	tx.Put(Class, ref, *r)
}

package task

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	maxResult     = 128 << 10
	maxErrorParam = 32 << 10 // bytes of one parameter
	maxErrorBytes = 64 << 10 // of all
	maxErrorInfo  = 16       // parameters
)

// Complete ends a task: success with result when err is nil, cancelled when
// err is TASK_CANCELLED, else failure with the code and parameters of err.
// result is the XML-RPC encoding of a value, at most 128 KiB. A task that has
// a terminal status keeps it: Complete then fails with TASK_CANCELLED [ref] or
// OPERATION_NOT_ALLOWED; a task that is gone gives HANDLE_INVALID.
func (m *Manager) Complete(ctx context.Context, ref xapi.Ref, result string, err error) error {
	h, running := m.handle(ref)
	if h != nil {
		err = h.outcome(err)
	}
	werr := m.end(ctx, ref, ending{h.unwritten(), result, err})
	if h != nil && !running && (werr == nil || ended(werr)) {
		m.forget(h)
	}
	return werr
}

// outcome turns an error that is the echo of a cancel into TASK_CANCELLED.
func (h *Handle) outcome(err error) error {
	asked := h.ctx.Err() != nil && xapi.Is(context.Cause(h.ctx), xapi.TaskCancelled)
	if asked && (errors.Is(err, context.Canceled) || xapi.Is(err, xapi.TaskCancelled)) {
		return taskCancelled(h.ref).Because(err)
	}
	return err
}

// ending is how a task ends.
type ending struct {
	details map[string]string // for other_config
	result  string
	err     error
}

// end is the one place where a status becomes terminal, but for the bulk of
// Repair and a client's own words: one transaction that refuses a task that
// has one.
func (m *Manager) end(ctx context.Context, ref xapi.Ref, e ending) error {
	if e.err == nil && len(e.result) > maxResult {
		e.err = xapi.Internal("the result of the task is longer than %d bytes", maxResult)
	}
	rec, err := m.storeEnd(ctx, ref, e, false)
	if xapi.Is(err, xapi.MessageTooLarge) { // by what clients put into other_config
		e.details = nil
		rec, err = m.storeEnd(ctx, ref, e, true)
	}
	if err != nil {
		return fmt.Errorf("end task %s: %w", ref, err)
	}
	m.logEnd(rec, e.err)
	return nil
}

// storeEnd is the transaction of end. slim drops other_config: how a task ended
// has to fit.
func (m *Manager) storeEnd(ctx context.Context, ref xapi.Ref, e ending, slim bool) (Record, error) {
	var rec Record
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		rec = Record{}
		if err := tx.Get(Class, ref, &rec); err != nil {
			return err
		}
		if err := unfinished(ref, rec); err != nil {
			return err
		}
		if slim {
			rec.OtherConfig = map[string]string{}
		}
		rec.addDetails(e.details)
		rec.end(ref, m.clock.Now(), e.result, e.err)
		rec.store(tx, ref)
		return nil
	})
	return rec, err
}

func (m *Manager) logEnd(rec Record, err error) {
	log := m.log.WithFields(logrus.Fields{"task": rec.UUID, "label": rec.NameLabel, "status": rec.Status})
	if rec.Status == Failure {
		log.WithError(err).Info("task ended")
		return
	}
	log.Debug("task ended")
}

// end gives r its terminal status.
func (r *Record) end(ref xapi.Ref, now time.Time, result string, err error) {
	r.Progress = 1
	r.Finished = now.UTC()
	r.AllowedOperations = []string{}
	r.CurrentOperations = map[string]string{}
	switch {
	case err == nil:
		r.Status, r.Result, r.ErrorInfo = Success, result, []string{}
	case xapi.Is(err, xapi.TaskCancelled):
		r.Status, r.ErrorInfo = Cancelled, taskCancelled(ref).Description()
	default:
		r.Status, r.ErrorInfo = Failure, errorInfo(err)
	}
}

// store writes an ended record, or takes it away where that was asked.
func (r *Record) store(tx *store.Tx, ref xapi.Ref) {
	if r.Destroy {
		tx.Delete(Class, ref)
		return
	}
	tx.Put(Class, ref, *r)
}

// errorInfo is the description of err, bounded: it has to fit a record.
func errorInfo(err error) []string {
	info := xapi.AsError(err).Description()
	info = append([]string{}, info[:min(len(info), 1+maxErrorInfo)]...)
	left := maxErrorBytes
	for i, s := range info {
		info[i] = cut(s, min(maxErrorParam, left))
		left -= len(info[i])
	}
	return info
}

// finish records how f of a running task has ended and gives the error that
// was recorded. It tries until the store has it, but for Stop and the loss of
// the lead; then, and when f was cut off by Stop, the task stays pending.
func (m *Manager) finish(h *Handle, result string, err error) error {
	h.close()
	if interrupted(h.ctx, err) {
		return xapi.NewError(xapi.InternalError, ErrStopping.Error()).Because(err)
	}
	err = h.outcome(err)
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		werr := m.endInTime(h, result, err)
		if werr == nil || ended(werr) {
			return err
		}
		m.log.WithError(werr).WithField("task", h.uuid).Warn("the end of a task is not stored yet")
		if errors.Is(werr, store.ErrDeposed) || errors.Is(werr, store.ErrClosed) || !m.pause(wait) {
			return err // the next coordinator repairs it
		}
	}
}

// endInTime is end with a deadline of its own: it has to work while the
// manager stops.
func (m *Manager) endInTime(h *Handle, result string, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(h.ctx), writeTimeout)
	defer cancel()
	return m.end(ctx, h.ref, ending{h.unwritten(), result, err})
}

// interrupted tells whether err is the echo of Stop. Where a cancel came before
// Stop it is that of the cancel.
func interrupted(ctx context.Context, err error) bool {
	return errors.Is(err, ErrStopping) ||
		errors.Is(err, context.Canceled) && errors.Is(context.Cause(ctx), ErrStopping)
}

// pause waits for d; false says that the manager stops.
func (m *Manager) pause(d time.Duration) bool {
	over := make(chan struct{})
	stop := m.clock.AfterFunc(d, func() { close(over) })
	defer stop()
	select {
	case <-over:
		return true
	case <-m.base.Done():
		return false
	}
}

// Wait waits for a task to finish and gives its record. It fails with
// HANDLE_INVALID when the task is gone, or goes without a last record because
// it was destroyed while it ran, and with the cause of ctx.
func (m *Manager) Wait(ctx context.Context, ref xapi.Ref) (Record, error) {
	var rec Record
	var seen int64 = -1
	err := m.store.Until(ctx, func(v *store.View) (bool, error) {
		it, ok := v.Get(Class, ref)
		if !ok {
			return false, xapi.NewError(xapi.HandleInvalid, Class, string(ref))
		}
		if it.Modified == seen {
			return false, nil
		}
		seen, rec = it.Modified, Record{}
		if err := it.Decode(&rec); err != nil {
			return false, err
		}
		return rec.Status.Finished(), nil
	})
	return rec, err
}

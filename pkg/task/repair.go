package task

import (
	"cmp"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// What keeps the set of tasks small and true.

const (
	pendingFor  = 24 * time.Hour
	finishedFor = 65 * time.Minute
	maxFinished = 200
	// readable is how long a finished task stays at least, so that whoever
	// asked for the work can see how it ended.
	readable = time.Minute
	// batch is how many records one transaction takes: each costs up to two
	// operations of the 128 that there are.
	batch = 50
)

// errInterrupted is how a task ends that a restart has cut off.
var errInterrupted = xapi.NewError(xapi.InternalError, "the operation was interrupted by a restart of patchd")

// Repair ends what an earlier process has left: every unfinished task that
// owned does not claim for a durable job becomes failure, INTERNAL_ERROR with
// a text that says so, cancelled when that was asked, or success when Settle was
// called for it. Tasks that this
// process drives are left alone. Call it once this host is the coordinator,
// before clients are let in. A second Repair is harmless. owned may be nil.
func (m *Manager) Repair(ctx context.Context, owned func(ref xapi.Ref) bool) error {
	var left []xapi.Ref
	err := m.each(func(ref xapi.Ref, rec Record) {
		if rec.Status.Finished() || owned != nil && owned(ref) {
			return
		}
		if h, _ := m.handle(ref); h == nil {
			left = append(left, ref)
		}
	})
	for _, ref := range left {
		if err := m.repair(ctx, ref); err != nil {
			return err
		}
	}
	return err
}

// Settle notes, in the transaction that makes the work of a task true, the text
// that is its result: a restart before the task has ended is then no failure.
// The task does not end by it. A task that is gone, or has ended, is left alone;
// the null reference is none.
func Settle(tx *store.Tx, ref xapi.Ref, text string) error {
	if ref.IsNull() || !tx.Has(Class, ref) {
		return nil
	}
	rec, err := store.Read[Record](tx, Class, ref)
	if err != nil || rec.Status.Finished() {
		return err
	}
	var b strings.Builder
	if err := xml.EscapeText(&b, []byte(text)); err != nil {
		return err
	}
	rec.Settled = "<value>" + b.String() + "</value>"
	tx.Put(Class, ref, rec)
	return nil
}

func (m *Manager) repair(ctx context.Context, ref xapi.Ref) error {
	var why error
	var rec Record
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		rec = Record{}
		if err := tx.Get(Class, ref, &rec); err != nil {
			return err
		}
		if err := unfinished(ref, rec); err != nil {
			return err
		}
		why = errInterrupted
		switch {
		case rec.Settled != "":
			why = nil
		case rec.Status == Cancelling:
			why = taskCancelled(ref)
		}
		rec.end(ref, m.clock.Now(), rec.Settled, why)
		rec.store(tx, ref)
		return nil
	})
	switch {
	case ended(err):
		return nil
	case err != nil:
		return fmt.Errorf("repair task %s: %w", ref, err)
	}
	m.logEnd(rec, why)
	return nil
}

// each calls f with every task, oldest first. A record that cannot be read is
// reported when all others have been seen.
func (m *Manager) each(f func(ref xapi.Ref, rec Record)) error {
	var items []store.Item
	err := m.store.View(func(v *store.View) error {
		items = v.List(Class)
		return nil
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, it := range items {
		var rec Record
		if err := it.Decode(&rec); err != nil {
			errs = append(errs, fmt.Errorf("task %s: %w", it.Ref, err))
			continue
		}
		f(it.Ref, rec)
	}
	return errors.Join(errs...)
}

// GC takes old records away: tasks of clients that are pending for more than
// 24 hours, tasks that finished more than 65 minutes ago, and of the finished
// ones the oldest beyond 200, unless they finished within the last minute.
// Tasks that the server drives stay until they have finished. Call it every
// few minutes.
func (m *Manager) GC(ctx context.Context) error { return m.gc(ctx, readable) }

func (m *Manager) gc(ctx context.Context, keep time.Duration) error {
	now := m.clock.Now()
	type done struct {
		ref xapi.Ref
		at  time.Time
	}
	var old []xapi.Ref
	var kept []done
	err := m.each(func(ref xapi.Ref, rec Record) {
		switch {
		case rec.Status.Finished() && now.Sub(rec.Finished) > finishedFor,
			!rec.Status.Finished() && !rec.Driven && now.Sub(rec.Created) > pendingFor:
			old = append(old, ref)
		case rec.Status.Finished():
			kept = append(kept, done{ref, rec.Finished})
		}
	})
	slices.SortStableFunc(kept, func(a, b done) int { return cmp.Compare(a.at.UnixNano(), b.at.UnixNano()) })
	for _, d := range kept[:max(0, len(kept)-maxFinished)] {
		if now.Sub(d.at) >= keep {
			old = append(old, d.ref)
		}
	}
	for part := range slices.Chunk(old, batch) {
		if err := m.remove(ctx, part); err != nil {
			return err
		}
	}
	return err
}

// remove deletes records, but not those that the server began to drive since.
func (m *Manager) remove(ctx context.Context, refs []xapi.Ref) error {
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		for _, ref := range refs {
			var rec Record
			err := tx.Get(Class, ref, &rec)
			switch {
			case xapi.Is(err, xapi.HandleInvalid):
				continue
			case err != nil:
				return err
			case rec.Status.Finished() || !rec.Driven:
				tx.Delete(Class, ref)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove %d old tasks: %w", len(refs), err)
	}
	return nil
}

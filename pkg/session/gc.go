package session

import (
	"context"
	"fmt"
	"slices"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// batch is how many records one transaction removes.
const batch = 50

// GC ends and removes sessions that are dead: idle for 24 hours, or without
// their user. Call it every few minutes.
func (m *Manager) GC(ctx context.Context) error {
	m.mu.Lock()
	m.dropOldBasic()
	var dead []xapi.Ref
	err := m.store.View(func(v *store.View) error {
		dead = m.sweep(v)
		return nil
	})
	m.mu.Unlock()
	if err != nil {
		return err
	}
	for part := range slices.Chunk(dead, batch) {
		if err := m.remove(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

// sweep ends what is dead of the sessions in memory and names the dead stored
// ones. Call it with mu held.
func (m *Manager) sweep(v *store.View) (dead []xapi.Ref) {
	now := m.now()
	for _, it := range v.List(Class) {
		var rec Record
		ok := it.Decode(&rec) == nil
		if ok {
			_, ok = roleOf(v, rec)
		}
		if !ok || now.Sub(lastUse(rec, m.live[it.Ref])) >= idleFor {
			dead = append(dead, it.Ref)
			m.end(it.Ref)
		}
	}
	for stored, l := range m.live {
		rec, ok := m.record(v, stored, l)
		if ok {
			_, ok = roleOf(v, rec)
		}
		if !ok {
			m.end(stored)
		}
	}
	return dead
}

func (m *Manager) remove(ctx context.Context, refs []xapi.Ref) error {
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		for _, ref := range refs {
			tx.Delete(Class, ref)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove %d dead sessions: %w", len(refs), err)
	}
	return nil
}

// reap is GC after a user has changed. The sessions are dead already, so a
// failure leaves garbage only, which the next GC removes.
func (m *Manager) reap(ctx context.Context) {
	if err := m.GC(ctx); err != nil {
		m.log.WithError(err).Warn("dead sessions are not removed yet")
	}
}

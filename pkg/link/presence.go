package link

import (
	"context"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// leavers are the hosts whose presence may have to be stored. Every host has
// the same grace, so those that left wait in the order in which they did, and
// one timer does for all. The hub's mu guards it.
type leavers struct {
	left  []leaver
	backs map[xapi.Ref]bool // their record says away, and they are connected
	wake  chan struct{}
}

// leaver is a host that was not connected at a time.
type leaver struct {
	host xapi.Ref
	at   time.Time
}

// awayBatch is how many records one transaction changes, and awayAgain when it is
// tried again after a failure.
const (
	awayBatch = 100
	awayAgain = 5 * time.Second
)

// leaves notes that a host is not connected since at. Call it with mu held.
func (h *Hub) leaves(m *member, at time.Time) {
	if m.link != nil || m.ref == h.o.Self {
		return
	}
	if !m.since.IsZero() {
		m.since = at
	}
	h.left = append(h.left, leaver{m.ref, at})
	h.nudge()
}

// back notes that a host is connected whose record says it is away. Call it
// with mu held.
func (h *Hub) back(host xapi.Ref) {
	if h.backs == nil {
		h.backs = map[xapi.Ref]bool{}
	}
	h.backs[host] = true
	h.nudge()
}

func (h *Hub) nudge() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// minder stores who is away and who is back, until ctx ends.
func (h *Hub) minder(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		case <-timer.C:
		}
		select { // so that many who leave together are stored together
		case <-ctx.Done():
			return
		case <-time.After(h.times.gather):
		}
		pause, err := h.storePresence(ctx)
		if err != nil && ctx.Err() == nil {
			h.o.Log.WithError(err).Errorf("who is away could not be stored; it is tried again in %s", awayAgain)
			pause = awayAgain
		}
		timer.Reset(pause)
	}
}

// storePresence stores what is due, and gives the time until more is.
func (h *Hub) storePresence(ctx context.Context) (time.Duration, error) {
	for {
		batch, next := h.due()
		if len(batch) == 0 {
			return next, nil
		}
		if err := h.storeBatch(ctx, batch); err != nil {
			h.mu.Lock()
			for _, l := range batch {
				h.left = append([]leaver{l}, h.left...)
			}
			h.mu.Unlock()
			return 0, err
		}
	}
}

// due takes the next hosts whose record may have to change: at zero for those
// that are back.
func (h *Hub) due() (batch []leaver, next time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for host := range h.backs {
		if len(batch) == awayBatch {
			return batch, 0
		}
		batch = append(batch, leaver{host: host})
		delete(h.backs, host)
	}
	now := h.o.Now()
	for len(h.left) > 0 {
		l := h.left[0]
		if wait := h.times.grace - now.Sub(l.at); wait > 0 {
			return batch, wait
		}
		if len(batch) == awayBatch {
			return batch, 0
		}
		h.left = h.left[1:]
		batch = append(batch, l)
	}
	h.left = nil
	return batch, time.Hour
}

// storeBatch makes the records say what holds now.
func (h *Hub) storeBatch(ctx context.Context, batch []leaver) error {
	return h.o.Store.Update(ctx, func(tx *store.Tx) error {
		for _, l := range batch {
			rec, err := store.Read[pool.Host](tx, pool.ClassHost, l.host)
			if xapi.Is(err, xapi.HandleInvalid) {
				continue
			}
			if err != nil {
				return err
			}
			since, connected := h.Seen(l.host)
			switch {
			case connected && !rec.Away.IsZero():
				rec.Away = time.Time{}
			case !connected && rec.Away.IsZero() && !l.at.IsZero() && !since.After(l.at):
				rec.Away = l.at.UTC()
			default:
				continue
			}
			tx.Put(pool.ClassHost, l.host, rec)
		}
		return nil
	})
}

// Connected tells whether a host is connected now.
func (h *Hub) Connected(host xapi.Ref) bool {
	_, connected := h.Seen(host)
	return connected
}

// Seen tells whether a host is connected, and since when it is or is not; zero:
// nothing was seen of it since this coordinator leads.
func (h *Hub) Seen(host xapi.Ref) (since time.Time, connected bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.index.members[host]
	switch {
	case m == nil:
		return time.Time{}, false
	case host == h.o.Self:
		return m.since, true
	}
	return m.since, m.link != nil
}

// Hosts gives the hosts that are connected, this one not counted.
func (h *Hub) Hosts() []xapi.Ref {
	h.mu.Lock()
	defer h.mu.Unlock()
	var refs []xapi.Ref
	for ref, m := range h.index.members {
		if m.link != nil {
			refs = append(refs, ref)
		}
	}
	return refs
}

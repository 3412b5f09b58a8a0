package server

import (
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// inventoryPause gathers changes of the storage before they are told.
const inventoryPause = 50 * time.Millisecond

// maxInventoryPause lies at most between two tries to tell what is refused.
const maxInventoryPause = time.Minute

// sender tells the coordinator of an inventory; *link.Client is one.
type sender interface {
	Inventory(ctx context.Context, inv pool.Inventory) error
}

// inventory keeps the coordinator's copy of what lies on this host's storage up
// to date: it follows the store of this host and tells what has changed.
type inventory struct {
	store *store.Store
	pool  *pool.Pool
	to    sender
	log   logrus.FieldLogger

	mu    sync.Mutex
	acked *pool.Inventory // what the coordinator has; nil: nobody knows
	told  int64           // the revision of the store that acked is of
	next  chan struct{}   // closed when told moves on, or a connection is new
}

func newInventory(s *store.Store, p *pool.Pool, to sender, log logrus.FieldLogger) *inventory {
	return &inventory{store: s, pool: p, to: to, log: log, next: make(chan struct{})}
}

// reset makes the next telling a full one: the coordinator is another, or may
// have missed something.
func (i *inventory) reset() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.acked, i.told = nil, 0
	close(i.next)
	i.next = make(chan struct{})
}

func (i *inventory) state() (acked *pool.Inventory, told int64, next chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.acked, i.told, i.next
}

// run tells of changes until ctx ends.
func (i *inventory) run(ctx context.Context) {
	var pause time.Duration
	for ctx.Err() == nil {
		_, _, fresh := i.state()
		err := i.tell(ctx)
		if pause = min(2*pause, maxInventoryPause); err == nil {
			pause, fresh = inventoryPause, nil // what was told has closed it
		} else if pause < time.Second {
			pause = time.Second
		}
		if err != nil && ctx.Err() == nil {
			i.log.WithError(err).Warn("the coordinator could not be told of this host's storage; it is tried again")
		}
		if !i.wait(ctx, pause, fresh) {
			return
		}
	}
}

// wait blocks until pause is over or fresh closes, because the connection is new, and
// then until there may be something to tell.
func (i *inventory) wait(ctx context.Context, pause time.Duration, fresh chan struct{}) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(pause):
	case <-fresh:
	}
	_, told, next := i.state()
	changed, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = i.store.Wait(changed, told) // why it ended is seen below
	}()
	select {
	case <-done:
	case <-next:
		cancel()
		<-done
	}
	return ctx.Err() == nil
}

// tell sends what the coordinator does not know yet.
func (i *inventory) tell(ctx context.Context) error {
	acked, _, _ := i.state()
	var rev int64
	err := i.store.View(func(v *store.View) error { rev = v.Revision(); return nil })
	if err != nil {
		return err
	}
	now, err := i.pool.Inventory()
	if err != nil {
		return err
	}
	news := now
	if acked != nil {
		news = now.Changed(*acked)
	}
	if news.Full || len(news.Put)+len(news.Gone) > 0 {
		if err := i.send(ctx, news); err != nil {
			return err
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.acked != acked {
		return nil // reset meanwhile: all is told again
	}
	i.acked, i.told = &now, rev
	close(i.next)
	i.next = make(chan struct{})
	return nil
}

// inventoryPart is how many records go in one message.
const inventoryPart = 500

// send sends an inventory in parts; of a full one the last part names all there is.
func (i *inventory) send(ctx context.Context, inv pool.Inventory) error {
	if len(inv.Put)+len(inv.Gone) <= inventoryPart {
		return i.to.Inventory(ctx, inv)
	}
	for part := range slices.Chunk(inv.Put, inventoryPart) {
		if err := i.to.Inventory(ctx, pool.Inventory{Put: part}); err != nil {
			return err
		}
	}
	for part := range slices.Chunk(inv.Gone, inventoryPart) {
		if err := i.to.Inventory(ctx, pool.Inventory{Gone: part}); err != nil {
			return err
		}
	}
	if !inv.Full {
		return nil
	}
	names := pool.Inventory{Full: true}
	for _, r := range inv.Put {
		names.Put = append(names.Put, pool.InventoryRecord{Class: r.Class, Ref: r.Ref})
	}
	return i.to.Inventory(ctx, names)
}

// flush returns when the coordinator knows what the store of this host says now.
func (i *inventory) flush(ctx context.Context) error {
	var rev int64
	err := i.store.View(func(v *store.View) error { rev = v.Revision(); return nil })
	if err != nil {
		return err
	}
	for {
		acked, told, next := i.state()
		if acked != nil && told >= rev {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// memberStorage is the storage of a member for its agent: what a call has
// changed is told before its result is.
type memberStorage struct {
	*pool.Pool
	inventory *inventory
}

// HostCall runs a method of this host's pool; see pool.Pool.HostCall.
func (m memberStorage) HostCall(ctx context.Context, name string, args json.RawMessage) (string, error) {
	text, err := m.Pool.HostCall(ctx, name, args)
	if ferr := m.inventory.flush(ctx); ferr != nil && err == nil {
		err = xapi.Internal("the coordinator was not told of what has changed: %w", ferr)
	}
	return text, err
}

// serveMember is the part of a host that was joined to a pool: its API names the
// coordinator, and it carries out its jobs.
func (s *Server) serveMember(ctx context.Context, serving func()) error {
	handler, err := s.standbyRoutes()
	if err != nil {
		return err
	}
	defer s.cli.Close()
	s.ways.setHandler(handler)
	s.log.WithField("pool", s.pool.PoolUUID).Info("this host is a member of a pool")
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.keepLink(ctx) })
	wg.Go(func() { s.told.run(ctx) })
	serving()
	<-ctx.Done()
	return context.Cause(ctx)
}

// runAgent carries out the jobs of this host until ctx ends. A member's jobs are
// known when the coordinator has told of them.
func (s *Server) runAgent(ctx context.Context) error {
	if s.member != nil {
		if err := s.link.Ready(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if err := s.recoverJobs(ctx); err != nil && ctx.Err() == nil {
			s.log.WithError(err).Error("the coordinator was not told of this host's stampfiles")
		}
	}
	return s.agent.Run(ctx)
}

// memberRole is what a member tells of itself to any caller.
func (s *Server) memberRole(role map[string]string) map[string]string {
	st := s.link.State()
	p := s.leadingPeer()
	role["role"], role["coordinator"], role["coordinator_address"] = roleMember, string(p.Host), addressOf(p.URL)
	role["connected"], role["problem"] = strconv.FormatBool(st.Connected), st.Problem
	if !st.Since.IsZero() {
		role["since"] = xapi.FormatTime(st.Since)
	}
	tellPeer(role, p)
	return role
}

// tellPeer adds how clients reach the coordinator: its URL, and the SHA-256 of its
// newest key.
func tellPeer(role map[string]string, p pool.Peer) {
	role["coordinator_url"] = p.URL
	if n := len(p.Keys); n > 0 {
		role["coordinator_pin"] = trust.Pin(p.Keys[n-1])
	}
}

// ejected makes this host a pool of its own: a coordinator whose key it knows has
// said that it was ejected.
func (s *Server) ejected() {
	if err := s.leavePool("this host was ejected from its pool"); err != nil {
		s.log.WithError(err).Error("this host was ejected from its pool and is no pool of its own yet; it is tried again")
	}
}

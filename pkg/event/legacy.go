package event

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// maxSessions bounds the sessions that are registered. The one that asked
	// longest ago makes room.
	maxSessions = 4096
	// maxQueue bounds the objects that changed since a session last asked.
	maxQueue = 5000
)

// errGone ends the wait of a session that is registered no more.
var errGone = errors.New("the session is not registered any more")

// registration is one session of the legacy calls. Its queue is a position in
// the history of the view, so a session that never asks costs nothing.
type registration struct {
	used   time.Time       // guarded by Broker.mu
	ctx    context.Context // ends with the registration, cause errGone
	cancel context.CancelCauseFunc

	mu   sync.Mutex // guards what follows; taken after Broker.mu where both are
	want subscriptions
	data string // store id
	rev  int64  // events up to here are delivered
	lost bool   // the queue ran over: register again
}

// Register adds subscriptions to a session; its events begin now.
// EVENT_SUBSCRIPTION_PARSE_FAILURE [subscription].
func (b *Broker) Register(session xapi.Ref, classes []string) error {
	want, err := b.parse(classes)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	r, ok := b.sessions[session]
	if !ok {
		b.makeRoom()
		r = &registration{want: subscriptions{map[string]map[xapi.Ref]bool{}}}
		r.ctx, r.cancel = context.WithCancelCause(context.Background())
		err = b.store.View(func(v *store.View) error {
			r.data, r.rev = v.StoreID(), v.Revision()
			return nil
		})
		if err != nil {
			return err
		}
		b.sessions[session] = r
	}
	r.used = time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.want.add(want)
	if r.want.size() > maxSubscriptions {
		b.drop(session)
		return xapi.NewError(xapi.EventSubscriptionParseFailure, "too many subscriptions")
	}
	return nil
}

// Unregister takes subscriptions away from a session. With the last one the
// session is forgotten, and who waits in Next gets SESSION_NOT_REGISTERED.
func (b *Broker) Unregister(session xapi.Ref, classes []string) error {
	want, err := b.parse(classes)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if r, ok := b.sessions[session]; ok {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.want.remove(want)
		if r.want.size() == 0 {
			b.drop(session)
		}
	}
	return nil
}

// Drop forgets a session that has ended.
func (b *Broker) Drop(session xapi.Ref) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drop(session)
}

func (b *Broker) drop(session xapi.Ref) {
	if r, ok := b.sessions[session]; ok {
		r.cancel(errGone)
		delete(b.sessions, session)
	}
}

// makeRoom forgets the session that asked longest ago when there are too many.
func (b *Broker) makeRoom() {
	if len(b.sessions) < maxSessions {
		return
	}
	var oldest xapi.Ref
	for session, r := range b.sessions {
		if oldest == "" || r.used.Before(b.sessions[oldest].used) {
			oldest = session
		}
	}
	b.drop(oldest)
}

// Next gives the events of a session since it was last asked, and waits for
// one as long as ctx lasts. SESSION_NOT_REGISTERED [session]; EVENTS_LOST []
// when more happened than is kept, and then again until the session is
// registered anew; the cause of ctx.
func (b *Broker) Next(ctx context.Context, session xapi.Ref, render Render) ([]Event, error) {
	b.mu.Lock()
	r, ok := b.sessions[session]
	if ok {
		r.used = time.Now()
	}
	b.mu.Unlock()
	if !ok {
		return nil, xapi.NewError(xapi.SessionNotRegistered, string(session))
	}
	wait, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(r.ctx, func() { cancel(errGone) })()
	var events []Event
	err := b.store.Until(wait, func(v *store.View) (bool, error) {
		var err error
		events, err = r.deliver(v, render)
		return len(events) > 0, err
	})
	if errors.Is(err, errGone) {
		return nil, xapi.NewError(xapi.SessionNotRegistered, string(session)).Because(err)
	}
	return events, err
}

// deliver gives the events of v that the session has not got, and moves its
// position past them.
func (r *registration) deliver(v *store.View, render Render) ([]Event, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lost = r.lost || r.data != v.StoreID(); r.lost {
		return nil, xapi.NewError(xapi.EventsLost)
	}
	if v.Revision() <= r.rev {
		return nil, nil // a call of the same session is ahead
	}
	events, err := since(v, r.want, r.rev, render)
	if len(events) > maxQueue || xapi.Is(err, xapi.EventsLost) {
		r.lost = true
		return nil, xapi.NewError(xapi.EventsLost)
	}
	if err == nil {
		r.rev = v.Revision()
	}
	return events, err
}

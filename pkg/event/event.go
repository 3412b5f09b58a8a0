package event

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// maxWait bounds the time a client may ask to wait.
	maxWait = 24 * time.Hour
	// maxSubscriptions bounds the subscriptions of one call, or one session.
	maxSubscriptions = 4096
)

// errTimeout ends a wait that found nothing.
var errTimeout = errors.New("nothing happened in time")

// Render makes the snapshot of a record as clients see it. It runs on a view,
// so it must not block.
type Render func(v *store.View, it store.Item) (any, error)

// Event is what happened to one object.
type Event struct {
	// ID is the revision of the event.
	ID int64
	// Class is in lower case, as the wire has it.
	Class string
	Op    store.Op
	Ref   xapi.Ref
	// Snapshot is what Render made; nil for store.Del.
	Snapshot any
}

// Batch is the answer to one event.from.
type Batch struct {
	Events []Event
	// Counts is how many objects there are of each subscribed class, by its
	// lower-case name.
	Counts map[string]int
	// Token is where the next event.from goes on.
	Token string
}

// Broker answers for the classes that are served. Its methods may be called
// from any goroutine.
type Broker struct {
	store   *store.Store
	classes map[string]string // lower case to exact

	mu       sync.Mutex
	sessions map[xapi.Ref]*registration
}

// New makes a broker. classes are the exact names of those that are served:
// nothing else is ever shown.
func New(s *store.Store, classes []string) *Broker {
	b := &Broker{store: s, classes: map[string]string{}, sessions: map[xapi.Ref]*registration{}}
	for _, class := range classes {
		b.classes[strings.ToLower(class)] = class
	}
	return b
}

// Token says "everything up to now".
func (b *Broker) Token() string {
	var token string
	_ = b.store.View(func(v *store.View) error { // a closed store has no token
		token = tokenOf(v, v.Revision())
		return nil
	})
	return token
}

// CurrentID is the ID of the newest event there can be.
func (b *Broker) CurrentID() int64 {
	var rev int64
	_ = b.store.View(func(v *store.View) error { // a closed store has no events
		rev = v.Revision()
		return nil
	})
	return rev
}

// From gives what happened to the subscribed objects after token, at once when
// there is something, else as soon as there is, else an empty batch when
// timeout has passed. An empty token gives an add for every object that is
// there, at once.
//
// EVENT_SUBSCRIPTION_PARSE_FAILURE [subscription],
// EVENT_FROM_TOKEN_PARSE_FAILURE [token], EVENTS_LOST []; the cause of ctx when
// it ends; and the errors of render.
func (b *Broker) From(ctx context.Context, subs []string, token string, timeout time.Duration, render Render) (Batch, error) {
	want, err := b.parse(subs)
	if err != nil {
		return Batch{}, err
	}
	if token == "" {
		return b.all(want, render)
	}
	data, rev, err := parseToken(token)
	if err != nil {
		return Batch{}, err
	}
	if err := b.reach(ctx, data, rev); err != nil {
		return Batch{}, err
	}
	wait, cancel := context.WithTimeoutCause(ctx, min(max(timeout, 0), maxWait), errTimeout)
	defer cancel()
	var batch Batch
	var last *store.View
	err = b.store.Until(wait, func(v *store.View) (bool, error) {
		last = v
		if v.StoreID() != data {
			return true, xapi.NewError(xapi.EventsLost)
		}
		events, err := since(v, want, rev, render)
		if err != nil || len(events) > 0 {
			batch = Batch{Events: events, Counts: want.counts(v), Token: tokenOf(v, v.Revision())}
			return true, err
		}
		rev = v.Revision() // nothing of interest: look from here next time
		return false, nil
	})
	if errors.Is(err, errTimeout) {
		return Batch{Counts: want.counts(last), Token: tokenOf(last, rev)}, nil
	}
	return batch, err
}

// all is the answer to the empty token.
func (b *Broker) all(want subscriptions, render Render) (Batch, error) {
	var batch Batch
	err := b.store.View(func(v *store.View) error {
		for _, class := range slices.Sorted(maps.Keys(want.classes)) {
			for _, it := range v.List(class) {
				if !want.has(class, it.Ref) {
					continue
				}
				e, err := newEvent(v, store.Change{
					Class: class, Ref: it.Ref, Op: store.Add, Revision: it.Modified, Item: it,
				}, render)
				if err != nil {
					return err
				}
				batch.Events = append(batch.Events, e)
			}
		}
		batch.Counts, batch.Token = want.counts(v), tokenOf(v, v.Revision())
		return nil
	})
	return batch, err
}

// reach makes sure that the view is of the token's data and not older than it.
func (b *Broker) reach(ctx context.Context, data string, rev int64) error {
	var now int64
	err := b.store.View(func(v *store.View) error {
		now = v.Revision()
		if v.StoreID() != data {
			return xapi.NewError(xapi.EventsLost)
		}
		return nil
	})
	if err != nil || rev <= now {
		return err
	}
	// The token may come of another host, whose view is ahead of ours.
	if err := b.store.Sync(ctx); err != nil {
		return err
	}
	if rev > b.CurrentID() {
		return xapi.NewError(xapi.EventsLost)
	}
	return nil
}

// since gives the events of subscribed objects after rev.
func since(v *store.View, want subscriptions, rev int64, render Render) ([]Event, error) {
	changes, ok := v.Since(rev)
	if !ok {
		return nil, xapi.NewError(xapi.EventsLost)
	}
	var events []Event
	for _, c := range changes {
		if !want.has(c.Class, c.Ref) {
			continue
		}
		e, err := newEvent(v, c, render)
		if err != nil {
			return nil, err
		}
		events = append(events, e)
	}
	return events, nil
}

func newEvent(v *store.View, c store.Change, render Render) (Event, error) {
	e := Event{ID: c.Revision, Class: strings.ToLower(c.Class), Op: c.Op, Ref: c.Ref}
	if c.Op == store.Del {
		return e, nil
	}
	var err error
	if e.Snapshot, err = render(v, c.Item); err != nil {
		return e, fmt.Errorf("snapshot of %s %s: %w", c.Class, c.Ref, err)
	}
	return e, nil
}

// Inject makes a mod event of one object and gives the token from just before
// it, so that From with that token delivers it at once. class is the exact
// name. HANDLE_INVALID [class, ref] when there is no such object.
func (b *Broker) Inject(ctx context.Context, class string, ref xapi.Ref) (string, error) {
	if b.classes[strings.ToLower(class)] != class {
		return "", xapi.NewError(xapi.HandleInvalid, class, string(ref))
	}
	rev, err := b.store.Commit(ctx, func(tx *store.Tx) error {
		if !tx.Has(class, ref) {
			return xapi.NewError(xapi.HandleInvalid, class, string(ref))
		}
		tx.Touch(class, ref)
		return nil
	})
	if err != nil {
		return "", err
	}
	return b.store.ID() + ":" + strconv.FormatInt(rev-1, 10), nil
}

func tokenOf(v *store.View, rev int64) string {
	return v.StoreID() + ":" + strconv.FormatInt(rev, 10)
}

// parseToken reads "<store id>:<revision>".
func parseToken(token string) (data string, rev int64, err error) {
	data, text, ok := strings.Cut(token, ":")
	if ok && xapi.UUID(data).Valid() {
		rev, err = strconv.ParseInt(text, 10, 64)
		if err == nil && rev >= 0 && strconv.FormatInt(rev, 10) == text {
			return data, rev, nil
		}
	}
	return "", 0, xapi.NewError(xapi.EventFromTokenParseFailure, token)
}

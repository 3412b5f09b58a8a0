package link

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// Backend is what a Hub needs of the pool. *pool.Pool is one. It is asked only
// for what the calling host may ask for.
type Backend interface {
	JobsIn(v *store.View, host xapi.Ref) ([]pool.Assignment, error)
	FindJob(ctx context.Context, id xapi.UUID) (job pool.Job, there bool, err error)
	JobPromise(ctx context.Context, job xapi.Ref, want pool.Promise) (found int64, err error)
	JobClaim(ctx context.Context, job xapi.Ref) (attempt int64, err error)
	JobReport(ctx context.Context, job xapi.Ref, progress float64, tail string) error
	JobRequeue(ctx context.Context, job xapi.Ref) error
	JobFinish(ctx context.Context, job xapi.Ref, o pool.Outcome) error
	// DamageSaid takes it from a host that an image is damaged.
	DamageSaid(ctx context.Context, host, vdi xapi.Ref, text string) error
	Resync(ctx context.Context, host xapi.Ref, stamps []pool.Stamp) error
	MessageCreate(ctx context.Context, name string, priority int64, cls string, obj xapi.UUID, body string) (xapi.Ref, error)
	// TakeInventory brings the copy of what lies on a member up to date.
	TakeInventory(ctx context.Context, host xapi.Ref, inv pool.Inventory) error
	// HostHello writes into a host's record what the host says of itself.
	HostHello(ctx context.Context, host xapi.Ref, f pool.Facts) error
	// Sources names hosts that have the blocks of a map. fetching: the caller
	// has begun to have some, too.
	Sources(ctx context.Context, host xapi.Ref, mapDigest string, fetching bool) (pool.Sources, error)
}

// Options is what a Hub works with.
type Options struct {
	Store   *store.Store
	Pool    Backend
	Log     logrus.FieldLogger
	Now     func() time.Time // nil: time.Now
	Version string           // of patchd, for the texts
	// Self is the host that this process is on: it is there without a link.
	Self xapi.Ref
	// Term is the revision of this coordinator's election.
	Term func() int64
	// Known is told of the request that has become the link of a host, of which there
	// is one at a time; nil: nobody is.
	Known func(ctx context.Context)
}

// Hub is the coordinator's side of all links. Its methods may be called from
// any goroutine.
type Hub struct {
	o     Options
	times times
	proto int
	big   chan struct{}
	wg    sync.WaitGroup
	ctx   context.Context // of requests; ends with Run
	stop  context.CancelFunc

	mu     sync.Mutex
	closed bool
	index  index
	leavers
}

// bigLines is how many long lines a hub takes in at once, and ownBigLines how many
// of these may be one host's.
const bigLines, ownBigLines = 8, 2

// maxKeys is how many keys a host has at most: it may change its key a few times
// before it forgets the older ones.
const maxKeys = 4

// NewHub makes a hub. It takes links from now on, and follows the records while
// Run does.
func NewHub(o Options) *Hub {
	if o.Now == nil {
		o.Now = time.Now
	}
	h := &Hub{o: o, times: defaultTimes, proto: Proto, big: make(chan struct{}, bigLines), index: newIndex()}
	h.leavers.wake = make(chan struct{}, 1)
	h.ctx, h.stop = context.WithCancel(context.Background())
	return h
}

// Run follows the records, pushes orders and notes who is away, until ctx ends.
// Then it cuts all links and waits for what they began. A hub runs once.
func (h *Hub) Run(ctx context.Context) error {
	defer h.close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h.advance()
	h.wg.Go(func() { h.minder(ctx) })
	err := h.o.Store.Until(ctx, func(*store.View) (bool, error) {
		h.advance()
		return false, nil
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (h *Hub) close() {
	h.stop()
	h.mu.Lock()
	h.closed = true
	for _, m := range h.index.members {
		if m.link != nil {
			m.link.cut("the coordinator ends")
		}
	}
	h.mu.Unlock()
	h.wg.Wait()
}

// begin counts work of a link in; false when the hub is closed.
func (h *Hub) begin(f func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.wg.Go(f)
	return true
}

// caller is who makes a request, by the key that was shown.
type caller struct {
	host xapi.Ref
	uuid xapi.UUID
	pin  string // of the key that was shown
}

func (c caller) fields() logrus.Fields { return logrus.Fields{"host": c.uuid, "key": c.pin} }

// errNotHost is the answer to a request that was not made as a host makes it.
var errNotHost = errors.New("only a host of the pool may ask for this: over TLS, by the protocol " + trust.Protocol)

// identify finds the host whose record has the key that was shown, or the one
// that signed for it; then the record learns the new one.
func (h *Hub) identify(ctx context.Context, cs *tls.ConnectionState) (caller, error) {
	if cs == nil || cs.NegotiatedProtocol != trust.Protocol {
		return caller{}, errNotHost
	}
	h.advance()
	c := caller{pin: trust.Pin(trust.PeerKey(*cs))}
	leaf, viaOld, err := trust.VerifyChain(trust.Shown(*cs), func(spki []byte) bool {
		m := h.owner(trust.Pin(spki))
		if m == nil {
			return false
		}
		c.host, c.uuid = m.ref, m.uuid
		return true
	})
	if err == nil && h.isRevoked(c.pin) {
		err = errors.New("the key was revoked")
	}
	if err != nil {
		return c, fmt.Errorf("this is no host of the pool: %w", err)
	}
	if err := h.keepKeys(ctx, c, leaf, viaOld); err != nil {
		return c, err
	}
	return c, nil
}

// keepKeys adds a key that the old one has signed for to the record of its
// host. A host that shows its newest key without help has left the older ones.
func (h *Hub) keepKeys(ctx context.Context, c caller, leaf []byte, viaOld bool) error {
	if !viaOld && !h.leavesKeys(c) {
		return nil
	}
	err := h.o.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[pool.Host](tx, pool.ClassHost, c.host)
		if err != nil {
			return err
		}
		n := len(rec.Keys)
		switch {
		case !viaOld && n > 1 && trust.Pin(rec.Keys[n-1].SPKI) == c.pin:
			rec.Keys = rec.Keys[n-1:]
		case viaOld && (n == 0 || trust.Pin(rec.Keys[n-1].SPKI) != c.pin):
			rec.Keys = append(rec.Keys, pool.HostKey{SPKI: leaf, Added: h.o.Now().UTC()})
			rec.Keys = rec.Keys[max(0, len(rec.Keys)-maxKeys):]
		default:
			return nil
		}
		tx.Put(pool.ClassHost, c.host, rec)
		return nil
	})
	if err != nil {
		return fmt.Errorf("note the new key of the host: %w", err)
	}
	h.o.Log.WithFields(c.fields()).Info("a host shows its new key")
	h.advance()
	return nil
}

// Authenticated gives next the requests of hosts of the pool, and answers 403
// to all others.
func (h *Hub) Authenticated(next func(w http.ResponseWriter, r *http.Request, host xapi.Ref)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := h.admit(w, r); ok {
			next(w, r, c.host)
		}
	})
}

// admit identifies who makes a request, or answers it.
func (h *Hub) admit(w http.ResponseWriter, r *http.Request) (caller, bool) {
	c, err := h.identify(r.Context(), r.TLS)
	if err != nil {
		h.o.Log.WithError(err).WithFields(c.fields()).WithFields(logrus.Fields{"from": r.RemoteAddr, "path": r.URL.Path}).Warn("a stranger was refused")
		if from, yes := h.isEjected(c.pin); yes {
			answerNotLeading(w, http.StatusForbidden, notLeading{Error: failure{Code: xapi.HostEjected, Params: []string{string(from)}}})
			return c, false
		}
		http.Error(w, err.Error(), http.StatusForbidden)
	}
	return c, err == nil
}

// ServeHTTP begins a link.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || r.Header.Get("Upgrade") != upgrade {
		http.Error(w, "a link begins with POST and Upgrade: "+upgrade, http.StatusBadRequest)
		return
	}
	c, ok := h.admit(w, r)
	if !ok {
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		h.o.Log.WithError(err).Error("a link could not be begun")
		return
	}
	l := &hostLink{hub: h, caller: c, wire: newWire(conn, rw.Reader, &h.times), since: h.o.Now(), known: func() {}}
	if h.o.Known != nil {
		asked := context.WithoutCancel(r.Context())
		l.known = func() { h.o.Known(asked) }
	}
	l.wire.big, l.wire.own, l.taken.L = h.big, make(chan struct{}, ownBigLines), &l.mu
	l.ctx, l.stop = context.WithCancel(h.ctx)
	if !h.begin(l.run) {
		l.cut("the coordinator ends")
	}
}

// NotLeading answers hosts on behalf of one that has no hub: HOST_IS_SLAVE and
// who leads. leader gives false when nobody does.
func NotLeading(leader func() (pool.Peer, bool)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := notLeading{Error: failure{Code: xapi.HostIsSlave}}
		if p, ok := leader(); ok {
			answer.Leader, answer.Error.Params = &p, []string{addressOf(p.URL)}
		}
		answerNotLeading(w, http.StatusMisdirectedRequest, answer)
	})
}

func answerNotLeading(w http.ResponseWriter, status int, answer notLeading) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // whoever asked may be gone
}

// limits of what one host may ask for in a second, and at once.
const (
	askRate, askBurst   = 50, 200
	tellRate, tellBurst = 5, 50 // reports and messages, which only tell
	atOnce              = 16
)

func newLimits() (ask, tell *rate.Limiter) {
	return rate.NewLimiter(askRate, askBurst), rate.NewLimiter(tellRate, tellBurst)
}

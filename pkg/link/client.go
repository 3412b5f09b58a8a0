package link

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// Term is what a host remembers of whom it has obeyed: the identity of a pool
// database and the highest election revision seen in it. A restored database
// has another identity, and counts anew.
type Term struct {
	Store    string `json:"store"`
	Revision int64  `json:"revision"`
}

// ClientOptions is what a Client works with.
type ClientOptions struct {
	Identity *trust.Identity
	Log      logrus.FieldLogger
	Version  string // of patchd, for the texts
	// Coordinators are the hosts that may lead, as far as this host knows.
	Coordinators func() []pool.Peer
	// Facts are what this host says of itself; a standby says so there.
	Facts func() pool.Facts
	// Learn is called with orders before anybody acts on them, so that the
	// coordinators and the revoked keys in them can be kept durably. nil: not called.
	Learn func(pool.Orders)
	// Connected is called in a goroutine of its own after each connect; ctx ends
	// with the link. The host pushes its full inventory there. nil: not called.
	Connected func(ctx context.Context)
	// Ejected is called when a coordinator has said that this host was ejected
	// from its pool; nil: not called. The link is tried on until Run ends.
	Ejected func()
	// LoadTerm and SaveTerm keep the Term durably; nil: it is kept in memory.
	LoadTerm func() (Term, error)
	SaveTerm func(Term) error
	Now      func() time.Time // nil: time.Now
}

// Client is a host's side of the link. Its methods may be called from any
// goroutine. It offers what an agent needs of a coordinator: requests wait for a
// link for as long as ctx and Run go on, and are asked again when the link ended
// before the answer came. JobClaim alone is not: see there.
type Client struct {
	o     ClientOptions
	times times
	proto int
	// process tells the coordinator this process from another one with the same key.
	process string

	mu     sync.Mutex
	term   Term
	state  State
	link   *session        // nil: not connected
	up     chan struct{}   // closed when link is there
	slow   map[string]bool // URLs of coordinators that did not answer
	orders *pool.Orders
	count  int64         // of orders so far: the revision that Jobs gives
	newer  chan struct{} // closed when newer orders came
	ended  chan struct{} // closed when Run has ended

	transports transports
}

// State is how things stand with the link, for people.
type State struct {
	Connected bool
	Since     time.Time // of Connected, or of its end
	Leader    pool.Peer // who leads, as far as is known
	Problem   string    // why there is no link; "": there is one, or nothing was tried yet
}

// errEnded is the answer when the client's Run has ended.
var errEnded = xapi.NewError(xapi.CannotContactHost, "this daemon ends")

// errLost is the end of a request whose link ended before its answer came, and
// errUnsent of one that ended before it was sent.
var (
	errLost   = errors.New("the link ended before the answer came")
	errUnsent = errors.New("the link ended")
)

// NewClient makes a client; Run makes it connect.
func NewClient(o ClientOptions) (*Client, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	c := &Client{
		o: o, times: defaultTimes, proto: Proto, process: string(xapi.NewUUID()),
		slow: map[string]bool{}, up: make(chan struct{}), newer: make(chan struct{}), ended: make(chan struct{}),
	}
	c.transports.id = o.Identity
	if o.LoadTerm != nil {
		var err error
		if c.term, err = o.LoadTerm(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// Run keeps the host connected until ctx ends. A client runs once.
func (c *Client) Run(ctx context.Context) error {
	defer c.transports.close()
	defer close(c.ended)
	pause, failed := c.times.retry, 0
	for ctx.Err() == nil {
		failed++
		if c.round(ctx, failed-1) {
			pause, failed = c.times.retry, 0
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause/2 + rand.N(pause)):
		}
		pause = min(2*pause, c.times.maxRetry)
	}
	return nil
}

// round tries the coordinators until one lets this host in, and tells whether
// one did when that link has ended. n rounds before it have failed: each gives
// the coordinators more time.
func (c *Client) round(ctx context.Context, n int) (was bool) {
	todo, tried := c.candidates(), map[string]bool{}
	if len(todo) == 0 {
		c.problem(errors.New("no coordinator is known"))
	}
	for len(todo) > 0 && ctx.Err() == nil {
		p := todo[0]
		todo = todo[1:]
		if tried[p.URL] {
			continue
		}
		tried[p.URL] = true
		ok, leader, err := c.try(ctx, p, min(firstPatience<<min(n, 3), dialPatience))
		c.noteSlow(p, err)
		if ok {
			return true
		}
		if ctx.Err() == nil {
			c.problem(err)
			c.o.Log.WithError(err).WithField("coordinator", p.URL).Debug("a coordinator did not let this host in")
		}
		if leader != nil {
			todo = append([]pool.Peer{*leader}, todo...)
		}
	}
	return false
}

// firstPatience is how long a coordinator may take to accept a connection before
// the next one is tried.
const firstPatience = 2 * time.Second

// noteSlow remembers who did not answer: it is tried after those who did.
func (c *Client) noteSlow(p pool.Peer, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var t net.Error
	if errors.As(err, &t) && t.Timeout() {
		c.slow[p.URL] = true
	} else {
		delete(c.slow, p.URL)
	}
}

// candidates are the coordinators to try, the one that led last first, those
// that did not answer last.
func (c *Client) candidates() []pool.Peer {
	c.mu.Lock()
	last, orders := c.state.Leader, c.orders
	c.mu.Unlock()
	var peers []pool.Peer
	if last.URL != "" {
		peers = append(peers, last)
	}
	if orders != nil {
		peers = append(peers, orders.Coordinators...)
	}
	peers = append(peers, c.o.Coordinators()...)
	c.mu.Lock()
	defer c.mu.Unlock()
	slices.SortStableFunc(peers, func(a, b pool.Peer) int {
		switch {
		case c.slow[a.URL] == c.slow[b.URL]:
			return 0
		case c.slow[a.URL]:
			return 1
		}
		return -1
	})
	return peers
}

// problem notes why there is no link.
func (c *Client) problem(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == nil {
		c.state.Problem = err.Error()
	}
}

// State tells how things stand.
func (c *Client) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// Reconnect ends the link, so that the next one begins anew: after this host's
// key was rotated.
func (c *Client) Reconnect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		c.link.wire.cut()
	}
	c.transports.close()
}

// attach makes s the link that requests go over.
func (c *Client) attach(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.link = s
	c.state = State{Connected: true, Since: c.o.Now(), Leader: s.peer}
	close(c.up)
}

// detach ends that.
func (c *Client) detach(s *session, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != s {
		return
	}
	c.link, c.up = nil, make(chan struct{})
	c.state.Connected, c.state.Since, c.state.Problem = false, c.o.Now(), err.Error()
}

// linked waits for a link.
func (c *Client) linked(ctx context.Context) (*session, error) {
	for {
		c.mu.Lock()
		s, up := c.link, c.up
		c.mu.Unlock()
		if s != nil {
			return s, nil
		}
		select {
		case <-up:
		case <-ctx.Done():
			return nil, c.unreachable(context.Cause(ctx))
		case <-c.ended:
			return nil, errEnded
		}
	}
}

// unreachable is the failure of a request that no coordinator has answered. Who
// has cancelled it is told that, and not this.
func (c *Client) unreachable(why error) error {
	if errors.Is(why, context.Canceled) || xapi.Is(why, xapi.TaskCancelled) {
		return why
	}
	return xapi.NewError(xapi.CannotContactHost, "the coordinator").Because(why)
}

// call makes a request, again when its answer was lost.
func (c *Client) call(ctx context.Context, method string, params, result any) error {
	for {
		err := c.once(ctx, method, params, result)
		if !errors.Is(err, errLost) {
			return err
		}
	}
}

// once makes a request over the link that is there, or the next one.
func (c *Client) once(ctx context.Context, method string, params, result any) error {
	for {
		s, err := c.linked(ctx)
		if err != nil {
			return err
		}
		err = s.ask(ctx, method, params, result)
		if !errors.Is(err, errUnsent) {
			return err
		}
	}
}

// Ended tells whether Run has ended: there will be no link any more.
func (c *Client) Ended() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// Ready waits for the first orders: until then Jobs fails.
func (c *Client) Ready(ctx context.Context) error { return c.WaitChange(ctx, 0) }

// Orders are the newest; ok is false while there are none.
func (c *Client) Orders() (o pool.Orders, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.orders == nil {
		return o, false
	}
	return *c.orders, true
}

// Jobs gives the open jobs of this host as the newest orders have them. rev
// counts orders, from 1.
func (c *Client) Jobs(xapi.Ref) (jobs []pool.Assignment, rev int64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.orders == nil {
		return nil, 0, xapi.NewError(xapi.CannotContactHost, "the coordinator").Because(errors.New("no orders came yet"))
	}
	return c.orders.Jobs, c.count, nil
}

// WaitChange waits for newer orders than rev.
func (c *Client) WaitChange(ctx context.Context, rev int64) error {
	for {
		c.mu.Lock()
		count, newer := c.count, c.newer
		c.mu.Unlock()
		if count > rev {
			return nil
		}
		select {
		case <-newer:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-c.ended:
			return errEnded
		}
	}
}

// FindJob asks for a job of this host.
func (c *Client) FindJob(ctx context.Context, id xapi.UUID) (pool.Job, bool, error) {
	var r jobResult
	err := c.call(ctx, methodJob, jobParams{UUID: id}, &r)
	return r.Job, r.There, err
}

// JobPromise asks for room.
func (c *Client) JobPromise(ctx context.Context, job xapi.Ref, want pool.Promise) (found int64, err error) {
	return found, c.call(ctx, methodPromise, jobParams{Job: job, Promise: &want}, &found)
}

// JobClaim claims a job. When the link ends before the answer comes nobody knows
// whether it was granted, and a second one would be refused: the error is
// CANNOT_CONTACT_HOST, nothing may be started, and FindJob tells the attempt by
// which the job can be ended.
func (c *Client) JobClaim(ctx context.Context, job xapi.Ref) (attempt int64, err error) {
	err = c.once(ctx, methodClaim, jobParams{Job: job}, &attempt)
	if errors.Is(err, errLost) {
		err = c.unreachable(err)
	}
	return attempt, err
}

// JobReport tells how far a job has come. That is for display, and old at once:
// without a link it is left out.
func (c *Client) JobReport(ctx context.Context, job xapi.Ref, progress float64, tail string) error {
	c.mu.Lock()
	s := c.link
	c.mu.Unlock()
	if s == nil {
		return nil
	}
	err := s.ask(ctx, methodReport, jobParams{Job: job, Progress: progress, Tail: tail}, nil)
	if errors.Is(err, errLost) || errors.Is(err, errUnsent) {
		return nil
	}
	return err
}

// JobRequeue puts a job back.
func (c *Client) JobRequeue(ctx context.Context, job xapi.Ref) error {
	return c.call(ctx, methodRequeue, jobParams{Job: job}, nil)
}

// JobFinish ends a job.
func (c *Client) JobFinish(ctx context.Context, job xapi.Ref, o pool.Outcome) error {
	return c.call(ctx, methodFinish, jobParams{Job: job, Outcome: outcomeOf(o)}, nil)
}

// VDIDamaged tells that an image is damaged.
func (c *Client) VDIDamaged(ctx context.Context, vdi xapi.Ref, text string) error {
	return c.call(ctx, methodDamaged, damagedParams{vdi, text}, nil)
}

// Resync tells all stampfiles of this host.
func (c *Client) Resync(ctx context.Context, host xapi.Ref, stamps []pool.Stamp) error {
	p := resyncParams{Host: host, Stamps: []stamp{}}
	for _, s := range stamps {
		p.Stamps = append(p.Stamps, stamp{s.Patch, s.Applied, s.Garbled})
	}
	return c.call(ctx, methodResync, p, nil)
}

// MessageCreate leaves a notice about this host. It may be left twice.
func (c *Client) MessageCreate(ctx context.Context, name string, priority int64, cls string, obj xapi.UUID, body string) (ref xapi.Ref, err error) {
	return ref, c.call(ctx, methodMessage, messageParams{name, priority, cls, obj, body}, &ref)
}

// Inventory tells what lies on this host. Code: MESSAGE_TOO_LARGE.
func (c *Client) Inventory(ctx context.Context, inv pool.Inventory) error {
	return c.call(ctx, methodInventory, inv, nil)
}

// Sources asks who has the blocks of a map. fetching: this host has begun to
// have some.
func (c *Client) Sources(ctx context.Context, mapDigest string, fetching bool) (s pool.Sources, err error) {
	return s, c.call(ctx, methodSources, sourcesParams{mapDigest, fetching}, &s)
}

// FetchPatch gets a patch as a file from the coordinator that leads. Codes:
// CANNOT_FIND_PATCH, CANNOT_CONTACT_HOST.
func (c *Client) FetchPatch(ctx context.Context, uuid xapi.UUID) (io.ReadCloser, int64, error) {
	s, err := c.linked(ctx)
	if err != nil {
		return nil, 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.peer.URL+"/pool_patch_download?uuid="+url.QueryEscape(string(uuid)), nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := c.HTTP(s.peer).Do(req)
	if err != nil {
		return nil, 0, c.unreachable(err)
	}
	switch {
	case resp.StatusCode == http.StatusOK && resp.ContentLength >= 0:
		return resp.Body, resp.ContentLength, nil
	case resp.StatusCode == http.StatusNotFound:
		err = xapi.NewError(xapi.CannotFindPatch)
	default:
		err = c.unreachable(readFailure(resp))
	}
	resp.Body.Close()
	return nil, 0, err
}

// HTTP speaks to another host of the pool, and to no other server: its key, or
// one that it has signed for, is what is asked for. Connections are kept for a
// while. Requests go to p.URL.
func (c *Client) HTTP(p pool.Peer) *http.Client { return c.transports.to(p) }

package link

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// session is the client's end of one link.
type session struct {
	client *Client
	peer   pool.Peer // who leads
	wire   *wire

	send sync.Mutex // one line at a time

	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan message
	over    bool
	asked   chan struct{} // tells the beats that an answer is waited for
}

// try dials one coordinator and serves the link until it ends. was tells that
// there was one; else leader is who leads, when the other side does not and
// knows. patience bounds the connecting; afterwards each step has a time of its own.
func (c *Client) try(ctx context.Context, p pool.Peer, patience time.Duration) (was bool, leader *pool.Peer, err error) {
	keys := trust.OneOf(p.Keys...)
	dctx, cancel := context.WithTimeout(ctx, c.times.hello)
	defer cancel()
	conn, err := c.dial(dctx, p, patience, func(spki []byte) bool { return keys(spki) && !c.revoked(trust.Pin(spki)) })
	if err != nil {
		return false, nil, err
	}
	s := &session{client: c, peer: p, waiting: map[uint64]chan message{}, asked: make(chan struct{}, 1)}
	defer context.AfterFunc(ctx, func() { under(conn).Close() })()
	defer under(conn).Close()
	if s.wire, err = upgraded(dctx, conn, p, &c.times); err != nil {
		var n *notLeadingError
		if errors.As(err, &n) {
			leader = n.leader
		}
		if xapi.Is(err, xapi.HostEjected) && c.o.Ejected != nil {
			c.o.Ejected()
		}
		return false, leader, err
	}
	hello, err := s.hello()
	if err != nil {
		return false, nil, err
	}
	return true, nil, s.serve(ctx, hello)
}

// dial connects, within patience, and finishes TLS within ctx.
func (c *Client) dial(ctx context.Context, p pool.Peer, patience time.Duration, trusted func([]byte) bool) (net.Conn, error) {
	return dialPeer(ctx, p.URL, patience, trust.ClientConfig(c.o.Identity, trusted))
}

// revoked tells whether the newest orders say so of a key.
func (c *Client) revoked(pin string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.orders == nil {
		return false
	}
	for _, r := range c.orders.Revoked {
		if r == pin {
			return true
		}
	}
	return false
}

// notLeadingError is the answer of a host that does not lead.
type notLeadingError struct {
	error
	leader *pool.Peer
}

func (e *notLeadingError) Unwrap() error { return e.error }

// maxFailure is how much of the body of a refusal is read, in bytes.
const maxFailure = 64 << 10

// upgraded begins a link on a fresh connection.
func upgraded(ctx context.Context, conn net.Conn, p pool.Peer, t *times) (*wire, error) {
	deadline, _ := ctx.Deadline()
	if err := errors.Join(watchPeer(conn), conn.SetDeadline(deadline)); err != nil {
		return nil, err
	}
	host := addressOf(p.URL)
	req := "POST " + Path + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + "\r\nContent-Length: 0\r\n\r\n"
	if _, err := conn.Write([]byte(req)); err != nil {
		return nil, err
	}
	in := bufio.NewReaderSize(conn, readBuffer)
	resp, err := http.ReadResponse(in, &http.Request{Method: http.MethodPost})
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		w := newWire(conn, in, t)
		return w, conn.SetDeadline(time.Time{})
	}
	defer resp.Body.Close()
	return nil, readFailure(resp)
}

// readFailure makes an error of an answer that is none that was hoped for.
func readFailure(resp *http.Response) error {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxFailure))
	if err != nil {
		return fmt.Errorf("%s: %w", resp.Status, err)
	}
	var n notLeading
	if json.Unmarshal(b, &n) == nil && n.Error.Code != "" {
		return &notLeadingError{n.Error.err(), n.Leader}
	}
	text := strings.TrimSpace(string(b))
	return fmt.Errorf("%s: %.500s", resp.Status, text)
}

// hello greets, and looks whether the other side may be obeyed.
func (s *session) hello() (helloResult, error) {
	c := s.client
	var r helloResult
	params, err := raw(helloParams{Proto: c.proto, Version: c.o.Version, Facts: c.o.Facts(), Process: c.process})
	if err != nil {
		return r, err
	}
	s.last = 1
	line, err := encode(message{ID: s.last, Method: methodHello, Params: params})
	if err == nil {
		err = s.wire.write(line)
	}
	if err != nil {
		return r, err
	}
	if line, _, err = s.wire.read(maxHello, c.times.hello); err != nil {
		return r, fmt.Errorf("no answer to hello: %w", err)
	}
	var m message
	switch err := json.Unmarshal(line, &m); {
	case err != nil:
		return r, fmt.Errorf("the answer to hello makes no sense: %w", err)
	case m.Error != nil:
		return r, m.Error.err()
	}
	if err := json.Unmarshal(m.Result, &r); err != nil {
		return r, fmt.Errorf("the answer to hello makes no sense: %w", err)
	}
	if d := r.Proto - c.proto; d < -1 || d > 1 {
		return r, fmt.Errorf("the coordinator has patchd %s (protocol %d), this host has patchd %s (protocol %d): they may be one step apart", r.Version, r.Proto, c.o.Version, c.proto)
	}
	return r, c.obey(Term{r.Store, r.Term})
}

// obey refuses a term lower than one that was seen in the same database, and
// remembers a higher one, durably, before anything is done in its name.
func (c *Client) obey(t Term) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case t == c.term:
		return nil
	case t.Store == c.term.Store && t.Revision < c.term.Revision:
		return fmt.Errorf("its term %d is over: this host has obeyed one of term %d", t.Revision, c.term.Revision)
	case c.o.SaveTerm != nil:
		if err := c.o.SaveTerm(t); err != nil {
			return fmt.Errorf("remember the term: %w", err)
		}
	}
	c.term = t
	return nil
}

// serve reads what the coordinator sends until the link ends.
func (s *session) serve(ctx context.Context, hello helloResult) (err error) {
	c := s.client
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer func() { s.end() }()
	defer func() { c.detach(s, err) }()
	c.attach(s)
	log := c.o.Log.WithField("coordinator", s.peer.URL)
	log.Info("connected to the coordinator")
	defer func() { log.WithError(err).Info("the link to the coordinator has ended") }()
	wg.Go(func() { s.beats(ctx) })
	if c.o.Connected != nil {
		wg.Go(func() { c.o.Connected(ctx) })
	}
	for {
		line, _, err := s.wire.read(maxOrders, forever)
		if err != nil {
			return err
		}
		var m message
		if err := json.Unmarshal(line, &m); err != nil {
			return fmt.Errorf("a line makes no sense: %w", err)
		}
		switch {
		case m.ID != 0:
			s.answered(m)
		case m.Method == pushOrders:
			if err := c.take(m.Params, hello); err != nil {
				return err
			}
		}
	}
}

// forever is the silence that is allowed where the beats see to it.
const forever = 24 * time.Hour

// take makes orders those that Jobs gives.
func (c *Client) take(params json.RawMessage, hello helloResult) error {
	var o pool.Orders
	if err := json.Unmarshal(params, &o); err != nil {
		return fmt.Errorf("the orders make no sense: %w", err)
	}
	if o.Pool != hello.Pool || o.Host != hello.Host {
		return fmt.Errorf("the orders are for host %s of pool %s", o.Host, o.Pool)
	}
	if err := c.obey(Term{hello.Store, o.Term}); err != nil {
		return err
	}
	if c.o.Learn != nil {
		c.o.Learn(o)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.orders = &o
	c.count++
	close(c.newer)
	c.newer = make(chan struct{})
	return nil
}

// answered hands an answer to who waits for it.
func (s *session) answered(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch, ok := s.waiting[m.ID]; ok {
		delete(s.waiting, m.ID)
		ch <- m
	}
}

// end lets all that wait know that no answer will come.
func (s *session) end() {
	s.wire.cut()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	for _, ch := range s.waiting {
		close(ch)
	}
	s.waiting = nil
}

// ask makes a request and waits for its answer. The error is errUnsent
// or errLost when the link ended first, the cause of ctx, or the coordinator's. result may be nil.
func (s *session) ask(ctx context.Context, method string, params, result any) error {
	p, err := raw(params)
	if err != nil {
		return err
	}
	if len(p) > maxRequest-1024 {
		return xapi.NewError(xapi.MessageTooLarge, method, fmt.Sprint(maxRequest))
	}
	answer := make(chan message, 1)
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return errUnsent
	}
	s.last++
	id := s.last
	s.waiting[id] = answer
	s.mu.Unlock()
	if err := s.write(message{ID: id, Method: method, Params: p}); err != nil {
		s.wire.cut() // serve sees it, and ends
	}
	if method != methodBeat {
		select {
		case s.asked <- struct{}{}:
		default:
		}
	}
	select {
	case m, ok := <-answer:
		switch {
		case !ok:
			return errLost
		case m.Error != nil:
			return m.Error.err()
		case result == nil:
			return nil
		}
		return json.Unmarshal(m.Result, result)
	case <-ctx.Done():
		s.mu.Lock()
		delete(s.waiting, id)
		s.mu.Unlock()
		return s.client.unreachable(context.Cause(ctx))
	}
}

func (s *session) write(m message) error {
	line, err := encode(m)
	if err != nil {
		return err
	}
	s.send.Lock()
	defer s.send.Unlock()
	return s.wire.write(line)
}

// busy tells whether an answer is waited for.
func (s *session) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting) > 0
}

// beats shows the coordinator that this host is there, and looks whether it
// answers: now and then, and more often while an answer is waited for. A
// coordinator that does not is cut.
func (s *session) beats(ctx context.Context) {
	t := s.client.times
	for {
		pause := t.beat*4/5 + rand.N(t.beat*2/5)
		if s.busy() {
			pause = t.busyBeat
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.asked:
			if !timer.Stop() || pause == t.busyBeat {
				break
			}
			continue // from now on it is busy
		case <-timer.C:
		}
		bctx, cancel := context.WithTimeout(ctx, t.answer)
		err := s.ask(bctx, methodBeat, nil, nil)
		cancel()
		if err != nil {
			s.wire.cut()
			return
		}
	}
}

// addressOf is host and port of a URL, for messages and headers.
func addressOf(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return text
	}
	return u.Host
}

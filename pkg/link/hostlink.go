package link

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/patchd/patchd/pkg/xapi"
)

// maxAnswers is how many answers may wait for a host to take them before it is
// read from again.
const maxAnswers = 2 * atOnce

// hostLink is the hub's end of one link. One goroutine reads; another one
// writes, and is only there while there is something to write.
type hostLink struct {
	hub     *Hub
	caller  caller
	wire    *wire
	since   time.Time
	known   func() // says that the connection belongs to somebody
	standby bool   // it has the pool database; set before it is in the index
	ctx     context.Context
	stop    context.CancelFunc

	mu      sync.Mutex
	taken   sync.Cond // answers were taken, or the link has ended
	answers []message
	orders  bool // some are to be sent
	writing bool // flush runs
	why     string
	wg      sync.WaitGroup // requests that are carried out, and flush
}

// cut ends the link, at once. The first reason is the one that is logged.
func (l *hostLink) cut(why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end(why)
}

// end is cut with mu held: after it nothing is begun any more, see kick.
func (l *hostLink) end(why string) {
	if l.why == "" {
		l.why = why
	}
	l.stop()
	l.wire.cut()
	l.taken.Broadcast()
}

// run is the life of the link.
func (l *hostLink) run() {
	log := l.hub.o.Log.WithFields(l.caller.fields())
	entered, err := l.greet()
	if err == nil {
		log.Info("a host is connected")
		err = l.serve()
	}
	if err != nil {
		l.cut(err.Error())
	}
	l.wg.Wait()
	l.stop()
	if entered {
		l.hub.leave(l)
	}
	log.WithField("reason", l.why).Info("the link of a host has ended")
}

// greet upgrades the connection and lets the host in, when its first message
// is a hello of a version that is served.
func (l *hostLink) greet() (entered bool, err error) {
	if err := watchPeer(l.wire.conn); err != nil {
		return false, err
	}
	answer := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + "\r\n\r\n"
	if err := l.wire.write([]byte(answer)); err != nil {
		return false, err
	}
	line, _, err := l.wire.read(maxHello, l.hub.times.hello)
	if err != nil {
		return false, fmt.Errorf("no hello came: %w", err)
	}
	var m message
	var p helloParams
	if err := json.Unmarshal(line, &m); err != nil || m.Method != methodHello || json.Unmarshal(m.Params, &p) != nil {
		return false, fmt.Errorf("the first message is no hello")
	}
	if err := l.checkProto(p); err != nil {
		if line, eerr := encode(message{ID: m.ID, Error: failed(err)}); eerr == nil {
			_ = l.wire.write(line)
		}
		return false, err
	}
	l.standby = p.Facts.Standby
	if err := l.patient(); err != nil { // it may be one that comes again and again
		return false, err
	}
	if err := l.hub.o.Pool.HostHello(l.ctx, l.caller.host, p.Facts); err != nil {
		return false, fmt.Errorf("note the facts of the host: %w", err)
	}
	return l.enter(m.ID)
}

// checkProto refuses a version that is more than one step away.
func (l *hostLink) checkProto(p helloParams) error {
	ours := l.hub.proto
	if d := p.Proto - ours; d >= -1 && d <= 1 {
		return nil
	}
	older := "host"
	if p.Proto > ours {
		older = "coordinator"
	}
	return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf(
		"the host has patchd %s (protocol %d), the coordinator has patchd %s (protocol %d): they may be one step apart; upgrade the %s",
		p.Version, p.Proto, l.hub.o.Version, ours, older))
}

// enter makes this the link of its host and says welcome. The orders follow.
func (l *hostLink) enter(id uint64) (bool, error) {
	h := l.hub
	h.mu.Lock()
	m := h.index.members[l.caller.host]
	welcome, err := raw(helloResult{
		Proto: h.proto, Version: h.o.Version, Store: h.o.Store.ID(), Term: h.o.Term(), Pool: h.index.uuid, Host: l.caller.host,
	})
	if err != nil || m == nil || h.closed {
		h.mu.Unlock()
		return false, fmt.Errorf("the host is of the pool no more")
	}
	old := m.link
	m.link, m.since = l, h.o.Now()
	h.checkKey(m)
	if m.away {
		h.back(m.ref)
	}
	l.known()
	l.answer(message{ID: id, Result: welcome})
	l.order()
	h.mu.Unlock()
	if old != nil {
		old.cut("another link of this host has taken its place")
	}
	return true, nil
}

// leave takes the link out of the index.
func (h *Hub) leave(l *hostLink) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.index.members[l.caller.host]
	if m == nil || m.link != l {
		return
	}
	m.link = nil
	h.leaves(m, h.o.Now())
}

// serve reads requests until the link ends.
func (l *hostLink) serve() error {
	ask, slots := l.limit(), make(chan struct{}, atOnce)
	for {
		line, release, err := l.wire.read(maxRequest, l.hub.times.silence)
		if err != nil {
			return err
		}
		if err := l.begin(line, release, ask, slots); err != nil {
			return err
		}
	}
}

// begin takes up the request of one line, when it is the host's turn. release
// is called when it is done.
func (l *hostLink) begin(line []byte, release func(), ask *rate.Limiter, slots chan struct{}) (err error) {
	defer func() {
		if release != nil {
			release()
		}
	}()
	m, err := parse(line)
	if err != nil {
		return err
	}
	if err := ask.Wait(l.ctx); err != nil {
		return err
	}
	l.drained()
	if m.Method == methodBeat {
		l.answerBeat(m.ID)
		return nil
	}
	select {
	case slots <- struct{}{}:
	case <-l.ctx.Done():
		return l.ctx.Err()
	}
	done := release
	release = nil
	l.wg.Go(func() {
		defer func() { <-slots }()
		if done != nil {
			defer done()
		}
		l.request(m)
	})
	return nil
}

// parse decodes a request. A beat, as hosts send it, is nearly all that ever
// comes, and costs little.
func parse(line []byte) (m message, err error) {
	if id, ok := bytes.CutSuffix(line, []byte(beatSuffix)); ok {
		if id, ok = bytes.CutPrefix(id, []byte(idPrefix)); ok {
			if m.ID, err = strconv.ParseUint(string(id), 10, 64); err == nil && m.ID != 0 {
				m.Method = methodBeat
				return m, nil
			}
		}
	}
	if err := json.Unmarshal(line, &m); err != nil || m.ID == 0 || m.Method == "" {
		return m, fmt.Errorf("a line makes no sense: %.80q", line)
	}
	return m, nil
}

// What a beat is around its id.
const (
	idPrefix   = `{"id":`
	beatSuffix = `,"method":"` + methodBeat + `"}`
)

// drained waits until the host has taken most of its answers, or the link ends.
func (l *hostLink) drained() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.answers) >= maxAnswers && l.ctx.Err() == nil {
		l.taken.Wait()
	}
}

// request carries out one request and answers it.
func (l *hostLink) request(m message) {
	result, err := l.do(m.Method, m.Params)
	a := message{ID: m.ID, Error: failed(err)}
	if err == nil {
		a.Result, err = raw(result)
		a.Error = failed(err)
	}
	if err != nil && l.ctx.Err() == nil {
		log := l.hub.o.Log.WithError(err).WithFields(l.caller.fields()).WithField("method", m.Method)
		if xapi.Is(err, xapi.OperationNotAllowed) {
			log.Warn("a host asked for what it may not have")
		} else {
			log.Debug("a request of a host failed")
		}
	}
	l.answer(a)
}

// answerBeat answers a beat, by the goroutine that reads unless another one
// writes: so an idle link never needs a second one.
func (l *hostLink) answerBeat(id uint64) {
	l.mu.Lock()
	l.answers = append(l.answers, message{ID: id})
	ours := !l.writing && l.ctx.Err() == nil
	l.writing = l.writing || ours
	l.mu.Unlock()
	if ours {
		l.flush()
	}
}

// answer has a message sent.
func (l *hostLink) answer(m message) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers = append(l.answers, m)
	l.kick()
}

// order has the orders of the host sent. However often it is called before they
// are: they are sent once, the newest.
func (l *hostLink) order() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.orders = true
	l.kick()
}

// kick begins to write, unless that goes on. Call it with mu held.
func (l *hostLink) kick() {
	if l.writing || l.ctx.Err() != nil {
		return
	}
	l.writing = true
	l.wg.Go(l.flush)
}

// flush writes what there is to write.
func (l *hostLink) flush() {
	for {
		l.mu.Lock()
		answers, orders := l.answers, l.orders
		l.answers, l.orders = nil, false
		l.taken.Broadcast()
		if len(answers) == 0 && !orders {
			l.writing = false
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		for _, m := range answers {
			if !l.send(m) {
				return
			}
		}
		if orders && !l.sendOrders() {
			return
		}
	}
}

// send writes one message; false when the link is at its end.
func (l *hostLink) send(m message) bool {
	line, err := encode(m)
	if err == nil {
		err = l.wire.write(line)
	}
	if err != nil {
		l.cut(fmt.Sprintf("it takes no more: %v", err))
	}
	return err == nil
}

// sendOrders writes the newest orders. Where the records make no sense the
// host keeps those it has: the next change tries again.
func (l *hostLink) sendOrders() bool {
	o, err := l.hub.orders(l)
	if err != nil {
		l.hub.o.Log.WithError(err).WithFields(l.caller.fields()).Error("no orders can be made for a host")
		return true
	}
	for {
		params, err := raw(o)
		if err != nil {
			l.hub.o.Log.WithError(err).WithFields(l.caller.fields()).Error("no orders can be made for a host")
			return true
		}
		if len(params) < maxOrders-1024 || len(o.Jobs) == 0 {
			return l.send(message{Method: pushOrders, Params: params})
		}
		o.Jobs = o.Jobs[:len(o.Jobs)/2] // the others follow when these are done
	}
}

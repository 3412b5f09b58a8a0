package session

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
)

// errBusy is what comes of a check that finds too many others waiting.
var errBusy = errors.New("too many password checks are waiting")

// gate lets a few through at once. Those who wait do so in a queue for each
// address; the queues take turns, so one long queue delays the others by one
// check at a time. Waiters are bounded in number for each address and in all;
// when all places are taken, a newcomer takes the last place of the longest
// queue, if that is longer than its own.
type gate struct {
	perAddress, total int

	mu      sync.Mutex // guards what follows
	free    int
	waiting int
	queues  map[string][]*waiter
	turns   []string // addresses with a queue; the first is served next
}

type waiter struct {
	done chan struct{} // closed when let in or sent away
	err  error         // set before done is closed
}

func newGate(slots, perAddress, total int) *gate {
	return &gate{perAddress: perAddress, total: total, free: slots, queues: map[string][]*waiter{}}
}

// enter waits for a place. It fails with errBusy, or with the cause of ctx.
// Whoever got in calls leave.
func (g *gate) enter(ctx context.Context, addr string) error {
	w, err := g.join(addr)
	if w == nil {
		return err
	}
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
	}
	if !g.abandon(addr, w) && w.err == nil {
		g.leave() // let in at the same moment
	}
	return context.Cause(ctx)
}

// join gives a waiter, or neither waiter nor error to one who is in.
func (g *gate) join(addr string) (*waiter, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.free > 0 {
		g.free--
		return nil, nil
	}
	mine := len(g.queues[addr])
	if mine >= g.perAddress || g.waiting >= g.total && !g.displace(mine) {
		return nil, errBusy
	}
	w := &waiter{done: make(chan struct{})}
	if mine == 0 {
		g.turns = append(g.turns, addr)
	}
	g.queues[addr] = append(g.queues[addr], w)
	g.waiting++
	return w, nil
}

// displace sends the last of the longest queue away, if that queue would still
// be no shorter than a newcomer's.
func (g *gate) displace(mine int) bool {
	longest := ""
	for addr, q := range g.queues {
		if longest == "" || len(q) > len(g.queues[longest]) {
			longest = addr
		}
	}
	q := g.queues[longest]
	if len(q) <= mine+1 {
		return false
	}
	w := q[len(q)-1]
	g.queues[longest] = q[:len(q)-1]
	g.waiting--
	w.err = errBusy
	close(w.done)
	return true
}

// abandon takes w out of its queue; false says that it is there no more.
func (g *gate) abandon(addr string, w *waiter) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	q := g.queues[addr]
	for i := range q {
		if q[i] == w {
			g.queues[addr] = append(q[:i:i], q[i+1:]...)
			g.waiting--
			if len(g.queues[addr]) == 0 {
				g.dropTurn(addr)
			}
			return true
		}
	}
	return false
}

func (g *gate) dropTurn(addr string) {
	delete(g.queues, addr)
	for i, a := range g.turns {
		if a == addr {
			g.turns = append(g.turns[:i], g.turns[i+1:]...)
			return
		}
	}
}

// leave gives the place to the next.
func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.turns) == 0 {
		g.free++
		return
	}
	addr := g.turns[0]
	g.turns = g.turns[1:]
	w := g.queues[addr][0]
	if g.queues[addr] = g.queues[addr][1:]; len(g.queues[addr]) > 0 {
		g.turns = append(g.turns, addr)
	} else {
		delete(g.queues, addr)
	}
	g.waiting--
	close(w.done)
}

// addressKey is whom a connection counts for: its host, and of IPv6 the /64,
// which one customer has for himself.
func addressKey(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	host, _, _ = strings.Cut(host, "%")
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return "local" // a unix socket
	}
	if ip = ip.Unmap(); ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.String()
		}
	}
	return ip.String()
}

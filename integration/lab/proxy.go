package lab

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Proxy hands TCP connections on to a target, and does to them what networks
// do: they are late, fall silent, or break.
type Proxy struct {
	ln     net.Listener
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	target string
	wg     sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed when one of these changes
	conns   map[net.Conn]bool
	delay   time.Duration
	silent  bool
	refuse  bool
	left    int64 // bytes that the target may still send; -1: any number
	closed  bool
}

// NewProxy listens on an address of this machine's own, a free port of
// 127.0.0.1 when it is "", for the target. It ends with the test.
func NewProxy(t testing.TB, address, target string) *Proxy {
	t.Helper()
	if address == "" {
		address = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return newProxy(t, ln, (&net.Dialer{}).DialContext, target)
}

// Proxy is a Proxy that listens on a port of the node, a free one for 0, and
// connects from there.
func (n *Node) Proxy(t testing.TB, port int, target string) *Proxy {
	t.Helper()
	ln, err := n.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	return newProxy(t, ln, n.Dial, target)
}

func newProxy(t testing.TB, ln net.Listener, dial func(context.Context, string, string) (net.Conn, error), target string) *Proxy {
	p := &Proxy{ln: ln, dial: dial, target: target, changed: make(chan struct{}), conns: map[net.Conn]bool{}, left: -1}
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// Addr is where it listens: an IP and a port.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Delay lets every byte of either direction arrive later by d.
func (p *Proxy) Delay(d time.Duration) { p.change(func() { p.delay = d }) }

// Silence lets nothing pass until Pass: connections are accepted and stay open,
// and no byte comes through. What was sent meanwhile comes afterwards.
func (p *Proxy) Silence() { p.change(func() { p.silent = true }) }

// Refuse ends all connections, and new ones as soon as they come, until Pass.
func (p *Proxy) Refuse() {
	p.change(func() { p.refuse = true })
	p.Break()
}

// CutAfter ends all connections once the target has sent n more bytes, and new
// ones at once, until Pass.
func (p *Proxy) CutAfter(n int64) { p.change(func() { p.left = n }) }

// Pass undoes Delay, Silence, Refuse and CutAfter.
func (p *Proxy) Pass() {
	p.change(func() { p.delay, p.silent, p.refuse, p.left = 0, false, false, -1 })
}

// Break resets the connections that there are; new ones are taken.
func (p *Proxy) Break() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		c.Close()
	}
}

// Open is how many connections clients have through it now.
func (p *Proxy) Open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns) / 2
}

func (p *Proxy) change(set func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	set()
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *Proxy) close() {
	p.change(func() { p.closed = true })
	p.ln.Close()
	p.Break()
	p.wg.Wait()
}

func (p *Proxy) accept() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(c) })
	}
}

// serve carries one connection until both sides have ended it.
func (p *Proxy) serve(client net.Conn) {
	defer client.Close()
	p.mu.Lock()
	refused := p.refuse || p.closed || p.left == 0
	p.mu.Unlock()
	if refused {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	target, err := p.dial(ctx, "tcp", p.target)
	if err != nil {
		return
	}
	defer target.Close()
	if !p.enter(client, target) {
		return
	}
	defer p.leave(client, target)
	var both sync.WaitGroup
	both.Go(func() { p.carry(target, client, false) })
	both.Go(func() { p.carry(client, target, true) })
	both.Wait()
}

// enter is false when Refuse or the end came while the target was dialled.
func (p *Proxy) enter(client, target net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse || p.closed {
		return false
	}
	p.conns[client], p.conns[target] = true, true
	return true
}

func (p *Proxy) leave(client, target net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, client)
	delete(p.conns, target)
}

// piece is what was read at once, and when.
type piece struct {
	data []byte
	at   time.Time
}

// carry moves bytes one way. The end of one direction is handed on; an error
// ends both.
func (p *Proxy) carry(to, from net.Conn, counted bool) {
	pieces := make(chan piece, 64)
	p.wg.Go(func() {
		defer close(pieces)
		for {
			buf := make([]byte, 32<<10)
			n, err := from.Read(buf)
			if n > 0 {
				pieces <- piece{buf[:n], time.Now()}
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					to.Close()
				}
				return
			}
		}
	})
	for x := range pieces {
		data, more := p.pass(x, counted)
		if _, err := to.Write(data); err != nil || !more {
			to.Close()
			from.Close()
			for range pieces { // the reader ends
			}
			return
		}
	}
	if tcp, ok := to.(*net.TCPConn); ok {
		tcp.CloseWrite()
	}
}

// pass waits until a piece may go on, and gives what of it may; more is false
// when the connection is to end behind that.
func (p *Proxy) pass(x piece, counted bool) (data []byte, more bool) {
	for {
		p.mu.Lock()
		wait, changed := time.Until(x.at.Add(p.delay)), p.changed
		switch {
		case p.closed:
			p.mu.Unlock()
			return nil, false
		case p.silent:
			wait = time.Hour
		case wait <= 0:
			n := int64(len(x.data))
			if counted && p.left >= 0 {
				n = min(n, p.left)
				p.left -= n
			}
			more = !counted || p.left != 0
			p.mu.Unlock()
			return x.data[:n], more
		}
		p.mu.Unlock()
		select {
		case <-changed:
		case <-time.After(wait):
		}
	}
}

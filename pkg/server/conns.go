package server

import (
	"container/list"
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/trust"
)

// crowd bounds how many connections are open at once. When it is full, a
// newcomer takes the place of the connection that has been there longest
// without showing who it belongs to: whoever has logged in is never put out by
// those who have not, and can always come in. Only when everybody is known are
// newcomers refused.
type crowd struct {
	limit int

	mu      sync.Mutex
	open    int
	unknown list.List // of *crowdConn, the oldest first
}

// crowdLimit is how many connections the listeners on the network may hold
// together: what the process may open, less what it needs for itself. The Go
// runtime has raised that to what the system allows before main began.
func crowdLimit() int {
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil || lim.Cur > 1<<20 {
		return maxConnections
	}
	return min(maxConnections, max(64, (int(lim.Cur)-ownFiles)*3/4))
}

// admit counts a connection in; nil when there is no place for it.
func (c *crowd) admit(nc net.Conn) *crowdConn {
	c.mu.Lock()
	var oldest *crowdConn
	if c.open >= c.limit {
		e := c.unknown.Front()
		if e == nil {
			c.mu.Unlock()
			return nil
		}
		oldest = e.Value.(*crowdConn)
		c.forget(oldest)
	}
	cc := &crowdConn{Conn: nc, crowd: c}
	cc.place = c.unknown.PushBack(cc)
	c.open++
	c.mu.Unlock()
	if oldest != nil {
		oldest.Close()
	}
	return cc
}

// forget takes a connection out. Call it with mu held.
func (c *crowd) forget(cc *crowdConn) {
	if cc.left {
		return
	}
	cc.left = true
	c.open--
	if cc.place != nil {
		c.unknown.Remove(cc.place)
		cc.place = nil
	}
}

// crowdConn is one connection of a crowd.
type crowdConn struct {
	net.Conn
	crowd *crowd
	place *list.Element // nil once it is known
	left  bool
}

// known says that the connection belongs to somebody with a session.
func (c *crowdConn) known() {
	c.crowd.mu.Lock()
	defer c.crowd.mu.Unlock()
	if c.place != nil {
		c.crowd.unknown.Remove(c.place)
		c.place = nil
	}
}

// Close closes the connection and gives its place to the next.
func (c *crowdConn) Close() error {
	c.crowd.mu.Lock()
	c.crowd.forget(c)
	c.crowd.mu.Unlock()
	return c.Conn.Close()
}

// NetConn gives the connection under c.
func (c *crowdConn) NetConn() net.Conn { return c.Conn }

// CloseWrite tells the client that nothing more comes.
func (c *crowdConn) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return syscall.ENOTSUP
}

// ReadFrom lets the kernel copy where it can.
func (c *crowdConn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(c.Conn, r) }

// crowdListener lets connections into a crowd.
type crowdListener struct {
	net.Listener
	crowd *crowd
}

// Accept waits for the next connection that finds a place.
func (l *crowdListener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if t, ok := nc.(*net.TCPConn); ok {
			// A host that vanished is only noticed by probing it.
			t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4})
		}
		if cc := l.crowd.admit(nc); cc != nil {
			return cc, nil
		}
		nc.Close()
	}
}

// inCrowd finds the connection of a crowd under what the server was given.
func inCrowd(c net.Conn) *crowdConn {
	switch t := c.(type) {
	case *tls.Conn:
		c = t.NetConn()
	case *trust.HostConn:
		c = t.NetConn()
	}
	cc, _ := c.(*crowdConn)
	return cc
}

// marked lets a request say that its connection belongs to somebody.
func marked(ctx context.Context, c net.Conn) context.Context {
	if cc := inCrowd(c); cc != nil {
		return session.WithProof(ctx, cc.known)
	}
	return ctx
}

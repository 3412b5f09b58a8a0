package trust

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"time"
)

// Split finishes the TLS handshake of each connection that ln accepts, within
// timeout, and gives it to one of two listeners: hosts gets those that speak
// Protocol, others the rest, which are *tls.Conn. net/http would close what
// speaks a protocol that it does not know, so connections of hosts do not look
// like TLS to it: see Request. Both listeners have to be closed; the first Close
// closes ln. failed is told of handshakes that failed.
func Split(ln net.Listener, c *tls.Config, timeout time.Duration, failed func(error)) (others, hosts net.Listener) {
	s := &split{Listener: ln, config: c, timeout: timeout, failed: failed}
	s.ctx, s.stop = context.WithCancelCause(context.Background())
	o := &half{split: s, conns: make(chan net.Conn)}
	h := &half{split: s, conns: make(chan net.Conn)}
	s.wg.Go(func() { s.accept(o.conns, h.conns) })
	return o, h
}

type split struct {
	net.Listener
	config  *tls.Config
	timeout time.Duration
	failed  func(error)
	wg      sync.WaitGroup

	ctx  context.Context // ends when nothing is accepted any more; its cause says why
	stop context.CancelCauseFunc
}

// end makes both halves say that nothing more comes.
func (s *split) end(why error) {
	s.stop(why)
	s.Listener.Close()
}

func (s *split) accept(others, hosts chan net.Conn) {
	pause := time.Duration(0)
	for {
		nc, err := s.Listener.Accept()
		if ne, ok := err.(interface{ Temporary() bool }); ok && ne.Temporary() {
			// Too many files are open: some of them will be closed.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(pause):
				continue
			case <-s.ctx.Done():
				return
			}
		}
		if err != nil {
			s.end(err)
			return
		}
		pause = 0
		s.wg.Go(func() { s.greet(nc, others, hosts) })
	}
}

// greet does the handshake and hands the connection over.
func (s *split) greet(nc net.Conn, others, hosts chan net.Conn) {
	ctx, cancel := context.WithTimeout(s.ctx, s.timeout)
	defer cancel()
	conn := tls.Server(nc, s.config)
	if err := conn.HandshakeContext(ctx); err != nil {
		nc.Close()
		s.failed(err)
		return
	}
	to, c := others, net.Conn(conn)
	if conn.ConnectionState().NegotiatedProtocol == Protocol {
		to, c = hosts, &HostConn{conn}
	}
	select {
	case to <- c:
	case <-s.ctx.Done():
		nc.Close()
	}
}

// half is one of the two listeners.
type half struct {
	*split
	conns chan net.Conn
}

// Accept waits for the next connection of its kind.
func (h *half) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.ctx.Done():
		return nil, context.Cause(h.ctx)
	}
}

// Close ends both halves and waits for handshakes that are under way, which end
// at once.
func (h *half) Close() error {
	h.end(net.ErrClosed)
	h.wg.Wait()
	return nil
}

// HostConn is a connection of a host.
type HostConn struct{ *tls.Conn }

type stateKey struct{}

// WithConn is for http.Server.ConnContext of a server on the listener hosts.
func WithConn(ctx context.Context, c net.Conn) context.Context {
	if hc, ok := c.(*HostConn); ok {
		return context.WithValue(ctx, stateKey{}, hc)
	}
	return ctx
}

// Request gives h the requests of such a server with r.TLS as net/http has it
// for other connections.
func Request(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hc, ok := r.Context().Value(stateKey{}).(*HostConn); ok {
			state := hc.ConnectionState()
			r.TLS = &state
		}
		h.ServeHTTP(w, r)
	})
}

package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/upload"
)

// Limits of every listener. There is no time-out on a whole request: an upload
// may take hours. A header must come soon, and a body must not stall; the
// handlers see to the latter.
const (
	headerTimeout = 20 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 32 << 10
	// maxConnections bounds what the listeners on the network hold together,
	// see crowd: one for each of 10,000 hosts, and those of clients. The unix
	// socket has its own count, so that an admin on the host always gets in.
	maxConnections = 16384
	maxLocal       = 512
	// ownFiles is how many files the process keeps for its own work.
	ownFiles = 512
	// lastWords is how long a client may take to read the end of an answer, and
	// wasteTime how long it may send what nobody wants any more.
	lastWords = time.Minute
	wasteTime = 5 * time.Second
)

// listeners are the ways in: plain HTTP, TLS, and the unix socket.
type listeners struct {
	log     logrus.FieldLogger
	handler atomic.Value // http.Handler: changes once, when start-up is done
	servers []*http.Server
	wg      sync.WaitGroup
	// Addr and TLSAddr are where the two listen in fact.
	Addr, TLSAddr net.Addr
}

type handlerBox struct{ http.Handler }

func (l *listeners) setHandler(h http.Handler) { l.handler.Store(handlerBox{h}) }

// ServeHTTP lets the handler decide about deadlines while it runs. What the
// server does by itself afterwards, which is sending the end of the answer and
// skipping the rest of the body, is bounded here.
func (l *listeners) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	_ = rc.SetWriteDeadline(time.Time{}) // of the request before
	if r.TLS != nil && r.TLS.NegotiatedProtocol == trust.Protocol {
		t := &taking{ResponseWriter: w}
		w = t
		defer func() {
			if !t.taken {
				l.bound(rc)
			}
		}()
	} else {
		defer l.bound(rc)
	}
	l.handler.Load().(handlerBox).ServeHTTP(w, r)
}

// bound gives the server time for what it does after the handler.
func (l *listeners) bound(rc *http.ResponseController) {
	_ = rc.SetWriteDeadline(time.Now().Add(lastWords))
	_ = rc.SetReadDeadline(time.Now().Add(wasteTime)) // the server sets its own for the next request
}

// taking knows whether a handler has taken the connection for itself.
type taking struct {
	http.ResponseWriter
	taken bool
}

// Unwrap lets http.ResponseController find what it needs.
func (t *taking) Unwrap() http.ResponseWriter { return t.ResponseWriter }

// Hijack gives the connection to the handler.
func (t *taking) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(t.ResponseWriter).Hijack()
	t.taken = t.taken || err == nil
	return c, rw, err
}

// booting answers everything until start-up repair is done.
func booting(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "1")
	http.Error(w, "patchd is starting: HOST_STILL_BOOTING", http.StatusServiceUnavailable)
}

// open begins to listen; until setHandler all is answered by booting.
func openListeners(c Config, s stateDir, id *trust.Identity, log logrus.FieldLogger) (l *listeners, err error) {
	l = &listeners{log: log}
	l.setHandler(http.HandlerFunc(booting))
	network := &crowd{limit: crowdLimit()}
	defer func() {
		if err != nil {
			l.close(0)
		}
	}()
	if c.Listen != "" {
		ln, err := net.Listen("tcp", c.Listen)
		if err != nil {
			return l, fmt.Errorf("plain HTTP: %w; --listen names another address", err)
		}
		l.Addr = ln.Addr()
		l.serve(&crowdListener{ln, network}, marked)
	}
	if c.TLSListen != "" {
		ln, err := net.Listen("tcp", c.TLSListen)
		if err != nil {
			return l, fmt.Errorf("TLS: %w; --tls-listen names another address", err)
		}
		l.TLSAddr = ln.Addr()
		clients, hosts := trust.Split(&crowdListener{ln, network}, trust.ServerConfig(tlsConfig(id), id), headerTimeout, func(err error) {
			l.log.WithError(err).Debug("a TLS handshake failed")
		})
		l.serve(clients, marked)
		l.serve(hosts, marked)
	}
	return l, l.openSocket(s.path("patchd.sock"))
}

// tlsConfig takes TLS 1.2 with ephemeral keys and authenticated ciphers, and
// 1.3. HTTP/2 is not offered: the classic clients need plain connections.
func tlsConfig(id *trust.Identity) *tls.Config {
	return &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return id.Certificate(), nil },
		MinVersion:     tls.VersionTLS12,
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
			tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
	}
}

// openSocket listens on the unix socket, where root needs no password. The
// state directory's lock is held, so a socket that lies there is a dead one.
func (l *listeners) openSocket(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	old := syscall.Umask(0o177)
	ln, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return err
	}
	l.serve(&crowdListener{ln, &crowd{limit: maxLocal}}, func(ctx context.Context, c net.Conn) context.Context {
		ctx = marked(ctx, c)
		if peerIsRoot(c) {
			return session.WithTrusted(ctx)
		}
		return ctx
	})
	return nil
}

// peerIsRoot asks the kernel who is at the other end of a unix socket.
func peerIsRoot(c net.Conn) bool {
	if cc := inCrowd(c); cc != nil {
		c = cc.Conn
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	root := false
	raw.Control(func(fd uintptr) {
		cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		root = err == nil && cred.Uid == 0
	})
	return root
}

func (l *listeners) serve(ln net.Listener, connContext func(context.Context, net.Conn) context.Context) {
	s := &http.Server{
		Handler: trust.Request(l), ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return upload.WithConn(trust.WithConn(connContext(ctx, c), c), raw(c))
		},
		ErrorLog:     quiet(l.log),
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	l.servers = append(l.servers, s)
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		if err := s.Serve(ln); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			l.log.WithError(err).WithField("address", ln.Addr()).Error("a listener ended")
		}
	}()
}

// raw is the connection under what the server was given.
func raw(c net.Conn) net.Conn {
	if cc := inCrowd(c); cc != nil {
		return cc.Conn
	}
	return c
}

// close stops to listen, lets calls end for as long as grace, and closes what
// is left.
func (l *listeners) close(grace time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	var wg sync.WaitGroup
	for _, s := range l.servers {
		wg.Go(func() {
			if s.Shutdown(ctx) != nil {
				s.Close()
			}
		})
	}
	wg.Wait()
	l.wg.Wait()
}

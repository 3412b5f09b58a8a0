package link

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// defaultPort is that of the TLS listener where a URL has none.
const defaultPort = "8443"

// dialPeer connects to a host within patience, and finishes TLS within ctx.
func dialPeer(ctx context.Context, base string, patience time.Duration, c *tls.Config) (net.Conn, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("%q is not the URL of a TLS listener", base)
	}
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	d := net.Dialer{Timeout: patience, KeepAlive: -1}
	nc, err := d.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, err
	}
	conn := tls.Client(nc, c)
	if err := conn.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, fmt.Errorf("TLS with %s: %w", base, err)
	}
	return conn, nil
}

// Times and numbers of connections that are kept for further requests.
const (
	dialPatience = 10 * time.Second
	keepIdle     = 90 * time.Second
	// expectPatience is how long a request that expects to be refused, perhaps, waits
	// for that before its body goes.
	expectPatience = 10 * time.Second
	maxTransports  = 64
)

// NewHTTP speaks to the host at base, the URL of its TLS listener, and to no
// other, wherever a request goes: trusted decides about its key, see
// trust.OneOf and trust.Pinned. It is for who has no Client, such as a
// coordinator, or a host that joins. CloseIdleConnections ends it.
func NewHTTP(id *trust.Identity, base string, trusted func(spki []byte) bool) *http.Client {
	config := trust.ClientConfig(id, trusted)
	return &http.Client{
		Transport: &http.Transport{
			DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, 2*dialPatience)
				defer cancel()
				conn, err := dialPeer(ctx, base, dialPatience, config)
				if err != nil {
					return nil, err
				}
				if err := watchPeer(conn); err != nil {
					conn.Close()
					return nil, err
				}
				return conn, nil
			},
			ExpectContinueTimeout: expectPatience,
			IdleConnTimeout:       keepIdle, MaxIdleConnsPerHost: 4, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// transports keeps one http.Client for each host that was spoken to lately.
type transports struct {
	id *trust.Identity

	mu sync.Mutex
	by map[xapi.UUID]transport
}

type transport struct {
	peer   pool.Peer
	client *http.Client
	used   time.Time
}

// to gives the client for a peer; one whose keys or address have changed gets a
// new one.
func (t *transports) to(p pool.Peer) *http.Client {
	t.mu.Lock()
	defer t.mu.Unlock()
	have, ok := t.by[p.Host]
	if !ok || have.peer.URL != p.URL || !slices.EqualFunc(have.peer.Keys, p.Keys, slices.Equal) {
		if ok {
			have.client.CloseIdleConnections()
		}
		t.makeRoom()
		have = transport{peer: p, client: NewHTTP(t.id, p.URL, trust.OneOf(p.Keys...))}
	}
	have.used = time.Now()
	if t.by == nil {
		t.by = map[xapi.UUID]transport{}
	}
	t.by[p.Host] = have
	return have.client
}

// makeRoom forgets the one that was not used for longest. Call it with mu held.
func (t *transports) makeRoom() {
	if len(t.by) < maxTransports {
		return
	}
	var oldest xapi.UUID
	for id, tr := range t.by {
		if oldest == "" || tr.used.Before(t.by[oldest].used) {
			oldest = id
		}
	}
	t.by[oldest].client.CloseIdleConnections()
	delete(t.by, oldest)
}

// close ends all connections that nobody uses.
func (t *transports) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tr := range t.by {
		tr.client.CloseIdleConnections()
	}
	t.by = nil
}

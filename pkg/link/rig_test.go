package link

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// quickTimes are short enough for tests and long enough for a busy machine.
var quickTimes = times{
	beat: 10 * time.Second, busyBeat: 5 * time.Second, answer: 5 * time.Second, silence: 20 * time.Second,
	hello: 5 * time.Second, write: 5 * time.Second, line: 10 * time.Second, grace: time.Hour, gather: 20 * time.Millisecond,
	retry: 10 * time.Millisecond, maxRetry: 50 * time.Millisecond,
}

// backend is a real pool, and what the pool does of inventories and sources in
// memory.
type backend struct {
	*pool.Pool

	mu          sync.Mutex
	hellos      map[xapi.Ref]pool.Facts
	inventories map[xapi.Ref][]pool.Inventory
	claimed     func() // called when a claim was granted, before its answer
}

func (b *backend) TakeInventory(_ context.Context, host xapi.Ref, inv pool.Inventory) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inventories[host] = append(b.inventories[host], inv)
	return nil
}

func (b *backend) HostHello(_ context.Context, host xapi.Ref, f pool.Facts) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hellos[host] = f
	return nil
}

func (b *backend) Sources(_ context.Context, host xapi.Ref, mapDigest string, fetching bool) (pool.Sources, error) {
	return pool.Sources{Ticket: []byte(mapDigest), Peers: []pool.SourcePeer{{Name: string(host), Partial: fetching}}}, nil
}

// onClaim sets claimed.
func (b *backend) onClaim(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.claimed = f
}

func (b *backend) JobClaim(ctx context.Context, job xapi.Ref) (int64, error) {
	n, err := b.Pool.JobClaim(ctx, job)
	b.mu.Lock()
	f := b.claimed
	b.mu.Unlock()
	if err == nil && f != nil {
		f()
	}
	return n, err
}

// rig is a coordinator with a real pool database.
type rig struct {
	t     *testing.T
	store *store.Store
	pool  *pool.Pool
	back  *backend
	id    *trust.Identity
	log   *logrus.Logger
	said  *logtest.Hook

	hub  *Hub
	url  string
	quit func() // ends hub and server
}

func newRig(t *testing.T) *rig { return newRigOf(t, quickTimes, Proto) }

func newRigOf(t *testing.T, tm times, proto int) *rig {
	t.Helper()
	r := &rig{t: t}
	r.log, r.said = logtest.NewNullLogger()
	r.log.SetLevel(logrus.DebugLevel)
	dir := t.TempDir()
	var err error
	r.store, err = store.Open(t.Context(), store.Options{Dir: filepath.Join(dir, "db"), Indexes: append(pool.Indexes(), task.Indexes()...)})
	r.must(err)
	t.Cleanup(func() { r.must(r.store.Close()) })
	r.pool, err = pool.Open(t.Context(), pool.Options{
		Store: r.store, Log: r.log, HostUUID: xapi.NewUUID(), Hostname: "coordinator", PatchDir: filepath.Join(dir, "patches"),
	})
	r.must(err)
	r.back = &backend{Pool: r.pool, hellos: map[xapi.Ref]pool.Facts{}, inventories: map[xapi.Ref][]pool.Inventory{}}
	r.id = identity(t)
	r.hub = r.newHub(tm, proto, 7)
	r.url, r.quit = r.serve(r.hub, r.hub)
	t.Cleanup(func() { r.quit() })
	r.change(pool.ClassHost, r.pool.Self, func(h *pool.Host) {
		h.URL, h.Keys, h.Coordinator = r.url, []pool.HostKey{{SPKI: r.id.SPKI()}}, true
	})
	return r
}

func identity(t *testing.T) *trust.Identity {
	t.Helper()
	id, err := trust.Open(filepath.Join(t.TempDir(), "tls.pem"), "host")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (r *rig) newHub(tm times, proto int, term int64) *Hub {
	h := NewHub(Options{Store: r.store, Pool: r.back, Log: r.log, Version: "1.0", Self: r.pool.Self, Term: func() int64 { return term }})
	h.times, h.proto = tm, proto
	return h
}

// serve listens for hosts; end stops that and, when there is one, the hub.
func (r *rig) serve(links http.Handler, hub *Hub) (url string, end func()) {
	r.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	r.must(err)
	url = "https://" + ln.Addr().String()
	mux := http.NewServeMux()
	mux.Handle(Path, links)
	if hub != nil {
		mux.Handle("/whoami", hub.Authenticated(func(w http.ResponseWriter, _ *http.Request, host xapi.Ref) { io.WriteString(w, string(host)) }))
		mux.Handle("/pool_patch_download", hub.Authenticated(func(w http.ResponseWriter, q *http.Request, _ xapi.Ref) {
			if q.FormValue("uuid") == "" {
				http.NotFound(w, q)
				return
			}
			io.WriteString(w, "patch "+q.FormValue("uuid"))
		}))
	}
	base := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return r.id.Certificate(), nil }}
	clients, hosts := trust.Split(ln, trust.ServerConfig(base, r.id), 5*time.Second, func(error) {})
	s := &http.Server{Handler: trust.Request(mux), ConnContext: trust.WithConn}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() { _ = s.Serve(hosts) })
	if hub != nil {
		wg.Go(func() { _ = hub.Run(ctx) })
	}
	var once sync.Once
	return url, func() {
		once.Do(func() {
			cancel()
			clients.Close()
			s.Close()
			wg.Wait()
		})
	}
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// until waits for a condition that something else brings about.
func (r *rig) until(what string, f func() bool) {
	r.t.Helper()
	end := time.Now().Add(20 * time.Second)
	for !f() {
		if time.Now().After(end) {
			r.t.Fatalf("it never came to this: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// change alters one record.
func change[T any](r *rig, class string, ref xapi.Ref, f func(*T)) {
	r.t.Helper()
	r.must(r.store.Update(r.t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[T](tx, class, ref)
		if err != nil {
			return err
		}
		f(&rec)
		tx.Put(class, ref, rec)
		return nil
	}))
}

func (r *rig) change(class string, ref xapi.Ref, f func(*pool.Host)) {
	r.t.Helper()
	change(r, class, ref, f)
}

func (r *rig) put(class string, v any) xapi.Ref {
	r.t.Helper()
	ref := xapi.NewRef()
	r.must(r.store.Update(r.t.Context(), func(tx *store.Tx) error {
		tx.Put(class, ref, v)
		return nil
	}))
	return ref
}

func (r *rig) delete(class string, ref xapi.Ref) error {
	return r.store.Update(r.t.Context(), func(tx *store.Tx) error {
		tx.Delete(class, ref)
		return nil
	})
}

func (r *rig) revision() (rev int64) {
	r.must(r.store.View(func(v *store.View) error { rev = v.Revision(); return nil }))
	return rev
}

func get[T any](r *rig, class string, ref xapi.Ref) (rec T) {
	r.t.Helper()
	r.must(r.store.View(func(v *store.View) (err error) {
		rec, err = store.Get[T](v, class, ref)
		return err
	}))
	return rec
}

func (r *rig) poolRef() (ref xapi.Ref) {
	r.must(r.store.View(func(v *store.View) error { ref = v.List(pool.ClassPool)[0].Ref; return nil }))
	return ref
}

// revoke tells the pool that a key is bad.
func (r *rig) revoke(pin string) {
	r.t.Helper()
	change(r, pool.ClassPool, r.poolRef(), func(p *pool.PoolRecord) {
		p.Revoked = append(p.Revoked, pool.RevokedKey{Pin: pin, Until: time.Now().Add(24 * time.Hour)})
	})
}

// host is one of the pool, or one that would like to be.
type host struct {
	ref  xapi.Ref
	uuid xapi.UUID
	id   *trust.Identity
}

func (r *rig) host() host {
	r.t.Helper()
	h := host{uuid: xapi.NewUUID(), id: identity(r.t)}
	h.ref = r.put(pool.ClassHost, pool.Host{UUID: h.uuid, Keys: []pool.HostKey{{SPKI: h.id.SPKI()}}})
	return h
}

// job is a call, which needs no patch.
func (r *rig) job(h host) (ref xapi.Ref, id xapi.UUID) {
	r.t.Helper()
	id = xapi.NewUUID()
	return r.put(pool.ClassJob, pool.Job{UUID: id, Kind: pool.JobCall, Call: "x", Host: h.ref, State: pool.JobQueued, Created: time.Now()}), id
}

// peer is the coordinator as hosts know it, at a URL.
func (r *rig) peer(url string) pool.Peer {
	return pool.Peer{Host: r.pool.SelfUUID, URL: url, Keys: [][]byte{r.id.SPKI()}}
}

// client connects a host, by what more can be changed of it; the test ends it.
func (r *rig) client(h host, change ...func(*Client)) *Client {
	r.t.Helper()
	c, _ := r.clientTo(h, r.url, change...)
	return c
}

func (r *rig) clientTo(h host, url string, change ...func(*Client)) (_ *Client, end func()) {
	r.t.Helper()
	c, err := NewClient(ClientOptions{
		Identity: h.id, Log: r.log, Version: "1.0",
		Coordinators: func() []pool.Peer { return []pool.Peer{r.peer(url)} },
		Facts:        func() pool.Facts { return pool.Facts{Hostname: "h-" + string(h.uuid)} },
	})
	r.must(err)
	c.times = quickTimes
	for _, f := range change {
		f(c)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	end = func() { cancel(); <-done }
	r.t.Cleanup(end)
	return c, end
}

func (r *rig) ready(c *Client) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	if err := c.Ready(ctx); err != nil {
		r.t.Fatalf("the host was not let in: %v; %+v", err, c.State())
	}
}

// logged tells whether a line of the log has all those texts in it.
func (r *rig) logged(texts ...string) bool {
	return slices.ContainsFunc(r.said.AllEntries(), func(e *logrus.Entry) bool {
		line, err := e.String()
		for _, t := range texts {
			if err != nil || !strings.Contains(line, t) {
				return false
			}
		}
		return true
	})
}

// caller speaks by hand.
type byHand struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

// dial connects as a host and upgrades, without a hello.
func (r *rig) dial(h host) *byHand {
	r.t.Helper()
	conn, err := dialPeer(r.t.Context(), r.url, 5*time.Second, trust.ClientConfig(h.id, trust.OneOf(r.id.SPKI())))
	r.must(err)
	r.t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(r.t.Context(), 10*time.Second)
	defer cancel()
	w, err := upgraded(ctx, conn, r.peer(r.url), &quickTimes)
	r.must(err)
	return &byHand{r.t, conn, w.in}
}

func (b *byHand) send(line string) error {
	_, err := io.WriteString(b.conn, line+"\n")
	return err
}

// next gives the next message, or the end.
func (b *byHand) next() (m message, err error) {
	_ = b.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	line, err := b.in.ReadBytes('\n')
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(line, &m)
}

// hello says it and waits for the first orders.
func (b *byHand) hello() {
	b.t.Helper()
	if err := b.send(`{"id":1,"method":"hello","params":{"proto":1}}`); err != nil {
		b.t.Fatal(err)
	}
	for _, want := range []string{"", pushOrders} {
		if m, err := b.next(); err != nil || m.Error != nil || m.Method != want {
			b.t.Fatalf("%+v %v", m, err)
		}
	}
}

// cut waits for the other side to end the link.
func (b *byHand) cut() {
	b.t.Helper()
	for {
		if _, err := b.next(); err != nil {
			var t net.Error
			if errors.As(err, &t) && t.Timeout() {
				b.t.Fatal("the link was not cut")
			}
			return
		}
	}
}

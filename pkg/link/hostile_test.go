package link

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// brief are for tests that wait for something not to come.
func brief() times {
	t := quickTimes
	t.hello, t.silence, t.line = 200*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
	return t
}

func TestWhoDoesNotSpeakAsAHostIsCut(t *testing.T) {
	for name, say := range map[string]func(b *byHand){
		"nothing":               func(*byHand) {},
		"half a line":           func(b *byHand) { _ = b.send(`{"id":1`[:5]); _, _ = io.WriteString(b.conn, `{"id"`) },
		"garbage for a hello":   func(b *byHand) { _ = b.send("\x00\xffhello") },
		"another method first":  func(b *byHand) { _ = b.send(`{"id":1,"method":"claim","params":{}}`) },
		"a hello of 100 KB":     func(b *byHand) { _ = b.send(`{"id":1,"method":"hello","params":"` + strings.Repeat("x", 100<<10)) },
		"silence after a hello": func(b *byHand) { b.hello() },
		"garbage after a hello": func(b *byHand) { b.hello(); _ = b.send("garbage") },
		"a push":                func(b *byHand) { b.hello(); _ = b.send(`{"method":"orders"}`) },
		"half a long line": func(b *byHand) {
			b.hello()
			_, _ = io.WriteString(b.conn, `{"id":2,"method":"inventory","params":"`+strings.Repeat("x", 200<<10))
		},
		"a line of 9 MiB": func(b *byHand) {
			b.hello()
			_ = b.send(`{"id":2,"method":"inventory","params":"` + strings.Repeat("x", 9<<20) + `"}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRigOf(t, brief(), Proto)
			h := r.host()
			b := r.dial(h)
			say(b)
			b.cut()
			r.until("the hub has let go", func() bool { return !r.hub.Connected(h.ref) })
			if len(r.hub.big) != 0 {
				t.Error("a place for a long line is still taken")
			}
			r.until("it is logged", func() bool { return r.logged("the link of a host has ended", string(h.uuid)) })
		})
	}
}

func TestARequestThatBeginsNoLinkIsAnswered(t *testing.T) {
	r := newRig(t)
	c := NewHTTP(r.host().id, r.url, trust.OneOf(r.id.SPKI()))
	defer c.CloseIdleConnections()
	resp, err := c.Post(r.url+Path, "", nil)
	r.must(err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Error(resp.Status)
	}
}

// A host that asks and takes no answers is cut, and holds nobody up.
func TestASlowReaderIsCut(t *testing.T) {
	tm := quickTimes
	tm.write = 200 * time.Millisecond
	r := newRigOf(t, tm, Proto)
	slow, good := r.host(), r.host()
	c := r.client(good)
	r.ready(c)
	for range 40 {
		r.put(pool.ClassJob, pool.Job{
			UUID: xapi.NewUUID(), Kind: pool.JobCall, Host: slow.ref, State: pool.JobQueued, Tail: strings.Repeat("x", 200<<10),
		})
	}
	b := r.dial(slow)
	if t, ok := under(b.conn).(*net.TCPConn); ok {
		r.must(t.SetReadBuffer(4 << 10))
	}
	r.must(b.send(`{"id":1,"method":"hello","params":{"proto":1}}`)) // 8 MB of orders come
	_, rev, _ := c.Jobs(good.ref)
	r.job(good)
	r.must(c.WaitChange(t.Context(), rev))
	r.until("the slow one is cut", func() bool { return r.logged("takes no more", string(slow.uuid)) })
	if r.hub.Connected(slow.ref) || !r.hub.Connected(good.ref) {
		t.Error("the wrong one is connected")
	}
}

func TestAHostThatAsksTooOftenIsSlowedDown(t *testing.T) {
	r := newRig(t)
	h := r.host()
	b := r.dial(h)
	b.hello()
	ask, _ := r.hub.limits(h.ref)
	began := time.Now()
	n := askBurst + askRate/2
	go func() {
		for i := range n {
			_ = b.send(fmt.Sprintf(`{"id":%d,"method":"beat"}`, i+2))
		}
	}()
	for range n {
		if _, err := b.next(); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took < 400*time.Millisecond {
		t.Errorf("%d requests took %s", n, took)
	}
	if again, _ := r.hub.limits(h.ref); again != ask {
		t.Error("a new link would begin with a new limit")
	}
}

// pipe is a network between hosts and a coordinator that can go silent: then
// nothing passes, and nobody is told.
type pipe struct {
	ln     net.Listener
	silent atomic.Bool
	wg     sync.WaitGroup
	mu     sync.Mutex
	conns  []net.Conn
}

func (r *rig) pipe() (p *pipe, url string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	r.must(err)
	p = &pipe{ln: ln}
	to := addressOf(r.url)
	p.wg.Go(func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, a, b)
			p.mu.Unlock()
			p.wg.Go(func() { p.copy(a, b) })
			p.wg.Go(func() { p.copy(b, a) })
		}
	})
	r.t.Cleanup(func() {
		ln.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p, "https://" + ln.Addr().String()
}

func (p *pipe) copy(to, from net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		switch {
		case p.silent.Load():
			if err != nil {
				return
			}
		case err != nil:
			to.Close()
			return
		default:
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
}

// Both sides notice a connection that is only half there, and the host comes
// back when the network does.
func TestAHalfOpenLinkIsNoticedByBothSides(t *testing.T) {
	tm := quickTimes
	tm.beat, tm.busyBeat, tm.answer, tm.silence = 100*time.Millisecond, 50*time.Millisecond, 300*time.Millisecond, 600*time.Millisecond
	r := newRigOf(t, tm, Proto)
	h := r.host()
	job, id := r.job(h)
	p, url := r.pipe()
	c, _ := r.clientTo(h, url, func(c *Client) { c.times = tm; c.times.hello = 300 * time.Millisecond })
	r.ready(c)
	p.silent.Store(true)
	asked := make(chan error, 1)
	go func() { _, _, err := c.FindJob(t.Context(), id); asked <- err }()
	r.until("the host notices", func() bool { return !c.State().Connected })
	r.until("the coordinator notices", func() bool { return !r.hub.Connected(h.ref) })
	p.silent.Store(false)
	if err := <-asked; err != nil {
		t.Errorf("what was asked is not answered by the next link: %v", err)
	}
	r.until("the coordinator has it again", func() bool { return r.hub.Connected(h.ref) })
	if n, err := c.JobClaim(t.Context(), job); n != 1 || err != nil {
		t.Error(n, err)
	}
}

func TestAnIdleLinkLivesByItsBeats(t *testing.T) {
	tm := quickTimes
	tm.beat, tm.silence = 50*time.Millisecond, 600*time.Millisecond
	r := newRigOf(t, tm, Proto)
	h := r.host()
	c := r.client(h, func(c *Client) { c.times = tm })
	r.ready(c)
	since := c.State().Since
	time.Sleep(2 * tm.silence) // nothing must happen in this time
	if s := c.State(); !s.Connected || s.Since != since || !r.hub.Connected(h.ref) {
		t.Errorf("%+v", s)
	}
}

func TestWhoIsAwayIsStoredAndTakenBack(t *testing.T) {
	tm := quickTimes
	tm.grace = 300 * time.Millisecond
	r := newRigOf(t, tm, Proto)
	never, h := r.host(), r.host()
	c, end := r.clientTo(h, r.url)
	r.ready(c)
	away := func(h host) bool { return !get[pool.Host](r, pool.ClassHost, h.ref).Away.IsZero() }
	r.until("one that never came is away", func() bool { return away(never) })
	if away(h) {
		t.Error("one that is connected is away")
	}
	if since, connected := r.hub.Seen(never.ref); connected || !since.IsZero() {
		t.Error(since, connected)
	}
	if since, connected := r.hub.Seen(h.ref); !connected || since.IsZero() {
		t.Error(since, connected)
	}
	end()
	r.until("the hub notices", func() bool { return !r.hub.Connected(h.ref) })
	since, _ := r.hub.Seen(h.ref)
	if away(h) {
		t.Error("it is away before its grace is over")
	}
	r.until("it is away", func() bool { return away(h) })
	if at := get[pool.Host](r, pool.ClassHost, h.ref).Away; !at.Equal(since) {
		t.Errorf("away since %s, want %s", at, since)
	}
	c2, end2 := r.clientTo(h, r.url)
	r.ready(c2)
	r.until("it is back", func() bool { return !away(h) })
	end2()
	r.until("it is away again", func() bool { return away(h) })
	if get[pool.Host](r, pool.ClassHost, r.pool.Self).Away.IsZero() == false || !r.hub.Connected(r.pool.Self) {
		t.Error("the coordinator itself is away")
	}
	r.change(pool.ClassHost, r.pool.Self, func(h *pool.Host) { h.Away = time.Now() })
	r.until("the coordinator is back", func() bool { return get[pool.Host](r, pool.ClassHost, r.pool.Self).Away.IsZero() })
}

// 250 hosts that are away make a few transactions, not 250.
func TestManyThatAreAwayAreStoredTogether(t *testing.T) {
	tm := quickTimes
	tm.grace, tm.gather = time.Second, 200*time.Millisecond
	r := newRigOf(t, tm, Proto)
	var hosts []host
	id := identity(t)
	for range 250 {
		h := host{uuid: xapi.NewUUID(), id: id}
		h.ref = r.put(pool.ClassHost, pool.Host{UUID: h.uuid})
		hosts = append(hosts, h)
	}
	before := r.revision()
	r.until("all are away", func() bool {
		for _, h := range hosts {
			if get[pool.Host](r, pool.ClassHost, h.ref).Away.IsZero() {
				return false
			}
		}
		return true
	})
	if n := r.revision() - before; n > 20 {
		t.Errorf("%d revisions", n)
	}
}

package link

import (
	"context"
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

// A line of many empty records would be a gigabyte in memory.
func TestAListOfAMillionNothingsIsGivenUp(t *testing.T) {
	r := newRig(t)
	h := r.host()
	b := r.dial(h)
	b.hello()
	nothings := func(one string) string { return "[" + strings.Repeat(one+",", 2<<20/len(one)) + one + "]" }
	for i, params := range []string{
		`{"host":"` + string(h.ref) + `","stamps":` + nothings("{}") + `}`,
		`{"host":"` + string(h.ref) + `","stamps":` + nothings("null") + `}`,
	} {
		r.must(b.send(fmt.Sprintf(`{"id":%d,"method":"resync","params":%s}`, i+2, params)))
		for {
			m, err := b.next()
			r.must(err)
			if m.ID != uint64(i+2) {
				continue
			}
			if m.Error == nil || m.Error.Code != xapi.InvalidValue {
				t.Errorf("%+v", m)
			}
			break
		}
	}
	var inv pool.Inventory
	if err := inv.UnmarshalJSON([]byte(`{"put":` + nothings("{}") + `}`)); !xapi.Is(err, xapi.InvalidValue) {
		t.Errorf("an inventory: %v", err)
	}
	if _, err := decode[pool.JoinRequest]([]byte(`{"stamps":` + nothings("{}") + `}`)); !xapi.Is(err, xapi.InvalidValue) {
		t.Errorf("a join: %v", err)
	}
}

// A host that signs one key after another for itself fills no record.
func TestAHostHasAFewKeysOnly(t *testing.T) {
	r := newRig(t)
	h := r.host()
	first := h.id.SPKI()
	for range maxKeys + 2 {
		r.must(h.id.Rotate(time.Now()))
		b := r.dial(h)
		b.hello()
	}
	keys := get[pool.Host](r, pool.ClassHost, h.ref).Keys
	if len(keys) > maxKeys || string(keys[len(keys)-1].SPKI) != string(h.id.SPKI()) || string(keys[0].SPKI) == string(first) {
		t.Errorf("%d keys", len(keys))
	}
}

// What a host reports at the end of a job is bounded.
func TestAReportIsBounded(t *testing.T) {
	r := newRig(t)
	h := r.host()
	job, _ := r.job(h)
	c := r.client(h)
	n, err := c.JobClaim(t.Context(), job)
	r.must(err)
	r.must(c.JobReport(t.Context(), job, 1e9, strings.Repeat("x", 1<<20)))
	if j := get[pool.Job](r, pool.ClassJob, job); j.Progress != 1 || len(j.Tail) != maxParam {
		t.Errorf("progress %g, %d bytes", j.Progress, len(j.Tail))
	}
	params := make([]string, 1000)
	r.must(c.JobFinish(t.Context(), job, pool.Outcome{
		Attempt: n, Output: strings.Repeat("x", 4<<20), Err: xapi.NewError("a code\nof lines", params...),
	}))
	j := get[pool.Job](r, pool.ClassJob, job)
	if len(j.Output) != maxText || len(j.Error) > maxParams+1 || j.Error[0] != xapi.InternalError {
		t.Errorf("%d bytes, %d parameters, %q", len(j.Output), len(j.Error), j.Error[0])
	}
	if _, err := c.MessageCreate(t.Context(), "N", 3, "Host", h.uuid, strings.Repeat("x", 1<<20)); !xapi.Is(err, xapi.InvalidValue) {
		t.Errorf("a large message: %v", err)
	}
}

// A connection counts as a host's when it is the one link of that, not before.
func TestOnlyALinkIsKnown(t *testing.T) {
	r := newRig(t)
	var known atomic.Int64
	r.hub.o.Known = func(context.Context) { known.Add(1) }
	h := r.host()
	for range 3 {
		r.dial(h) // and no hello
	}
	c := NewHTTP(h.id, r.url, trust.OneOf(r.id.SPKI()))
	defer c.CloseIdleConnections()
	resp, err := c.Get(r.url + "/pool_patch_download?uuid=x")
	r.must(err)
	resp.Body.Close()
	if n := known.Load(); n != 0 {
		t.Errorf("%d connections are kept for good", n)
	}
	r.dial(h).hello()
	if n := known.Load(); n != 1 {
		t.Errorf("the link is known %d times", n)
	}
}

// Room is promised in the SRs of the host, and no less than none.
func TestAPromiseIsInAnSROfTheHost(t *testing.T) {
	r := newRig(t)
	h, other := r.host(), r.host()
	job, _ := r.job(h)
	own, theirs := r.put(pool.ClassSR, pool.SR{UUID: xapi.NewUUID()}), r.put(pool.ClassSR, pool.SR{UUID: xapi.NewUUID()})
	r.put(pool.ClassPBD, pool.PBD{UUID: xapi.NewUUID(), Host: h.ref, SR: own})
	r.put(pool.ClassPBD, pool.PBD{UUID: xapi.NewUUID(), Host: other.ref, SR: theirs})
	c := r.client(h)
	if _, err := c.JobPromise(t.Context(), job, pool.Promise{SR: theirs, Room: 1, Free: 2, Work: xapi.NewUUID()}); !xapi.Is(err, xapi.OperationNotAllowed) {
		t.Errorf("an SR of another host: %v", err)
	}
	if _, err := c.JobPromise(t.Context(), job, pool.Promise{SR: own, Room: -1 << 60, Free: 2, Work: xapi.NewUUID()}); !xapi.Is(err, xapi.InvalidValue) {
		t.Errorf("less than none: %v", err)
	}
}

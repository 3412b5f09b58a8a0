package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

func TestMain(m *testing.M) { Main(m) }

// echo answers every connection with what it says.
func echo(t *testing.T, ln net.Listener) string {
	t.Helper()
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return ln.Addr().String()
}

// says sends a word from a node and waits a while for it to come back.
func says(n *Node, addr string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	return word(c, limit)
}

func word(c net.Conn, limit time.Duration) error {
	c.SetDeadline(time.Now().Add(limit))
	if _, err := io.WriteString(c, "word"); err != nil {
		return err
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "word" {
		return fmt.Errorf("%q %w", b, err)
	}
	return nil
}

// lost fails the test unless err is that of a time-out: what was sent vanished.
func lost(t *testing.T, what string, err error) {
	t.Helper()
	var e net.Error
	if !errors.As(err, &e) || !e.Timeout() {
		t.Errorf("%s: %v, want a time-out", what, err)
	}
}

const (
	short = 300 * time.Millisecond
	long  = 10 * time.Second
)

func TestNodesReachEachOtherAndNothingElse(t *testing.T) {
	w, other := NewNet(t, 2), NewNet(t, 1)
	ln, err := w.Nodes[0].Listen(7000)
	if err != nil {
		t.Fatal(err)
	}
	addr := echo(t, ln)
	if addr != w.Nodes[0].IP+":7000" {
		t.Errorf("it listens on %s", addr)
	}
	for _, n := range w.Nodes {
		if err := says(n, addr, long); err != nil {
			t.Errorf("from %s: %v", n.Name, err)
		}
	}
	if err := says(other.Nodes[0], addr, short); err == nil {
		t.Error("another network reaches it")
	}
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := says(w.Nodes[0], echo(t, outside), short); err == nil {
		t.Error("a node reaches a listener of this machine")
	}
	// The test itself is where it was.
	c, err := net.Dial("tcp", outside.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := word(c, long); err != nil {
		t.Error(err)
	}
	if out, err := w.Nodes[1].Command("ip", "-br", "addr", "show", "dev", link).Output(); err != nil || !strings.Contains(string(out), w.Nodes[1].IP+"/24") {
		t.Errorf("%s %v", out, err)
	}
}

func TestCutAndHeal(t *testing.T) {
	w := NewNet(t, 2)
	ln, err := w.Nodes[0].Listen(7000)
	if err != nil {
		t.Fatal(err)
	}
	addr := echo(t, ln)
	open, err := w.Nodes[1].Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	for range 2 {
		w.Nodes[0].Cut()
		lost(t, "a connection that was open", word(open, short))
		lost(t, "a new connection", says(w.Nodes[1], addr, short))
		if err := says(w.Nodes[0], addr, long); err != nil {
			t.Errorf("to itself: %v", err)
		}
		w.Nodes[0].Heal()
		if err := says(w.Nodes[1], addr, long); err != nil {
			t.Errorf("healed: %v", err)
		}
		// What was written meanwhile comes late, and with it what is answered.
		open.SetDeadline(time.Now().Add(long))
		if _, err := io.ReadFull(open, make([]byte, 4)); err != nil {
			t.Errorf("an open connection, healed: %v", err)
		}
	}
}

func TestPartitionIsBetweenPairs(t *testing.T) {
	w := NewNet(t, 3)
	a, b, c := w.Nodes[0], w.Nodes[1], w.Nodes[2]
	addrs := map[*Node]string{}
	for _, n := range w.Nodes {
		ln, err := n.Listen(7000)
		if err != nil {
			t.Fatal(err)
		}
		addrs[n] = echo(t, ln)
	}
	open, err := a.Dial(t.Context(), "tcp", addrs[b])
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := word(open, long); err != nil {
		t.Fatal(err)
	}
	w.Partition([]*Node{a}, []*Node{b})
	lost(t, "a connection that was open", word(open, short))
	lost(t, "a to b", says(a, addrs[b], short))
	lost(t, "b to a", says(b, addrs[a], short))
	for _, n := range []*Node{a, b} {
		if err := errors.Join(says(n, addrs[c], long), says(c, addrs[n], long)); err != nil {
			t.Error(err)
		}
	}
	w.Rejoin([]*Node{a}, []*Node{b})
	if err := errors.Join(says(a, addrs[b], long), says(b, addrs[a], long)); err != nil {
		t.Error(err)
	}
}

func TestNarrowBoundsWhatANodeSends(t *testing.T) {
	w := NewNet(t, 2)
	ln, err := w.Nodes[0].Listen(7000)
	if err != nil {
		t.Fatal(err)
	}
	const size = 4 << 20
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Write(make([]byte, size))
			c.Close()
		}
	}()
	defer ln.Close()
	fetch := func() time.Duration {
		t.Helper()
		begun := time.Now()
		c, err := w.Nodes[1].Dial(t.Context(), "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if n, err := io.Copy(io.Discard, c); n != size || err != nil {
			t.Fatal(n, err)
		}
		return time.Since(begun)
	}
	sent, _ := w.Nodes[0].Traffic()
	_, received := w.Nodes[1].Traffic()
	w.Nodes[0].Narrow(50)
	took := fetch() // 4 MiB are 33.6 million bits: 0.67 s, less what the bucket holds
	if took < 500*time.Millisecond || took > 5*time.Second {
		t.Errorf("at 50 Mbit/s it took %s", took)
	}
	after, _ := w.Nodes[0].Traffic()
	_, got := w.Nodes[1].Traffic()
	for _, n := range []int64{after - sent, got - received} {
		if n < size || n > size*11/10 {
			t.Errorf("%d bytes were counted for %d", n, size)
		}
	}
	w.Nodes[0].Narrow(0)
	if wide := fetch(); wide > took/2 {
		t.Errorf("without a bound it took %s, with one %s", wide, took)
	}
}

func TestNetworksOfTheDeadAreSwept(t *testing.T) {
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	stale := fmt.Sprintf("%s%d.1-1-0", netPrefix, gone.Process.Pid)
	if err := ip("", "netns add "+stale); err != nil {
		t.Fatal(err)
	}
	inside := exec.Command("nsenter", "--net="+filepath.Join(netnsDir, stale), "sleep", "1000")
	if err := inside.Start(); err != nil {
		t.Fatal(err)
	}
	w := NewNet(t, 1)
	for !strings.Contains(cmdline(inside.Process.Pid), "sleep\x001000") || strings.Contains(cmdline(inside.Process.Pid), "nsenter") {
		time.Sleep(time.Millisecond) // until it is in the namespace
	}
	sweepNetworks()
	if err := inside.Wait(); err == nil {
		t.Error("the process in it was not ended")
	}
	if len(namespaces(stale)) > 0 {
		t.Errorf("%s is still there", stale)
	}
	if len(namespaces(w.prefix)) != 2 {
		t.Error("a living network was swept")
	}
}

func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return string(b)
}

func TestANetworkGoesWithItsTest(t *testing.T) {
	var prefix string
	t.Run("it", func(t *testing.T) { prefix = NewNet(t, 2).prefix })
	if left := namespaces(prefix); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestProxy(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := NewProxy(t, "", echo(t, ln))
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", p.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	c := dial()
	if err := word(c, long); err != nil {
		t.Fatal(err)
	}

	p.Delay(150 * time.Millisecond) // each way
	begun := time.Now()
	if err := word(c, long); err != nil || time.Since(begun) < 300*time.Millisecond {
		t.Errorf("delayed: %v after %s", err, time.Since(begun))
	}
	p.Pass()

	p.Silence()
	lost(t, "silence", word(c, short))
	half := dial()
	lost(t, "half open", word(half, short))
	p.Pass()
	for _, late := range []net.Conn{c, half} {
		late.SetDeadline(time.Now().Add(long))
		if _, err := io.ReadFull(late, make([]byte, 4)); err != nil {
			t.Errorf("after the silence: %v", err)
		}
	}

	p.CutAfter(6)
	cut := dial()
	cut.SetDeadline(time.Now().Add(long))
	if _, err := io.WriteString(cut, "wordword"); err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(cut); string(b) != "wordwo" {
		t.Errorf("cut after 6 bytes: %q", b)
	}
	if err := word(dial(), long); err == nil {
		t.Error("a new connection works behind the cut")
	}
	p.Pass()

	kept := dial()
	if err := word(kept, long); err != nil {
		t.Fatal(err)
	}
	p.Refuse()
	if err := word(kept, long); err == nil {
		t.Error("a connection lives on, refused")
	}
	if err := word(dial(), long); err == nil {
		t.Error("a new connection works, refused")
	}
	p.Pass()
	if err := word(dial(), long); err != nil {
		t.Error(err)
	}
}

func TestProxyInANetwork(t *testing.T) {
	w := NewNet(t, 3)
	ln, err := w.Nodes[0].Listen(7000)
	if err != nil {
		t.Fatal(err)
	}
	p := w.Nodes[1].Proxy(t, 7000, echo(t, ln))
	if err := says(w.Nodes[2], p.Addr(), long); err != nil {
		t.Fatal(err)
	}
	if sent, _ := w.Nodes[1].Traffic(); sent == 0 {
		t.Error("it did not go by way of the proxy")
	}
}

// A member of three dies and comes back; two of three serve all the while.
func TestEtcd(t *testing.T) {
	w := NewNet(t, 4)
	t.Run("on loopback", func(t *testing.T) { StartEtcd(t, 1) })
	c := StartEtcdOn(t, w.Nodes[:3]...)
	put := func(i int) error {
		body := bytes.NewReader([]byte(`{"key":"YQ==","value":"YQ=="}`))
		res, err := w.Nodes[3].HTTP().Post(fmt.Sprintf("http://%s:%d/v3/kv/put", c.Nodes[i].IP, etcdPort), "application/json", body)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if b, _ := io.ReadAll(res.Body); res.StatusCode != 200 {
			return fmt.Errorf("%s %s", res.Status, b)
		}
		return nil
	}
	if err := put(0); err != nil {
		t.Fatal(err)
	}
	c.Nodes[0].Kill()
	if err := put(0); err == nil {
		t.Error("a dead member serves")
	}
	err := put(1)
	for range 3 { // what is asked while there is no leader is refused, late
		if err == nil {
			break
		}
		err = put(1)
	}
	if err != nil {
		t.Error(err)
	}
	c.Nodes[0].Restart()
	if err := put(0); err != nil {
		t.Error(err)
	}
}

// Hosts in a network: everything that the other tests do with a host works,
// and a patch does what it is told on each.
func TestHostsInANetwork(t *testing.T) {
	p := NewPool(t, 2, nil)
	a, b := p.Hosts[0], p.Hosts[1]
	w := p.Work(Patch{Pad: 1000})
	for _, h := range p.Hosts {
		s := h.Root()
		ref := s.MustUpload(w.Patch)
		if h == b {
			w.Tell(Refuse, b)
			_, err := s.Try("pool_patch.precheck", ref, s.Host())
			var e *xapi.Error
			if !errors.As(err, &e) || e.Code != "PATCH_PRECHECK_FAILED_UNKNOWN_ERROR" {
				t.Errorf("told to refuse: %v", err)
			}
			w.Relent(Refuse, b)
			w.Tell(Fail, b)
			if _, err := s.Try("pool_patch.apply", ref, s.Host()); !errors.As(err, &e) || e.Code != "PATCH_APPLY_FAILED" {
				t.Errorf("told to fail: %v", err)
			}
			w.Relent(Fail, b)
			if w.Begun(b) != 1 || w.Effects(b) != 0 {
				t.Errorf("begun %d, effects %d", w.Begun(b), w.Effects(b))
			}
			w.Asked(b)
		}
		if out, err := s.Try("pool_patch.apply", ref, s.Host()); err != nil || !strings.Contains(out.(string), "done on "+h.UUID()) {
			t.Fatalf("%v %v", out, err)
		}
		if n := w.Effects(h); n != 1 {
			t.Errorf("%d effects", n)
		}
		if state := s.State(w, h); state != "applied" {
			t.Errorf("its state is %s", state)
		}
	}
	if out := a.Must("host", "list"); !strings.Contains(out, a.UUID()) || strings.Contains(out, b.UUID()) {
		t.Error(out)
	}
	if res, err := b.HTTP.Get(a.URL + "/healthz"); err != nil || res.StatusCode != 200 {
		t.Errorf("%v %v", res, err)
	}
	a.Kill()
	a.Up()
	p.out[b] = true // it is a pool of its own
	p.Finish()
}

// What CheckTruth must find.
func TestWorkTellsWhatIsWrong(t *testing.T) {
	h := &Host{StateDir: t.TempDir(), PatchDir: t.TempDir()}
	h.T = t
	if err := os.WriteFile(filepath.Join(h.StateDir, "host-uuid"), []byte("h\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		begun, effects int
		stamp          bool
		asked          int
		unsure         bool
		state          string
		bad            bool
	}{
		"never":                     {state: "absent"},
		"applied":                   {begun: 1, effects: 1, stamp: true, state: "applied"},
		"failed":                    {begun: 1, state: "absent"},
		"failed, then applied":      {begun: 2, effects: 1, stamp: true, asked: 1, state: "applied"},
		"killed":                    {begun: 1, unsure: true, state: "unknown"},
		"ran twice":                 {begun: 2, effects: 1, stamp: true, state: "applied", bad: true},
		"effect twice":              {begun: 2, effects: 2, stamp: true, asked: 1, state: "applied", bad: true},
		"no stampfile":              {begun: 1, effects: 1, state: "applied", bad: true},
		"no effect":                 {begun: 1, stamp: true, state: "applied", bad: true},
		"forgotten":                 {begun: 1, effects: 1, state: "absent", bad: true},
		"stampfile, and no record":  {stamp: true, state: "absent", bad: true},
		"unknown for no reason":     {begun: 1, state: "unknown", bad: true},
		"still at it":               {begun: 1, state: "of …", bad: true},
		"two records for one patch": {begun: 1, effects: 1, stamp: true, state: "twice", bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			quiet := &recorder{TB: t}
			w := NewWork(t, Patch{UUID: xapi.NewUUID()})
			w.T = quiet
			fill := func(what string, n int) {
				if err := os.WriteFile(w.file(what, "h"), []byte(strings.Repeat("x\n", n)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			fill("begun", c.begun)
			fill("effect", c.effects)
			if c.stamp {
				os.MkdirAll(filepath.Join(h.PatchDir, "applied"), 0o755)
				os.WriteFile(filepath.Join(h.PatchDir, "applied", string(w.UUID)), nil, 0o644)
			}
			for range c.asked {
				w.Asked(h)
			}
			if c.unsure {
				w.Unsure(h)
			}
			w.check(h, c.state)
			if bad := len(quiet.said) > 0; bad != c.bad {
				t.Errorf("it says %q", quiet.said)
			}
		})
	}
}

// recorder keeps errors instead of failing.
type recorder struct {
	testing.TB
	said []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.said = append(r.said, fmt.Sprintf(format, args...))
}

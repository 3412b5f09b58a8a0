package session

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

// line lets waiters into a gate one by one and notes in which order.
type line struct {
	t     *testing.T
	g     *gate
	wg    sync.WaitGroup
	mu    sync.Mutex
	order []string
}

// join adds a waiter from addr and returns when it stands in its queue, or has
// been refused.
func (l *line) join(addr string) {
	l.g.mu.Lock()
	before := l.g.waiting
	l.g.mu.Unlock()
	done := make(chan struct{})
	l.wg.Go(func() {
		defer close(done)
		err := l.g.enter(l.t.Context(), addr)
		l.mu.Lock()
		defer l.mu.Unlock()
		if err != nil {
			l.order = append(l.order, "refused "+addr)
			return
		}
		l.order = append(l.order, addr)
		l.g.leave()
	})
	for {
		l.g.mu.Lock()
		waiting := l.g.waiting
		l.g.mu.Unlock()
		if waiting > before {
			return
		}
		select {
		case <-done:
			return
		default:
			runtime.Gosched()
		}
	}
}

func (l *line) run() string {
	l.g.leave()
	l.wg.Wait()
	return strings.Join(l.order, " ")
}

func newLine(t *testing.T, perAddress, total int) *line {
	l := &line{t: t, g: newGate(1, perAddress, total)}
	if err := l.g.enter(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	return l
}

func TestQueuesTakeTurns(t *testing.T) {
	l := newLine(t, 100, 100)
	for range 5 {
		l.join("flood")
	}
	l.join("admin")
	l.join("other")
	l.join("admin")
	if got, want := l.run(), "flood admin other flood admin flood flood flood"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if l.g.free != 1 || l.g.waiting != 0 || len(l.g.queues) != 0 || len(l.g.turns) != 0 {
		t.Errorf("%+v", l.g)
	}
}

func TestAQueueIsBounded(t *testing.T) {
	l := newLine(t, 3, 100)
	for range 5 {
		l.join("flood")
	}
	l.join("admin")
	if got, want := l.run(), "refused flood refused flood flood admin flood flood"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A login flood that takes every place still leaves one for an admin who comes
// from elsewhere.
func TestAFullHouseMakesRoomForANewAddress(t *testing.T) {
	l := newLine(t, 100, 4)
	for range 6 {
		l.join("flood")
	}
	l.g.mu.Lock()
	before := l.g.waiting
	l.g.mu.Unlock()
	entered := make(chan error, 1)
	l.wg.Go(func() {
		err := l.g.enter(t.Context(), "admin")
		entered <- err
		l.g.leave()
	})
	for {
		l.g.mu.Lock()
		there := len(l.g.queues["admin"]) == 1
		full := l.g.waiting == before
		l.g.mu.Unlock()
		if there && full {
			break
		}
		runtime.Gosched()
	}
	got := l.run()
	if err := <-entered; err != nil {
		t.Error(err)
	}
	if strings.Count(got, "refused flood") != 3 || len(strings.Fields(got)) != 3*2+3 {
		t.Errorf("got %s", got)
	}
}

func TestNobodyIsDisplacedByAnEqual(t *testing.T) {
	l := newLine(t, 100, 2)
	l.join("a")
	l.join("b")
	l.join("c")
	if got, want := l.run(), "refused c a b"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestAWaiterMayGo(t *testing.T) {
	g := newGate(1, 10, 10)
	if err := g.enter(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := g.enter(ctx, "a"); !errors.Is(err, cause) {
		t.Error(err)
	}
	if g.waiting != 0 || len(g.queues) != 0 || len(g.turns) != 0 {
		t.Errorf("%+v", g)
	}
	g.leave()
	if g.free != 1 {
		t.Error("the place is lost")
	}
}

func TestNoPlaceIsLostHoweverWaitersComeAndGo(t *testing.T) {
	g := newGate(2, 20, 40)
	var wg sync.WaitGroup
	var mu sync.Mutex
	inside, most := 0, 0
	for n := range 64 {
		wg.Go(func() {
			for i := range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				if (n+i)%3 == 0 {
					go cancel()
				}
				if g.enter(ctx, fmt.Sprint(n%7)) == nil {
					mu.Lock()
					inside++
					most = max(most, inside)
					mu.Unlock()
					runtime.Gosched()
					mu.Lock()
					inside--
					mu.Unlock()
					g.leave()
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if most > 2 || g.free != 2 || g.waiting != 0 || len(g.queues) != 0 || len(g.turns) != 0 {
		t.Errorf("%d at once, %+v", most, g)
	}
}

func TestAddressKey(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.7:4711":         "192.0.2.7",
		"[2001:db8:1:2:3::4]:80": "2001:db8:1:2::/64",
		"[2001:db8:1:2:9::9]:81": "2001:db8:1:2::/64",
		"[::ffff:192.0.2.7]:80":  "192.0.2.7",
		"[fe80::1%eth0]:80":      "fe80::/64",
		"192.0.2.7":              "192.0.2.7",
		"":                       "local",
		"@":                      "local",
		"not an address":         "local",
	} {
		if got := addressKey(remote); got != want {
			t.Errorf("%q: %s, want %s", remote, got, want)
		}
	}
}

func TestHashes(t *testing.T) {
	stored := standard.hash("secret")
	if !strings.HasPrefix(stored, "$argon2id$v=19$m=19456,t=2,p=1$") {
		t.Errorf("%s", stored)
	}
	if stored == standard.hash("secret") {
		t.Error("no salt")
	}
	for password, want := range map[string]bool{"secret": true, "Secret": false, "": false} {
		if ok, err := matches(stored, password); ok != want || err != nil {
			t.Errorf("%q: %v %v", password, ok, err)
		}
	}
	for _, bad := range []string{
		"", "secret", "$argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$a2V5a2V5a2V5a2V5a2V5",
		"$argon2id$v=18$m=8,t=1,p=1$c2FsdHNhbHQ$a2V5a2V5a2V5a2V5a2V5",
		"$argon2id$v=19$m=99999999,t=1,p=1$c2FsdHNhbHQ$a2V5a2V5a2V5a2V5a2V5",
		"$argon2id$v=19$m=8,t=0,p=1$c2FsdHNhbHQ$a2V5a2V5a2V5a2V5a2V5",
		"$argon2id$v=19$m=8,t=1,p=1$$a2V5", "$argon2id$v=19$nonsense$c2FsdHNhbHQ$a2V5a2V5a2V5a2V5a2V5",
	} {
		if ok, err := matches(bad, "secret"); ok || !errors.Is(err, errHash) {
			t.Errorf("%q: %v %v", bad, ok, err)
		}
	}
	if !slices.Equal(ranks, []Role{ReadOnly, PoolOperator, PoolAdmin}) {
		t.Error("the order of the roles is their meaning")
	}
}

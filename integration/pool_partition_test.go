package integration

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// C4: the leader is alone for a while, in the middle of a run. It writes
// nothing, another one goes on with the run, and afterwards all agree.
func TestC4_LeaderIsAlone(t *testing.T) {
	t.Parallel()
	leaderIsAlone(t, 8*time.Second)
}

// The same for half a minute, as often as one likes: make soak N=10.
func TestC4_SoakLeaderIsAlone(t *testing.T) {
	n, _ := soak(t, 0)
	for range n {
		leaderIsAlone(t, 30*time.Second)
	}
}

func leaderIsAlone(t *testing.T, cut time.Duration) {
	t.Helper()
	n := lab.NewNet(t, 7)
	etcd := lab.StartEtcdOn(t, n.Nodes[4:]...)
	p := lab.PoolOn(t, n, 4, func(i int) (o lab.Options) {
		if i < 3 {
			o.Store = etcd.URL("")
		}
		return o
	})
	p.Join(p.Leader().H, p.Hosts[3])
	s := p.Leader()
	old := s.H
	var rest []*lab.Host
	var others []*lab.Node
	for i, node := range n.Nodes {
		if node == old.Node {
			continue
		}
		others = append(others, node)
		if i < len(p.Hosts) {
			rest = append(rest, p.Hosts[i])
		}
	}
	w := p.Work(lab.Patch{Pad: 1 << 20})
	s.MustUpload(w.Patch)
	w.Tell(lab.Hold, rest...)
	run := startRun(old, w, "--coordinator", "last", "--wait-away", "5m")
	until(t, "the first host to be at work", func() bool { return begunOn(w, rest) == 1 })

	pool, _ := s.One("pool")
	n.Partition([]*lab.Node{old.Node}, others)
	began := time.Now()
	var written atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // a client that is cut off together with the leader
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
			if _, err := s.Try("pool.add_to_other_config", pool, fmt.Sprintf("alone-%d", i), "written"); err == nil {
				written.Add(1)
			}
		}
	}()
	next := leaderAmong(t, rest)
	t.Logf("another one leads after %s", time.Since(began).Round(10*time.Millisecond))
	w.Relent(lab.Hold, rest...)
	until(t, "the run to go on without the old leader", func() bool {
		for _, h := range rest {
			if next.State(w, h) != "applied" {
				return false
			}
		}
		return true
	})
	everywhere(t, next, w, rest...)
	untouched(t, w, old)
	if r := showRun(next.H, run); r.Run.State != "running" {
		t.Errorf("the run does not wait for the host that is cut off: %+v", r)
	}
	time.Sleep(time.Until(began.Add(cut))) // a partition is as long as it is
	close(stop)
	n.Rejoin([]*lab.Node{old.Node}, others)

	until(t, "the old leader to stand by", func() bool {
		_, err := old.Login("root", lab.Password)
		var e *xapi.Error
		return errors.As(err, &e) && e.Code == xapi.HostIsSlave && len(e.Params) == 1 && e.Params[0] == next.H.IP
	})
	<-stopped
	if r := ended(next.H, run, time.Minute); r.Run.State != "done" {
		t.Errorf("the run: %+v", r)
	}
	everywhere(t, next, w, p.Hosts...)
	_, rec := next.One("pool")
	for key := range rec["other_config"].(map[string]any) {
		if strings.HasPrefix(key, "alone-") {
			t.Errorf("the old leader has written %s", key)
		}
	}
	if k := written.Load(); k != 0 {
		t.Errorf("it says so of %d writes", k)
	}
	p.Finish()
}

// begunOn counts the hosts where apply has begun.
func begunOn(w *lab.Work, hosts []*lab.Host) (n int) {
	for _, h := range hosts {
		if w.Begun(h) > 0 {
			n++
		}
	}
	return n
}

// leaderAmong waits until one of hosts leads, and logs in there.
func leaderAmong(t testing.TB, hosts []*lab.Host) (s *lab.Session) {
	t.Helper()
	until(t, "another host to lead", func() bool {
		for _, h := range hosts {
			var err error
			if s, err = h.Login("root", lab.Password); err == nil {
				return true
			}
		}
		return false
	})
	return s
}

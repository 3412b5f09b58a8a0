package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/patchd/patchd/pkg/xapi"
)

// playWriter is a daemon on embedded data that leads and writes until it is
// killed. It says each number when it is durable.
func playWriter() int {
	var o Options
	config(&o)
	s, err := Open(context.Background(), o)
	if err == nil {
		_, err = s.Campaign(context.Background(), "writer")
	}
	for n := 0; err == nil; n++ {
		err = s.Update(context.Background(), func(tx *Tx) error {
			tx.Put("VDI", xapi.Ref(fmt.Sprintf("n%d", n)), disk{N: n})
			return nil
		})
		fmt.Println(n)
	}
	fmt.Fprintln(os.Stderr, "writer:", err)
	return 1
}

const counter = xapi.Ref("counter")

// playLeader is a daemon on a cluster that leads and counts until it is
// deposed.
func playLeader() int {
	var o Options
	config(&o)
	ctx := context.Background()
	s, err := Open(ctx, o)
	if err == nil {
		_, err = s.Campaign(ctx, "leader")
	}
	for err == nil {
		err = s.Update(ctx, func(tx *Tx) error { return increaseIn(tx, counter) })
		fmt.Println("counted", err)
		_ = s.pause(ctx, 5*time.Millisecond)
	}
	if errors.Is(err, ErrDeposed) {
		fmt.Println("deposed")
	}
	return 0
}

// TestKilledWriter: what was acknowledged is there, and the lease of the dead
// process keeps nobody waiting.
func TestKilledWriter(t *testing.T) {
	dir := t.TempDir()
	p := play(t, "writer", Options{Dir: dir})
	last := -1
	for range 300 {
		if _, err := fmt.Sscan(p.says(t), &last); err != nil {
			t.Fatal(err)
		}
	}
	p.signal(t, syscall.SIGKILL)
	for p.lines.Scan() {
		_, _ = fmt.Sscan(p.lines.Text(), &last)
	}
	_ = p.cmd.Wait()
	s := openDir(t, dir)
	start := time.Now()
	if name, _ := view(t, s).Leader(); name != "" {
		t.Error("a dead process leads:", name)
	}
	if _, err := s.Campaign(t.Context(), "after"); err != nil || time.Since(start) > 5*time.Second {
		t.Error("campaign:", err, time.Since(start))
	}
	v := view(t, s)
	for n := range last + 1 {
		if d, err := Get[disk](v, "VDI", xapi.Ref(fmt.Sprintf("n%d", n))); err != nil || d.N != n {
			t.Fatalf("%d of %d is lost: %v", n, last, err)
		}
	}
	if name, _ := v.Leader(); name != "after" {
		t.Error("leader:", name)
	}
}

// TestFailover: the raft leader of three nodes is killed and the pool goes on;
// then the pool's leader stands still for longer than its lease, another one
// takes over, and when the first wakes up it cannot write any more.
func TestFailover(t *testing.T) {
	at, nodes := cluster(t, 3)
	o := Options{URL: at, LeaseTTL: 2 * time.Second}
	s := open(t, o)
	p := play(t, "leader", o)
	counts := func(times int) {
		t.Helper()
		for range times {
			if line := p.says(t); line != "counted <nil>" {
				t.Fatal("the leader says", line)
			}
		}
	}
	counts(20)
	kill := raftLeader(t, s)
	nodes[kill].signal(t, syscall.SIGKILL)
	counts(50)
	before := number(t, s, counter)
	put(t, s, "VDI", xapi.NewRef(), disk{})

	p.signal(t, syscall.SIGSTOP)
	l, err := s.Campaign(t.Context(), "second")
	if err != nil {
		t.Fatal(err)
	}
	taken := number(t, s, counter)
	p.signal(t, syscall.SIGCONT)
	for line := p.says(t); line != "deposed"; {
		line = p.says(t)
	}
	if err := increase(t.Context(), s, counter); err != nil {
		t.Error("the second leader cannot write:", err)
	}
	if n := number(t, s, counter); n != taken+1 || taken < before {
		t.Errorf("counted %d, then %d, then %d", before, taken, n)
	}
	if err := l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

// raftLeader is the number of the node that leads the cluster.
func raftLeader(t *testing.T, s *Store) int {
	t.Helper()
	for n, at := range s.client.Endpoints() {
		var st *clientv3.StatusResponse
		st, err := s.client.Status(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		if st.Leader == st.Header.MemberId {
			return n
		}
	}
	t.Fatal("nobody leads")
	return 0
}

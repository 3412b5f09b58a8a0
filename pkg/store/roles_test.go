package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
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

// TestALeaderInDoubt: while the cluster does not answer for longer than its
// lease a leader does not hold the lead, and holds it again when nobody else has
// taken it.
func TestALeaderInDoubt(t *testing.T) {
	at, nodes := cluster(t, 1)
	s := open(t, Options{URL: at, LeaseTTL: 2 * time.Second})
	l, err := s.Campaign(t.Context(), "leader")
	if err != nil {
		t.Fatal(err)
	}
	if !l.Held() {
		t.Error("a new leader is in doubt")
	}
	put(t, s, "VDI", counter, disk{})
	nodes[0].signal(t, syscall.SIGSTOP)
	for end := time.Now().Add(10 * time.Second); l.Held(); _ = s.pause(t.Context(), 10*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it holds the lead without the cluster, for 10 s")
		}
	}
	if over(l) {
		t.Error("it gave up at once")
	}
	// The node counts the time that it stood still: the lease may be over, too.
	nodes[0].signal(t, syscall.SIGCONT)
	for !l.Held() && !over(l) {
		_ = s.pause(t.Context(), 10*time.Millisecond)
	}
	if _, err := s.client.Revoke(t.Context(), l.lease.id); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Fatal(err)
	}
	<-l.Done()
	if l.Held() {
		t.Error("a leader without a lease holds the lead")
	}
	if err := increase(t.Context(), s, counter); !errors.Is(err, ErrDeposed) {
		t.Error("it wrote:", err)
	}
	if err := l.Abdicate(t.Context()); err != nil {
		t.Error(err)
	}
	if err := increase(t.Context(), s, counter); !errors.Is(err, ErrDeposed) {
		t.Error("it wrote after it has abdicated:", err)
	}
}

func over(l *Leadership) bool {
	select {
	case <-l.Done():
		return true
	default:
		return false
	}
}

// TestACandidateWhoseLeaseIsLost stands again.
func TestACandidateWhoseLeaseIsLost(t *testing.T) {
	at, _ := cluster(t, 1)
	o := Options{URL: at, LeaseTTL: 2 * time.Second}
	first, second := open(t, o), open(t, o)
	put(t, first, "VDI", counter, disk{})
	l, err := first.Campaign(t.Context(), "first")
	if err != nil {
		t.Fatal(err)
	}
	elected := make(chan error, 1)
	go func() {
		_, err := second.Campaign(t.Context(), "second")
		elected <- err
	}()
	var own clientv3.LeaseID
	for own == 0 {
		got, err := first.client.Get(t.Context(), first.keys.leaders()+"/", clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range got.Kvs {
			if string(kv.Value) == "second" {
				own = clientv3.LeaseID(kv.Lease)
			}
		}
	}
	if _, err := first.client.Revoke(t.Context(), own); err != nil {
		t.Fatal(err)
	}
	if err := l.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-elected; err != nil {
		t.Fatal(err)
	}
	if name, _ := view(t, second).Leader(); name != "second" {
		t.Error("leader:", name)
	}
	if err := increase(t.Context(), second, counter); err != nil {
		t.Error(err)
	}
}

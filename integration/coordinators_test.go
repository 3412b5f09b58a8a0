package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// coordinators is a pool of hosts that have its database, on a real cluster.
type coordinators struct {
	t     *testing.T
	etcd  *lab.Etcd
	hosts []*lab.Host
}

// startCoordinators starts an etcd cluster of three and n daemons on it, all at once.
func startCoordinators(t *testing.T, n int, o lab.Options) *coordinators {
	t.Helper()
	c := &coordinators{t: t, etcd: lab.StartEtcd(t, 3)}
	o.Flags = append([]string{"--store", c.etcd.URL("")}, o.Flags...)
	for range n {
		c.hosts = append(c.hosts, lab.Prepare(t, o))
	}
	for _, h := range c.hosts {
		h.Launch()
	}
	for _, h := range c.hosts {
		if err := h.Ready(60 * time.Second); err != nil {
			t.Fatalf("%v\n%.2000s", err, h.Log())
		}
	}
	return c
}

// leader waits until a host lets root in, and gives it, a session there and how
// long that took.
func (c *coordinators) leader() (*lab.Host, *lab.Session, time.Duration) {
	c.t.Helper()
	begun := time.Now()
	for time.Since(begun) < 15*time.Second {
		for _, h := range c.hosts {
			if s, err := h.Login("root", lab.Password); err == nil {
				return h, s, time.Since(begun)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	c.t.Fatal("no host leads within 15 s")
	return nil, nil, 0
}

// others are the hosts but one.
func (c *coordinators) others(not *lab.Host) (others []*lab.Host) {
	for _, h := range c.hosts {
		if h != not {
			others = append(others, h)
		}
	}
	return others
}

// standsBy waits until a host says that another one leads.
func standsBy(t *testing.T, h, leader *lab.Host) {
	t.Helper()
	until(t, h.IP+" to stand by", func() bool {
		_, err := h.Login("root", lab.Password)
		var e *xapi.Error
		return errors.As(err, &e) && e.Code == xapi.HostIsSlave && len(e.Params) == 1 && e.Params[0] == leader.IP
	})
}

// masterIP is the address of the pool's master as the records say.
func masterIP(s *lab.Session) string {
	s.H.T.Helper()
	_, pool := s.One("pool")
	return s.Call("host.get_address", pool["master"]).(string)
}

// C4: of many coordinators one leads and the others say which; when it dies
// another one does, with the sessions, the events and the master of the pool.
func TestC4_CoordinatorsFollowEachOther(t *testing.T) {
	c := startCoordinators(t, 3, lab.Options{})
	first, s, _ := c.leader()
	if n := len(s.All("host")); n != 3 {
		t.Fatalf("the pool has %d hosts", n)
	}
	s.One("pool")
	if n := len(s.All("SR")); n != 3 {
		t.Errorf("the pool has %d SRs, one for each host is right", n)
	}
	if ip := masterIP(s); ip != first.IP {
		t.Errorf("the master is %s, the leader %s", ip, first.IP)
	}
	for _, h := range c.others(first) {
		standsBy(t, h, first)
		_, err := h.RPC("pool.get_all", s.Ref)
		wantCode(t, err, xapi.HostIsSlave, first.IP)
		role, err := h.RPC("patchd.role")
		if r, _ := role.(map[string]any); err != nil || r["role"] != "standby" || r["coordinator_address"] != first.IP {
			t.Errorf("role %v %v", role, err)
		}
		out, stderr, code := h.CLI("status")
		if code != 0 || !strings.Contains(out, "standby") || !strings.Contains(out, first.IP) {
			t.Errorf("status: %d %s %s", code, out, stderr)
		}
	}

	next := c.others(first)
	from := s.Call("event.from", []string{"pool"}, "", 1.0).(map[string]any)
	token := from["token"].(string)
	first.Kill()
	second, _, took := (&coordinators{t: t, hosts: next}).leader()
	t.Logf("the next call was served after %s", took.Round(10*time.Millisecond))
	s = &lab.Session{H: second, Ref: s.Ref} // the login is the pool's
	from = s.Call("event.from", []string{"pool"}, token, 5.0).(map[string]any)
	if events, _ := from["events"].([]any); len(events) == 0 {
		t.Errorf("no event of the new master after the old token: %v", from)
	}
	if ip := masterIP(s); ip != second.IP {
		t.Errorf("the master is %s, the leader %s", ip, second.IP)
	}

	first.Launch()
	if err := first.Ready(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	standsBy(t, first, second)
	second.Down() // SIGTERM: it gives the lead back
	begun := time.Now()
	third, _, _ := (&coordinators{t: t, hosts: []*lab.Host{first, c.others(first)[0], c.others(first)[1]}}).leader()
	t.Logf("after SIGTERM the next call was served after %s", time.Since(begun).Round(10*time.Millisecond))
	if third == second {
		t.Error("a daemon that ended leads")
	}
}

// C7: the npm package as it is, pointed at a host that does not lead.
func TestC7_XenAPIAtAHostThatDoesNotLead(t *testing.T) {
	npmClients(t)
	c := startCoordinators(t, 2, lab.Options{Plain: 80, TLS: 443}) // it knows no other ports of a host
	leader, _, _ := c.leader()
	standby := c.others(leader)[0]
	standsBy(t, standby, leader)
	for transport, url := range map[string]string{"json-rpc": standby.URL, "xml-rpc": standby.TLSURL} {
		t.Run(transport, func(t *testing.T) {
			p := plan{
				URL: url, Transport: transport, Debounce: 20, Patches: clientPatches(t, "sized", "unsized", "buffer"),
				Extra: map[string]string{"leader": leader.IP, "standby": standby.IP},
			}
			clientOK(t, "npm", "node", "standby.mjs", p.write(t))
		})
	}
}

// puts writes into a record of the pool, again and again, until stop, and
// counts what was acknowledged.
type writer struct {
	stop  chan struct{}
	done  chan struct{}
	acked atomic.Int64
}

// writing writes at a host with a session until stop is closed.
func writing(h *lab.Host, s *lab.Session, pool string) *writer {
	w := &writer{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for n := 0; ; n++ {
			select {
			case <-w.stop:
				return
			default:
			}
			if _, err := h.RPC("pool.add_to_other_config", s.Ref, pool, fmt.Sprintf("%s-%06d", h.IP, n), "x"); err == nil {
				w.acked.Add(1)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return w
}

func (w *writer) end() int64 {
	close(w.stop)
	<-w.done
	return w.acked.Load()
}

// wrote counts the keys in the pool's other_config that came from a host.
func wrote(s *lab.Session, h *lab.Host) (n int64) {
	s.H.T.Helper()
	_, pool := s.One("pool")
	for key := range pool["other_config"].(map[string]any) {
		if strings.HasPrefix(key, h.IP+"-") {
			n++
		}
	}
	return n
}

// C4: a leader that stands still for longer than its lease writes nothing when
// it wakes, and stands by; a node of etcd that dies, and all of them away for a
// while, lose nothing.
func TestC4_APausedLeaderWritesNothing(t *testing.T) {
	c := startCoordinators(t, 2, lab.Options{})
	first, s, _ := c.leader()
	second := c.others(first)[0]
	poolRef, _ := s.One("pool")
	w := writing(first, s, poolRef)
	until(t, "some writes", func() bool { return w.acked.Load() > 20 })

	first.Pause()
	_, _, took := (&coordinators{t: t, hosts: []*lab.Host{second}}).leader()
	t.Logf("the next call was served after %s", took.Round(10*time.Millisecond))
	s = &lab.Session{H: second, Ref: s.Ref}
	before := wrote(s, first)
	time.Sleep(time.Second) // nothing can be waited for: it is to do nothing
	first.Resume()
	standsBy(t, first, second)
	if acked := w.end(); acked > before {
		t.Errorf("%d writes were acknowledged, %d are there", acked, before)
	}
	if after := wrote(s, first); after != before {
		t.Errorf("%d writes of the paused leader, then %d", before, after)
	}
	if ip := masterIP(s); ip != second.IP {
		t.Errorf("the master is %s, the leader %s", ip, second.IP)
	}

	// a node of etcd
	w = writing(second, s, poolRef)
	c.etcd.Nodes[0].Kill()
	reached := w.acked.Load() + 50
	until(t, "writes go on with two nodes", func() bool { return w.acked.Load() >= reached })

	// all of etcd
	c.etcd.Nodes[1].Kill()
	c.etcd.Nodes[2].Kill()
	until(t, "the API says that it cannot answer", func() bool {
		_, err := second.RPC("pool.get_all", s.Ref)
		var e *xapi.Error
		return errors.As(err, &e) && (e.Code == xapi.HostStillBooting || e.Code == xapi.HostIsSlave) || err != nil && strings.Contains(err.Error(), "503")
	})
	for _, n := range c.etcd.Nodes {
		n.Start()
	}
	third, _, took := c.leader()
	t.Logf("after etcd came back the next call was served after %s", took.Round(10*time.Millisecond))
	acked := w.end()
	s = &lab.Session{H: third, Ref: s.Ref}
	if n := wrote(s, second); n < acked {
		t.Errorf("%d writes were acknowledged, %d are there", acked, n)
	}
	s.MustUpload(&lab.Patch{})
}

// The database moves to a cluster, is backed up while it is in use, and comes
// back from the backup; each time it is another one to whoever follows events.
func TestC4_TheDatabaseMoves(t *testing.T) {
	etcd := lab.StartEtcd(t, 3)
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{}
	s.MustUpload(p)
	token := s.Call("event.from", []string{"pool"}, "", 1.0).(map[string]any)["token"].(string)
	h.Down()
	cli := func(args ...string) {
		t.Helper()
		if out, stderr, code := h.CLI(args...); code != 0 {
			t.Fatalf("%v: %d %s %s", args, code, out, stderr)
		}
	}
	cli("store", "migrate", etcd.URL("moved"))
	h.Launch()
	<-h.Exited()
	if !strings.Contains(h.Log(), "the pool database was moved to "+etcd.URL("moved")) {
		t.Error("a daemon starts on a database that was moved")
	}

	there := lab.Prepare(t, lab.Options{Dir: filepath.Dir(h.StateDir), Flags: []string{"--store", etcd.URL("moved")}})
	follow := func(token string) string {
		t.Helper()
		there.Up()
		c := &coordinators{t: t, hosts: []*lab.Host{there}}
		_, s, _ := c.leader()
		s.One("host")
		if _, rec := s.One("pool_patch"); rec["uuid"] != string(p.UUID) {
			t.Errorf("another patch is there: %v", rec)
		}
		_, err := s.Try("event.from", []string{"pool"}, token, 1.0)
		hasCode(t, err, xapi.EventsLost)
		return s.Call("event.from", []string{"pool"}, "", 1.0).(map[string]any)["token"].(string)
	}
	token = follow(token)
	file := filepath.Join(t.TempDir(), "backup")
	cli("store", "backup", file, "--store", etcd.URL("moved"))
	if _, stderr, code := h.CLI("store", "restore", file, "--store", etcd.URL("moved")); code != 1 || !strings.Contains(stderr, "empty") {
		t.Errorf("restored over what is there: %d %s", code, stderr)
	}
	there.Down()
	cli("store", "restore", file, "--store", etcd.URL("restored"))
	there.SetFlags("--store", etcd.URL("restored"))
	follow(token)
}

// A host that stands by applies patches as every host does, also one that lies
// as a classic file on the leader; what is at work while the leader dies ends.
func TestC4_AStandbyAppliesPatches(t *testing.T) {
	c := startCoordinators(t, 3, lab.Options{})
	leader, s, _ := c.leader()
	standby := c.others(leader)[0]
	hostAt := func(h *lab.Host) string {
		for ref, rec := range s.All("host") {
			if rec["address"] == h.IP {
				return ref
			}
		}
		t.Fatalf("no host at %s", h.IP)
		return ""
	}
	dir := t.TempDir()
	goOn, log := filepath.Join(dir, "go on"), filepath.Join(dir, "log")
	p := &lab.Patch{Apply: fmt.Sprintf("echo begun >>%[2]s; until [ -e '%[1]s' ]; do sleep 0.05; done; echo done >>%[2]s", goOn, log)}
	signed := p.Signed(t)
	file := filepath.Join(dir, "classic")
	if err := os.WriteFile(file, signed, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, stderr, code := leader.CLI("patch", "import", file); code != 0 {
		t.Fatalf("import: %d %s %s", code, out, stderr)
	}
	patch := s.Call("pool_patch.get_by_uuid", string(p.UUID)).(string)
	task := s.Call("Async.pool_patch.apply", patch, hostAt(standby)).(string)
	until(t, "the apply to begin", func() bool { return lines(log) == 1 })

	leader.Kill()
	c.hosts = c.others(leader)
	second, _, _ := c.leader()
	s = &lab.Session{H: second, Ref: s.Ref}
	if err := os.WriteFile(goOn, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if rec := s.Wait(task); rec["status"] != "success" {
		t.Errorf("the task ended as %v %v", rec["status"], rec["error_info"])
	}
	if n := lines(log); n != 2 || !exists(filepath.Join(standby.PatchDir, "applied", string(p.UUID))) {
		t.Errorf("%d lines of effect, or no stampfile", n)
	}
	if hp := s.All("host_patch"); len(hp) != 1 {
		t.Errorf("%d host_patches", len(hp))
	}
	leader.Launch()
	if err := leader.Ready(30 * time.Second); err != nil {
		t.Error(err)
	}
}

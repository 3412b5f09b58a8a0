package integration

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
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
func startCoordinators(t *testing.T, n int, flags ...string) *coordinators {
	t.Helper()
	c := &coordinators{t: t, etcd: lab.StartEtcd(t, 3)}
	for range n {
		c.hosts = append(c.hosts, lab.Prepare(t, lab.Options{Flags: append([]string{"--store", c.etcd.URL("")}, flags...)}))
	}
	for _, h := range c.hosts {
		h.Launch()
	}
	for _, h := range c.hosts {
		if err := h.Ready(60 * time.Second); err != nil {
			t.Fatal(err)
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
	c := startCoordinators(t, 3)
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

var _ = fmt.Sprint
var _ sync.Mutex
var _ = syscall.SIGSTOP

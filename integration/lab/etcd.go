package lab

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// The ports of every member of a Cluster, on addresses of their own.
const (
	etcdPort     = 2379
	etcdPeerPort = 2380
	// etcdMember is set for a process of the test binary that is a member.
	etcdMember = "PATCHD_LAB_ETCD"
)

// Cluster is a real etcd cluster, each member a process of its own.
type Cluster struct {
	Members []*Member
	URL     string // as --store takes it
}

// Member is one process of etcd, and the folder with its data.
type Member struct {
	T      testing.TB
	Name   string
	IP     string
	dir    string
	all    string // the whole cluster, as etcd takes it
	node   *Node  // or nil
	http   *http.Client
	cmd    *exec.Cmd
	exited chan struct{}
	log    *syncBuffer
}

// StartCluster starts one member on each node, and waits until they have a
// leader. A node that is nil is a loopback address of this machine. The
// package's TestMain must be Main.
func StartCluster(t testing.TB, nodes ...*Node) *Cluster {
	t.Helper()
	c := &Cluster{}
	var all, clients []string
	for i, n := range nodes {
		m := &Member{T: t, Name: fmt.Sprintf("etcd%d", i), dir: t.TempDir(), node: n, http: http.DefaultClient, log: &syncBuffer{}}
		if n != nil {
			m.IP, m.http = n.IP, n.HTTP()
		} else {
			m.IP = freeAddress(t)
		}
		c.Members = append(c.Members, m)
		all = append(all, fmt.Sprintf("%s=http://%s:%d", m.Name, m.IP, etcdPeerPort))
		clients = append(clients, fmt.Sprintf("%s:%d", m.IP, etcdPort))
	}
	c.URL = "etcd://" + strings.Join(clients, ",")
	for _, m := range c.Members {
		m.all = strings.Join(all, ",")
		t.Cleanup(func() {
			m.Kill()
			if t.Failed() {
				t.Logf("%s said:\n%s", m.Name, tail(m.log.String(), 2000))
			}
		})
		m.Launch()
	}
	for _, m := range c.Members {
		m.Ready()
	}
	return c
}

// Launch starts the member and does not wait for it.
func (m *Member) Launch() {
	m.T.Helper()
	self, err := os.Executable()
	if err != nil {
		m.T.Fatal(err)
	}
	m.cmd = exec.Command(self)
	if m.node != nil {
		m.cmd = m.node.Command(self)
	}
	m.cmd.Env = append(os.Environ(), etcdMember+"="+strings.Join([]string{m.Name, m.IP, m.dir, m.all}, " "))
	m.cmd.Stdout, m.cmd.Stderr = m.log, m.log
	if err := m.cmd.Start(); err != nil {
		m.T.Fatal(err)
	}
	exited := make(chan struct{})
	m.exited = exited
	go func() {
		m.cmd.Wait()
		close(exited)
	}()
}

// Ready waits until the member serves, which it does once there is a leader.
func (m *Member) Ready() {
	m.T.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		res, err := m.http.Get(fmt.Sprintf("http://%s:%d/health", m.IP, etcdPort))
		if err == nil {
			res.Body.Close()
			if res.StatusCode == 200 {
				return
			}
		}
		select {
		case <-m.exited:
			m.T.Fatalf("%s ended:\n%s", m.Name, tail(m.log.String(), 4000))
		default:
		}
	}
	m.T.Fatalf("%s does not serve:\n%s", m.Name, tail(m.log.String(), 4000))
}

// Kill ends the member by SIGKILL and waits for its end. Twice is once.
func (m *Member) Kill() {
	if m.cmd != nil {
		m.cmd.Process.Kill()
		<-m.exited
	}
}

// Running tells whether the member's process is there.
func (m *Member) Running() bool {
	select {
	case <-m.exited:
		return false
	default:
		return true
	}
}

// Pause stops the process of the member where it is.
func (m *Member) Pause() { m.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a paused member go on.
func (m *Member) Resume() { m.cmd.Process.Signal(syscall.SIGCONT) }

// Restart starts the member again, killed before or not, and waits until it
// serves.
func (m *Member) Restart() {
	m.T.Helper()
	m.Kill()
	m.Launch()
	m.Ready()
}

// beEtcd runs a member of a cluster in this process, until TERM. args is the
// name, the IP, the folder and the whole cluster.
func beEtcd(args string) int {
	f := strings.Fields(args)
	if len(f) != 4 {
		fmt.Fprintf(os.Stderr, "%s: %q is not four words\n", etcdMember, args)
		return 2
	}
	at := func(port int) []url.URL {
		return []url.URL{{Scheme: "http", Host: net.JoinHostPort(f[1], fmt.Sprint(port))}}
	}
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster = f[0], filepath.Join(f[2], "etcd"), f[3]
	c.ListenClientUrls, c.AdvertiseClientUrls = at(etcdPort), at(etcdPort)
	c.ListenPeerUrls, c.AdvertisePeerUrls = at(etcdPeerPort), at(etcdPeerPort)
	c.TickMs, c.ElectionMs = 50, 500
	c.LogLevel = "error"
	c.LogOutputs = []string{"stderr"}
	e, err := embed.StartEtcd(c)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer e.Close()
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	select {
	case <-term:
		return 0
	case <-e.Server.StopNotify():
	case err = <-e.Err():
	}
	fmt.Fprintln(os.Stderr, "etcd has ended:", err)
	return 1
}

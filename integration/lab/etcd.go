package lab

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Etcd is a real etcd cluster: each node is a process of its own, with quick
// elections (a heartbeat every 50 ms, an election after 500 ms).
type Etcd struct {
	T     testing.TB
	Nodes []*EtcdNode
}

// EtcdNode is one node of a cluster.
type EtcdNode struct {
	T    testing.TB
	Name string
	IP   string

	etcd   *Etcd
	dir    string
	wrap   []string // of the command, as for a namespace
	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
	log    *syncBuffer
}

// The ports of every etcd node; each has an address of its own.
const (
	etcdPort     = 2379
	etcdPeerPort = 2380
)

// EtcdPlace is where a node runs.
type EtcdPlace struct {
	IP string
	// Wrap is put before the command of the node, as to enter a namespace.
	Wrap []string
}

// StartEtcd starts a cluster of n nodes on loopback addresses of their own, and
// waits until it answers.
func StartEtcd(t testing.TB, n int) *Etcd {
	t.Helper()
	places := make([]EtcdPlace, n)
	for i := range places {
		places[i].IP = freeAddress(t)
	}
	return StartEtcdAt(t, places...)
}

// StartEtcdOn is StartEtcd in namespaces, one node of the cluster on each.
func StartEtcdOn(t testing.TB, nodes ...*Node) *Etcd {
	t.Helper()
	places := make([]EtcdPlace, len(nodes))
	for i, n := range nodes {
		places[i] = EtcdPlace{IP: n.IP, Wrap: n.enter()}
	}
	return StartEtcdAt(t, places...)
}

// StartEtcdAt is StartEtcd at given places.
func StartEtcdAt(t testing.TB, places ...EtcdPlace) *Etcd {
	t.Helper()
	e := &Etcd{T: t}
	for i, p := range places {
		e.Nodes = append(e.Nodes, &EtcdNode{
			T: t, Name: fmt.Sprintf("n%d", i), IP: p.IP, etcd: e, dir: filepath.Join(t.TempDir(), "etcd"), wrap: p.Wrap, log: &syncBuffer{},
		})
	}
	t.Cleanup(e.stop)
	for _, n := range e.Nodes {
		n.Start()
	}
	for _, n := range e.Nodes {
		n.Ready(60 * time.Second)
	}
	return e
}

// stop ends all nodes, and shows what they said when the test has failed.
func (e *Etcd) stop() {
	for _, n := range e.Nodes {
		n.Kill()
		if e.T.Failed() {
			e.T.Logf("etcd node %s said:\n%s", n.Name, tail(n.log.String(), 3000))
		}
	}
}

// URL is what --store takes. prefix parts pools on one cluster; "" is the default.
func (e *Etcd) URL(prefix string) string {
	hosts := make([]string, len(e.Nodes))
	for i, n := range e.Nodes {
		hosts[i] = fmt.Sprintf("%s:%d", n.IP, etcdPort)
	}
	u := "etcd://" + strings.Join(hosts, ",")
	if prefix != "" {
		u += "/" + prefix
	}
	return u
}

func (e *Etcd) peers() string {
	all := make([]string, len(e.Nodes))
	for i, n := range e.Nodes {
		all[i] = fmt.Sprintf("%s=http://%s:%d", n.Name, n.IP, etcdPeerPort)
	}
	return strings.Join(all, ",")
}

// Start starts the node on the data it has, and does not wait for it.
func (n *EtcdNode) Start() {
	n.T.Helper()
	fmt.Fprint(n.log, startMark)
	args := append(append([]string{}, n.wrap...), etcdBinary(n.T), n.Name, n.dir,
		fmt.Sprintf("http://%s:%d", n.IP, etcdPort), fmt.Sprintf("http://%s:%d", n.IP, etcdPeerPort), n.etcd.peers())
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	if err := cmd.Start(); err != nil {
		n.T.Fatal(err)
	}
	exited := make(chan struct{})
	n.mu.Lock()
	n.cmd, n.exited = cmd, exited
	n.mu.Unlock()
	go func() {
		cmd.Wait()
		close(exited)
	}()
}

// Ready waits until the node has said so since its last start.
func (n *EtcdNode) Ready(limit time.Duration) {
	n.T.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		said := n.log.String()
		if i := strings.LastIndex(said, startMark); strings.Contains(said[max(i, 0):], "ready\n") {
			return
		}
		select {
		case <-n.exited:
			n.T.Fatalf("etcd node %s ended:\n%s", n.Name, tail(said, 3000))
		default:
		}
	}
	n.T.Fatalf("etcd node %s is not ready within %s", n.Name, limit)
}

// startMark stands in the log of a node before what each start says.
const startMark = "-- start --\n"

// Kill ends the node by SIGKILL, also one that is paused. A node that has ended
// is left alone.
func (n *EtcdNode) Kill() {
	n.signal(syscall.SIGKILL)
	if n.exited != nil {
		<-n.exited
	}
}

// Running tells whether the node's process is there.
func (n *EtcdNode) Running() bool {
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

// Pause stops the node where it is; Resume lets it go on.
func (n *EtcdNode) Pause() { n.signal(syscall.SIGSTOP) }

// Resume lets a paused node go on.
func (n *EtcdNode) Resume() { n.signal(syscall.SIGCONT) }

// Restart starts a killed node and waits until it has joined again.
func (n *EtcdNode) Restart() {
	n.T.Helper()
	n.Start()
	n.Ready(60 * time.Second)
}

func (n *EtcdNode) signal(sig syscall.Signal) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd != nil && n.cmd.Process != nil {
		n.cmd.Process.Signal(sig)
	}
}

// Log is what the node has said so far, over all its starts.
func (n *EtcdNode) Log() string { return n.log.String() }

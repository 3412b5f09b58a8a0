package lab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Net is a network of its own: a switch in one network namespace, and each
// node in another, joined to the switch by one link. Nothing leaves it, and
// nothing of this machine's own network is seen in it. It goes with the test.
type Net struct {
	T      testing.TB
	Nodes  []*Node
	prefix string // of the names of its namespaces
}

// Node is one namespace of a Net, with an address of its own.
type Node struct {
	Name string // of the namespace, as in /run/netns
	IP   string
	net  *Net
	port string // the switch's end of its link
	ns   *os.File
	http *http.Client
}

const (
	netnsDir  = "/run/netns"
	netPrefix = "pdlab-"
	link      = "eth0"
	// nobody is a hardware address that no node has: frames to it are lost.
	nobody = "02:00:00:00:00:00"
)

var (
	networks  atomic.Int64
	sweepOnce sync.Once
)

// NewNet makes a network with n nodes; their addresses are on no other network
// of this test process.
func NewNet(t testing.TB, n int) *Net {
	t.Helper()
	sweepOnce.Do(sweepNetworks)
	id := networks.Add(1)
	w := &Net{T: t, prefix: fmt.Sprintf("%s%d.%s-%d", netPrefix, os.Getpid(), startTime(os.Getpid()), id)}
	t.Cleanup(w.remove)
	w.ip("", "netns add "+w.prefix)
	w.ip(w.prefix, "link add br0 type bridge", "link set br0 up")
	for i := range n {
		node := &Node{Name: fmt.Sprintf("%s-%d", w.prefix, i), IP: fmt.Sprintf("10.%d.%d.%d", 64+id/250, id%250, i+1), net: w, port: fmt.Sprintf("port%d", i)}
		w.join(node)
		w.Nodes = append(w.Nodes, node)
	}
	return w
}

// join makes the namespace of a node and its link.
func (w *Net) join(n *Node) {
	w.T.Helper()
	w.ip("", "netns add "+n.Name)
	w.ip(w.prefix,
		fmt.Sprintf("link add %s type veth peer name %s netns %s", n.port, link, n.Name),
		fmt.Sprintf("link set %s master br0 up", n.port))
	w.ip(n.Name, "link set lo up", "addr add "+n.IP+"/24 dev "+link, "link set "+link+" up")
	ns, err := os.Open(filepath.Join(netnsDir, n.Name))
	if err != nil {
		w.T.Fatal(err)
	}
	n.ns = ns
	n.http = &http.Client{Transport: &http.Transport{DialContext: n.Dial}}
}

// ip runs commands of ip(8) in a namespace; "" is the test's own.
func (w *Net) ip(ns string, commands ...string) {
	w.T.Helper()
	if err := ip(ns, commands...); err != nil {
		w.T.Fatal(err)
	}
}

func ip(ns string, commands ...string) error {
	args := []string{"-batch", "-"}
	if ns != "" {
		args = append([]string{"-n", ns}, args...)
	}
	cmd := exec.Command("ip", args...)
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip %q: %w: %s", commands, err, out)
	}
	return nil
}

// remove takes the network away. Processes that are still in it keep their
// namespace, without a way out.
func (w *Net) remove() {
	for _, n := range w.Nodes {
		n.http.CloseIdleConnections()
		n.ns.Close()
	}
	for _, name := range namespaces(w.prefix) {
		if name != w.prefix && !strings.HasPrefix(name, w.prefix+"-") {
			continue // of network 10, when this is 1
		}
		if err := ip("", "netns del "+name); err != nil {
			w.T.Error(err)
		}
	}
}

func namespaces(prefix string) (names []string) {
	paths, _ := filepath.Glob(filepath.Join(netnsDir, prefix+"*"))
	for _, p := range paths {
		names = append(names, filepath.Base(p))
	}
	return names
}

// sweepNetworks removes the networks of test processes that have died, with
// the daemons that were left in them.
func sweepNetworks() {
	for _, name := range namespaces(netPrefix) {
		owner, _, _ := strings.Cut(strings.TrimPrefix(name, netPrefix), "-")
		pid, start, _ := strings.Cut(owner, ".")
		if n, err := strconv.Atoi(pid); err != nil || startTime(n) == start {
			continue
		}
		pids, _ := exec.Command("ip", "netns", "pids", name).Output()
		for _, word := range strings.Fields(string(pids)) {
			if n, err := strconv.Atoi(word); err == nil {
				syscall.Kill(n, syscall.SIGKILL)
			}
		}
		if err := ip("", "netns del "+name); err != nil {
			fmt.Fprintln(os.Stderr, err) // another test process sweeps as well
		}
	}
}

// startTime tells processes apart that had the same pid, one after the other;
// "" when there is none.
func startTime(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return ""
	}
	return f[19]
}

// Cut takes the link of a node down. It still reaches itself, and is told
// nothing: what it sends is lost. Twice is once.
func (n *Node) Cut() {
	n.net.T.Helper()
	n.net.ip(n.net.prefix, "link set "+n.port+" down")
}

// Heal brings the link up again.
func (n *Node) Heal() {
	n.net.T.Helper()
	n.net.ip(n.net.prefix, "link set "+n.port+" up")
}

// Partition keeps every node of a from every node of b, in both directions,
// by hardware addresses that nobody has: whatever they send is lost.
func (w *Net) Partition(a, b []*Node) {
	w.T.Helper()
	pairs(a, b, func(from, to *Node) {
		w.ip(from.Name, fmt.Sprintf("neigh replace %s lladdr %s nud permanent dev %s", to.IP, nobody, link))
	})
}

// Rejoin undoes a Partition.
func (w *Net) Rejoin(a, b []*Node) {
	w.T.Helper()
	pairs(a, b, func(from, to *Node) {
		w.ip(from.Name, fmt.Sprintf("neigh del %s dev %s", to.IP, link))
	})
}

func pairs(a, b []*Node, do func(from, to *Node)) {
	for _, x := range a {
		for _, y := range b {
			do(x, y)
			do(y, x)
		}
	}
}

// Narrow bounds what a node sends, in millions of bits per second; 0 takes the
// bound away.
func (n *Node) Narrow(mbit int) {
	n.net.T.Helper()
	args := []string{"qdisc", "del", "dev", link, "root"}
	if mbit > 0 {
		// The bucket holds what flows in 4 ms, the longest tick of a kernel, and
		// the largest packet that is handed down in one piece.
		burst := max(64<<10, mbit*1e6/8/250)
		args = []string{"qdisc", "replace", "dev", link, "root", "tbf", "rate", fmt.Sprintf("%dmbit", mbit), "burst", strconv.Itoa(burst), "latency", "50ms"}
	}
	if out, err := n.Command("tc", args...).CombinedOutput(); err != nil {
		n.net.T.Fatalf("tc %v: %v\n%s", args, err, out)
	}
}

// Traffic is what a node has sent and received over its link so far, in bytes,
// with all headers.
func (n *Node) Traffic() (sent, received int64) {
	n.net.T.Helper()
	var text []byte
	if err := n.Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/dev")
		return err
	}); err != nil {
		n.net.T.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 10 || f[0] != link+":" {
			continue
		}
		in, err1 := strconv.ParseInt(f[1], 10, 64)
		out, err2 := strconv.ParseInt(f[9], 10, 64)
		if err1 == nil && err2 == nil {
			return out, in
		}
	}
	n.net.T.Fatalf("no counters of %s in %s", link, text)
	return 0, 0
}

// Command is a program that runs in the namespace of the node, with the mounts
// of this machine: its process is the program itself.
func (n *Node) Command(name string, args ...string) *exec.Cmd {
	return n.CommandContext(context.Background(), name, args...)
}

// CommandContext is Command that ends with ctx.
func (n *Node) CommandContext(ctx context.Context, name string, args ...string) *exec.Cmd {
	args = append(append(n.enter(), name), args...)
	return exec.CommandContext(ctx, args[0], args[1:]...)
}

// enter is what is put before a command that is to run in the namespace.
func (n *Node) enter() []string {
	return []string{"nsenter", "--net=" + filepath.Join(netnsDir, n.Name), "--"}
}

// Do calls f on a thread that is in the namespace: the sockets that f itself
// makes are there for good, not those of goroutines that it starts.
func (n *Node) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return // the thread ends with this goroutine
		}
		defer home.Close()
		if err := unix.Setns(int(n.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter namespace %s: %w", n.Name, err)
			return
		}
		err = f()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Dial connects from the node. The address is an IP and a port.
func (n *Node) Dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = n.Do(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens on a port of the node.
func (n *Node) Listen(port int) (ln net.Listener, err error) {
	err = n.Do(func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(n.IP, strconv.Itoa(port)))
		return err
	})
	return ln, err
}

// HTTP is a client whose connections come from the node.
func (n *Node) HTTP() *http.Client { return n.http }

package store

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/patchd/patchd/pkg/xapi"
)

// TestMain also plays the other processes of these tests: nodes of a cluster,
// and daemons that are killed.
func TestMain(m *testing.M) {
	switch os.Getenv("STORE_TEST_ROLE") {
	case "etcd":
		os.Exit(playEtcd())
	case "writer":
		os.Exit(playWriter())
	case "leader":
		os.Exit(playLeader())
	}
	flag.Parse()
	for name, value := range map[string]string{"rapid.checks": "20", "rapid.seed": "7"} {
		if flag.Lookup(name).Value.String() == flag.Lookup(name).DefValue {
			_ = flag.Set(name, value)
		}
	}
	goleak.VerifyTestMain(m)
}

// process is a second process of this test binary. It says things line by line
// and ends when its standard input does.
type process struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
}

func play(t *testing.T, role string, config any) *process {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STORE_TEST_ROLE="+role, "STORE_TEST_CONFIG="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return &process{cmd, bufio.NewScanner(out)}
}

// says gives the next line.
func (p *process) says(t *testing.T) string {
	t.Helper()
	if !p.lines.Scan() {
		t.Fatal("the other process ended:", p.lines.Err())
	}
	return p.lines.Text()
}

func (p *process) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

func config(into any) {
	if err := json.Unmarshal([]byte(os.Getenv("STORE_TEST_CONFIG")), into); err != nil {
		panic(err)
	}
}

// untilOrphaned returns when the parent has gone.
func untilOrphaned() { _, _ = bufio.NewReader(os.Stdin).ReadByte() }

type node struct {
	Name, Dir, Client, Peer, Cluster string
	// Cert and Key, when set, are for TLS: the node's, and what clients must show.
	Cert, Key string
}

// playEtcd is one node of a real cluster.
func playEtcd() int {
	var n node
	config(&n)
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster = n.Name, n.Dir, n.Cluster
	client, _ := url.Parse(n.Client)
	peer, _ := url.Parse(n.Peer)
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = n.Cert, n.Key
	cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = n.Cert, n.Cert != ""
	cfg.TickMs, cfg.ElectionMs = 50, 500
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "start etcd:", err)
		return 1
	}
	<-etcd.Server.ReadyNotify()
	fmt.Println("ready")
	untilOrphaned()
	return 0
}

// cluster starts real nodes and gives the URL of the store on them.
func cluster(t *testing.T, size int) (storeURL string, nodes []*process) {
	t.Helper()
	addrs := freeAddrs(t, 2*size)
	var all, clients []string
	for n := range size {
		all = append(all, fmt.Sprintf("n%d=http://%s", n, addrs[2*n+1]))
		clients = append(clients, addrs[2*n])
	}
	for n := range size {
		nodes = append(nodes, play(t, "etcd", node{
			Name: fmt.Sprintf("n%d", n), Dir: t.TempDir(), Client: "http://" + addrs[2*n],
			Peer: "http://" + addrs[2*n+1], Cluster: strings.Join(all, ","),
		}))
	}
	for _, p := range nodes {
		if line := p.says(t); line != "ready" {
			t.Fatal("etcd says", line)
		}
	}
	return "etcd://" + strings.Join(clients, ","), nodes
}

func freeAddrs(t *testing.T, count int) (addrs []string) {
	t.Helper()
	for range count {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		addrs = append(addrs, l.Addr().String())
	}
	return addrs
}

type disk struct {
	UUID xapi.UUID `json:"uuid"`
	SR   xapi.Ref  `json:"SR"`
	N    int       `json:"n"`
}

var testIndexes = []Index{{Class: "VDI", Field: "SR", Parent: "SR"}}

// open opens a store that the test closes.
func open(t *testing.T, o Options) *Store {
	t.Helper()
	o.Indexes = testIndexes
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func closeStore(t *testing.T, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error("close:", err)
	}
}

func openDir(t *testing.T, dir string) *Store {
	t.Helper()
	return open(t, Options{Dir: dir})
}

func update(t *testing.T, s *Store, f func(tx *Tx)) int64 {
	t.Helper()
	rev, err := s.Commit(t.Context(), func(tx *Tx) error { f(tx); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func put(t *testing.T, s *Store, class string, ref xapi.Ref, v any) int64 {
	t.Helper()
	return update(t, s, func(tx *Tx) { tx.Put(class, ref, v) })
}

func view(t *testing.T, s *Store) *View {
	t.Helper()
	var now *View
	if err := s.View(func(v *View) error { now = v; return nil }); err != nil {
		t.Fatal(err)
	}
	return now
}

// number is the n of a record.
func number(t *testing.T, s *Store, ref xapi.Ref) int {
	t.Helper()
	d, err := Get[disk](view(t, s), "VDI", ref)
	if err != nil {
		t.Fatal(err)
	}
	return d.N
}

// increase adds one to the n of a record.
func increase(ctx context.Context, s *Store, ref xapi.Ref) error {
	return s.Update(ctx, func(tx *Tx) error {
		d, err := Read[disk](tx, "VDI", ref)
		d.N++
		tx.Put("VDI", ref, d)
		return err
	})
}

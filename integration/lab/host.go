package lab

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Password is root's in every lab.
const Password = "lab password"

// Options say how a Host differs from the ordinary.
type Options struct {
	Dir     string   // state and patch-dir lie below it; empty: a fresh folder
	Binary  string   // empty: Binary(t)
	Flags   []string // further flags of serve
	Env     []string // further variables of the daemon, and of its runners
	Node    *Node    // where it listens and calls out; nil: this machine, on a loopback address of its own
	Address string   // where it listens; empty: one that is free, or that of Node
	Store   string   // URL of the pool database; empty: the embedded one
	NoKey   bool     // the lab's key is not trusted
	NoCheck bool     // do not look for what is left at the end
	// Plain and TLS are the ports; 0: those of the lab.
	Plain, TLS int
}

// Host is one patchd on this machine.
type Host struct {
	T        testing.TB
	StateDir string
	PatchDir string
	IP       string // a loopback address of its own, or that of its node
	// URL of plain HTTP, TLSURL of TLS, without a slash at the end.
	URL, TLSURL string
	// HTTP reaches the host also where it is in a network of the test's own.
	HTTP *http.Client
	Node *Node // or nil

	o      Options
	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
	log    *syncBuffer
}

// Start makes a host and waits until it answers.
func Start(t testing.TB, o Options) *Host {
	t.Helper()
	h := Prepare(t, o)
	h.Up()
	return h
}

// Prepare makes a host that is not up yet.
func Prepare(t testing.TB, o Options) *Host {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.Binary == "" {
		o.Binary = Binary(t)
	}
	h := &Host{T: t, StateDir: filepath.Join(o.Dir, "state"), PatchDir: filepath.Join(o.Dir, "patches"), o: o, log: &syncBuffer{}}
	h.place(t)
	h.URL = fmt.Sprintf("http://%s:%d", h.IP, cmp.Or(o.Plain, plainPort))
	h.TLSURL = fmt.Sprintf("https://%s:%d", h.IP, cmp.Or(o.TLS, tlsPort))
	if !o.NoKey {
		h.Trust(DefaultKey(t))
	}
	t.Cleanup(func() {
		h.Down()
		if t.Failed() {
			t.Logf("the daemon said:\n%s", tail(h.log.String(), 8000))
		}
		if !o.NoCheck {
			h.CheckNothingLeft()
		}
	})
	return h
}

// StartAll makes hosts that start at the same time, and waits until all answer.
func StartAll(t testing.TB, all ...Options) []*Host {
	t.Helper()
	hosts := make([]*Host, len(all))
	for i, o := range all {
		hosts[i] = Prepare(t, o)
	}
	UpAll(hosts...)
	return hosts
}

// UpAll starts the daemons of hosts at the same time, and waits until all answer.
func UpAll(hosts ...*Host) {
	for _, h := range hosts {
		h.T.Helper()
		h.Launch()
	}
	for _, h := range hosts {
		h.mustBeReady()
	}
}

// place gives the host its address.
func (h *Host) place(t testing.TB) {
	t.Helper()
	if h.Node = h.o.Node; h.Node != nil {
		h.IP, h.HTTP = h.Node.IP, h.Node.HTTP()
		return
	}
	if h.IP, h.HTTP = h.o.Address, http.DefaultClient; h.IP == "" {
		h.IP = freeAddress(t)
	}
}

// Dial connects to an address from where the host is.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if h.Node != nil {
		return h.Node.Dial(ctx, network, address)
	}
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

// UUID is the host's own uuid, once it was up; it stays the same in every pool.
func (h *Host) UUID() string {
	h.T.Helper()
	b, err := os.ReadFile(filepath.Join(h.StateDir, "host-uuid"))
	if err != nil {
		h.T.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// The ports of every host; each has an address of its own.
const (
	plainPort = 8080
	tlsPort   = 8443
)

var addresses atomic.Int64

// freeAddress is a loopback address that no other host of this machine uses:
// on it no outgoing connection can take a port before the daemon has it.
func freeAddress(t testing.TB) string {
	t.Helper()
	pid := os.Getpid()
	for range 1000 {
		ip := fmt.Sprintf("127.%d.%d.%d", 16+pid/250%200, 1+pid%250, 1+addresses.Add(1)%250)
		ln, err := net.Listen("tcp", fmt.Sprintf("%s:%d", ip, plainPort))
		if err == nil {
			ln.Close()
			return ip
		}
	}
	t.Fatal("no loopback address is free")
	return ""
}

// Trust puts a public key into trusted-keys.
func (h *Host) Trust(k *Key) {
	h.T.Helper()
	dir := filepath.Join(h.StateDir, "trusted-keys")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.T.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, k.Fingerprint+".gpg"), k.Public, 0o644); err != nil {
		h.T.Fatal(err)
	}
}

// Distrust removes it again.
func (h *Host) Distrust(k *Key) {
	h.T.Helper()
	if err := os.Remove(filepath.Join(h.StateDir, "trusted-keys", k.Fingerprint+".gpg")); err != nil {
		h.T.Fatal(err)
	}
}

// SetFlags replaces the further flags of serve, for the next start.
func (h *Host) SetFlags(flags ...string) { h.o.Flags = flags }

// Launch starts the daemon and does not wait for it. env adds variables for
// this start only.
func (h *Host) Launch(env ...string) {
	h.T.Helper()
	args := append([]string{
		"serve", "--state-dir", h.StateDir, "--patch-dir", h.PatchDir,
		"--listen", strings.TrimPrefix(h.URL, "http://"), "--tls-listen", strings.TrimPrefix(h.TLSURL, "https://"),
		"--bad-password-delay", "200ms", "--grace-timeout", "1s",
	}, h.o.Flags...)
	if h.o.Store != "" {
		args = append(args, "--store", h.o.Store)
	}
	cmd := h.command(context.Background(), args...)
	cmd.Env = append(append(append(os.Environ(), "PATCHD_ROOT_PASSWORD="+Password), h.o.Env...), env...)
	cmd.Stdout, cmd.Stderr = h.log, h.log
	if err := cmd.Start(); err != nil {
		h.T.Fatal(err)
	}
	exited := make(chan struct{})
	h.mu.Lock()
	h.cmd, h.exited = cmd, exited
	h.mu.Unlock()
	go func() {
		cmd.Wait()
		close(exited)
	}()
}

// command runs patchd where the host is.
func (h *Host) command(ctx context.Context, args ...string) *exec.Cmd {
	if h.Node != nil {
		return h.Node.CommandContext(ctx, h.o.Binary, args...)
	}
	return exec.CommandContext(ctx, h.o.Binary, args...)
}

// Up starts the daemon and waits until it answers.
func (h *Host) Up(env ...string) {
	h.T.Helper()
	h.Launch(env...)
	h.mustBeReady()
}

func (h *Host) mustBeReady() {
	h.T.Helper()
	if err := h.Ready(60 * time.Second); err != nil {
		h.T.Fatalf("%v\nthe daemon said:\n%s", err, tail(h.log.String(), 8000))
	}
}

// Ready waits until /healthz answers 200 or the daemon ends.
func (h *Host) Ready(limit time.Duration) error {
	end := time.Now().Add(limit)
	for time.Now().Before(end) {
		select {
		case <-h.Exited():
			return fmt.Errorf("the daemon ended: %v", h.cmd.ProcessState)
		default:
		}
		res, err := h.HTTP.Get(h.URL + "/healthz")
		if err == nil {
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("the daemon does not answer within %s", limit)
}

// Pause stops the daemon's process where it is.
func (h *Host) Pause() { h.signal(syscall.SIGSTOP) }

// Resume lets a paused daemon go on.
func (h *Host) Resume() { h.signal(syscall.SIGCONT) }

// Exited is closed when the daemon's process has ended.
func (h *Host) Exited() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.exited == nil {
		c := make(chan struct{})
		close(c)
		return c
	}
	return h.exited
}

// Pid is the daemon's process, or 0.
func (h *Host) Pid() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.cmd == nil {
		return 0
	}
	return h.cmd.Process.Pid
}

// Kill ends the daemon by SIGKILL and waits for its end.
func (h *Host) Kill() {
	h.T.Helper()
	h.signal(syscall.SIGKILL)
	<-h.Exited()
}

// Down ends the daemon by SIGTERM; it must be gone within seconds.
func (h *Host) Down() {
	h.T.Helper()
	select {
	case <-h.Exited():
		return
	default:
	}
	h.signal(syscall.SIGTERM)
	select {
	case <-h.Exited():
	case <-time.After(20 * time.Second):
		h.T.Errorf("the daemon does not end after SIGTERM")
		h.signal(syscall.SIGQUIT)
		h.Kill()
	}
}

func (h *Host) signal(sig os.Signal) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.cmd != nil {
		h.cmd.Process.Signal(sig)
	}
}

// Restart is Down and Up.
func (h *Host) Restart() {
	h.T.Helper()
	h.Down()
	h.Up()
}

// Log is what the daemon has said so far, over all its starts.
func (h *Host) Log() string { return h.log.String() }

// CLI runs patchd's own command line over the unix socket.
func (h *Host) CLI(args ...string) (stdout, stderr string, code int) {
	h.T.Helper()
	return h.CLIInput("", args...)
}

// CLIInput is CLI with a standard input.
func (h *Host) CLIInput(input string, args ...string) (stdout, stderr string, code int) {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := h.command(ctx, args...)
	cmd.Env = append(os.Environ(), "PATCHD_STATE_DIR="+h.StateDir, "XDG_STATE_HOME="+filepath.Join(filepath.Dir(h.StateDir), "user"))
	cmd.Stdin = strings.NewReader(input)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil {
		h.T.Fatalf("patchd %v: %v", args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// GroupPrefix is the folder of the daemon's control groups.
func (h *Host) GroupPrefix() string {
	sum := sha256.Sum256([]byte(h.StateDir))
	return "patchd-" + hex.EncodeToString(sum[:6])
}

// Left lists what belongs to this host and should not be there when nothing
// runs: loop devices, mounts, processes in its control groups, journal
// folders, and volumes that are not live VDIs.
func (h *Host) Left() []string {
	var left []string
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range loops {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), filepath.Dir(h.StateDir)+"/") && !strings.Contains(string(b), "/disk.img") {
			left = append(left, "loop device of "+strings.TrimSpace(string(b)))
		}
	}
	up := true
	select {
	case <-h.Exited():
		up = false
	default:
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(mounts), "\n") {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[4], h.StateDir+"/") && !(up && strings.HasPrefix(f[4], h.StateDir+"/mnt/")) { // a plugged SR
			left = append(left, "mount at "+f[4])
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + h.GroupPrefix() + "/*/cgroup.procs")
	direct, _ := filepath.Glob("/sys/fs/cgroup/" + h.GroupPrefix() + "/*/cgroup.procs")
	for _, g := range append(groups, direct...) {
		if b, err := os.ReadFile(g); err == nil && len(b) > 0 {
			left = append(left, "processes in "+g+": "+strings.Join(strings.Fields(string(b)), " "))
		}
	}
	jobs, _ := filepath.Glob(filepath.Join(h.StateDir, "jobs", "*"))
	left = append(left, jobs...)
	volumes, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "*.*.*"))
	return append(left, volumes...)
}

// CheckNothingLeft fails the test when Left finds anything.
func (h *Host) CheckNothingLeft() {
	h.T.Helper()
	var left []string
	for range 50 { // what was killed a moment ago needs one to be gone
		if left = h.Left(); len(left) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	h.T.Errorf("left behind: %s", strings.Join(left, "; "))
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// syncBuffer keeps what the daemon says.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

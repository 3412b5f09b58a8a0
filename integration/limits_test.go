package integration

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	crowd = 2000
	// answersWithin is what an admin may wait for an answer, in a crowd.
	answersWithin = 3 * time.Second
	// memoryWithin is what the daemon may hold, in a crowd.
	memoryWithin = 300 * mib
)

// rss is the resident memory of a process in bytes.
func rss(t testing.TB, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// attack is one kind of client that wants something of the server and gives
// nothing: it sends open on a fresh connection, then drip every so often.
type attack struct {
	name string
	tls  bool // the bytes go to the TLS port as they are
	open string
	drip string
	read bool // answers are read, not left lying
	few  int  // so many at once, where each does real work; 0: a crowd
}

// attackers holds the connections of one attack.
type attackers struct {
	mu    sync.Mutex
	conns []net.Conn
	stop  chan struct{}
	wg    sync.WaitGroup
}

// begin opens n connections of an attack. It fails when the server takes none
// of them; that it closes some of them is its right.
func begin(t testing.TB, h *lab.Host, a attack, n int) *attackers {
	t.Helper()
	addr := strings.TrimPrefix(h.URL, "http://")
	if a.tls {
		addr = strings.TrimPrefix(h.TLSURL, "https://")
	}
	at := &attackers{stop: make(chan struct{})}
	dial := make(chan int)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for i := range dial {
				c, err := net.DialTimeout("tcp", addr, 10*time.Second)
				if err != nil {
					t.Errorf("%s: connection %d: %v", a.name, i, err)
					continue
				}
				c.SetWriteDeadline(time.Now().Add(10 * time.Second))
				io.WriteString(c, a.open) // a refusal may have closed it
				at.mu.Lock()
				at.conns = append(at.conns, c)
				at.mu.Unlock()
			}
		})
	}
	for i := range n {
		dial <- i
	}
	close(dial)
	wg.Wait()
	at.wg.Go(func() { at.dripOn(a) })
	return at
}

func (at *attackers) dripOn(a attack) {
	buf := make([]byte, 4096)
	for {
		for _, c := range at.conns {
			select {
			case <-at.stop:
				return
			default:
			}
			if a.drip != "" {
				c.SetWriteDeadline(time.Now().Add(time.Millisecond))
				io.WriteString(c, a.drip)
			}
			if a.read {
				c.SetReadDeadline(time.Now().Add(time.Microsecond))
				c.Read(buf)
			}
		}
		select {
		case <-at.stop:
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (at *attackers) end() {
	close(at.stop)
	at.wg.Wait()
	for _, c := range at.conns {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}

// admin is somebody with a session who works on while others attack.
type admin struct {
	s    *lab.Session
	kept *http.Client // with a connection that is there already
}

func newAdmin(t testing.TB, h *lab.Host) *admin {
	a := &admin{s: h.Root(), kept: &http.Client{Transport: &http.Transport{}}}
	t.Cleanup(a.kept.CloseIdleConnections)
	a.call(t, a.kept)
	return a
}

func (a *admin) call(t testing.TB, client *http.Client) time.Duration {
	t.Helper()
	began := time.Now()
	body, _ := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": "host.get_all_records", "params": []any{a.s.Ref}})
	res, err := client.Post(a.s.H.URL+"/jsonrpc", "application/json", strings.NewReader(string(body)))
	if err != nil {
		t.Errorf("an admin's call: %v", err)
		return 0
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 || !strings.Contains(string(b), "OpaqueRef:") {
		t.Errorf("an admin's call: %d %.200s %v", res.StatusCode, b, err)
	}
	return time.Since(began)
}

// works makes calls over the connection that is there and over new ones, and
// fails the test when one is slow.
func (a *admin) works(t testing.TB, rounds int) {
	t.Helper()
	fresh := &http.Transport{DisableKeepAlives: true}
	worst := time.Duration(0)
	for range rounds {
		for way, client := range map[string]*http.Client{"old": a.kept, "new": {Transport: fresh}} {
			if took := a.call(t, client); took > answersWithin {
				t.Errorf("a call over the %s connection took %s", way, took)
			} else {
				worst = max(worst, took)
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	memory := rss(t, a.s.H.Pid())
	if memory > memoryWithin {
		t.Errorf("the daemon holds %d MiB", memory>>20)
	}
	t.Logf("slowest answer %s, memory %d MiB", worst.Round(time.Millisecond), memory>>20)
}

func (a *admin) pool() string {
	ref, _ := a.s.One("pool")
	return ref
}

// attacks are the kinds of clients that keep the server busy for nothing.
// session is what those have that have logged in.
func attacks(t testing.TB, session *lab.Session) []attack {
	post := func(path, body string) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
	}
	call := func(method string, params ...any) string {
		b, err := json.Marshal(map[string]any{"id": 1, "method": method, "params": params})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	// short sends a request whose body ends before its length.
	short := func(head string, length int, body string) string {
		return fmt.Sprintf("%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", head, length, body)
	}
	put := "PUT /pool_patch_upload?session_id=" + session.Ref
	signed := string((&lab.Patch{Pad: 1 << 18}).Signed(t))
	token := session.Call("event.from", []string{"pool"}, "", 0.0).(map[string]any)["token"]
	return []attack{
		{name: "idle"},
		{name: "waiting for events", open: post("/jsonrpc", call("event.from", session.Ref, []string{"pool"}, token, 30)), read: true},
		{name: "dripping headers", open: "GET / HTTP/1.1\r\nHost: x\r\nX-A: ", drip: "a"},
		{name: "long headers", open: "GET / HTTP/1.1\r\nHost: x\r\nX-A: " + strings.Repeat("h", 30<<10), drip: "a"},
		{name: "dripping XML", open: short("POST /RPC2", 1<<20, "<?xml"), drip: " "},
		{name: "large XML that does not end", open: short("POST /RPC2", 1<<20, strings.Repeat(" ", 1<<20-1000)), drip: " "},
		{name: "large JSON that does not end", open: short("POST /jsonrpc", 1<<20, strings.Repeat(" ", 1<<20-1000)), drip: " "},
		{name: "large JSON that ends", open: post("/jsonrpc", `{"id":1,"method":"x","params":[`+strings.Repeat(`{},`, 90_000)+`1]}`), read: true},
		{name: "dripping command lines", open: short("POST /cli", 200_000, strings.Repeat("x", 150_000)), drip: "x"},
		{name: "conversations that do not begin", open: short("POST /cli", 10, "host-list\n")},
		{name: "uploads without credentials", open: short("PUT /pool_patch_upload", 1<<30, signed), drip: "a"},
		{name: "silent uploads", open: short(put, 1<<20, "")},
		{name: "dripping uploads", open: short(put, len(signed), signed[:60_000]), few: 400},
		{name: "hanging TLS hand-shakes", tls: true},
		{name: "dripping TLS hand-shakes", tls: true, open: "\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" + strings.Repeat("a", 10_000), drip: "a"},
		{name: "answers that nobody reads", open: strings.Repeat(post("/jsonrpc", call("system.listMethods")), 20)},
		{name: "wrong passwords", open: post("/jsonrpc", call("session.login_with_password", "root", "wrong")), read: true},
	}
}

// TestA12_crowd has 2,000 clients at the server: an admin who has logged in
// works on as if alone, and the server's memory stays bounded.
func TestA12_crowd(t *testing.T) {
	crowded(t, func(a attack) bool { return a.name == "idle" || a.name == "large JSON that does not end" })
}

// TestSoakA12_crowd has 2,000 of each kind, one kind after the other.
func TestSoakA12_crowd(t *testing.T) {
	if os.Getenv("PATCHD_SOAK_N") == "" {
		t.Skip("only by make soak")
	}
	crowded(t, func(attack) bool { return true })
}

// crowded has 2,000 clients of each kind that is picked, and then of all kinds
// together.
func crowded(t *testing.T, pick func(attack) bool) {
	h := lab.Start(t, lab.Options{NoCheck: true})
	adm := newAdmin(t, h)
	other := h.Root()
	all := attacks(t, other)
	for _, a := range all {
		if !pick(a) {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			at := begin(t, h, a, cmp.Or(a.few, crowd))
			defer at.end()
			adm.works(t, 3)
			adm.s.Call("pool.set_name_label", adm.pool(), a.name) // wakes who waits
			adm.works(t, 3)
		})
	}
	t.Run("all together", func(t *testing.T) {
		for _, a := range all {
			defer begin(t, h, a, crowd/len(all)).end()
		}
		adm.works(t, 5)
		adm.s.Call("pool.set_name_label", adm.pool(), "together")
		adm.works(t, 5)
	})
	until(t, "the uploads leave nothing", func() bool { return len(h.Left()) == 0 })
	adm.works(t, 3)
}

// TestA12_few_files has more clients than the server may open files: those who
// have logged in stay, those who have not give way.
func TestA12_few_files(t *testing.T) {
	script := filepath.Join(t.TempDir(), "patchd")
	text := "#!/bin/sh\nulimit -n 1024\nexec " + lab.Binary(t) + " \"$@\"\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	h := lab.Start(t, lab.Options{Binary: script})
	adm := newAdmin(t, h)
	at := begin(t, h, attack{name: "idle"}, crowd)
	defer at.end()
	adm.works(t, 5)
	if out, errs, code := h.CLI("host", "list"); code != 0 {
		t.Errorf("over the unix socket: %d %s %s", code, out, errs)
	}
	if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.Pid())); err != nil || len(fds) > 700 {
		t.Errorf("%d files are open, %v", len(fds), err)
	}
	if a := adm.s.Upload((&lab.Patch{}).Signed(t)); a.Status != http.StatusCreated {
		t.Errorf("an upload: %d %s", a.Status, a.Body)
	}
}

// TestA12_login_flood tries 100 wrong passwords at once while an admin works
// and another one logs in.
func TestA12_login_flood(t *testing.T) {
	h := lab.Start(t, lab.Options{Flags: []string{"--bad-password-delay", "1s"}})
	adm := newAdmin(t, h)
	var wg sync.WaitGroup
	var mu sync.Mutex
	quick := 0
	for i := range 100 {
		wg.Go(func() {
			began := time.Now()
			_, err := h.Login("root", fmt.Sprint("guess ", i))
			var e *xapi.Error
			if !errors.As(err, &e) || e.Code != xapi.SessionAuthenticationFailed {
				t.Errorf("a wrong password got %v", err)
			}
			mu.Lock()
			defer mu.Unlock()
			if time.Since(began) < time.Second {
				quick++
			}
		})
	}
	adm.works(t, 10)
	if _, err := h.Login("root", lab.Password); err != nil {
		t.Errorf("the right password among wrong ones: %v", err)
	}
	wg.Wait()
	if quick > 0 {
		t.Errorf("%d wrong passwords were refused without the delay", quick)
	}
	if n := rss(t, h.Pid()); n > memoryWithin {
		t.Errorf("the daemon holds %d MiB", n>>20)
	}
	if strings.Contains(h.Log(), "guess ") {
		t.Error("a password that was tried is in the log")
	}
}

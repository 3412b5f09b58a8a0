package thincli_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xenapi/thincli"
	"github.com/patchd/patchd/pkg/xenapi/thincli/xetest"
)

// dial opens a bare connection to the world's server.
func (w *world) dial() net.Conn {
	w.t.Helper()
	nc, err := net.Dial("tcp", w.server.Listener.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	return nc
}

const (
	magic    = "XenSource thin CLI protocol"
	login    = "username=root\npassword=secret"
	opening  = magic + "\x00\x00\x00\x00\x02\x00\x00\x00"
	okFrame  = "\x08\x00\x00\x00\x0a\x00\x00\x00\x05\x00\x00\x00"
	waitWord = "\x08\x00\x00\x00\x0a\x00\x00\x00\x12\x00\x00\x00"
)

func post(body string) string {
	return fmt.Sprintf("POST /cli HTTP/1.0\r\ncontent-length: %d\r\n\r\n%s", len(body), body)
}

// converse sends everything at once and reads until the server closes.
func (w *world) converse(parts ...string) string {
	w.t.Helper()
	nc := w.dial()
	if _, err := io.WriteString(nc, strings.Join(parts, "")); err != nil {
		w.t.Fatal(err)
	}
	got, err := io.ReadAll(nc)
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		w.t.Fatalf("the server did not close; got %q", got)
	}
	return string(got)
}

func TestFramesThatNoClientMaySend(t *testing.T) {
	int32s := func(ns ...uint32) string {
		var b []byte
		for _, n := range ns {
			b = binary.LittleEndian.AppendUint32(b, n)
		}
		return string(b)
	}
	cases := []struct{ name, frames string }{
		{"an answer to no question", okFrame},
		{"a frame of 2 GiB", int32s(1<<31 - 1)},
		{"a frame of negative length", int32s(1<<32 - 1)},
		{"a frame without a group", int32s(0)},
		{"half a message", int32s(4, 10)},
		{"a command, as if it were the server", int32s(12, 9, 4, 0)},
		{"an unknown response", int32s(8, 10, 77)},
		{"a response with more behind it", int32s(12, 10, 5, 0)},
		{"a blob that nobody asked for", int32s(12, 11, 7, 4) + "data"},
		{"a blob of negative length", int32s(12, 11, 7, 1<<31)},
		{"words", "GET / HTTP/1.1\r\n\r\n"},
		{"half a frame", "\x08\x00\x00\x00\x0a"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, short())
			furnish(w)
			hold := make(chan struct{})
			defer close(hold)
			w.holds["pool_patch.pool_apply"] = hold
			nc := w.dial()
			io.WriteString(nc, post("patch-pool-apply\nuuid="+uuid(20)+"\n"+login)+opening)
			<-w.entered
			io.WriteString(nc, c.frames)
			nc.(*net.TCPConn).CloseWrite()
			if got, _ := io.ReadAll(nc); string(got) != opening {
				t.Errorf("the server sent %q", got)
			}
			w.until("the session ends", func() bool { return w.open() == 0 })
		})
	}
}

func TestHeartbeatsOutsideOfATransferAreHarmlessUntilTheyFlood(t *testing.T) {
	o := short()
	o.MaxFrames = 10
	w := newWorld(t, o)
	furnish(w)
	hold := make(chan struct{})
	w.holds["pool_patch.pool_apply"] = hold
	nc := w.dial()
	io.WriteString(nc, post("patch-pool-apply\nuuid="+uuid(20)+"\n"+login)+opening+strings.Repeat(waitWord, 5))
	<-w.entered
	if w.open() != 1 {
		t.Fatal("a few heartbeats ended the command")
	}
	io.WriteString(nc, strings.Repeat(waitWord, 6))
	w.until("the flood ends the command", func() bool { return w.open() == 0 })
	close(hold)
}

func TestOpenings(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	cases := []struct{ name, opening string }{
		{"another protocol", strings.Repeat("x", len(opening))},
		{"another major version", magic + "\x01\x00\x00\x00\x02\x00\x00\x00"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got := w.converse(post("host-list\n"+login), c.opening); got != opening {
				t.Errorf("the server sent %q", got)
			}
		})
	}
	t.Run("a later minor version is fine", func(t *testing.T) {
		c := w.client("host-list", "--minimal")
		c.Version = [2]int{0, 7}
		expect(t, w.run(c), xetest.Result{Stdout: uuid(1) + "\n"})
	})
	t.Run("frames that came with the opening are not lost", func(t *testing.T) {
		got := w.converse(post("host-list\n--minimal\n"+login), opening, waitWord)
		if !strings.Contains(got, uuid(1)) {
			t.Errorf("the server sent %q", got)
		}
	})
}

func TestAClientThatDoesNotOpen(t *testing.T) {
	o := short()
	o.HelloTimeout = 20 * time.Millisecond
	w := newWorld(t, o)
	if got := w.converse(post("host-list\n" + login)); got != opening {
		t.Errorf("the server sent %q", got)
	}
}

func TestBodies(t *testing.T) {
	o := short()
	o.BodyTimeout = 200 * time.Millisecond
	w := newWorld(t, o)
	furnish(w)
	cases := []struct{ name, request, want string }{
		{"too large", "POST /cli HTTP/1.0\r\ncontent-length: 204801\r\n\r\n", "413"},
		{"as large as allowed", post("host-list\n--minimal\n"+login+"\nx="+strings.Repeat("y", 200<<10-len("host-list\n--minimal\n"+login+"\nx="))) + opening, "Unknown field 'x'"},
		{"without a length", "POST /cli HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "411"},
		{"that never comes", "POST /cli HTTP/1.0\r\ncontent-length: 10\r\n\r\nhost", "408"},
		{"empty", post("") + opening, "the command name is missing"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got := w.converse(c.request); !strings.Contains(got, c.want) {
				t.Errorf("the server sent %.200q, want %q", got, c.want)
			}
		})
	}
	t.Run("by another method", func(t *testing.T) {
		rec := httptest.NewRecorder()
		w.handler.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/cli", nil))
		if rec.Code != http.StatusMethodNotAllowed {
			t.Errorf("status %d", rec.Code)
		}
	})
	t.Run("on a connection that cannot be taken over", func(t *testing.T) {
		rec := httptest.NewRecorder()
		w.handler.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/cli", strings.NewReader("help")))
		if rec.Code != http.StatusHTTPVersionNotSupported {
			t.Errorf("status %d", rec.Code)
		}
	})
}

// A client that does not read is given up after one write time-out, and its
// session is closed.
func TestAClientThatDoesNotRead(t *testing.T) {
	o := short()
	o.WriteTimeout = 50 * time.Millisecond
	w := newWorld(t, o)
	furnish(w)
	long := strings.Repeat("x", 1<<20)
	for i := range 64 {
		w.add("message", 100+i, object{"name": "N", "body": long})
	}
	nc := w.dial()
	nc.(*net.TCPConn).SetReadBuffer(4096)
	io.WriteString(nc, post("message-list\n"+login)+opening)
	w.until("the command begins", func() bool { w.fake.mu.Lock(); defer w.fake.mu.Unlock(); return w.logins == 1 })
	w.until("the session ends", func() bool { return w.open() == 0 })
}

func TestTooManyConversationsAtOnce(t *testing.T) {
	o := short()
	o.MaxConversations = 1
	w := newWorld(t, o)
	furnish(w)
	hold := make(chan struct{})
	w.holds["pool_patch.pool_apply"] = hold
	nc := w.dial()
	io.WriteString(nc, post("patch-pool-apply\nuuid="+uuid(20)+"\n"+login)+opening)
	<-w.entered
	got := w.xe("host-list")
	if got.Exit != 1 || got.Stderr != "Server internal error.\n" {
		t.Errorf("got %+v", got)
	}
	close(hold)
	if rest, _ := io.ReadAll(nc); !bytes.HasSuffix(rest, []byte("\x09\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00")) {
		t.Errorf("the first one ended with %q", rest)
	}
}

// Commands of those who have logged in are counted apart from clients that have
// only connected: strangers keep nobody from working.
func TestTooManyCommandsAtOnce(t *testing.T) {
	o := short()
	o.MaxCommands = 1
	w := newWorld(t, o)
	furnish(w)
	for range 5 {
		io.WriteString(w.dial(), post("host-list\n"+login)) // and no hello
	}
	if got := w.xe("host-list"); got.Exit != 0 {
		t.Errorf("among strangers: %+v", got)
	}
	hold := make(chan struct{})
	w.holds["pool_patch.pool_apply"] = hold
	nc := w.dial()
	io.WriteString(nc, post("patch-pool-apply\nuuid="+uuid(20)+"\n"+login)+opening)
	<-w.entered
	if got := w.xe("host-list"); got.Exit != 1 || !strings.Contains(got.Stderr, "Too many commands are running") {
		t.Errorf("got %+v", got)
	}
	close(hold)
	io.Copy(io.Discard, nc)
	if got := w.xe("host-list"); got.Exit != 0 {
		t.Errorf("afterwards: %+v", got)
	}
}

func TestCloseEndsWhatRuns(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	hold := make(chan struct{})
	defer close(hold)
	w.holds["pool_patch.pool_apply"] = hold
	go func() {
		<-w.entered
		w.handler.Close()
	}()
	expect(t, w.xe("patch-pool-apply", "uuid="+uuid(20)),
		xetest.Result{Exit: 1, Stderr: "Error: the server is shutting down\n"})
	w.handler.Close()
	if w.open() != 0 {
		t.Error("the session was left open")
	}
	if got := w.xe("host-list"); got.Stderr != "Server internal error.\n" {
		t.Errorf("got %+v", got)
	}
}

func TestTheLocalSocketNeedsNoPassword(t *testing.T) {
	f := newFake()
	h := thincli.New(f, thincli.Options{Local: func(r *http.Request) bool { return r.RemoteAddr == "@" || r.RemoteAddr == "" }})
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	defer srv.Close()
	defer h.Close()
	f.add("host", 1, object{"name_label": "one"})
	// As xe does on the coordinator itself: no -s, no -u, no -pw.
	c := &xetest.Client{Args: []string{"host-list", "--minimal"}, Socket: path}
	got, err := c.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	expect(t, got, xetest.Result{Stdout: uuid(1) + "\n"})
	t.Run("but another user does", func(t *testing.T) {
		c := &xetest.Client{Args: []string{"host-list", "--minimal", "-u", "eve"}, Socket: path}
		got, err := c.Run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		expect(t, got, xetest.Result{Exit: 1, Stderr: "Authentication failed\nFor usage run: 'xe help'\n"})
	})
}

// A server can ask for any file; a client gives only what it was told to.
func TestTheClientGuardsItsFiles(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	w.file("secret", "s")
	// device-config:a-filename names a file that the client permits; the
	// command line the server sees is the same, so ask for another one by
	// a relative detour.
	c := w.client("sr-create", "name-label=n", "type=x", "device-config:a-filename=sub/../secret")
	w.answers["SR.create"] = ref(3)
	expect(t, w.run(c), xetest.Result{Stdout: uuid(3) + "\n"})
	evil := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		nc, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer nc.Close()
		io.WriteString(nc, opening)
		io.ReadFull(nc, make([]byte, len(opening)))
		io.WriteString(nc, "\x12\x00\x00\x00\x09\x00\x00\x00\x01\x00\x00\x00\x06\x00\x00\x00secret")
		io.Copy(io.Discard, nc)
	}))
	defer evil.Close()
	host, port, _ := net.SplitHostPort(evil.Listener.Addr().String())
	got := w.run(&xetest.Client{Dir: w.dir, Args: []string{"host-list", "x=other", "-s", host, "-p", port}})
	if got.Exit != 1 || !strings.Contains(got.Stderr, "not permitted") {
		t.Errorf("got %+v", got)
	}
}

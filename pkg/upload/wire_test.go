package upload

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// client is a hand-made HTTP client.
type client struct {
	t    *testing.T
	conn *net.TCPConn
	r    *bufio.Reader
}

func (e *env) dial() *client {
	e.t.Helper()
	conn, err := net.Dial("tcp", e.server.Listener.Addr().String())
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return &client{e.t, conn.(*net.TCPConn), bufio.NewReader(conn)}
}

func (c *client) send(p []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(p); err != nil {
		c.t.Fatal(err)
	}
}

// status reads the status line and the headers.
func (c *client) status() (line string, headers string) {
	c.t.Helper()
	line, err := c.r.ReadString('\n')
	if err != nil {
		c.t.Fatalf("no status line: %v", err)
	}
	for {
		h, err := c.r.ReadString('\n')
		if err != nil {
			c.t.Fatal(err)
		}
		if strings.TrimSpace(h) == "" {
			return strings.TrimSpace(line), strings.ToLower(headers)
		}
		headers += h
	}
}

func (e *env) success(ref, uuid string) {
	e.t.Helper()
	rec := e.outcome(xapi.Ref(ref))
	if rec.Status != task.Success {
		e.t.Fatalf("task %v %v", rec.Status, rec.ErrorInfo)
	}
	got, _ := e.patchOf(xapi.UUID(uuid))
	if want := "<value>" + string(got) + "</value>"; rec.Result != want {
		e.t.Errorf("task.result %q, want %q", rec.Result, want)
	}
}

func TestXEWaitsForTheStatusBeforeTheBody(t *testing.T) {
	e := newEnv(t)
	for _, proto := range []string{"HTTP/1.0", "HTTP/1.1"} {
		t.Run(proto, func(t *testing.T) {
			e.t = t
			uuid, ref := xapi.NewUUID(), e.newTask()
			message := sign(t, program(uuid, mib), "-z", "0")
			c := e.dial()
			// The colons of the refs are not escaped.
			c.send(fmt.Appendf(nil, "PUT /pool_patch_upload?session_id=%s&task_id=%s&sr_id=%s %s\r\nHost: x\r\ncontent-length: %d\r\n\r\n",
				e.session, ref, e.pool.sr, proto, len(message)))
			line, headers := c.status()
			if !strings.HasPrefix(line, proto+" 200 OK") || !strings.Contains(headers, "connection: close") || !strings.Contains(headers, "task-id: "+strings.ToLower(string(ref))) {
				t.Errorf("%s\n%s", line, headers)
			}
			c.send(message)
			e.success(string(ref), string(uuid))
		})
	}
}

func TestXenAPIStreamOfUnknownLength(t *testing.T) {
	e := newEnv(t)
	head := func(more string) []byte {
		return fmt.Appendf(nil, "PUT /pool_patch_upload/?session_id=%s%s HTTP/1.1\r\nHost: x\r\ncontent-length: 1125899906842624\r\n\r\n",
			strings.ReplaceAll(string(e.session), ":", "%3A"), more)
	}
	probe := e.dial()
	probe.send(head(""))
	if line, headers := probe.status(); line != "HTTP/1.1 200 OK" || !strings.Contains(headers, "connection: close") {
		t.Errorf("probe: %s\n%s", line, headers)
	}
	probe.conn.Close()
	e.nothing()

	uuid, ref := xapi.NewUUID(), e.newTask()
	c := e.dial()
	c.send(head("&task_id=" + strings.ReplaceAll(string(ref), ":", "%3A")))
	c.status()
	c.send(sign(t, program(uuid, 2*mib), "-z", "0"))
	c.conn.CloseWrite()
	e.success(string(ref), string(uuid))
}

// xen-api does not expect its task to fail before it has sent everything: it
// would take the whole process along.
func TestAStreamOfUnknownLengthIsRefusedAtItsEnd(t *testing.T) {
	e := newEnv(t)
	ref := e.newTask()
	c := e.dial()
	c.send(fmt.Appendf(nil, "PUT /pool_patch_upload/?session_id=%s&task_id=%s HTTP/1.1\r\nHost: x\r\ncontent-length: 1125899906842624\r\n\r\n", e.session, ref))
	c.status()
	c.send(make([]byte, 32*mib)) // more than lies in the buffers between us
	if rec, err := e.tasks.Get(ref); err != nil || rec.Status != task.Pending {
		t.Errorf("before the end: %v %v", rec.Status, err)
	}
	c.conn.CloseWrite()
	if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.InvalidPatch {
		t.Errorf("at the end: %v %v", rec.Status, rec.ErrorInfo)
	}
	e.nothing()
}

func TestALyingLengthIsRefused(t *testing.T) {
	e := newEnv(t)
	message := sign(t, program(xapi.NewUUID(), mib), "-z", "0")
	for _, c := range []struct {
		name   string
		length int
	}{{"more is promised than comes", len(message) + 1}, {"more comes than is promised", len(message) - 1}} {
		t.Run(c.name, func(t *testing.T) {
			e.t = t
			ref := e.newTask()
			x := e.dial()
			x.send(fmt.Appendf(nil, "PUT /pool_patch_upload?session_id=%s&task_id=%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", e.session, ref, c.length))
			x.status()
			x.send(message)
			x.conn.CloseWrite()
			if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.InvalidPatch {
				t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
			}
			e.nothing()
		})
	}
	e.t = t
}

func TestAClientThatGoesAwayLeavesNothing(t *testing.T) {
	e := newEnv(t)
	message := sign(t, program(xapi.NewUUID(), 4*mib), "-z", "0")
	ref := e.newTask()
	c := e.dial()
	c.send(fmt.Appendf(nil, "PUT /pool_patch_upload?session_id=%s&task_id=%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", e.session, ref, len(message)))
	c.status()
	c.send(message[:3*mib])
	c.conn.SetLinger(0) // reset
	c.conn.Close()
	if rec := e.outcome(ref); rec.Status != task.Failure {
		t.Errorf("task %v", rec.Status)
	}
	e.nothing()
}

func TestAClientThatGoesAwayAfterTheLastByteChangesNothing(t *testing.T) {
	e := newEnv(t)
	uuid, ref := xapi.NewUUID(), e.newTask()
	message := sign(t, program(uuid, mib), "-z", "0")
	c := e.dial()
	c.send(fmt.Appendf(nil, "PUT /pool_patch_upload?session_id=%s&task_id=%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", e.session, ref, len(message)))
	c.status()
	c.send(message)
	c.conn.Close()
	e.success(string(ref), string(uuid))
}

func TestCancelEndsAnUploadThatDrips(t *testing.T) {
	e := newEnv(t)
	message := sign(t, program(xapi.NewUUID(), 9*mib), "-z", "0")
	ref := e.newTask()
	c := e.dial()
	c.send(fmt.Appendf(nil, "PUT /pool_patch_upload?session_id=%s&task_id=%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", e.session, ref, len(message)))
	c.status()
	c.send(message[:5*mib])
	begun := time.Now()
	if err := e.tasks.Cancel(context.Background(), ref); err != nil {
		t.Fatal(err)
	}
	c.conn.Write(message[5*mib : 5*mib+1]) // still dripping
	rec := e.outcome(ref)
	if took := time.Since(begun); rec.Status != task.Cancelled || took > time.Second {
		t.Errorf("task %v %v after %v", rec.Status, rec.ErrorInfo, took)
	}
	e.nothing()
}

func TestCurlWithExpectContinue(t *testing.T) {
	e := newEnv(t)
	uuid := xapi.NewUUID()
	path := filepath.Join(t.TempDir(), "patch")
	if err := os.WriteFile(path, sign(t, program(uuid, 3*mib), "-z", "0"), 0o600); err != nil {
		t.Fatal(err)
	}
	ref := e.newTask()
	for _, c := range []struct {
		name, url, want string
		args            []string
	}{
		{"with a task", e.url("/pool_patch_upload", "task_id", string(ref)), "200", nil},
		{"chunked, known uuid", e.url("/pool_patch_upload"), "409", []string{"-H", "Transfer-Encoding: chunked"}},
		{"HTTP/1.0, known uuid", e.url("/pool_patch_upload"), "409", []string{"--http1.0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append([]string{"-sS", "-m", "20", "-H", "Expect: 100-continue", "-T", path, "-o", os.DevNull, "-w", "%{http_code} %{size_upload}"}, c.args...)
			out, err := exec.Command("curl", append(args, c.url)...).CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), c.want+" ") || strings.HasSuffix(string(out), " 0") {
				t.Errorf("curl: %s %v, want %s", out, err, c.want)
			}
			if c.want == "200" {
				e.success(string(ref), string(uuid))
			}
		})
	}
}

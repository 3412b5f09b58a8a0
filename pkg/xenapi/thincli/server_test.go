package thincli_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi/thincli"
	"github.com/patchd/patchd/pkg/xenapi/thincli/xetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a server with a fake API behind it and a folder for the client.
type world struct {
	*fake
	t       *testing.T
	handler *thincli.Handler
	server  *httptest.Server
	dir     string

	mu       sync.Mutex
	uploaded []byte
	query    string
	// refuse answers a transfer before it begins: a status, 0: none.
	refuse int
	// verdict fails the task of a transfer after its data has come.
	verdict error
	// verify holds a transfer's task back after its data has come, nil: does not.
	verify chan struct{}
	// received is closed once a transfer's data has come or broken off.
	received chan struct{}
}

// short are limits that no test has to wait for.
func short() thincli.Options {
	return thincli.Options{
		HelloTimeout: 10 * time.Second, SettleTimeout: 50 * time.Millisecond, LingerTimeout: 5 * time.Second,
	}
}

func newWorld(t *testing.T, o thincli.Options) *world {
	t.Helper()
	w := &world{fake: newFake(), t: t, dir: t.TempDir(), received: make(chan struct{})}
	w.handler = thincli.New(w.fake, o)
	mux := http.NewServeMux()
	mux.Handle("POST /cli", w.handler)
	mux.HandleFunc("PUT /pool_patch_upload", func(rw http.ResponseWriter, r *http.Request) { w.put(rw, r, "pool_patch", 35) })
	mux.HandleFunc("PUT /import_raw_vdi", func(rw http.ResponseWriter, r *http.Request) { w.put(rw, r, "VDI", 40) })
	mux.HandleFunc("GET /export_raw_vdi", w.export)
	w.server = httptest.NewServer(mux)
	t.Cleanup(func() {
		w.handler.Close()
		w.server.Close()
	})
	return w
}

// put takes a file as the real handlers do: the status first, then the body,
// then the task.
func (w *world) put(rw http.ResponseWriter, r *http.Request, class string, n int) {
	defer close(w.received)
	w.mu.Lock()
	w.query = r.URL.RawQuery
	w.mu.Unlock()
	task := r.URL.Query().Get("task_id")
	if w.refuse != 0 {
		rw.WriteHeader(w.refuse)
		return
	}
	rc := http.NewResponseController(rw)
	_ = rc.EnableFullDuplex()
	rw.Header().Set("Connection", "close")
	rw.WriteHeader(http.StatusOK)
	_ = rc.Flush()
	data, err := io.ReadAll(r.Body)
	if err != nil {
		w.edit(task, object{"status": "failure", "error_info": []any{"INVALID_PATCH"}})
		return
	}
	w.mu.Lock()
	w.uploaded = data
	w.mu.Unlock()
	if w.verify != nil {
		<-w.verify
	}
	var coded *xapi.Error
	if errors.As(w.verdict, &coded) {
		info := []any{}
		for _, s := range coded.Description() {
			info = append(info, s)
		}
		w.edit(task, object{"status": "failure", "error_info": info})
		return
	}
	if w.get(ref(n)) == nil {
		w.add(class, n, object{"name_label": "new"})
	}
	w.edit(task, object{"status": "success", "result": "<value>" + ref(n) + "</value>"})
}

func (w *world) export(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	w.query = r.URL.RawQuery
	w.mu.Unlock()
	_, _ = io.WriteString(rw, "content of the image")
	w.edit(r.URL.Query().Get("task_id"), object{"status": "success", "result": ""})
}

// client is an xe with the connection options of this world.
func (w *world) client(args ...string) *xetest.Client {
	host, port, _ := net.SplitHostPort(w.server.Listener.Addr().String())
	return &xetest.Client{Dir: w.dir,
		Args: append(args, "-s", host, "-p", port, "--nossl", "-u", "root", "-pw", "secret")}
}

func (w *world) run(c *xetest.Client) xetest.Result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	res, err := c.Run(ctx)
	if err != nil {
		w.t.Fatalf("xe %s: %v", strings.Join(c.Args, " "), err)
	}
	return res
}

func (w *world) xe(args ...string) xetest.Result {
	w.t.Helper()
	return w.run(w.client(args...))
}

func (w *world) file(name, content string) string {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return name
}

// until waits for the fake to satisfy cond; it wakes at every change.
func (w *world) until(what string, cond func() bool) {
	w.t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			w.t.Fatalf("did not happen: %s; calls %q", what, w.log())
		}
	}
}

func expect(t *testing.T, got, want xetest.Result) {
	t.Helper()
	if got.Exit != want.Exit {
		t.Errorf("exit code %d, want %d", got.Exit, want.Exit)
	}
	if got.Stdout != want.Stdout {
		t.Errorf("stdout\n%q\nwant\n%q", got.Stdout, want.Stdout)
	}
	if got.Stderr != want.Stderr {
		t.Errorf("stderr\n%q\nwant\n%q", got.Stderr, want.Stderr)
	}
}

// furnish fills a world with one object of each class.
func furnish(w *world) {
	w.add("host", 1, object{"name_label": "host one", "name_description": "first", "hostname": "one", "enabled": true,
		"software_version": object{"platform_version": "2.1.0", "product_brand": "patchd"}, "patches": []any{ref(21)},
		"other_config": object{}, "suspend_image_sr": "OpaqueRef:NULL", "metrics": "OpaqueRef:NULL"})
	w.add("pool", 2, object{"name_label": "the pool", "name_description": "", "master": ref(1), "default_SR": ref(3),
		"other_config": object{"a": "1", "b": "2"}, "tags": []any{"x", "y"}})
	w.add("SR", 3, object{"name_label": "local", "name_description": "files", "type": "file", "content_type": "user",
		"shared": false, "PBDs": []any{ref(5)}, "VDIs": []any{ref(4)}, "other_config": object{"k": "v,w"}, "tags": []any{}})
	w.add("VDI", 4, object{"name_label": "disk", "name_description": "", "SR": ref(3), "virtual_size": "4194304",
		"read_only": false, "sharable": false, "other_config": object{}})
	w.add("PBD", 5, object{"host": ref(1), "SR": ref(3), "device_config": object{"location": "/srv/sr"},
		"currently_attached": true, "other_config": object{}})
	w.add("pool_patch", 20, object{"name_label": "P11", "name_description": "Eleventh", "size": "1234",
		"host_patches": []any{ref(21)}, "after_apply_guidance": []any{"restartHost", "restartXAPI"}, "VDI": ref(4), "other_config": object{}})
	w.add("host_patch", 21, object{"host": ref(1), "pool_patch": ref(20)})
	w.add("task", 30, object{"name_label": "work", "name_description": "", "status": "success", "progress": 1.0})
	w.add("SM", 31, object{"type": "file", "name_label": "Local files", "name_description": "", "vendor": "patchd",
		"copyright": "c", "configuration": object{"location": "where"}, "capabilities": []any{"VDI_CLONE"}})
	w.add("message", 32, object{"name": "NOTE", "priority": "3", "cls": "Host", "obj_uuid": uuid(1),
		"timestamp": "20260102T03:04:05Z", "body": "text"})
}

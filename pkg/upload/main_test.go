package upload

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/mux"
	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

const signer = "signer@upload.test"

// gpgHome holds a key to sign with, keyring its public part.
var gpgHome string
var publicKey []byte

func TestMain(m *testing.M) {
	dom0.MaybeShim()
	os.Exit(func() int {
		var err error
		if gpgHome, err = os.MkdirTemp("", "gpg"); err != nil { // short: gpg puts sockets in it
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(gpgHome)
		defer exec.Command("gpgconf", "--homedir", gpgHome, "--kill", "all").Run()
		if _, err = gpg(nil, "--quick-generate-key", signer, "ed25519", "sign", "0"); err == nil {
			publicKey, err = gpg(nil, "--export", signer)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func gpg(stdin []byte, args ...string) ([]byte, error) {
	args = append([]string{"--homedir", gpgHome, "--batch", "--quiet", "--no-tty", "--yes", "--passphrase", "", "--pinentry-mode", "loopback"}, args...)
	c := exec.Command("gpg", args...)
	var stderr bytes.Buffer
	c.Stdin, c.Stderr = bytes.NewReader(stdin), &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("gpg %v: %w: %s", args, err, &stderr)
	}
	return out, nil
}

func sign(t testing.TB, payload []byte, args ...string) []byte {
	t.Helper()
	out, err := gpg(payload, append([]string{"-u", signer, "--sign"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// program is a patch with that uuid, filled up to at least size bytes.
func program(uuid xapi.UUID, size int) []byte {
	info := patch.Info{UUID: uuid, Version: "1.0", NameLabel: "XS-TEST " + string(uuid)[:8], NameDescription: "a test", Guidance: []xapi.Guidance{xapi.RestartXAPI}}
	text := "#!/bin/sh\nif [ \"$1\" = info ]; then cat <<'X'\n" + info.Encode() + "\nX\nfi\nexit 0\n"
	if n := size - len(text); n > 0 {
		pad := make([]byte, n)
		for i := range pad {
			pad[i] = byte(i*7 + i>>11)
		}
		return append([]byte(text), pad...)
	}
	return []byte(text)
}

// env is a server with everything real but the pool's storage side.
type env struct {
	t        *testing.T
	store    *store.Store
	tasks    *task.Manager
	sessions *session.Manager
	pool     *fakePool
	server   *httptest.Server
	session  xapi.Ref // of root
	options  Options
	keepFree atomic.Int64 // of the SR
}

func newEnv(t *testing.T, change ...func(*Options)) *env {
	t.Helper()
	ctx := context.Background()
	log := logrus.New()
	log.SetOutput(io.Discard)
	e := &env{t: t}
	indexes := append(append(pool.Indexes(), task.Indexes()...), session.Indexes()...)
	var err error
	if e.store, err = store.Open(ctx, store.Options{Dir: t.TempDir(), Indexes: indexes, Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.store.Close() })
	e.tasks = task.NewManager(e.store, nil, log)
	t.Cleanup(e.tasks.Stop)
	if e.sessions, err = session.NewManager(e.store, session.Options{BadPasswordDelay: -1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.sessions.Close)
	if e.session, err = e.sessions.LoginLocal(ctx, "test"); err != nil {
		t.Fatal(err)
	}
	e.addSR()
	d, err := dom0.New(dom0.Options{CgroupPrefix: "patchd-upload-test-" + filepath.Base(t.TempDir()) + fmt.Sprint(os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	e.options = Options{
		Pool: e.pool, Store: e.store, Tasks: e.tasks, Sessions: e.sessions, Dom0: d, Log: log,
		Keys:   func() (*patch.Keyring, error) { return patch.NewKeyring("test", publicKey), nil },
		Linger: 200 * time.Millisecond,
	}
	for _, f := range change {
		f(&e.options)
	}
	e.serve(e.options)
	return e
}

// serve starts a server, perhaps another one than before.
func (e *env) serve(o Options) {
	router := mux.NewRouter()
	New(o).Routes(router)
	e.start(router)
}

func (e *env) start(router http.Handler) {
	e.server = httptest.NewServer(router)
	e.t.Cleanup(e.server.Close)
}

func (e *env) addSR() {
	e.t.Helper()
	ctx := context.Background()
	uuid := xapi.NewUUID()
	c := sr.Config{SR: uuid, Device: map[string]string{"location": filepath.Join(e.t.TempDir(), "sr")}, KeepFree: func(string) int64 { return e.keepFree.Load() }}
	driver := &file.Driver{}
	if err := driver.Create(ctx, c); err != nil {
		e.t.Fatal(err)
	}
	repo, err := driver.Attach(ctx, c)
	if err != nil {
		e.t.Fatal(err)
	}
	e.pool = &fakePool{store: e.store, sr: xapi.NewRef(), uuid: uuid, repo: repo, plugged: true}
	err = e.store.Update(ctx, func(tx *store.Tx) error {
		tx.Put(pool.ClassSR, e.pool.sr, pool.SR{UUID: uuid, NameLabel: "Local", Type: "file"})
		return nil
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

// url is the address of a path with session_id and more parameters.
func (e *env) url(path string, more ...string) string {
	q := url.Values{"session_id": {string(e.session)}}
	for i := 0; i < len(more); i += 2 {
		q.Set(more[i], more[i+1])
	}
	return e.server.URL + path + "?" + q.Encode()
}

// newTask makes a client's task.
func (e *env) newTask() xapi.Ref {
	e.t.Helper()
	s, err := e.sessions.Get(e.session)
	if err != nil {
		e.t.Fatal(err)
	}
	ref, err := e.tasks.Create(context.Background(), task.Spec{Label: "upload", Session: s.Stored, User: s.User})
	if err != nil {
		e.t.Fatal(err)
	}
	return ref
}

// outcome waits for the end of a task.
func (e *env) outcome(ref xapi.Ref) task.Record {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	rec, err := e.tasks.Wait(ctx, ref)
	if err != nil {
		e.t.Fatalf("wait for task %s: %v", ref, err)
	}
	return rec
}

// put sends a body in the way of net/http.
func (e *env) put(address string, body io.Reader, change ...func(*http.Request)) (int, problem, []byte) {
	e.t.Helper()
	r, err := http.NewRequest(http.MethodPut, address, body)
	if err != nil {
		e.t.Fatal(err)
	}
	for _, f := range change {
		f(r)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	var p problem
	json.Unmarshal(text, &p)
	return resp.StatusCode, p, text
}

// nothing checks that the SR and the records hold no VDI and no patch.
func (e *env) nothing() {
	e.t.Helper()
	vols, err := e.pool.repo.Scan(context.Background())
	if err != nil || len(vols) > 0 {
		e.t.Errorf("volumes are left: %v, %v", vols, err)
	}
	e.store.View(func(v *store.View) error {
		if n, m := v.Count(pool.ClassVDI), v.Count(pool.ClassPatch); n+m > 0 {
			e.t.Errorf("%d VDIs and %d patches are left", n, m)
		}
		return nil
	})
	if out, _ := os.ReadFile("/proc/self/mounts"); strings.Contains(string(out), e.t.Name()) {
		e.t.Error("a mount is left")
	}
}

// patchOf finds the record of an uploaded patch.
func (e *env) patchOf(uuid xapi.UUID) (ref xapi.Ref, rec pool.Patch) {
	e.t.Helper()
	err := e.store.View(func(v *store.View) error {
		it, ok := v.ByUUID(pool.ClassPatch, uuid)
		if !ok {
			return fmt.Errorf("no patch %s", uuid)
		}
		ref = it.Ref
		return it.Decode(&rec)
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return ref, rec
}

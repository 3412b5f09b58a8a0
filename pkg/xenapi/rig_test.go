package xenapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/mux"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/event"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const password = "correct horse battery"

// rig is a server over a real store, real tasks, sessions and events. Only the
// pool's operations are played.
type rig struct {
	*Server
	t     *testing.T
	http  *httptest.Server
	pool  *fakePool
	log   *logged
	root  *session.Session
	store *store.Store

	host, poolRef, patch, hostPatch, sr, vdi, sm, pbd, message xapi.Ref

	slave string // when set, another host is the coordinator
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, pool: &fakePool{}, log: &logged{}}
	log := logrus.New()
	log.SetOutput(io.Discard)
	log.AddHook(r.log)
	indexes := slices.Concat(pool.Indexes(), task.Indexes(), session.Indexes())
	s, err := store.Open(t.Context(), store.Options{Dir: t.TempDir(), Indexes: indexes})
	r.must(err)
	r.store = s
	host := func() xapi.Ref { return r.host }
	tasks := task.NewManager(s, host, log)
	sessions, err := session.NewManager(s, session.Options{BadPasswordDelay: -1, Log: log, ThisHost: host})
	r.must(err)
	r.Server, err = New(Options{
		Store: s, Pool: r.pool, Tasks: tasks, Sessions: sessions, Log: log,
		Events:      event.New(s, NewModel().EventClasses()),
		Coordinator: func() (string, bool) { return r.slave, r.slave == "" },
	})
	r.must(err)
	r.fill()
	router := mux.NewRouter().SkipClean(true)
	r.Routes(router)
	r.http = httptest.NewServer(router)
	t.Cleanup(func() {
		sessions.Close()
		tasks.Stop()
		r.http.Close()
		r.must(s.Close())
	})
	_, err = sessions.EnsureRoot(t.Context(), password)
	r.must(err)
	ref, err := sessions.Login(t.Context(), "root", password, "test", "127.0.0.1:1")
	r.must(err)
	r.root, err = sessions.Get(ref)
	r.must(err)
	return r
}

// fill writes one record of every class that has any.
func (r *rig) fill() {
	all := []*xapi.Ref{&r.host, &r.poolRef, &r.patch, &r.hostPatch, &r.sr, &r.vdi, &r.sm, &r.pbd, &r.message}
	for _, ref := range all {
		*ref = xapi.NewRef()
	}
	m := map[string]string{}
	r.must(r.store.Update(r.t.Context(), func(tx *store.Tx) error {
		tx.Put("host", r.host, pool.Host{UUID: xapi.NewUUID(), NameLabel: "h1", Enabled: true, Display: "enabled",
			OtherConfig: m, SuspendImageSR: xapi.NullRef, CrashDumpSR: xapi.NullRef})
		tx.Put("pool", r.poolRef, pool.PoolRecord{UUID: xapi.NewUUID(), Master: r.host, DefaultSR: r.sr})
		tx.Put("pool_patch", r.patch, pool.Patch{UUID: xapi.NewUUID(), NameLabel: "P1", Size: 5_000_000_000,
			AfterApplyGuidance: []xapi.Guidance{xapi.RestartHost}, VDI: r.vdi, Signature: []byte("secret stuff")})
		tx.Put("host_patch", r.hostPatch, pool.HostPatch{UUID: xapi.NewUUID(), Host: r.host, PoolPatch: r.patch})
		tx.Put("SR", r.sr, pool.SR{UUID: xapi.NewUUID(), NameLabel: "local", Type: "file", PhysicalSize: 1 << 40})
		tx.Put("VDI", r.vdi, pool.VDI{UUID: xapi.NewUUID(), SR: r.sr, VirtualSize: 4 << 20, Type: "user"})
		tx.Put("SM", r.sm, pool.SM{UUID: xapi.NewUUID(), Type: "file", Features: map[string]int64{"VDI_CREATE": 1, "VDI_CLONE": 1}})
		tx.Put("PBD", r.pbd, pool.PBD{UUID: xapi.NewUUID(), Host: r.host, SR: r.sr, DeviceConfig: map[string]string{"path": "/srv"}})
		tx.Put("message", r.message, pool.Message{UUID: xapi.NewUUID(), Name: "N", Priority: 3, Cls: "Host"})
		return nil
	}))
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// call sends a message in the process as root.
func (r *rig) call(method string, params ...any) (any, error) {
	return r.Call(r.t.Context(), r.root, method, params)
}

func (r *rig) good(method string, params ...any) any {
	r.t.Helper()
	v, err := r.call(method, params...)
	if err != nil {
		r.t.Fatalf("%s: %v", method, err)
	}
	return v
}

// user logs a user of that role in.
func (r *rig) user(name string, role session.Role) *session.Session {
	r.t.Helper()
	r.must(r.Sessions.AddUser(r.t.Context(), name, password, role))
	ref, err := r.Sessions.Login(r.t.Context(), name, password, "test", "127.0.0.1:1")
	r.must(err)
	s, err := r.Sessions.Get(ref)
	r.must(err)
	return s
}

// post sends a body and gives the status, the headers and the answer.
func (r *rig) post(path, contentType, body string) (*http.Response, string) {
	r.t.Helper()
	res, err := http.Post(r.http.URL+path, contentType, strings.NewReader(body))
	r.must(err)
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	r.must(err)
	return res, string(answer)
}

// json sends a JSON-RPC 2.0 request and gives its result or its error.
func (r *rig) json(method string, params ...any) (result any, failure []string) {
	r.t.Helper()
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "method": method, "params": params, "id": 0})
	r.must(err)
	res, text := r.post("/jsonrpc", "application/json", string(body))
	if res.StatusCode != http.StatusOK {
		r.t.Fatalf("%s: %s", method, res.Status)
	}
	var answer struct {
		Result any
		Error  *struct {
			Message string
			Data    []string
		}
	}
	r.must(json.Unmarshal([]byte(text), &answer))
	if answer.Error != nil {
		return nil, append([]string{answer.Error.Message}, answer.Error.Data...)
	}
	return answer.Result, nil
}

// wantError compares code and parameters; params nil compares the code alone.
func wantError(t *testing.T, err error, code string, params ...string) {
	t.Helper()
	var e *xapi.Error
	if !errors.As(err, &e) {
		t.Errorf("error %v, want %s", err, code)
		return
	}
	if e.Code != code || params != nil && !slices.Equal(e.Params, params) {
		t.Errorf("error %s %q, want %s %q", e.Code, e.Params, code, params)
	}
}

// logged keeps what was logged, as text and by field.
type logged struct {
	mu      sync.Mutex
	text    bytes.Buffer
	entries []logrus.Fields
}

func (l *logged) Levels() []logrus.Level { return logrus.AllLevels }

func (l *logged) Fire(e *logrus.Entry) error {
	line, err := e.String()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.WriteString(line)
	if e.Message == "audit" {
		l.entries = append(l.entries, e.Data)
	}
	return err
}

func (l *logged) audits(method string) (out []logrus.Fields) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.entries {
		if f["method"] == method {
			out = append(out, f)
		}
	}
	return out
}

package thincli_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gorilla/mux"
	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/event"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi"
	"github.com/patchd/patchd/pkg/xenapi/thincli"
	"github.com/patchd/patchd/pkg/xenapi/thincli/xetest"
)

// houseKey is the password of every user here.
const houseKey = "secret-enough"

// poolStub is the pool service as far as these tests need it.
type poolStub struct {
	xenapi.Pool
	applied chan struct{} // apply was called
}

func (p *poolStub) PatchPrecheck(context.Context, xapi.Ref, xapi.Ref) (string, error) {
	return "fine & <well>", nil
}

func (p *poolStub) PatchApply(ctx context.Context, patch, _ xapi.Ref) (string, error) {
	close(p.applied)
	<-ctx.Done()
	return "", context.Cause(ctx)
}

func (p *poolStub) PatchPoolApply(_ context.Context, patch xapi.Ref) error {
	return xapi.NewError(xapi.PatchAlreadyApplied, string(patch))
}

// house is a real server of the XenAPI, with sessions, tasks and events over a
// real store.
type house struct {
	t        *testing.T
	stub     *poolStub
	store    *store.Store
	tasks    *task.Manager
	sessions *session.Manager
	cli      *thincli.Handler
	server   *httptest.Server
	dir      string
}

func newHouse(t *testing.T) *house {
	t.Helper()
	h := &house{t: t, stub: &poolStub{applied: make(chan struct{})}, dir: t.TempDir()}
	log := logrus.New()
	log.SetOutput(io.Discard)
	indexes := append(append(pool.Indexes(), task.Indexes()...), session.Indexes()...)
	var err error
	if h.store, err = store.Open(t.Context(), store.Options{Dir: t.TempDir(), Indexes: indexes}); err != nil {
		t.Fatal(err)
	}
	self := func() xapi.Ref { return xapi.Ref(ref(1)) }
	h.tasks = task.NewManager(h.store, self, log)
	if h.sessions, err = session.NewManager(h.store, session.Options{Log: log, ThisHost: self, BadPasswordDelay: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.sessions.EnsureRoot(t.Context(), houseKey); err != nil {
		t.Fatal(err)
	}
	if err := h.sessions.AddUser(t.Context(), "reader", houseKey, session.ReadOnly); err != nil {
		t.Fatal(err)
	}
	server, err := xenapi.New(xenapi.Options{Store: h.store, Pool: h.stub, Tasks: h.tasks, Sessions: h.sessions,
		Events: event.New(h.store, xenapi.NewModel().EventClasses()), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	h.cli = thincli.New(thincli.Over(server), thincli.Options{Log: log, Local: thincli.TrustedRequest})
	r := mux.NewRouter()
	r.Handle("/cli", h.cli).Methods(http.MethodPost)
	r.HandleFunc("/pool_patch_upload", h.upload).Methods(http.MethodPut)
	server.Routes(r)
	h.server = httptest.NewServer(r)
	t.Cleanup(func() {
		h.tasks.Stop()
		h.cli.Close()
		h.server.Close()
		h.sessions.Close()
		if err := h.store.Close(); err != nil {
			t.Error(err)
		}
	})
	h.put(pool.ClassHost, ref(1), pool.Host{UUID: xapi.UUID(uuid(1)), NameLabel: "host one", Enabled: true})
	h.put(pool.ClassPool, ref(2), pool.PoolRecord{UUID: xapi.UUID(uuid(2)), NameLabel: "p", Master: xapi.Ref(ref(1)), DefaultSR: xapi.Ref(ref(3))})
	h.put(pool.ClassSR, ref(3), pool.SR{UUID: xapi.UUID(uuid(3)), NameLabel: "local", Type: "file"})
	h.put(pool.ClassPBD, ref(5), pool.PBD{UUID: xapi.UUID(uuid(5)), Host: xapi.Ref(ref(1)), SR: xapi.Ref(ref(3)), CurrentlyAttached: true})
	h.put(pool.ClassVDI, ref(4), pool.VDI{UUID: xapi.UUID(uuid(4)), NameLabel: "disk", SR: xapi.Ref(ref(3)), VirtualSize: 4 << 20})
	h.put(pool.ClassPatch, ref(20), pool.Patch{UUID: xapi.UUID(uuid(20)), NameLabel: "P11", Size: 1234, VDI: xapi.Ref(ref(4)),
		AfterApplyGuidance: []xapi.Guidance{xapi.RestartHost}})
	h.put(pool.ClassHostPatch, ref(21), pool.HostPatch{UUID: xapi.UUID(uuid(21)), Host: xapi.Ref(ref(1)), PoolPatch: xapi.Ref(ref(20)), Applied: true})
	return h
}

func (h *house) put(class, ref string, rec any) {
	h.t.Helper()
	err := h.store.Update(h.t.Context(), func(tx *store.Tx) error {
		tx.Put(class, xapi.Ref(ref), rec)
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
}

// upload finishes the task that a PUT came with, as the real handler does.
func (h *house) upload(w http.ResponseWriter, r *http.Request) {
	if _, release, err := h.sessions.FromRequest(r); err != nil {
		w.WriteHeader(session.HTTPStatus(err))
		return
	} else {
		defer release()
	}
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(w).Flush()
	_, err := io.Copy(io.Discard, r.Body)
	if err == nil {
		// The client closes as soon as it has sent the last byte.
		err = h.tasks.Complete(context.WithoutCancel(r.Context()), xapi.Ref(r.URL.Query().Get("task_id")), "<value>"+ref(20)+"</value>", nil)
	}
	if err != nil {
		h.t.Error(err)
	}
}

func (h *house) client(user string, args ...string) *xetest.Client {
	host, port, _ := net.SplitHostPort(h.server.Listener.Addr().String())
	return &xetest.Client{Dir: h.dir, Args: append(args, "-s", host, "-p", port, "-u", user, "-pw", houseKey)}
}

func (h *house) xe(args ...string) xetest.Result { return h.run(h.client("root", args...)) }

func (h *house) run(c *xetest.Client) xetest.Result {
	h.t.Helper()
	res, err := c.Run(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return res
}

// S1-30: xe over the server that every other client uses.
func TestXeOverARealServer(t *testing.T) {
	h := newHouse(t)
	t.Run("patch-list", func(t *testing.T) {
		expect(t, h.xe("patch-list", "params=uuid,name-label,hosts,after-apply-guidance,vdi-uuid"), xetest.Result{Stdout: "" +
			"uuid ( RO)                    : " + uuid(20) + "\n" +
			"              name-label ( RO): P11\n" +
			"                   hosts (SRO): " + uuid(1) + "\n" +
			"    after-apply-guidance (SRO): restartHost\n" +
			"                vdi-uuid ( RO): " + uuid(4) + "\n\n\n"})
	})
	t.Run("every list and every field can be read", func(t *testing.T) {
		for _, class := range []string{"patch", "sr", "vdi", "pbd", "host", "pool", "task", "sm", "message"} {
			if got := h.xe(class+"-list", "params=all"); got.Exit != 0 || got.Stderr != "" {
				t.Errorf("%s-list: %+v", class, got)
			}
		}
		for class, n := range map[string]int{"patch": 20, "sr": 3, "vdi": 4, "pbd": 5, "host": 1, "pool": 2} {
			got := h.xe(class+"-param-list", "uuid="+uuid(n))
			if got.Exit != 0 || !strings.Contains(got.Stdout, uuid(n)) {
				t.Errorf("%s-param-list: %+v", class, got)
			}
		}
	})
	t.Run("a field is changed", func(t *testing.T) {
		expect(t, h.xe("pool-param-set", "uuid="+uuid(2), "name-label=new", "other-config:k=v"), xetest.Result{})
		expect(t, h.xe("pool-param-get", "uuid="+uuid(2), "param-name=other-config", "param-key=k"), xetest.Result{Stdout: "v\n"})
		expect(t, h.xe("pool-list", "params=name-label", "--minimal"), xetest.Result{Stdout: "new\n"})
	})
	t.Run("a call that returns a text", func(t *testing.T) {
		expect(t, h.xe("patch-precheck", "uuid="+uuid(20), "host-uuid="+uuid(1)), xetest.Result{Stdout: "fine & <well>\n"})
	})
	t.Run("a failure names the object", func(t *testing.T) {
		expect(t, h.xe("patch-pool-apply", "uuid="+uuid(20)), xetest.Result{Exit: 1,
			Stderr: "The host has this patch already.\npatch: " + uuid(20) + " (P11)\n"})
	})
	t.Run("an upload", func(t *testing.T) {
		if err := os.WriteFile(filepath.Join(h.dir, "fix"), []byte(payload), 0o600); err != nil {
			t.Fatal(err)
		}
		expect(t, h.xe("patch-upload", "file-name=fix", "sr-uuid="+uuid(3)), xetest.Result{Stdout: uuid(20) + "\n"})
		expect(t, h.xe("task-list", "name-label=patch-upload fix"), xetest.Result{})
	})
	t.Run("waiting for an event", func(t *testing.T) {
		expect(t, h.xe("event-wait", "class=sr", "name-label=local"), xetest.Result{})
	})
	t.Run("a role that may only read", func(t *testing.T) {
		expect(t, h.run(h.client("reader", "host-list", "--minimal")), xetest.Result{Stdout: uuid(1) + "\n"})
		got := h.run(h.client("reader", "patch-pool-apply", "uuid="+uuid(20)))
		if got.Exit != 1 || !strings.HasPrefix(got.Stderr, "Your role does not allow this.\n") {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("a bad password", func(t *testing.T) {
		c := h.client("root", "host-list")
		c.Args = append(c.Args, "-pw", "wrong")
		expect(t, h.run(c), xetest.Result{Exit: 1, Stderr: "Authentication failed\nFor usage run: 'xe help'\n"})
	})
	t.Run("no session stays open", func(t *testing.T) {
		_ = h.store.View(func(v *store.View) error {
			if n := v.Count(session.Class); n != 0 {
				t.Errorf("%d sessions are open", n)
			}
			return nil
		})
	})
}

// The work of a call goes on when its client goes; stopping the tasks ends it.
func TestAnApplyOutlivesItsClient(t *testing.T) {
	h := newHouse(t)
	die := make(chan struct{})
	c := h.client("root", "patch-apply", "uuid="+uuid(20), "host-uuid="+uuid(1))
	c.Hook = func(at xetest.Step) error {
		if at == xetest.HelloSent {
			<-die
			return io.ErrClosedPipe
		}
		return nil
	}
	go func() {
		<-h.stub.applied
		close(die)
	}()
	if got := h.run(c); got.Exit != -1 {
		t.Fatalf("the client lived: %+v", got)
	}
	got := h.xe("task-list", "status=pending", "params=name-label", "--minimal")
	if !strings.Contains(got.Stdout, "pool_patch.apply") {
		t.Errorf("the task ended with its client: %+v", got)
	}
}

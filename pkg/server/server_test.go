package server

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/dom0/dom0test"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

func quietLog() *logrus.Logger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func testConfig(t *testing.T) Config {
	t.Helper()
	c := DefaultConfig()
	dir := t.TempDir()
	c.StateDir, c.PatchDir = filepath.Join(dir, "state"), filepath.Join(dir, "patches")
	c.Listen, c.TLSListen = "127.0.0.1:0", "127.0.0.1:0"
	c.BadPasswordDelay = 0
	return c
}

// running opens a daemon and runs it until stop.
func running(t *testing.T, c Config) (s *Server, stop func()) {
	t.Helper()
	s, err := Open(t.Context(), c, Options{Log: quietLog(), Version: "test", Runner: []string{"/bin/false"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	plain, _ := s.Addresses()
	if status := health(t, plain.String()); status != http.StatusServiceUnavailable {
		t.Errorf("before it is ready /healthz answers %d", status)
	}
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	if status := health(t, plain.String()); status != http.StatusOK {
		t.Errorf("/healthz answers %d", status)
	}
	return s, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func health(t *testing.T, addr string) int {
	t.Helper()
	res, err := http.Get("http://" + addr + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}

func TestOpenRunClose(t *testing.T) {
	c := testConfig(t)
	s, stop := running(t, c)
	if s.FirstPassword == "" {
		t.Error("no first password")
	}
	if b, err := os.ReadFile(filepath.Join(c.StateDir, "root-password")); err != nil || strings.TrimSpace(string(b)) != s.FirstPassword {
		t.Errorf("%s %v", b, err)
	}
	_, err := Open(t.Context(), c, Options{Log: quietLog()})
	if want := fmt.Sprintf("another patchd (process %d)", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a second daemon: %v", err)
	}
	if _, err := OpenDatabase(c, quietLog()); err == nil {
		t.Error("the database is opened below a daemon")
	}
	self := s.pool.Self
	stop()
	again, stop := running(t, c)
	if again.FirstPassword != "" || again.pool.Self != self {
		t.Error("the second start makes another pool")
	}
	stop()
}

func TestOpenFails(t *testing.T) {
	c := testConfig(t)
	_, stop := running(t, c)
	defer stop()
	other := testConfig(t)
	other.Listen = "127.0.0.1:1x"
	if _, err := Open(t.Context(), other, Options{Log: quietLog()}); err == nil || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("%v", err)
	}
	s, err := openStateDir(other.StateDir) // nothing was left locked
	if err != nil {
		t.Fatal(err)
	}
	s.close()
}

// What was begun before a start goes on or ends, also when its task is gone.
func TestResume(t *testing.T) {
	c := testConfig(t)
	s, stop := running(t, c)
	ctx := t.Context()
	patch, run := xapi.NewRef(), xapi.NewRef()
	lost, err := s.tasks.Create(ctx, task.Spec{Label: "nobody's"})
	if err != nil {
		t.Fatal(err)
	}
	owner, err := s.tasks.Create(ctx, task.Spec{Label: "of a job"})
	if err != nil {
		t.Fatal(err)
	}
	half := xapi.NewRef()
	uploader, err := s.tasks.Create(ctx, task.Spec{Label: "of an upload that is not confirmed"})
	if err != nil {
		t.Fatal(err)
	}
	err = s.store.Update(ctx, func(tx *store.Tx) error {
		tx.Put(pool.ClassPatch, half, pool.Patch{UUID: xapi.NewUUID(), VDI: xapi.NullRef, Unconfirmed: &pool.Unconfirmed{Task: uploader, Since: time.Now()}})
		tx.Put(pool.ClassPatch, patch, pool.Patch{UUID: xapi.NewUUID(), NameLabel: "p", VDI: xapi.NullRef, AfterApplyGuidance: []xapi.Guidance{}})
		rec := pool.Run{UUID: xapi.NewUUID(), Patch: patch, Task: xapi.NewRef(), Classic: true, State: pool.RunRunning}
		rec.Policy = pool.Policy{AtOnce: 1, StopAfter: 1, NoPrecheck: true}
		tx.Put(pool.ClassRun, run, rec)
		tx.Put(pool.ClassRunHost, xapi.NewRef(), pool.RunHost{Run: rec.UUID, Host: s.pool.Self, State: pool.HostWaiting})
		tx.Put(pool.ClassJob, xapi.NewRef(), pool.Job{
			UUID: xapi.NewUUID(), Kind: pool.JobPrecheck, Patch: patch, Host: s.pool.Self, Task: owner, State: pool.JobDone, Output: "fine", Finished: time.Now(),
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	stop()
	s, stop = running(t, c)
	defer stop()
	err = s.store.Until(ctx, func(v *store.View) (bool, error) {
		rec, err := store.Get[pool.Run](v, pool.ClassRun, run)
		return rec.State.Ended(), err
	})
	if err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[xapi.Ref]task.Status{lost: task.Failure, owner: task.Success, uploader: task.Failure} {
		if rec, err := s.tasks.Wait(ctx, ref); err != nil || rec.Status != want {
			t.Errorf("%+v %v", rec, err)
		}
	}
	if err := s.pool.PatchConfirmed(half); !xapi.Is(err, xapi.HandleInvalid) {
		t.Error("an upload whose image is gone is confirmed")
	}
	var goesOn []xapi.Ref
	s.store.View(func(v *store.View) error {
		for _, it := range v.List(task.Class) {
			var rec task.Record
			if err := it.Decode(&rec); err == nil && rec.NameLabel == "pool_patch.pool_apply" {
				goesOn = append(goesOn, it.Ref)
			}
		}
		return nil
	})
	if len(goesOn) != 1 {
		t.Fatalf("the run has %d tasks", len(goesOn))
	}
	if rec, err := s.tasks.Wait(ctx, goesOn[0]); err != nil || rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.CannotFindPatch {
		t.Errorf("%+v %v", rec, err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "patchd.toml")
	load := func(text string) (Config, error) {
		c := DefaultConfig()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return c, c.Load(path)
	}
	c, err := load("listen = '127.0.0.1:1'\napply-timeout = '1h'\nmax-cleartext = 5\npinned-sha256 = []\n")
	if err != nil || c.Listen != "127.0.0.1:1" || c.ApplyTimeout.String() != "1h0m0s" || c.MaxCleartext != 5 {
		t.Errorf("%+v %v", c, err)
	}
	for text, want := range map[string]string{
		"\n\nlisen = 'x'": ":3: there is no setting called", "x = [": path + ":", "apply-timeout = '-1s'": "negative",
	} {
		if _, err := load(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	env := map[string]string{"PATCHD_LISTEN": "127.0.0.1:2", "PATCHD_UNKNOWN": "x", "PATCHD_PINNED_SHA256": "x"}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	if err := c.LoadEnv(lookup); err != nil || c.Listen != "127.0.0.1:2" || len(c.PinnedSHA256) != 0 {
		t.Errorf("%+v %v", c, err)
	}
	env["PATCHD_GRACE_TIMEOUT"] = "soon"
	if err := c.LoadEnv(lookup); err == nil || !strings.Contains(err.Error(), "PATCHD_GRACE_TIMEOUT") {
		t.Errorf("%v", err)
	}
	for want, change := range map[string]func(*Config){
		"":                       func(*Config) {},
		"state-dir is empty":     func(c *Config) { c.StateDir = "" },
		"root of the filesystem": func(c *Config) { c.PatchDir = "/x/.." },
		"tls-listen":             func(c *Config) { c.TLSListen = "8443" },
		"nobody could reach":     func(c *Config) { c.Listen, c.TLSListen = "", "" },
		"is not a SHA-256":       func(c *Config) { c.PinnedSHA256 = []string{"ABC"} },
	} {
		c := DefaultConfig()
		change(&c)
		err := c.Validate()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

func TestReserve(t *testing.T) {
	t.Parallel()
	s, err := openStateDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	room := int64(1 << 40)
	d := dom0test.New(nil)
	d.Room = func(string) (dom0.Space, error) { return dom0.Space{Total: 1 << 40, Free: room}, nil }
	var log strings.Builder
	l := logrus.New()
	l.SetOutput(&log)
	there := func() bool { st, err := os.Stat(s.path("reserve")); return err == nil && st.Size() == reserveSize }
	for _, step := range []struct {
		free        int64
		full, there bool
	}{
		{reserveSize, false, false}, {1 << 40, false, true}, {1 << 30, false, true}, {reserveSize, false, true},
		{1 << 20, true, false}, {0, true, false}, {2 * reserveSize, false, false}, {1 << 40, false, true},
	} {
		room = step.free
		full, err := s.useReserve(d, l)
		if err != nil || full != step.full || there() != step.there {
			t.Errorf("%d bytes free: full %v, reserve %v, %v", step.free, full, there(), err)
		}
	}
	if !strings.Contains(log.String(), "Make room on the filesystem that holds "+s.dir) {
		t.Errorf("it does not say what to do: %s", log.String())
	}
	keep := s.keepFree(d)
	if n := keep(s.path("sr")); n != 1<<40/50 {
		t.Errorf("%d bytes are kept free", n)
	}
	if n := keep("/proc"); n != 0 {
		t.Errorf("%d bytes are kept free elsewhere", n)
	}
}

func TestStateFiles(t *testing.T) {
	t.Parallel()
	s, err := openStateDir(filepath.Join(t.TempDir(), "a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	id, err := s.hostUUID()
	if again, err2 := s.hostUUID(); err != nil || err2 != nil || id != again || !id.Valid() {
		t.Errorf("%s %s %v %v", id, again, err, err2)
	}
	secret, err := s.poolSecret()
	if again, _ := s.poolSecret(); err != nil || secret != again || strings.Count(secret, "/") != 2 {
		t.Errorf("%q %v", secret, err)
	}
	cert, err := s.identity("host")
	again, err2 := s.identity("host")
	if err != nil || err2 != nil || string(cert.Certificate().Certificate[0]) != string(again.Certificate().Certificate[0]) {
		t.Errorf("another certificate: %v %v", err, err2)
	}
	for _, name := range []string{"host-uuid", "pool-secret", "tls.pem"} {
		if st, err := os.Stat(s.path(name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, st.Mode(), err)
		}
	}
	os.WriteFile(s.path("tls.pem"), []byte("garbage"), 0o600)
	if _, err := s.identity("host"); err == nil {
		t.Error("garbage is a certificate")
	}
}

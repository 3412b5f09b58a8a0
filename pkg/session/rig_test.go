package session

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	rootPassword = "correct horse"
	testSecret   = "0f0f0f0f-1111-2222-3333-444444444444/0f0f0f0f-1111-2222-3333-444444444444"
)

var testHost = xapi.NewRef()

// rig is a manager on a real store, with a clock that goes when it is told to,
// cheap hashes, and a log that is searched for secrets at the end.
type rig struct {
	*Manager
	t   *testing.T
	s   *store.Store
	log *logs

	mu      sync.Mutex
	at      time.Time
	slept   []time.Duration
	secrets []string
}

type logs struct {
	mu    sync.Mutex
	lines strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.Write(p)
}

func newRig(t *testing.T) *rig {
	t.Helper()
	before := goleak.IgnoreCurrent()
	s, err := store.Open(t.Context(), store.Options{Dir: t.TempDir(), Indexes: Indexes()})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, s: s, log: &logs{}, at: time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)}
	r.Manager = r.manager()
	t.Cleanup(func() {
		r.Close()
		r.noSecrets()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, before)
	})
	if made, err := r.EnsureRoot(t.Context(), rootPassword); !made || err != nil {
		t.Fatal(made, err)
	}
	r.secrets = append(r.secrets, rootPassword, testSecret)
	return r
}

func (r *rig) manager() *Manager {
	log := logrus.New()
	log.SetOutput(r.log)
	log.SetLevel(logrus.TraceLevel)
	m, err := NewManager(r.s, Options{PoolSecret: testSecret, Now: r.now, Log: log, ThisHost: func() xapi.Ref { return testHost }})
	if err != nil {
		r.t.Fatal(err)
	}
	m.hashing = hashing{memory: 64, passes: 1, threads: 1}
	m.sleep = func(_ context.Context, d time.Duration) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.slept = append(r.slept, d)
	}
	return m
}

func (r *rig) now() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.at
}

func (r *rig) advance(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at = r.at.Add(d)
}

// noSecrets looks for secrets in the log and in the database.
func (r *rig) noSecrets() {
	text := r.log.lines.String()
	_ = r.s.View(func(v *store.View) error {
		for _, class := range []string{Class, ClassUser} {
			for _, it := range v.List(class) {
				text += string(it.Ref) + string(it.Raw)
			}
		}
		return nil
	})
	for _, secret := range r.secrets {
		if strings.Contains(text, secret) {
			r.t.Errorf("the secret %s is in the log or the store", secret)
		}
	}
}

func (r *rig) login(name, password string) xapi.Ref {
	r.t.Helper()
	ref, err := r.Login(r.t.Context(), name, password, "test", "192.0.2.1:1")
	if err != nil {
		r.t.Fatal(err)
	}
	r.secrets = append(r.secrets, string(ref), password)
	return ref
}

func (r *rig) get(ref xapi.Ref) *Session {
	r.t.Helper()
	s, err := r.Get(ref)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) dead(ref xapi.Ref) {
	r.t.Helper()
	_, err := r.Get(ref)
	r.wantError(err, xapi.SessionInvalid, string(ref))
}

func (r *rig) addUser(name, password string, role Role) {
	r.t.Helper()
	if err := r.AddUser(r.t.Context(), name, password, role); err != nil {
		r.t.Fatal(err)
	}
	r.secrets = append(r.secrets, password)
}

func (r *rig) count(class string) (n int) {
	_ = r.s.View(func(v *store.View) error {
		n = v.Count(class)
		return nil
	})
	return n
}

// wantError checks the code, and the first parameters.
func (r *rig) wantError(err error, code string, params ...string) {
	r.t.Helper()
	if code == "" {
		if err != nil {
			r.t.Errorf("error %v", err)
		}
		return
	}
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != code || len(e.Params) < len(params) || !slices.Equal(e.Params[:len(params)], params) {
		r.t.Errorf("error %v, want %s %q", err, code, params)
	}
}

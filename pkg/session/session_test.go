package session

import (
	"context"
	"errors"
	"fmt"
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

func TestLoginGetLogout(t *testing.T) {
	r := newRig(t)
	ref, err := r.Login(t.Context(), "root", rootPassword, "xo\n", "192.0.2.1:4711")
	if err != nil {
		t.Fatal(err)
	}
	r.secrets = append(r.secrets, string(ref))
	s := r.get(ref)
	if s.Ref != ref || s.Stored != StoredRef(ref) || s.User != "root" || s.Role != PoolAdmin || !s.IsLocalSuperuser ||
		s.Originator != "xo" || s.ThisHost != testHost || s.AuthUserName != "root" || s.Pool || !s.LastActive.Equal(r.at) {
		t.Errorf("%+v", s.Record)
	}
	if !s.Stored.Valid() || s.Stored == ref {
		t.Errorf("stored ref %s", s.Stored)
	}
	for _, text := range []string{fmt.Sprint(s), fmt.Sprintf("%+v %#v", s, *s), fmt.Sprintf("%v", *s)} {
		if strings.Contains(text, string(ref)) {
			t.Errorf("%s shows the secret", text)
		}
	}
	if s.Context().Err() != nil || r.get(ref).Context() != s.Context() {
		t.Error("one context for each session")
	}
	r.dead(s.Stored) // knowing the stored ref opens nothing
	for _, bad := range []xapi.Ref{"", "OpaqueRef:NULL", "x", xapi.NewRef()} {
		r.dead(bad)
	}

	if err := r.Logout(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	<-s.Context().Done()
	r.wantError(context.Cause(s.Context()), xapi.SessionInvalid, string(ref))
	r.dead(ref)
	r.wantError(r.Logout(t.Context(), ref), xapi.SessionInvalid, string(ref))
	if n := r.count(Class); n != 0 {
		t.Errorf("%d sessions left", n)
	}
}

func TestSessionsOutliveARestart(t *testing.T) {
	r := newRig(t)
	ref := r.login("root", rootPassword)
	s := r.get(ref)
	r.Close()
	<-s.Context().Done()
	if xapi.Is(context.Cause(s.Context()), xapi.SessionInvalid) {
		t.Error("the session itself goes on")
	}
	_, err := r.Get(ref)
	r.wantError(err, xapi.InternalError)
	r.Manager = r.manager()
	if r.get(ref).User != "root" {
		t.Error("not the same")
	}
}

func TestWrongCredentialsAreRefusedAlikeAndLate(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct{ name, user, password, shown string }{
		{"a wrong password", "root", "wrong", "root"},
		{"no password", "root", "", "root"},
		{"an unknown user", "nobody", rootPassword, "nobody"},
		{"no user", "", rootPassword, ""},
		{"control characters in the name", "ro\not\x1b[2J", rootPassword, "root[2J"},
		{"an endless name", strings.Repeat("n", 100000), "x", strings.Repeat("n", 256)},
		{"an endless password", "root", strings.Repeat("p", 100000), "root"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.slept = nil
			_, err := r.Login(t.Context(), c.user, c.password, "", "192.0.2.1:1")
			r.wantError(err, xapi.SessionAuthenticationFailed, c.shown, textWrong)
			if !slices.Equal(r.slept, []time.Duration{5 * time.Second}) {
				t.Errorf("slept %v", r.slept)
			}
		})
	}
	if n := r.count(Class); n != 0 {
		t.Errorf("%d sessions", n)
	}
}

func TestTheDelayEndsWithTheClient(t *testing.T) {
	r := newRig(t)
	r.Manager.sleep = sleep // the real one
	r.Manager.delay = time.Hour
	began := make(chan struct{})
	r.Manager.sleep = func(ctx context.Context, d time.Duration) {
		close(began)
		sleep(ctx, d)
	}
	ctx, gone := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := r.Login(ctx, "root", "wrong", "", "")
		done <- err
	}()
	<-began
	if r.gate.free != hashesAtOnce {
		t.Error("the delay holds a place of the hash limit")
	}
	gone()
	r.wantError(<-done, xapi.SessionAuthenticationFailed, "root")
	if len(r.delayed) != 0 || r.delayedSum != 0 {
		t.Errorf("%v %d", r.delayed, r.delayedSum)
	}
}

func TestCloseEndsTheDelay(t *testing.T) {
	r := newRig(t)
	r.Manager.delay = time.Hour
	began := make(chan struct{})
	r.Manager.sleep = func(ctx context.Context, d time.Duration) {
		close(began)
		sleep(ctx, d)
	}
	done := make(chan error)
	go func() {
		_, err := r.Login(t.Context(), "root", "wrong", "", "")
		done <- err
	}()
	<-began
	r.Close()
	<-done
}

func TestHeldBackAnswersAreBounded(t *testing.T) {
	r := newRig(t)
	r.delayed["192.0.2.1"] = delayedPerAddress
	_, err := r.Login(t.Context(), "root", "wrong", "", "192.0.2.1:1")
	r.wantError(err, xapi.SessionAuthenticationFailed)
	if len(r.slept) != 0 {
		t.Error("held back beyond the limit")
	}
	_, err = r.Login(t.Context(), "root", "wrong", "", "192.0.2.2:1")
	r.wantError(err, xapi.SessionAuthenticationFailed)
	if len(r.slept) != 1 {
		t.Error("another address is held back")
	}
	r.delayedSum = delayedInAll
	_, err = r.Login(t.Context(), "root", "wrong", "", "192.0.2.3:1")
	r.wantError(err, xapi.SessionAuthenticationFailed)
	if len(r.slept) != 1 {
		t.Error("held back beyond the limit of all")
	}
	r.Manager.delay = -1
	r.delayedSum = 0
	_, err = r.Login(t.Context(), "root", "wrong", "", "192.0.2.3:1")
	r.wantError(err, xapi.SessionAuthenticationFailed)
	if len(r.slept) != 1 {
		t.Error("no delay is wanted")
	}
}

func TestAFullQueueRefuses(t *testing.T) {
	r := newRig(t)
	r.Manager.gate = newGate(0, 0, 0)
	_, err := r.Login(t.Context(), "root", rootPassword, "", "")
	r.wantError(err, xapi.SessionAuthenticationFailed, "root", textBusy)
}

func TestSessionsExpire(t *testing.T) {
	r := newRig(t)
	ref, idle := r.login("root", rootPassword), r.login("root", rootPassword)
	old := r.get(idle)
	for range 3 {
		r.advance(20 * time.Hour)
		r.get(ref)
	}
	r.dead(idle)
	<-old.Context().Done()
	if err := r.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := r.count(Class); n != 1 {
		t.Errorf("%d sessions left", n)
	}
	s := r.get(ref)
	r.advance(24 * time.Hour)
	if err := r.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-s.Context().Done()
	r.dead(ref)
	if n := r.count(Class); n != 0 {
		t.Errorf("%d sessions left", n)
	}
}

func TestLastActiveIsStoredEveryTenMinutes(t *testing.T) {
	r := newRig(t)
	ref := r.login("root", rootPassword)
	opened := r.at
	stored := func() (rec Record, rev int64) {
		_ = r.s.View(func(v *store.View) (err error) {
			rec, err = store.Get[Record](v, Class, StoredRef(ref))
			it, _ := v.Get(Class, StoredRef(ref))
			rev = it.Modified
			return err
		})
		return rec, rev
	}
	r.advance(9 * time.Minute)
	r.get(ref)
	r.work.Wait()
	if rec, _ := stored(); !rec.LastActive.Equal(opened) {
		t.Error("too early")
	}
	r.advance(time.Minute)
	r.get(ref)
	r.get(ref)
	r.work.Wait()
	rec, rev := stored()
	if !rec.LastActive.Equal(r.at) {
		t.Errorf("last_active %s", rec.LastActive)
	}
	r.get(ref)
	r.work.Wait()
	if _, again := stored(); again != rev {
		t.Error("stored twice")
	}
}

func TestAUserHasAtMost500Sessions(t *testing.T) {
	r := newRig(t)
	local := func(originator string) xapi.Ref {
		t.Helper()
		ref, err := r.LoginLocal(t.Context(), originator)
		if err != nil {
			t.Fatal(err)
		}
		r.advance(time.Second)
		return ref
	}
	admin := local("admin")
	var robots []xapi.Ref
	for range maxPerUser - 1 {
		robots = append(robots, local("robot"))
	}
	used := r.get(robots[0])
	second := r.get(robots[1])
	r.advance(time.Second)
	r.get(robots[0])
	robots = append(robots, local("robot"), local("robot"))
	r.get(admin)     // the oldest of all, but not of the greedy originator
	r.get(robots[0]) // the oldest robot, but used since
	r.dead(robots[2])
	r.dead(robots[3])
	_ = second
	if used.Context().Err() != nil {
		t.Error("ended")
	}
	if n := r.count(Class); n != maxPerUser {
		t.Errorf("%d sessions", n)
	}
	r.login("root", rootPassword) // others have places of their own
	r.get(admin)
}

func TestUsers(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.addUser("op erator", "password1", PoolOperator)
	r.addUser("ann", "pässwörd", ReadOnly)
	for _, c := range []struct{ name, password, role, code string }{
		{"ann", "password1", "read-only", xapi.DBUniquenessConstraintViolated},
		{"", "password1", "read-only", xapi.InvalidValue},
		{"a\tb", "password1", "read-only", xapi.InvalidValue},
		{"a\xffb", "password1", "read-only", xapi.InvalidValue},
		{strings.Repeat("é", 65), "password1", "read-only", xapi.InvalidValue},
		{"bob", "password1", "vm-admin", xapi.InvalidValue},
		{"bob", "short", "read-only", xapi.ChangePasswordRejected},
		{"bob", strings.Repeat("x", 1025), "read-only", xapi.ChangePasswordRejected},
		{"bob", "passwor\xff\xff", "read-only", xapi.ChangePasswordRejected},
		{strings.Repeat("é", 64), "password1", "read-only", ""},
	} {
		r.wantError(r.AddUser(ctx, c.name, c.password, Role(c.role)), c.code)
	}
	users, err := r.Users()
	var names []string
	for _, u := range users {
		names = append(names, u.Name+" "+string(u.Role))
	}
	want := []string{"ann read-only", "op erator pool-operator", "root pool-admin", strings.Repeat("é", 64) + " read-only"}
	if err != nil || !slices.Equal(names, want) {
		t.Errorf("%v %v", names, err)
	}
	if made, err := r.EnsureRoot(ctx, "another"); made || err != nil {
		t.Error(made, err)
	}
	r.wantError(r.RemoveUser(ctx, "root"), xapi.OperationNotAllowed)
	r.wantError(r.RemoveUser(ctx, "nobody"), xapi.InvalidValue, "name", "nobody")
	r.wantError(r.SetPassword(ctx, "nobody", "password1"), xapi.InvalidValue, "name", "nobody")
	r.wantError(r.SetPassword(ctx, "ann", "short"), xapi.ChangePasswordRejected)
}

func TestRoles(t *testing.T) {
	r := newRig(t)
	r.addUser("op", "password1", PoolOperator)
	r.addUser("ann", "password2", ReadOnly)
	op, ann := r.get(r.login("op", "password1")), r.get(r.login("ann", "password2"))
	if op.IsLocalSuperuser || ann.IsLocalSuperuser {
		t.Error("only an admin is a superuser")
	}
	for _, c := range []struct {
		s    *Session
		need Role
		ok   bool
	}{
		{op, PoolAdmin, false}, {op, PoolOperator, true}, {op, ReadOnly, true}, {op, "unknown", false},
		{ann, PoolAdmin, false}, {ann, PoolOperator, false}, {ann, ReadOnly, true},
		{&Session{Role: "unknown"}, ReadOnly, false},
	} {
		code := ""
		if !c.ok {
			code = xapi.RBACPermissionDenied
		}
		r.wantError(c.s.Require(c.need, "pool_patch.apply"), code)
	}
	r.wantError(ann.Require(PoolOperator, "pool_patch.apply"), xapi.RBACPermissionDenied, "pool_patch.apply")
}

func TestChangePassword(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.addUser("ann", "password1", ReadOnly)
	own, other := r.login("ann", "password1"), r.login("ann", "password1")
	root := r.login("root", rootPassword)
	s, ended := r.get(own), r.get(other)

	r.wantError(r.ChangePassword(ctx, s, "password1", "short"), xapi.ChangePasswordRejected)
	r.wantError(r.ChangePassword(ctx, s, "wrong", "password2"), xapi.SessionAuthenticationFailed, "ann", textWrong)
	if len(r.slept) != 1 {
		t.Error("guessing has to be slow here, too")
	}
	r.get(other)

	r.secrets = append(r.secrets, "password2")
	r.wantError(r.ChangePassword(ctx, s, "password1", "password2"), "")
	r.get(own)
	r.get(root)
	r.dead(other)
	<-ended.Context().Done()
	r.wantError(context.Cause(ended.Context()), xapi.SessionInvalid, string(other))
	if s.Context().Err() != nil {
		t.Error("the own session goes on")
	}
	_, err := r.Login(ctx, "ann", "password1", "", "")
	r.wantError(err, xapi.SessionAuthenticationFailed)
	r.login("ann", "password2")
	if n := r.count(Class); n != 3 {
		t.Errorf("%d sessions", n)
	}

	pool, err := r.remember(r.poolSession(""))
	r.wantError(err, "")
	r.wantError(r.ChangePassword(ctx, pool, "", "password3"), xapi.ChangePasswordRejected)

	local, err := r.LoginLocal(ctx, "cli")
	r.wantError(err, "")
	r.wantError(r.ChangePassword(ctx, r.get(local), "", "new root password"), "")
	r.get(local)
	r.dead(root)
	r.login("root", "new root password")
}

func TestSetPasswordAndRemoveUserEndSessions(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.addUser("ann", "password1", ReadOnly)
	first := r.login("ann", "password1")
	s := r.get(first)
	r.wantError(r.SetPassword(ctx, "ann", "password2"), "")
	<-s.Context().Done()
	r.dead(first)

	second := r.login("ann", "password2")
	s = r.get(second)
	r.wantError(r.RemoveUser(ctx, "ann"), "")
	<-s.Context().Done()
	r.dead(second)
	_, err := r.Login(ctx, "ann", "password2", "", "")
	r.wantError(err, xapi.SessionAuthenticationFailed)

	r.addUser("ann", "password2", PoolAdmin)
	r.dead(second) // the new ann is not the old one
	if n := r.count(Class); n != 0 {
		t.Errorf("%d sessions left", n)
	}
}

// A login whose check was good, but whose user got another password before it
// was stored, is refused.
func TestALoginDoesNotOutrunAPasswordChange(t *testing.T) {
	r := newRig(t)
	u, err := r.check(t.Context(), "root", rootPassword, "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	rec := r.userSession(u, "")
	r.wantError(r.SetPassword(t.Context(), "root", "another one"), "")
	_, err = r.open(t.Context(), rec)
	r.wantError(err, xapi.SessionAuthenticationFailed, "root")
	r.wantError(r.setPassword(t.Context(), "root", "yet another", u.Epoch, ""), xapi.SessionAuthenticationFailed, "root")
}

func TestManySessionsAtOnce(t *testing.T) {
	r := newRig(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for g := range 8 {
		wg.Go(func() {
			for n := range 10 {
				ref, err := r.Login(t.Context(), "root", rootPassword, fmt.Sprint(g), fmt.Sprintf("192.0.2.%d:1", g))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				r.secrets = append(r.secrets, string(ref))
				mu.Unlock()
				s, err := r.Get(ref)
				if err != nil {
					t.Error(err)
					return
				}
				r.advance(3 * time.Minute)
				if n%2 == 0 {
					if err := r.Logout(t.Context(), ref); err != nil {
						t.Error(err)
					}
					<-s.Context().Done()
				}
				if err := r.GC(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := r.count(Class); n != 40 {
		t.Errorf("%d sessions", n)
	}
}

func TestAManagerNeedsAStore(t *testing.T) {
	if _, err := NewManager(nil, Options{}); err == nil {
		t.Error("made without a store")
	}
}

package session

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

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

package session

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

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

func TestHostsLogInWithThePoolSecret(t *testing.T) {
	r := newRig(t)
	_, err := r.LoginPool(t.Context(), "wrong", "host")
	r.wantError(err, xapi.SessionAuthenticationFailed)
	ref, err := r.LoginPool(t.Context(), testSecret, "host")
	r.wantError(err, "")
	if s := r.get(ref); !s.Pool || s.Role != PoolAdmin || s.User != "" || s.Originator != "host" {
		t.Errorf("%+v", s.Record)
	}
	r.wantError(r.Logout(t.Context(), ref), "")
	r.dead(ref)
}

package session

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

func basic(name, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(name+":"+password))
}

type requestCase struct {
	name                  string
	query, cookie, header string
	trusted, pool         bool
	user                  string
	status                int
}

func requestCases(ref, ann, dead string) []requestCase {
	return []requestCase{
		{name: "session_id with a raw colon", query: "session_id=" + ref, user: "root"},
		{name: "session_id percent-encoded", query: "session_id=" + url.QueryEscape(ref) + "&task_id=x", user: "root"},
		{name: "session_id as cookie", cookie: "session_id=" + ref, user: "root"},
		{name: "session_id as percent-encoded cookie", cookie: "a=b; session_id=" + url.QueryEscape(ref), user: "root"},
		{name: "the cookie comes first", cookie: "session_id=" + ann, query: "session_id=" + ref, user: "ann"},
		{name: "a dead cookie is not healed by the query", cookie: "session_id=" + dead, query: "session_id=" + ref, status: 401},
		{name: "a dead session_id is not healed by the secret", query: "session_id=" + dead + "&pool_secret=" + testSecret, status: 401},
		{name: "a session_id that is none", query: "session_id=root", status: 401},
		{name: "the session_id comes before the secret", query: "pool_secret=" + testSecret + "&session_id=" + ann, user: "ann"},
		{name: "pool_secret in the query", query: "pool_secret=" + testSecret, pool: true},
		{name: "pool_secret percent-encoded", query: "pool_secret=" + url.QueryEscape(testSecret), pool: true},
		{name: "pool_secret as cookie", cookie: "pool_secret=" + testSecret, pool: true},
		{name: "a wrong pool_secret", query: "pool_secret=" + testSecret + "0", status: 401},
		{name: "the secret comes before Basic", query: "pool_secret=wrong", header: basic("root", rootPassword), status: 401},
		{name: "Basic", header: basic("ann", "password1"), user: "ann"},
		{name: "basic in lower case", header: "b" + basic("ann", "password1")[1:], user: "ann"},
		{name: "Basic with a wrong password", header: basic("ann", "password2"), status: 401},
		{name: "Basic that is not base64", header: "Basic %%%", status: 401},
		{name: "an unknown scheme", header: "Bearer x", status: 500},
		{name: "a scheme alone", header: "x", status: 500},
		{name: "nothing", status: 401},
		{name: "empty values are nothing", query: "session_id=&pool_secret=", status: 401},
		{name: "nothing over the unix socket", trusted: true, user: "root"},
		{name: "the unix socket heals nothing", trusted: true, query: "session_id=" + dead, status: 401},
		{name: "a session over the unix socket", trusted: true, query: "session_id=" + ann, user: "ann"},
	}
}

func TestFromRequest(t *testing.T) {
	r := newRig(t)
	r.addUser("ann", "password1", ReadOnly)
	ref, ann := string(r.login("root", rootPassword)), string(r.login("ann", "password1"))
	dead := string(xapi.NewRef())
	for _, c := range requestCases(ref, ann, dead) {
		t.Run(c.name, func(t *testing.T) {
			req := httptest.NewRequest("PUT", "/pool_patch_upload?"+c.query, nil)
			if c.cookie != "" {
				req.Header.Set("Cookie", c.cookie)
			}
			if c.header != "" {
				req.Header.Set("Authorization", c.header)
			}
			if c.trusted {
				req = req.WithContext(WithTrusted(req.Context()))
			}
			s, release, err := r.FromRequest(req)
			defer release()
			if c.status != 0 {
				if err == nil || s != nil || HTTPStatus(err) != c.status {
					t.Errorf("%v %v %d", s, err, HTTPStatus(err))
				}
				if c.status == 401 {
					r.wantError(err, xapi.SessionAuthenticationFailed)
				}
				return
			}
			if err != nil || s.User != c.user || s.Pool != c.pool || s.Context().Err() != nil {
				t.Errorf("%v %v", s, err)
			}
		})
	}
}

func TestRefusalsSayWhatTheTaskShows(t *testing.T) {
	r := newRig(t)
	_, _, err := r.FromRequest(httptest.NewRequest("PUT", "/?session_id="+string(xapi.NewRef()), nil))
	if got := xapi.AsError(err).Description(); len(got) != 1 {
		t.Errorf("%q", got)
	}
	_, _, err = r.FromRequest(httptest.NewRequest("PUT", "/", nil))
	if !errors.Is(err, ErrNoCredentials) {
		t.Error(err)
	}
	for err, want := range map[error]int{
		xapi.NewError(xapi.SessionInvalid, "x"):                          401,
		xapi.NewError(xapi.RBACPermissionDenied, "x", "y"):               403,
		xapi.NewError(xapi.InternalError, "x"):                           500,
		fmt.Errorf("x: %w", xapi.NewError(xapi.RBACPermissionDenied)):    403,
		xapi.NewError(xapi.InternalError, "x").Because(ErrUnknownScheme): 500,
	} {
		if got := HTTPStatus(err); got != want {
			t.Errorf("%v: %d", err, got)
		}
	}
}

func TestWithoutAPoolSecretNobodyHasIt(t *testing.T) {
	r := newRig(t)
	m, err := NewManager(r.s, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, secret := range []string{"", "x", testSecret} {
		if m.isPoolSecret(secret) {
			t.Errorf("%q opens", secret)
		}
	}
}

func TestSessionsOfARequestEndWithIt(t *testing.T) {
	r := newRig(t)
	req := httptest.NewRequest("GET", "/?pool_secret="+testSecret, nil)
	s, release, err := r.FromRequest(req)
	if err != nil || !s.Pool || s.Role != PoolAdmin {
		t.Fatal(s, err)
	}
	r.secrets = append(r.secrets, string(s.Ref))
	if r.get(s.Ref).Stored != s.Stored {
		t.Error("it can be used by its ref")
	}
	if n := r.count(Class); n != 0 {
		t.Error("it is stored")
	}
	r.advance(time.Hour)
	r.get(s.Ref)
	release()
	release()
	<-s.Context().Done()
	r.wantError(context.Cause(s.Context()), xapi.SessionInvalid)
	r.dead(s.Ref)

	s, release, err = r.FromRequest(req)
	if err != nil {
		t.Fatal(err)
	}
	r.wantError(r.Logout(t.Context(), s.Ref), "")
	r.dead(s.Ref)
	release()
}

func (r *rig) basic(name, password string) (*Session, func(), error) {
	req := httptest.NewRequest("PUT", "/", nil)
	req.Header.Set("Authorization", basic(name, password))
	return r.FromRequest(req)
}

func TestBasicIsRememberedForAMinute(t *testing.T) {
	r := newRig(t)
	first, release, err := r.basic("root", rootPassword)
	if err != nil {
		t.Fatal(err)
	}
	r.secrets = append(r.secrets, string(first.Ref))
	release()
	r.advance(59 * time.Second)
	r.Manager.gate = newGate(0, 0, 0) // a check would be refused
	again, release2, err := r.basic("root", rootPassword)
	if err != nil || again.Ref != first.Ref {
		t.Fatal(again, err)
	}
	_, _, err = r.basic("root", "wrong")
	r.wantError(err, xapi.SessionAuthenticationFailed, "root", textBusy)

	r.advance(time.Second)
	_, _, err = r.basic("root", rootPassword)
	r.wantError(err, xapi.SessionAuthenticationFailed, "root", textBusy)
	if again.Context().Err() != nil {
		t.Error("ends while a request has it")
	}
	release2()
	<-first.Context().Done()
	r.dead(first.Ref)

	r.Manager.gate = newGate(2, 9, 9)
	next, release3, err := r.basic("root", rootPassword)
	if err != nil || next.Ref == first.Ref {
		t.Fatal(next, err)
	}
	release3()
	r.advance(time.Hour)
	r.wantError(r.GC(t.Context()), "")
	<-next.Context().Done()
	if len(r.Manager.basic) != 0 || len(r.live) != 0 {
		t.Errorf("%d entries, %d in memory", len(r.Manager.basic), len(r.live))
	}
}

func TestBasicEndsWithThePassword(t *testing.T) {
	r := newRig(t)
	r.addUser("ann", "password1", ReadOnly)
	s, release, err := r.basic("ann", "password1")
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	r.wantError(r.SetPassword(t.Context(), "ann", "password2"), "")
	<-s.Context().Done()
	_, _, err = r.basic("ann", "password1")
	r.wantError(err, xapi.SessionAuthenticationFailed, "ann", textWrong)
	r.secrets = append(r.secrets, "password2")
	next, release2, err := r.basic("ann", "password2")
	if err != nil {
		t.Fatal(err)
	}
	defer release2()
	r.wantError(r.Logout(t.Context(), next.Ref), "")
	third, release3, err := r.basic("ann", "password2")
	if err != nil || third.Ref == next.Ref {
		t.Error(third, err)
	}
	release3()
}

func TestBasicCredentialsAreToldApart(t *testing.T) {
	r := newRig(t)
	if r.keyOf("ab", "c") == r.keyOf("a", "bc") {
		t.Error("name and password run together")
	}
	if r.keyOf("a", "b") == r.manager().keyOf("a", "b") {
		t.Error("no key of this process")
	}
}

func TestBasicMemoryIsBounded(t *testing.T) {
	r := newRig(t)
	for n := range maxBasic {
		r.Manager.basic[r.keyOf("x", fmt.Sprint(n))] = &basicEntry{until: r.now().Add(time.Hour)}
	}
	s, release, err := r.basic("root", rootPassword)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Manager.basic) != maxBasic {
		t.Errorf("%d entries", len(r.Manager.basic))
	}
	release()
	<-s.Context().Done()
}

// Calls that come together with the same credentials check them once.
func TestBasicAtOnce(t *testing.T) {
	r := newRig(t)
	if err := r.gate.enter(t.Context(), "x"); err != nil { // one place is left
		t.Fatal(err)
	}
	defer r.gate.leave()
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[xapi.Ref]bool{}
	for range 20 {
		wg.Go(func() {
			s, release, err := r.basic("root", rootPassword)
			if err != nil {
				t.Error(err)
				return
			}
			defer release()
			mu.Lock()
			defer mu.Unlock()
			seen[s.Ref] = true
		})
	}
	wg.Wait()
	s, release, err := r.basic("root", rootPassword)
	if err != nil || !seen[s.Ref] {
		t.Error(s, err)
	}
	release()
	if len(r.Manager.basic) != 1 {
		t.Errorf("%d entries", len(r.Manager.basic))
	}
}

func TestTrustIsSaidByTheContext(t *testing.T) {
	if Trusted(t.Context()) || !Trusted(WithTrusted(t.Context())) {
		t.Error("wrong")
	}
}

func TestBrokenRecordsLetNobodyIn(t *testing.T) {
	r := newRig(t)
	ref := r.login("root", rootPassword)
	put := func(class string, key xapi.Ref, v any) {
		t.Helper()
		err := r.s.Update(t.Context(), func(tx *store.Tx) error { tx.Put(class, key, v); return nil })
		if err != nil {
			t.Fatal(err)
		}
	}
	put(Class, StoredRef(ref), map[string]any{"uuid": 7})
	r.dead(ref)
	put(Class, StoredRef(ref), map[string]any{"_kind": "god"})
	r.dead(ref)
	r.wantError(r.GC(t.Context()), "")
	if n := r.count(Class); n != 0 {
		t.Errorf("%d sessions left", n)
	}
	put(ClassUser, userRef("root"), map[string]any{"password": rootPassword[:3], "name": "root"})
	_, err := r.Login(t.Context(), "root", rootPassword[:3], "", "")
	if !errors.Is(err, errHash) {
		t.Error(err)
	}
	req, _ := http.NewRequest("GET", "/", nil)
	if _, _, err := r.FromRequest(req); HTTPStatus(err) != 401 {
		t.Error(err)
	}
}

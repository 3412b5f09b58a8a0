package session

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/xapi"
)

// ErrUnknownScheme is the cause when an Authorization header is not Basic.
var ErrUnknownScheme = errors.New("the authorization scheme is not known")

// ErrNoCredentials is the cause when a request carries none at all.
var ErrNoCredentials = errors.New("the request carries no credentials")

const (
	basicFor = 60 * time.Second
	// maxBasic bounds the credentials that are remembered.
	maxBasic        = 1000
	basicOriginator = "an HTTP request using Basic auth"
	poolOriginator  = "a host of the pool"
	localOriginator = "an HTTP request over the unix socket"
)

type trustedKey struct{}

// WithTrusted marks the context of a connection, or request, that came over
// the unix socket from root: it needs no credentials.
func WithTrusted(ctx context.Context) context.Context {
	return context.WithValue(ctx, trustedKey{}, true)
}

// Trusted tells whether ctx was marked by WithTrusted.
func Trusted(ctx context.Context) bool { return ctx.Value(trustedKey{}) != nil }

type proofKey struct{}

// WithProof lets Proven call known when a request of this connection has shown
// that it belongs to a session.
func WithProof(ctx context.Context, known func()) context.Context {
	return context.WithValue(ctx, proofKey{}, known)
}

// Proven says that whoever ctx's request belongs to has a session that is valid.
func Proven(ctx context.Context) {
	if known, ok := ctx.Value(proofKey{}).(func()); ok {
		known()
	}
}

// HTTPStatus is how the failure of FromRequest or Require is answered: 401,
// 403, or 500 for an unknown scheme and what went wrong inside.
func HTTPStatus(err error) int {
	switch {
	case errors.Is(err, ErrUnknownScheme):
		return http.StatusInternalServerError
	case xapi.Is(err, xapi.SessionAuthenticationFailed), xapi.Is(err, xapi.SessionInvalid):
		return http.StatusUnauthorized
	case xapi.Is(err, xapi.RBACPermissionDenied):
		return http.StatusForbidden
	}
	return http.StatusInternalServerError
}

// FromRequest finds out who sends a request. It takes the first of these that
// is there, each as cookie, then in the query: session_id, pool_secret; then
// Authorization: Basic; then the trust of WithTrusted. What is there and wrong
// is refused: nothing that comes later is tried.
//
// release has to be called when the request is done with the session; it is
// never nil. Sessions that stand for one request, or for credentials that were
// good in the last 60 seconds, end with it at the earliest.
//
// Every refusal is SESSION_AUTHENTICATION_FAILED, without parameters unless a
// password was wrong, and is to be answered by 401; an unknown scheme is
// INTERNAL_ERROR, by 500. See HTTPStatus.
func (m *Manager) FromRequest(r *http.Request) (s *Session, release func(), err error) {
	s, release, err = m.fromRequest(r)
	if err == nil {
		Proven(r.Context())
	}
	return s, release, err
}

func (m *Manager) fromRequest(r *http.Request) (s *Session, release func(), err error) {
	release = func() {}
	query := r.URL.Query()
	if id, ok := credential(r, query, "session_id"); ok {
		s, err = m.Get(xapi.Ref(id))
		if xapi.Is(err, xapi.SessionInvalid) {
			err = xapi.NewError(xapi.SessionAuthenticationFailed).Because(errors.New("the session_id is not valid"))
		}
		return s, release, err
	}
	if secret, ok := credential(r, query, "pool_secret"); ok {
		if !m.isPoolSecret(secret) {
			return nil, release, xapi.NewError(xapi.SessionAuthenticationFailed).Because(errPoolSecret)
		}
		return m.forRequest(m.poolSession(poolOriginator))
	}
	if header := r.Header.Get("Authorization"); header != "" {
		return m.fromHeader(r, header)
	}
	if Trusted(r.Context()) {
		return m.forRequest(m.localSession(localOriginator))
	}
	return nil, release, xapi.NewError(xapi.SessionAuthenticationFailed).Because(ErrNoCredentials)
}

// credential finds a value that is not empty, in a cookie or in the query.
// Clients send both with raw colons and percent-encoded.
func credential(r *http.Request, query url.Values, name string) (string, bool) {
	for _, c := range r.CookiesNamed(name) {
		if c.Value == "" {
			continue
		}
		if plain, err := url.PathUnescape(c.Value); err == nil {
			return plain, true
		}
		return c.Value, true
	}
	v := query.Get(name)
	return v, v != ""
}

// forRequest makes a session that lives until it is released.
func (m *Manager) forRequest(rec Record) (*Session, func(), error) {
	s, err := m.remember(rec)
	if err != nil {
		return nil, func() {}, err
	}
	return s, sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.end(s.Stored)
	}), nil
}

// remember makes a session that is only in memory.
func (m *Manager) remember(rec Record) (*Session, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errClosed
	}
	ref := xapi.NewRef()
	m.enliven(StoredRef(ref), ref, rec).memory = &rec
	return m.getLocked(ref)
}

func (m *Manager) fromHeader(r *http.Request, header string) (*Session, func(), error) {
	scheme, _, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return nil, func() {}, xapi.NewError(xapi.InternalError, ErrUnknownScheme.Error()).Because(ErrUnknownScheme)
	}
	name, password, ok := r.BasicAuth()
	if !ok {
		return nil, func() {}, xapi.NewError(xapi.SessionAuthenticationFailed).Because(errors.New("the Basic credentials cannot be read"))
	}
	return m.fromBasic(r.Context(), name, password, r.RemoteAddr)
}

// basicKey stands for a name and a password, under a key of this process.
type basicKey [sha256.Size]byte

func (m *Manager) keyOf(name, password string) (k basicKey) {
	h := hmac.New(sha256.New, m.basicKey[:])
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(name))))
	h.Write([]byte(name))
	h.Write([]byte(password))
	h.Sum(k[:0])
	return k
}

// basicEntry is a session of Basic credentials that were good.
type basicEntry struct {
	ref     xapi.Ref
	until   time.Time
	users   int  // requests that hold it
	retired bool // taken out: ends with its last user
}

func (m *Manager) fromBasic(ctx context.Context, name, password, addr string) (*Session, func(), error) {
	key := m.keyOf(name, password)
	for {
		if s, release := m.borrow(key); s != nil {
			return s, release, nil
		}
		known := func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			e := m.basic[key]
			return e != nil && m.now().Before(e.until)
		}
		u, err := m.authenticate(ctx, name, password, addr, known)
		if errors.Is(err, errKnown) {
			continue
		}
		if err != nil {
			m.logRefusal(m.log.WithFields(logrus.Fields{"user": printable(name), "originator": basicOriginator, "address": printable(addr)}), err)
			return nil, func() {}, err
		}
		s, err := m.remember(m.userSession(u, basicOriginator))
		if xapi.Is(err, xapi.SessionInvalid) { // the user changed meanwhile
			err = wrongPassword(name)
		}
		if err != nil {
			return nil, func() {}, err
		}
		return s, m.lend(key, s), nil
	}
}

// borrow gives the session that was made for the same credentials.
func (m *Manager) borrow(key basicKey) (*Session, func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dropOldBasic()
	e := m.basic[key]
	if e == nil {
		return nil, nil
	}
	s, err := m.getLocked(e.ref)
	if err != nil { // the password was changed, or it was logged out
		m.retire(key, e)
		return nil, nil
	}
	e.users++
	return s, m.returning(e)
}

// lend remembers a new session for key and lends it to its first user.
func (m *Manager) lend(key basicKey, s *Session) (release func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := &basicEntry{ref: s.Ref, until: m.now().Add(basicFor), users: 1}
	if old := m.basic[key]; old != nil {
		m.retire(key, old)
	}
	if len(m.basic) < maxBasic {
		m.basic[key] = e
	} else {
		e.retired = true
	}
	return m.returning(e)
}

func (m *Manager) returning(e *basicEntry) func() {
	return sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if e.users--; e.users == 0 && e.retired {
			m.end(StoredRef(e.ref))
		}
	})
}

// retire takes an entry out. Call it with mu held.
func (m *Manager) retire(key basicKey, e *basicEntry) {
	delete(m.basic, key)
	e.retired = true
	if e.users == 0 {
		m.end(StoredRef(e.ref))
	}
}

// dropOldBasic retires what is older than 60 s. Call it with mu held.
func (m *Manager) dropOldBasic() {
	now := m.now()
	for key, e := range m.basic {
		if !now.Before(e.until) {
			m.retire(key, e)
		}
	}
}

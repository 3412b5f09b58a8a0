package session

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	idleFor      = 24 * time.Hour
	activeEvery  = 10 * time.Minute
	writeTimeout = 10 * time.Second

	// DefaultBadPasswordDelay is how long a wrong password takes to be refused.
	DefaultBadPasswordDelay = 5 * time.Second

	hashesAtOnce      = 2
	waitingPerAddress = 256
	waitingInAll      = 1024
	delayedPerAddress = 256
	delayedInAll      = 4096
)

// Options are what a Manager needs to know.
type Options struct {
	// PoolSecret is what the hosts of the pool share; "" lets nobody in.
	PoolSecret string
	// BadPasswordDelay is how long the answer to a wrong password is held
	// back; 0 is DefaultBadPasswordDelay, below 0 is none.
	BadPasswordDelay time.Duration
	// Now is the clock; nil is the system's.
	Now func() time.Time
	// Log gets logins and what fails in the background; nil is nowhere.
	Log logrus.FieldLogger
	// ThisHost is the host that sessions are opened at; it may be nil, or give
	// "" before there is one.
	ThisHost func() xapi.Ref
}

// Manager knows the users and sessions of this pool. Its methods may be called
// by many goroutines at once.
type Manager struct {
	store    *store.Store
	log      logrus.FieldLogger
	now      func() time.Time
	sleep    func(ctx context.Context, d time.Duration)
	thisHost func() xapi.Ref
	delay    time.Duration
	hashing  hashing
	gate     *gate

	secret    [sha256.Size]byte // of the pool secret
	hasSecret bool
	basicKey  [32]byte

	base context.Context // ends on Close
	stop context.CancelCauseFunc
	work sync.WaitGroup // Add only with mu held and closed false

	mu         sync.Mutex // guards what follows
	closed     bool
	live       map[xapi.Ref]*live // by stored ref
	basic      map[basicKey]*basicEntry
	delayed    map[string]int // held back answers by address
	delayedSum int
}

// live is the part of a session that is in memory.
type live struct {
	ref    xapi.Ref // secret
	ctx    context.Context
	cancel context.CancelCauseFunc
	last   time.Time // of the last use
	wrote  time.Time // of the last try to store that
	user   xapi.Ref
	memory *Record // the record of a session that is not stored
}

// errClosed is the cause with which sessions end when the manager closes.
var errClosed = xapi.NewError(xapi.InternalError, "patchd is stopping")

// NewManager makes the manager of s.
func NewManager(s *store.Store, o Options) (*Manager, error) {
	if s == nil {
		return nil, errors.New("sessions need a store")
	}
	m := &Manager{
		store: s, log: o.Log, now: o.Now, thisHost: o.ThisHost, delay: o.BadPasswordDelay, hashing: standard,
		gate:    newGate(hashesAtOnce, waitingPerAddress, waitingInAll),
		secret:  sha256.Sum256([]byte(o.PoolSecret)),
		live:    map[xapi.Ref]*live{},
		basic:   map[basicKey]*basicEntry{},
		delayed: map[string]int{},
	}
	m.hasSecret = o.PoolSecret != ""
	m.sleep = sleep
	rand.Read(m.basicKey[:]) // never fails
	if m.log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		m.log = quiet
	}
	if m.now == nil {
		m.now = time.Now
	}
	if m.thisHost == nil {
		m.thisHost = func() xapi.Ref { return xapi.NullRef }
	}
	if m.delay == 0 {
		m.delay = DefaultBadPasswordDelay
	}
	m.base, m.stop = context.WithCancelCause(context.Background())
	return m, nil
}

// Close ends the contexts of all sessions, which wakes whoever waits under
// them, and waits for what goes on in the background. The sessions themselves
// stay: their clients go on after a restart.
func (m *Manager) Close() {
	m.mu.Lock()
	m.closed = true
	for ref, l := range m.live {
		l.cancel(errClosed)
		delete(m.live, ref)
	}
	m.mu.Unlock()
	m.stop(errClosed)
	m.work.Wait()
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func invalid(ref xapi.Ref) *xapi.Error {
	return xapi.NewError(xapi.SessionInvalid, printable(string(ref)))
}

// Get is the session with that secret ref, which counts as a use of it. It
// fails with SESSION_INVALID [ref].
func (m *Manager) Get(ref xapi.Ref) (*Session, error) {
	if !ref.Valid() {
		return nil, invalid(ref)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.getLocked(ref)
}

// getLocked is Get with mu held. So is the view taken: a session which Logout
// has taken out of it cannot come to life again.
func (m *Manager) getLocked(ref xapi.Ref) (s *Session, err error) {
	if m.closed {
		return nil, errClosed
	}
	err = m.store.View(func(v *store.View) (err error) {
		s, err = m.get(v, ref)
		return err
	})
	return s, err
}

func (m *Manager) get(v *store.View, ref xapi.Ref) (*Session, error) {
	stored, now := StoredRef(ref), m.now()
	l := m.live[stored]
	rec, ok := m.record(v, stored, l)
	var role Role
	if ok {
		role, ok = roleOf(v, rec)
	}
	if !ok || now.Sub(lastUse(rec, l)) >= idleFor {
		m.end(stored)
		return nil, invalid(ref)
	}
	if l == nil {
		l = m.enliven(stored, ref, rec)
	}
	l.last = now
	m.noteActive(stored, rec, l)
	return &Session{Ref: ref, Stored: stored, Record: rec, Role: role, User: rec.AuthUserName, ctx: l.ctx}, nil
}

// record finds a session's record in memory or in the view.
func (m *Manager) record(v *store.View, stored xapi.Ref, l *live) (Record, bool) {
	if l != nil && l.memory != nil {
		return *l.memory, true
	}
	rec, err := store.Get[Record](v, Class, stored)
	if err != nil && !xapi.Is(err, xapi.HandleInvalid) {
		m.log.WithError(err).Error("a session's record cannot be read")
	}
	return rec, err == nil
}

// roleOf is what the session may do now; false when its user is gone or has
// another password.
func roleOf(v *store.View, rec Record) (Role, bool) {
	switch rec.Kind {
	case kindLocal, kindPool:
		return PoolAdmin, true
	case kindUser:
		u, err := store.Get[userRecord](v, ClassUser, rec.UserRef)
		return u.Role, err == nil && u.Epoch == rec.Epoch
	}
	return "", false
}

func lastUse(rec Record, l *live) time.Time {
	if l != nil && l.last.After(rec.LastActive) {
		return l.last
	}
	return rec.LastActive
}

// enliven makes the part of a session that is in memory. Call it with mu held.
func (m *Manager) enliven(stored, ref xapi.Ref, rec Record) *live {
	l := &live{ref: ref, last: rec.LastActive, wrote: rec.LastActive, user: rec.UserRef}
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	m.live[stored] = l
	return l
}

// end ends what is in memory of a session. Call it with mu held.
func (m *Manager) end(stored xapi.Ref) {
	if l := m.live[stored]; l != nil {
		l.cancel(invalid(l.ref))
		delete(m.live, stored)
	}
}

// noteActive stores last_active in the background when the stored one is ten
// minutes old. Call it with mu held.
func (m *Manager) noteActive(stored xapi.Ref, rec Record, l *live) {
	if l.memory != nil {
		l.memory.LastActive = l.last
		return
	}
	if l.last.Sub(rec.LastActive) < activeEvery || l.last.Sub(l.wrote) < activeEvery {
		return
	}
	l.wrote = l.last
	at := l.last.UTC()
	m.work.Add(1)
	go func() {
		defer m.work.Done()
		if err := m.storeActive(stored, at); err != nil && !xapi.Is(err, xapi.HandleInvalid) && m.base.Err() == nil {
			m.log.WithError(err).Warn("last_active of a session is not stored")
		}
	}()
}

func (m *Manager) storeActive(stored xapi.Ref, at time.Time) error {
	ctx, cancel := context.WithTimeout(m.base, writeTimeout)
	defer cancel()
	return m.store.Update(ctx, func(tx *store.Tx) error {
		var rec Record
		if err := tx.Get(Class, stored, &rec); err != nil {
			return err
		}
		if at.After(rec.LastActive) {
			rec.LastActive = at
			tx.Put(Class, stored, rec)
		}
		return nil
	})
}

// Logout ends a session and wakes whoever waits under its context. It fails
// with SESSION_INVALID [ref].
func (m *Manager) Logout(ctx context.Context, ref xapi.Ref) error {
	s, err := m.Get(ref)
	if err != nil {
		return err
	}
	err = m.store.Update(ctx, func(tx *store.Tx) error {
		if tx.Has(Class, s.Stored) {
			tx.Delete(Class, s.Stored)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("log out %s: %w", s, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.end(s.Stored)
	return nil
}

// isPoolSecret compares in a time that tells nothing.
func (m *Manager) isPoolSecret(secret string) bool {
	got := sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(got[:], m.secret[:]) == 1 && m.hasSecret
}

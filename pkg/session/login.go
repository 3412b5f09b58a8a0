package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// maxPerUser is how many sessions one user may have.
const maxPerUser = 500

const (
	textWrong = "the user name or the password is wrong"
	textBusy  = "too many logins are waiting; try again later"
)

// Login opens a session. originator is what the client calls itself, and addr
// where it is ("host:port"; anything else counts as local). It fails with
// SESSION_AUTHENTICATION_FAILED [user name, text]; the answer to a wrong
// password comes late, unless ctx ends, or too many from that address are held
// back already. When the user has 500 sessions, the least recently used one of
// the originator that has most of them ends.
func (m *Manager) Login(ctx context.Context, name, password, originator, addr string) (xapi.Ref, error) {
	log := m.log.WithFields(logrus.Fields{"user": printable(name), "originator": printable(originator), "address": printable(addr)})
	u, err := m.authenticate(ctx, name, password, addr, nil)
	if err != nil {
		m.logRefusal(log, err)
		return "", err
	}
	ref, err := m.open(ctx, m.userSession(u, originator))
	if err != nil {
		return "", fmt.Errorf("log %s in: %w", u.Name, err)
	}
	log.Debug("logged in")
	return ref, nil
}

// logRefusal says who was refused. Those who did not get as far as a check are
// not worth a line each: a flood would fill the log with them.
func (m *Manager) logRefusal(log logrus.FieldLogger, err error) {
	if errors.Is(err, errBusy) {
		log.WithError(err).Debug("login refused")
		return
	}
	log.WithError(err).Warn("login refused")
}

// LoginLocal opens a session of root for a client of the unix socket, whom the
// kernel has vouched for.
func (m *Manager) LoginLocal(ctx context.Context, originator string) (xapi.Ref, error) {
	return m.open(ctx, m.localSession(originator))
}

// LoginPool opens a session for another host of the pool. It fails with
// SESSION_AUTHENTICATION_FAILED when the secret is not that of the pool.
func (m *Manager) LoginPool(ctx context.Context, secret, originator string) (xapi.Ref, error) {
	if !m.isPoolSecret(secret) {
		return "", xapi.NewError(xapi.SessionAuthenticationFailed).Because(errPoolSecret)
	}
	return m.open(ctx, m.poolSession(originator))
}

var errPoolSecret = errors.New("the pool_secret is wrong")

func (m *Manager) newRecord(kind kind, name, originator string) Record {
	now := m.now().UTC()
	return Record{
		UUID: xapi.NewUUID(), ThisHost: m.thisHost().OrNull(), ThisUser: xapi.NullRef, LastActive: now,
		OtherConfig: map[string]string{}, Subject: xapi.NullRef, ValidationTime: now, AuthUserName: name,
		RBACPermissions: []string{}, Parent: xapi.NullRef, Originator: printable(originator), Kind: kind,
	}
}

func (m *Manager) userSession(u userRecord, originator string) Record {
	rec := m.newRecord(kindUser, u.Name, originator)
	rec.IsLocalSuperuser = u.Role == PoolAdmin
	rec.UserRef, rec.Epoch = userRef(u.Name), u.Epoch
	return rec
}

func (m *Manager) localSession(originator string) Record {
	rec := m.newRecord(kindLocal, Root, originator)
	rec.IsLocalSuperuser = true
	rec.UserRef = localRef
	return rec
}

func (m *Manager) poolSession(originator string) Record {
	rec := m.newRecord(kindPool, "", originator)
	rec.Pool, rec.IsLocalSuperuser = true, true
	rec.UserRef = poolRef
	return rec
}

// open stores a new session, and ends others of the user that are too many.
func (m *Manager) open(ctx context.Context, rec Record) (xapi.Ref, error) {
	ref := xapi.NewRef()
	extra, err := m.surplus(rec.UserRef)
	if err != nil {
		return "", err
	}
	err = m.store.Update(ctx, func(tx *store.Tx) error {
		if rec.Kind == kindUser {
			u, err := store.Read[userRecord](tx, ClassUser, rec.UserRef)
			if err != nil || u.Epoch != rec.Epoch { // removed or changed since the check
				return wrongPassword(rec.AuthUserName)
			}
		}
		for _, old := range extra {
			tx.Delete(Class, old)
		}
		tx.Put(Class, StoredRef(ref), rec)
		return nil
	})
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, old := range extra {
		m.end(old)
	}
	return ref, nil
}

func wrongPassword(name string) *xapi.Error {
	return xapi.NewError(xapi.SessionAuthenticationFailed, printable(name), textWrong)
}

// surplus names the sessions of a user that have to go before a new one comes.
func (m *Manager) surplus(user xapi.Ref) (extra []xapi.Ref, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	err = m.store.View(func(v *store.View) error {
		if refs := v.Refs(Class, "_user", string(user)); len(refs) >= maxPerUser {
			extra = m.leastUsed(v, refs, min(len(refs)-maxPerUser+1, batch))
		}
		return nil
	})
	return extra, err
}

// leastUsed picks n of the sessions: each time the least recently used one of
// the originator that has most left. Call it with mu held.
func (m *Manager) leastUsed(v *store.View, refs []xapi.Ref, n int) (picked []xapi.Ref) {
	type used struct {
		ref  xapi.Ref
		last time.Time
	}
	groups := map[string][]used{}
	for _, ref := range refs {
		rec, err := store.Get[Record](v, Class, ref)
		if err != nil {
			picked = append(picked, ref) // nobody can use it
			continue
		}
		groups[rec.Originator] = append(groups[rec.Originator], used{ref, lastUse(rec, m.live[ref])})
	}
	for _, g := range groups {
		slices.SortStableFunc(g, func(a, b used) int { return cmp.Compare(a.last.UnixNano(), b.last.UnixNano()) })
	}
	for len(picked) < n && len(groups) > 0 {
		most := ""
		for o, g := range groups {
			if len(g) > len(groups[most]) || len(g) == len(groups[most]) && o < most {
				most = o
			}
		}
		picked = append(picked, groups[most][0].ref)
		groups[most] = groups[most][1:]
	}
	return picked[:min(n, len(picked))]
}

// authenticate checks a name and a password under the hash limit and holds the
// answer back when they are wrong. known, when set, is asked once more before
// the costly part: true means that somebody else has just checked the same.
func (m *Manager) authenticate(ctx context.Context, name, password, addr string, known func() bool) (userRecord, error) {
	ctx, cancel := m.untilClosed(ctx)
	defer cancel()
	key := addressKey(addr)
	u, err := m.check(ctx, name, password, key, known)
	if errors.Is(err, errWrong) {
		m.holdBack(ctx, key)
		return u, wrongPassword(name)
	}
	if errors.Is(err, errBusy) {
		return u, xapi.NewError(xapi.SessionAuthenticationFailed, printable(name), textBusy).Because(err)
	}
	return u, err
}

// untilClosed lets Close end what waits.
func (m *Manager) untilClosed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(m.base, func() { cancel(errClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

var (
	errWrong = errors.New("wrong user name or password")
	errKnown = errors.New("checked by another call")
)

// check compares the password under the hash limit. It takes as long for a
// name that does not exist as for a wrong password.
func (m *Manager) check(ctx context.Context, name, password, key string, known func() bool) (u userRecord, err error) {
	if !validName(name) || len(password) > maxPassword {
		return u, errWrong
	}
	if err := m.gate.enter(ctx, key); err != nil {
		return u, err
	}
	defer m.gate.leave()
	if known != nil && known() {
		return u, errKnown
	}
	err = m.store.View(func(v *store.View) (err error) {
		u, err = store.Get[userRecord](v, ClassUser, userRef(name))
		return err
	})
	if xapi.Is(err, xapi.HandleInvalid) {
		m.hashing.waste(password)
		return u, errWrong
	}
	if err != nil {
		return u, err
	}
	ok, err := matches(u.Password, password)
	if err == nil && !ok {
		err = errWrong
	}
	return u, err
}

// holdBack waits before a refusal goes out: guessing is slow. It holds no
// place of the hash limit, ends with ctx, and lets the answer go at once where
// too many are held back already, for each of them costs memory.
func (m *Manager) holdBack(ctx context.Context, key string) {
	if m.delay <= 0 {
		return
	}
	m.mu.Lock()
	full := m.delayed[key] >= delayedPerAddress || m.delayedSum >= delayedInAll
	if !full {
		m.delayed[key]++
		m.delayedSum++
	}
	m.mu.Unlock()
	if full {
		return
	}
	m.sleep(ctx, m.delay)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.delayedSum--
	if m.delayed[key]--; m.delayed[key] == 0 {
		delete(m.delayed, key)
	}
}

package session

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// inside is the queue of hashes that no login asks for.
const inside = "inside"

// newHash makes the hash of a new password, under the same limit as checks.
func (m *Manager) newHash(ctx context.Context, password string) (string, error) {
	ctx, cancel := m.untilClosed(ctx)
	defer cancel()
	if err := m.gate.enter(ctx, inside); err != nil {
		return "", fmt.Errorf("hash a password: %w", err)
	}
	defer m.gate.leave()
	return m.hashing.hash(password), nil
}

// goodPassword is nil, or CHANGE_PASSWORD_REJECTED [text].
func goodPassword(password string) error {
	switch {
	case utf8.RuneCountInString(password) < minPassword:
		return xapi.NewError(xapi.ChangePasswordRejected, fmt.Sprintf("a password has at least %d characters", minPassword))
	case len(password) > maxPassword:
		return xapi.NewError(xapi.ChangePasswordRejected, fmt.Sprintf("a password has at most %d bytes", maxPassword))
	case !utf8.ValidString(password):
		return xapi.NewError(xapi.ChangePasswordRejected, "a password is text in UTF-8")
	}
	return nil
}

// AddUser makes a user. It fails with INVALID_VALUE [field, value] on a name
// that is not 1 to 64 printable characters or an unknown role,
// CHANGE_PASSWORD_REJECTED [text] on a password of less than 8 characters, and
// DB_UNIQUENESS_CONSTRAINT_VIOLATION [user, name, value] when the name is taken.
func (m *Manager) AddUser(ctx context.Context, name, password string, role Role) error {
	if !validName(name) {
		return xapi.NewError(xapi.InvalidValue, "name", printable(name))
	}
	if !role.Valid() {
		return xapi.NewError(xapi.InvalidValue, "role", printable(string(role)))
	}
	if err := goodPassword(password); err != nil {
		return err
	}
	return m.addUser(ctx, name, password, role)
}

func (m *Manager) addUser(ctx context.Context, name, password string, role Role) error {
	hash, err := m.newHash(ctx, password)
	if err != nil {
		return err
	}
	now := m.now().UTC()
	u := userRecord{
		UUID: xapi.NewUUID(), User: User{Name: name, Role: role, Created: now, Changed: now},
		Password: hash, Epoch: string(xapi.NewUUID()),
	}
	err = m.store.Update(ctx, func(tx *store.Tx) error {
		if tx.Has(ClassUser, userRef(name)) {
			return xapi.NewError(xapi.DBUniquenessConstraintViolated, ClassUser, "name", name)
		}
		tx.Put(ClassUser, userRef(name), u)
		return nil
	})
	if err != nil {
		return fmt.Errorf("add user %s: %w", name, err)
	}
	return nil
}

// HasUser tells whether there is a user of that name.
func (m *Manager) HasUser(name string) (there bool, err error) {
	err = m.store.View(func(v *store.View) error {
		_, there = v.Get(ClassUser, userRef(name))
		return nil
	})
	return there, err
}

// EnsureRoot makes the user root, a pool-admin, with that password when there
// is none, and tells whether it did. Any password but "" will do: whoever runs
// the daemon has chosen it.
func (m *Manager) EnsureRoot(ctx context.Context, password string) (made bool, err error) {
	if there, err := m.HasUser(Root); there || err != nil {
		return false, err
	}
	if password == "" || len(password) > maxPassword {
		return false, xapi.NewError(xapi.ChangePasswordRejected, fmt.Sprintf("the password of root has 1 to %d bytes", maxPassword))
	}
	err = m.addUser(ctx, Root, password, PoolAdmin)
	if xapi.Is(err, xapi.DBUniquenessConstraintViolated) {
		return false, nil
	}
	return err == nil, err
}

// Users lists the users by name.
func (m *Manager) Users() ([]User, error) {
	users := []User{}
	err := m.store.View(func(v *store.View) error {
		for _, it := range v.List(ClassUser) {
			var u userRecord
			if err := it.Decode(&u); err != nil {
				return err
			}
			users = append(users, u.User)
		}
		return nil
	})
	slices.SortFunc(users, func(a, b User) int { return cmp.Compare(a.Name, b.Name) })
	return users, err
}

// SetPassword gives a user another password and ends his sessions, those of
// root over the unix socket excepted. It fails with INVALID_VALUE [name, value]
// on an unknown user and CHANGE_PASSWORD_REJECTED [text].
func (m *Manager) SetPassword(ctx context.Context, name, password string) error {
	return m.setPassword(ctx, name, password, "", "")
}

// ChangePassword is a user changing his own password: his other sessions end.
// It fails with SESSION_AUTHENTICATION_FAILED [user name, text], late, when
// the old one is wrong, and CHANGE_PASSWORD_REJECTED [text] when the new one is
// too weak or the session belongs to no user. Root over the unix socket need
// not know the old one.
func (m *Manager) ChangePassword(ctx context.Context, s *Session, oldPassword, newPassword string) error {
	if s.Kind == kindPool {
		return xapi.NewError(xapi.ChangePasswordRejected, "this session belongs to no user")
	}
	if err := goodPassword(newPassword); err != nil {
		return err
	}
	epoch := ""
	if s.Kind == kindUser {
		u, err := m.authenticate(ctx, s.User, oldPassword, "", nil)
		if err != nil {
			return err
		}
		epoch = u.Epoch
	}
	return m.setPassword(ctx, s.User, newPassword, epoch, s.Stored)
}

// setPassword does it in one transaction: the user's epoch changes, so every
// session of the old one is dead; only own, when it is his and stored, goes
// over to the new one. epoch, when set, is the one the old password was
// checked against.
func (m *Manager) setPassword(ctx context.Context, name, password, epoch string, own xapi.Ref) error {
	if err := goodPassword(password); err != nil {
		return err
	}
	hash, err := m.newHash(ctx, password)
	if err != nil {
		return err
	}
	next := string(xapi.NewUUID())
	user := userRef(name)
	err = m.store.Update(ctx, func(tx *store.Tx) error {
		u, err := store.Read[userRecord](tx, ClassUser, user)
		switch {
		case xapi.Is(err, xapi.HandleInvalid):
			return xapi.NewError(xapi.InvalidValue, "name", printable(name))
		case err != nil:
			return err
		case epoch != "" && u.Epoch != epoch:
			return wrongPassword(name)
		}
		if s, err := store.Read[Record](tx, Class, own); err == nil && s.UserRef == user && s.Epoch == u.Epoch {
			s.Epoch = next
			tx.Put(Class, own, s)
		}
		u.Password, u.Epoch, u.Changed = hash, next, m.now().UTC()
		tx.Put(ClassUser, user, u)
		return nil
	})
	if err != nil {
		return fmt.Errorf("set the password of %s: %w", printable(name), err)
	}
	m.reap(ctx)
	return nil
}

// RemoveUser removes a user and ends his sessions. It fails with
// INVALID_VALUE [name, value] on an unknown user, and OPERATION_NOT_ALLOWED on
// root.
func (m *Manager) RemoveUser(ctx context.Context, name string) error {
	if name == Root {
		return xapi.NewError(xapi.OperationNotAllowed, "the user root cannot be removed")
	}
	err := m.store.Update(ctx, func(tx *store.Tx) error {
		if !tx.Has(ClassUser, userRef(name)) {
			return xapi.NewError(xapi.InvalidValue, "name", printable(name))
		}
		tx.Delete(ClassUser, userRef(name))
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove user %s: %w", printable(name), err)
	}
	m.reap(ctx)
	return nil
}

package session

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// The classes of records of this package. Users are never shown on the wire.
const (
	Class     = "session"
	ClassUser = "user"
)

// Root is the name of the user that is always there.
const Root = "root"

// Role is what a user may do. A higher role may do all that a lower one may.
type Role string

// The roles, from the highest.
const (
	PoolAdmin    Role = "pool-admin"
	PoolOperator Role = "pool-operator"
	ReadOnly     Role = "read-only"
)

var ranks = []Role{ReadOnly, PoolOperator, PoolAdmin}

// Valid tells whether r is one of the three.
func (r Role) Valid() bool { return slices.Contains(ranks, r) }

// AtLeast tells whether r may do what need may. An unknown role may nothing.
func (r Role) AtLeast(need Role) bool {
	return need.Valid() && slices.Index(ranks, r) >= slices.Index(ranks, need)
}

// kind is how a session came to be.
type kind string

const (
	kindUser  kind = "user"  // by name and password
	kindLocal kind = "local" // root over the unix socket
	kindPool  kind = "pool"  // a host with the pool secret
)

// Record is what is known about one session. The JSON names are those of the
// XenAPI; names that begin with "_" are stored and never shown. The field
// tasks is derived, see task.OfSession.
type Record struct {
	UUID             xapi.UUID         `json:"uuid"`
	ThisHost         xapi.Ref          `json:"this_host"`
	ThisUser         xapi.Ref          `json:"this_user"`
	LastActive       time.Time         `json:"last_active"` // at most ten minutes old
	Pool             bool              `json:"pool"`
	OtherConfig      map[string]string `json:"other_config"`
	IsLocalSuperuser bool              `json:"is_local_superuser"`
	Subject          xapi.Ref          `json:"subject"`
	ValidationTime   time.Time         `json:"validation_time"`
	AuthUserSID      string            `json:"auth_user_sid"`
	AuthUserName     string            `json:"auth_user_name"`
	RBACPermissions  []string          `json:"rbac_permissions"`
	Parent           xapi.Ref          `json:"parent"`
	Originator       string            `json:"originator"`

	Kind kind `json:"_kind"`
	// UserRef is the user's record; Epoch is that of the password with which
	// the session was opened.
	UserRef xapi.Ref `json:"_user,omitempty"`
	Epoch   string   `json:"_epoch,omitempty"`
}

// Session is one live session as a call sees it: a snapshot, with the context
// that ends with the session.
type Session struct {
	// Ref is the secret reference, Stored the one of the record.
	Ref    xapi.Ref `json:"-"`
	Stored xapi.Ref
	Record
	Role Role
	// User is the name; "" for a host of the pool.
	User string

	ctx context.Context
}

// Context ends with the session; its cause is then SESSION_INVALID [ref].
func (s *Session) Context() context.Context { return s.ctx }

// Require is nil when the session's role is at least need, else
// RBAC_PERMISSION_DENIED [permission, text].
func (s *Session) Require(need Role, permission string) error {
	if s.Role.AtLeast(need) {
		return nil
	}
	return xapi.NewError(xapi.RBACPermissionDenied, permission,
		fmt.Sprintf("%s has the role %s; this needs %s", s.User, s.Role, need))
}

// String names the session without its secret.
func (s Session) String() string { return "session " + string(s.UUID) + " of " + s.User }

// GoString is String: a %#v shows no secret either.
func (s Session) GoString() string { return s.String() }

// StoredRef is the reference under which the session with that secret ref is
// stored. Knowing it opens nothing.
func StoredRef(secret xapi.Ref) xapi.Ref { return derivedRef("session", string(secret)) }

func userRef(name string) xapi.Ref { return derivedRef("user", name) }

// localRef stands for root over the unix socket, and poolRef for the hosts of
// the pool. They are no records: such sessions survive a change of root's
// password.
var (
	localRef = derivedRef("local", Root)
	poolRef  = derivedRef("pool", "")
)

// derivedRef makes a reference (a uuid of version 8) from a text.
func derivedRef(domain, text string) xapi.Ref {
	h := sha256.Sum256([]byte("patchd " + domain + "\x00" + text))
	b := h[:16]
	b[6] = b[6]&0x0f | 0x80
	b[8] = b[8]&0x3f | 0x80
	return xapi.Ref(fmt.Sprintf("OpaqueRef:%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16]))
}

// Indexes are the lookups this package needs; they go into store.Options.
func Indexes() []store.Index {
	return []store.Index{{Class: Class, Field: "_user"}}
}

// User is one user as an admin sees it.
type User struct {
	Name    string    `json:"name"`
	Role    Role      `json:"role"`
	Created time.Time `json:"created"`
	Changed time.Time `json:"changed"` // of the password
}

// userRecord is one user as it is stored.
type userRecord struct {
	UUID xapi.UUID `json:"uuid"`
	User
	Password string `json:"password"` // argon2id, never the text
	// Epoch changes with the password: sessions of an earlier one are dead.
	Epoch string `json:"epoch"`
}

const (
	maxName       = 64 // characters
	maxOriginator = 256
	minPassword   = 8
	maxPassword   = 1024 // bytes
)

// validName tells whether name can be a user's: 1 to 64 printable characters.
func validName(name string) bool {
	return utf8.ValidString(name) && name != "" && utf8.RuneCountInString(name) <= maxName && printable(name) == name
}

// printable is s without what must not get into a log or an answer, at most
// 256 bytes.
func printable(s string) string {
	out := make([]rune, 0, min(len(s), maxOriginator))
	n := 0
	for _, r := range s {
		if n += utf8.RuneLen(r); n > maxOriginator {
			break
		}
		if r != utf8.RuneError && unicode.IsPrint(r) {
			out = append(out, r)
		}
	}
	return string(out)
}

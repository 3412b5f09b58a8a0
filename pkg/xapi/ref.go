package xapi

import (
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Ref is the opaque reference of one object: "OpaqueRef:" and a lower-case
// uuid. Session refs have the same form and are secrets.
type Ref string

// NullRef is the reference that names nothing. A field of a record that holds
// no object holds NullRef, never an empty string.
const NullRef Ref = "OpaqueRef:NULL"

const refPrefix = "OpaqueRef:"

// NewRef makes a fresh random reference.
func NewRef() Ref { return Ref(refPrefix + string(NewUUID())) }

// IsNull tells whether r names nothing: the null reference or no text at all.
func (r Ref) IsNull() bool { return r == "" || r == NullRef }

// Valid tells whether r has the form of a reference to an object.
func (r Ref) Valid() bool {
	rest, ok := strings.CutPrefix(string(r), refPrefix)
	return ok && UUID(rest).Valid()
}

// OrNull is r, or NullRef where r is empty.
func (r Ref) OrNull() Ref {
	if r == "" {
		return NullRef
	}
	return r
}

// UUID is a uuid in its canonical text form: 36 characters, lower case.
type UUID string

// NewUUID makes a random (version 4) uuid.
func NewUUID() UUID { return UUID(uuid.NewString()) }

// Valid tells whether u is a uuid in canonical form. A valid UUID holds only
// hexadecimal digits and dashes, so it is safe as one element of a path.
func (u UUID) Valid() bool {
	if len(u) != 36 {
		return false
	}
	for i := 0; i < len(u); i++ {
		c := u[i]
		switch i {
		case 8, 13, 18, 23:
			if c != '-' {
				return false
			}
		default:
			if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
				return false
			}
		}
	}
	return true
}

// ParseUUID takes a uuid in either case and gives its canonical form. It
// fails on anything else.
func ParseUUID(s string) (UUID, error) {
	u := UUID(strings.ToLower(s))
	if !u.Valid() {
		return "", fmt.Errorf("%.64q is not a uuid", s)
	}
	return u, nil
}

// Epoch is the date a record carries where nothing has happened yet.
var Epoch = time.Unix(0, 0).UTC()

const timeLayout = "20060102T15:04:05Z"

// FormatTime writes t as the wire wants it: 20060102T15:04:05Z, in UTC. The
// zero time is written as the epoch, for a record never lacks a date.
func FormatTime(t time.Time) string {
	if t.IsZero() {
		t = Epoch
	}
	return t.UTC().Format(timeLayout)
}

// ParseTime reads the usual ISO 8601 forms; a time without a zone is UTC.
func ParseTime(s string) (time.Time, error) {
	for _, layout := range []string{
		timeLayout, "20060102T15:04:05", "20060102T15:04:05Z07:00", "20060102T150405Z0700",
		"2006-01-02T15:04:05Z07:00", "2006-01-02T15:04:05", "2006-01-02", "20060102T150405Z", "20060102",
	} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("%.64q is not an ISO 8601 date", s)
}

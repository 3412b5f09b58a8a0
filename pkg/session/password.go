package session

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"
)

// hashing is the cost of one password check.
type hashing struct {
	memory  uint32 // KiB
	passes  uint32
	threads uint8
}

// standard costs 19 MiB and about 50 ms of one core.
var standard = hashing{memory: 19 << 10, passes: 2, threads: 1}

const (
	saltLen = 16
	keyLen  = 32
	// What a stored hash may ask for at most.
	maxMemory  = 256 << 10
	maxPasses  = 16
	maxThreads = 4
)

// hash is the text that is stored for password, in the usual PHC form.
func (c hashing) hash(password string) string {
	salt := make([]byte, saltLen)
	rand.Read(salt) // never fails
	key := argon2.IDKey([]byte(password), salt, c.passes, c.memory, c.threads, keyLen)
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, c.memory, c.passes, c.threads,
		base64.RawStdEncoding.EncodeToString(salt), base64.RawStdEncoding.EncodeToString(key))
}

// waste takes as long as a check: a name that does not exist must not answer
// faster than one that does.
func (c hashing) waste(password string) {
	argon2.IDKey([]byte(password), make([]byte, saltLen), c.passes, c.memory, c.threads, keyLen)
}

// matches checks password against a stored text.
func matches(stored, password string) (bool, error) {
	c, salt, want, err := parseHash(stored)
	if err != nil {
		return false, err
	}
	got := argon2.IDKey([]byte(password), salt, c.passes, c.memory, c.threads, uint32(len(want)))
	return subtle.ConstantTimeCompare(got, want) == 1, nil
}

// errHash never repeats the text: a hash is a secret, too.
var errHash = errors.New("the stored password hash is not one of ours")

func parseHash(stored string) (c hashing, salt, key []byte, err error) {
	part := strings.Split(stored, "$")
	if len(part) != 6 || part[0] != "" || part[1] != "argon2id" || part[2] != fmt.Sprintf("v=%d", argon2.Version) {
		return c, nil, nil, errHash
	}
	if n, err := fmt.Sscanf(part[3], "m=%d,t=%d,p=%d", &c.memory, &c.passes, &c.threads); n != 3 || err != nil {
		return c, nil, nil, errHash
	}
	bounded := c.memory > 0 && c.memory <= maxMemory && c.passes > 0 && c.passes <= maxPasses && c.threads > 0 && c.threads <= maxThreads
	salt, serr := base64.RawStdEncoding.DecodeString(part[4])
	key, kerr := base64.RawStdEncoding.DecodeString(part[5])
	if !bounded || serr != nil || kerr != nil || len(salt) < 8 || len(key) < 16 || len(key) > 64 {
		return c, nil, nil, errHash
	}
	return c, salt, key, nil
}

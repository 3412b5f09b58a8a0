package patch

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
	"golang.org/x/sys/unix"
)

// Bounds of a folder of trusted keys.
const (
	maxKeyFiles    = 1000
	maxKeyFileSize = 1 << 20 // bytes, of one file
	maxKeyBytes    = 16 << 20
	maxKeys        = 1000
)

// Keyring holds the public keys this host trusts. It does not change after
// LoadKeyring and may be used by several goroutines.
type Keyring struct {
	blobs    []keyBlob
	keys     []Key
	problems []Problem
	count    int // keys in blobs, copies included
	now      func() time.Time
}

// keyBlob is one run of binary OpenPGP packets out of one file. Keys are parsed
// anew for every check: a parsed key remembers results inside itself.
type keyBlob struct {
	file string
	data []byte
}

// Key is one key of a Keyring, for people.
type Key struct {
	File        string   // name in the folder; the first, when it is in several
	Fingerprint string   // of the primary key, upper-case hexadecimal
	Subkeys     []string // fingerprints of the subkeys
	UserIDs     []string
	Algorithm   string // "RSA 3072", "EdDSA"
	Created     time.Time
	Expires     time.Time // zero: never
	Revoked     bool
	Usable      bool   // a patch signed by it now would be accepted
	Reason      string // why not
}

// Problem is something in the folder that is not, or not wholly, a trusted key.
type Problem struct {
	File string
	Err  error
}

func (p Problem) String() string { return p.File + ": " + p.Err.Error() }

// LoadKeyring reads every file of the folder dir, whatever its name, armoured
// or binary, with one or several keys. What cannot be read as a key is found in
// Problems and hides nothing else. Links, folders, sockets and devices are
// never opened. Of a secret key dropped in by mistake the public part is used.
// A folder that is missing is an empty one, and an empty keyring refuses all.
func LoadKeyring(dir string) (*Keyring, error) {
	k := &Keyring{now: time.Now}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		k.problem(dir, errors.New("the folder does not exist"))
		return k, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read trusted keys: %w", err)
	}
	total := 0 // bytes
	for n, entry := range entries {
		if n == maxKeyFiles {
			k.problem(dir, fmt.Errorf("more than %d files: the rest is not read", maxKeyFiles))
			break
		}
		data, err := ReadKeyFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			k.problem(entry.Name(), err)
			continue
		}
		if total += len(data); total > maxKeyBytes {
			k.problem(entry.Name(), fmt.Errorf("the folder holds more than %d bytes: this file and the rest are not read", maxKeyBytes))
			break
		}
		k.add(entry.Name(), data)
	}
	k.keys = k.list()
	return k, nil
}

// NewKeyring makes a keyring of the text of one key file.
func NewKeyring(name string, data []byte) *Keyring {
	k := &Keyring{now: time.Now}
	if len(data) > maxKeyFileSize {
		k.problem(name, fmt.Errorf("more than %d bytes", maxKeyFileSize))
		return k
	}
	k.add(name, data)
	k.keys = k.list()
	return k
}

// WithClock gives the same keys under another clock.
func (k *Keyring) WithClock(now func() time.Time) *Keyring {
	other := &Keyring{blobs: k.blobs, problems: k.problems, now: now}
	other.keys = other.list()
	return other
}

// Keys lists the keys, sorted by fingerprint.
func (k *Keyring) Keys() []Key { return slices.Clone(k.keys) }

// Problems lists what is wrong in the folder.
func (k *Keyring) Problems() []Problem { return slices.Clone(k.problems) }

// Trusts tells why the key with that fingerprint, a primary key or a subkey, is
// not trusted at the time now; nil: it is there, neither revoked nor expired,
// and may sign.
func (k *Keyring) Trusts(fp string, now time.Time) error {
	fp = strings.ToUpper(fp)
	for _, e := range k.entities() {
		if fingerprint(e.PrimaryKey) == fp {
			return checkKey(e, 0, now)
		}
		for i := range e.Subkeys {
			if fingerprint(e.Subkeys[i].PublicKey) != fp {
				continue
			}
			return checkKey(e, e.Subkeys[i].PublicKey.KeyId, now)
		}
	}
	return fmt.Errorf("no trusted key has the fingerprint %.64s", fp)
}

func (k *Keyring) problem(file string, err error) {
	k.problems = append(k.problems, Problem{file, err})
}

// add takes the keys of one file and finds the problems in it.
func (k *Keyring) add(name string, data []byte) {
	blobs, err := dearmourKeys(data)
	if err != nil {
		k.problem(name, err)
	}
	for _, b := range blobs {
		loose := len(revocations(b)) > 0
		found, errs := parseKeys(b)
		if loose && len(errs) > 0 {
			errs = errs[1:] // the revocation itself, which is no key
		}
		for _, err := range errs {
			k.problem(name, err)
		}
		for _, e := range found {
			if holdsSecret(e) {
				k.problem(name, fmt.Errorf("holds the secret key %s: only its public part is used; remove the secret key from this host", fingerprint(e.PrimaryKey)))
			}
		}
		if len(found) == 0 && !loose {
			if len(errs) == 0 {
				k.problem(name, errors.New("holds no key"))
			}
			continue
		}
		if k.count += len(found); k.count > maxKeys {
			k.problem(name, fmt.Errorf("more than %d keys: these are not used", maxKeys))
			continue
		}
		k.blobs = append(k.blobs, keyBlob{name, b})
	}
}

// entities parses all keys anew; copies of one key are made one, so that a
// revocation in any file counts.
func (k *Keyring) entities() openpgp.EntityList {
	var list openpgp.EntityList
	var loose []*packet.Signature
	at := make(map[string]*openpgp.Entity)
	for _, b := range k.blobs {
		loose = append(loose, revocations(b.data)...)
		found, _ := parseKeys(b.data)
		for _, e := range found {
			dropSecret(e)
			fp := fingerprint(e.PrimaryKey)
			if have, ok := at[fp]; ok {
				mergeKey(have, e)
				continue
			}
			at[fp] = e
			list = append(list, e)
		}
	}
	revoke(list, loose)
	return list
}

// ring is the key ring of one check at the time now.
type ring struct {
	openpgp.EntityList
	now time.Time
}

// EntitiesById gives the certificates that hold the key, those that can vouch
// for it first: the library asks the first only, and a trusted certificate may
// name another's subkey without right.
func (r ring) EntitiesById(id uint64) []*openpgp.Entity {
	if id == 0 {
		return nil
	}
	found := r.EntityList.EntitiesById(id)
	slices.SortStableFunc(found, func(a, b *openpgp.Entity) int { return r.rank(a, id) - r.rank(b, id) })
	return found
}

func (r ring) rank(e *openpgp.Entity, id uint64) int {
	if checkKey(e, id, r.now) == nil {
		return 0
	}
	if e.PrimaryKey.KeyId == id {
		return 1
	}
	return 2
}

func (k *Keyring) ring(now time.Time) ring { return ring{k.entities(), now} }

func (k *Keyring) list() []Key {
	files := make(map[string]string)
	for _, b := range k.blobs {
		found, _ := parseKeys(b.data)
		for _, e := range found {
			if fp := fingerprint(e.PrimaryKey); files[fp] == "" {
				files[fp] = b.file
			}
		}
	}
	now := k.now()
	var out []Key
	for _, e := range k.entities() {
		key := describeKey(e, now)
		key.File = files[key.Fingerprint]
		out = append(out, key)
	}
	slices.SortFunc(out, func(a, b Key) int { return strings.Compare(a.Fingerprint, b.Fingerprint) })
	return out
}

func describeKey(e *openpgp.Entity, now time.Time) Key {
	key := Key{
		Fingerprint: fingerprint(e.PrimaryKey),
		UserIDs:     identities(e),
		Algorithm:   algorithm(e.PrimaryKey),
		Created:     e.PrimaryKey.CreationTime.UTC(),
		Revoked:     e.Revoked(now),
	}
	for i := range e.Subkeys {
		key.Subkeys = append(key.Subkeys, fingerprint(e.Subkeys[i].PublicKey))
	}
	if self, err := e.PrimarySelfSignature(time.Time{}, policy(now)); err == nil && self.KeyLifetimeSecs != nil && *self.KeyLifetimeSecs != 0 {
		key.Expires = key.Created.Add(time.Duration(*self.KeyLifetimeSecs) * time.Second)
	}
	if err := checkKey(e, 0, now); err != nil {
		key.Reason = cleanText(err.Error())
	} else {
		key.Usable = true
	}
	return key
}

func algorithm(k *packet.PublicKey) string {
	name := map[packet.PublicKeyAlgorithm]string{
		packet.PubKeyAlgoRSA: "RSA", packet.PubKeyAlgoRSASignOnly: "RSA", packet.PubKeyAlgoDSA: "DSA",
		packet.PubKeyAlgoECDSA: "ECDSA", packet.PubKeyAlgoEdDSA: "EdDSA",
		packet.PubKeyAlgoEd25519: "Ed25519", packet.PubKeyAlgoEd448: "Ed448",
	}[k.PubKeyAlgo]
	if name == "" {
		name = fmt.Sprintf("algorithm %d", k.PubKeyAlgo)
	}
	if bits, err := k.BitLength(); err == nil && (name == "RSA" || name == "DSA") {
		name += fmt.Sprintf(" %d", bits)
	}
	return name
}

// ReadKeyFile reads a regular file and nothing else; it never follows a link
// and never waits for a pipe.
func ReadKeyFile(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == unix.ELOOP {
		return nil, errors.New("a symbolic link is not followed: put the key itself here")
	}
	if err == unix.ENXIO {
		return nil, errors.New("not a regular file: ignored")
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file: ignored")
	}
	return readAtMost(f, maxKeyFileSize)
}

// identities lists the user ids of e, made printable, sorted.
func identities(e *openpgp.Entity) []string {
	var out []string
	for name := range e.Identities {
		out = append(out, cleanText(name))
	}
	slices.Sort(out)
	return out
}

// cleanText makes a text out of a key or a message fit for a terminal and a log.
func cleanText(s string) string {
	s = strings.Map(func(r rune) rune {
		if checkText(string(r), 0, math.MaxInt) != nil {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if r := []rune(s); len(r) > maxLabel {
		s = string(r[:maxLabel]) + "…"
	}
	return s
}

package patch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Attestation is what one host has seen for itself: that the image with this
// block map holds the payload with this digest, and that the payload's
// signature by this key held. An image that equals the map needs no other check,
// for as long as the key is trusted.
type Attestation struct {
	Map    string        `json:"map"`    // digest of the image's block map, lower-case hexadecimal
	Digest string        `json:"digest"` // SHA-256 of the payload, lower-case hexadecimal
	Kind   SignatureKind `json:"kind"`
	Signer string        `json:"signer,omitempty"` // fingerprint; empty for Pinned
}

// Attestations is a folder with one small file for each attestation, named by
// the digest of the map. It belongs to this host alone: what is in the pool's
// database, or on a storage repository, cannot get into it. "" remembers nothing.
type Attestations string

// maxAttestation bounds one file, in bytes.
const maxAttestation = 4 << 10

// path is the file of a map, or "" for what is no digest.
func (dir Attestations) path(digest string) string {
	if dir == "" || len(digest) != 64 || strings.Trim(digest, "0123456789abcdef") != "" {
		return ""
	}
	return filepath.Join(string(dir), digest)
}

// Remember writes an attestation durably, in place of an older one of its map.
func (dir Attestations) Remember(a Attestation) error {
	path := dir.path(a.Map)
	if path == "" {
		return nil
	}
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(string(dir), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("attest map %s: %w", a.Map, err), os.Remove(f.Name()))
	}
	d, err := os.Open(string(dir))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Holds tells whether this host has attested that the image with that map holds
// the payload with that digest, by a key that keys trusts now, or a digest that
// is pinned now. What cannot be read was not attested.
func (dir Attestations) Holds(mapDigest, digest string, keys *Keyring, pinned []string) bool {
	a, ok := dir.read(mapDigest)
	if !ok || digest == "" || a.Digest != digest {
		return false
	}
	switch a.Kind {
	case Inline, Cleartext:
		return a.Signer != "" && keys.Trusts(a.Signer, keys.now()) == nil
	case Pinned:
		return isPinned(digest, pinned)
	}
	return false
}

func (dir Attestations) read(mapDigest string) (a Attestation, ok bool) {
	path := dir.path(mapDigest)
	if path == "" {
		return a, false
	}
	f, err := os.Open(path)
	if err != nil {
		return a, false
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxAttestation))
	if err != nil || json.Unmarshal(b, &a) != nil {
		return a, false
	}
	return a, a.Map == mapDigest
}

// Forget removes what was attested before that moment about maps that are not
// wanted any more.
func (dir Attestations) Forget(before time.Time, wanted func(mapDigest string) bool) error {
	if dir == "" {
		return nil
	}
	entries, err := os.ReadDir(string(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || wanted(e.Name()) || !info.Mode().IsRegular() || info.ModTime().After(before) {
			continue
		}
		errs = append(errs, os.Remove(filepath.Join(string(dir), e.Name())))
	}
	return errors.Join(errs...)
}

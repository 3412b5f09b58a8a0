package patch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

// The digest and the signatures' hashes are one where they can be: whoever
// signed, and with whatever hash, the digest is that of the payload, and a
// changed byte is seen.
func TestTheDigestIsThePayloadsWhoeverFeedsIt(t *testing.T) {
	payload := bytes.Repeat([]byte("#!/bin/sh\nexit 0\n"), 20000)
	for name, args := range map[string][]string{
		"one signer":            {"--local-user", keyA, "--digest-algo", "SHA256"},
		"another hash":          {"--local-user", keyB, "--digest-algo", "SHA512"},
		"two signers":           {"--local-user", keyA, "--local-user", keyB, "--digest-algo", "SHA256"},
		"text, not binary":      {"--local-user", keyA, "--digest-algo", "SHA256", "--textmode"},
		"compressed on its way": {"--local-user", keyA, "--digest-algo", "SHA256", "-z", "6"},
	} {
		t.Run(name, func(t *testing.T) {
			file := gpg_(t, payload, append(append([]string{"-z", "0"}, args...), "--sign")...)
			for _, keys := range []*Keyring{ringOf(t, keyA, keyB), ringOf(t, keyB), ringOf(t, keyA)} {
				got, m, err := readMessage(file, keys, Options{})
				if err != nil {
					if !xapi.Is(err, xapi.InvalidPatch) {
						t.Fatal(err)
					}
					continue // signed by a key that is not in this ring, or as text
				}
				if !bytes.Equal(got, payload) || m.Digest() != sum(payload) {
					t.Errorf("digest %s, not %s", m.Digest(), sum(payload))
				}
				checkStored(t, payload, m.Signature(), keys)
			}
		})
	}
}

// checkStored verifies the payload as a host does, whole, changed and cut.
func checkStored(t *testing.T, payload []byte, sig Signature, keys *Keyring) {
	t.Helper()
	digest, err := VerifyDetached(context.Background(), bytes.NewReader(payload), sig, keys, nil)
	if err != nil || digest != sum(payload) {
		t.Errorf("stored payload: %s, %v", digest, err)
	}
	for _, bad := range [][]byte{payload[:len(payload)-1], append(bytes.Clone(payload), 'x'), append([]byte("x"), payload[1:]...)} {
		digest, err := VerifyDetached(context.Background(), bytes.NewReader(bad), sig, keys, nil)
		if !xapi.Is(err, xapi.InvalidPatch) || digest != sum(bad) {
			t.Errorf("changed payload: %s, %v", digest, err)
		}
	}
}

// noClone is a hash that cannot be copied, or not any more.
type noClone struct{ hash.Hash }

func (noClone) Clone() (hash.Cloner, error) { return nil, errors.New("not any more") }

func TestAHashThatCannotBeCopiedVerifiesNothing(t *testing.T) {
	for name, h := range map[string]hash.Hash{"no method": struct{ hash.Hash }{sha256.New()}, "an error": noClone{sha256.New()}} {
		f := &fork{Hash: h}
		f.Write([]byte("trailer"))
		if got := f.Sum(nil); len(got) != 0 {
			t.Errorf("%s: the sum is %x", name, got)
		}
	}
	digest := sha256.New()
	digest.Write([]byte("payload"))
	f := &fork{Hash: digest}
	f.Write([]byte(" and trailer"))
	all := sha256.Sum256([]byte("payload and trailer"))
	alone := sha256.Sum256([]byte("payload"))
	if !bytes.Equal(f.Sum(nil), all[:]) || !bytes.Equal(digest.Sum(nil), alone[:]) {
		t.Error("the copy and the original are not apart")
	}
}

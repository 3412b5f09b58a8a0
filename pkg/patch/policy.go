package patch

import (
	"crypto"
	"errors"
	"time"

	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// clockSkew is how far ahead of ours the clock of a signing machine may be.
const clockSkew = 5 * time.Minute

// minRSABits is the shortest RSA key that is trusted.
const minRSABits = 2048

// weakHashes are refused for messages and for the signatures inside a key.
func weakHashes() map[crypto.Hash]bool {
	return map[crypto.Hash]bool{crypto.MD5: true, crypto.SHA1: true, crypto.RIPEMD160: true}
}

// policy is what a signature must meet at the time now.
func policy(now time.Time) *packet.Config {
	return &packet.Config{
		Time:                        func() time.Time { return now },
		MinRSABits:                  minRSABits,
		RejectHashAlgorithms:        weakHashes(),
		RejectMessageHashAlgorithms: weakHashes(),
		RejectPublicKeyAlgorithms: map[packet.PublicKeyAlgorithm]bool{
			packet.PubKeyAlgoDSA:     true,
			packet.PubKeyAlgoElGamal: true,
		},
		CheckPacketSequence: packet.BoolPointer(true),
	}
}

// checkKey tells why the key with that id, the primary one or a signing subkey
// of e, cannot be trusted at the time now; nil: it can.
func checkKey(e *openpgp.Entity, id uint64, now time.Time) error {
	config := policy(now)
	if _, ok := e.SigningKeyById(now, id, config); ok {
		return nil
	}
	// A key made on a machine whose clock is a little ahead is not yet valid.
	if ahead := now.Add(clockSkew); e.PrimaryKey.CreationTime.After(now) {
		if _, ok := e.SigningKeyById(ahead, id, policy(ahead)); ok {
			return nil
		}
	}
	if _, err := e.VerifyPrimaryKey(now, config); err != nil {
		return err
	}
	for i := range e.Subkeys {
		if e.Subkeys[i].PublicKey.KeyId != id {
			continue
		}
		if _, err := e.Subkeys[i].Verify(now, config); err != nil {
			return err
		}
	}
	if id != 0 && id != e.PrimaryKey.KeyId && !hasSubkey(e, id) {
		return errors.New("the key is not part of this certificate")
	}
	return errors.New("the key may not sign, or is too weak (RSA below 2048 bits, DSA, SHA-1)")
}

func hasSubkey(e *openpgp.Entity, id uint64) bool {
	for i := range e.Subkeys {
		if e.Subkeys[i].PublicKey.KeyId == id {
			return true
		}
	}
	return false
}

package patch

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// SignatureKind is how a patch is signed. It is stored with the record and
// says how the stored payload is verified again.
type SignatureKind string

// The kinds.
const (
	// Inline is an OpenPGP signed message, binary or armoured.
	Inline SignatureKind = "inline"
	// Cleartext is cleartext signed text: the form of classic hotfixes.
	Cleartext SignatureKind = "cleartext"
	// Pinned is an unsigned file whose SHA-256 stands in the configuration.
	Pinned SignatureKind = "pinned"
)

// Signature is what is known of a verified message and kept with the record.
type Signature struct {
	Kind SignatureKind
	// Packet holds the OpenPGP signature packets that verified, binary, the one
	// of Signer first. Empty for Pinned.
	Packet []byte
	// Signer is the fingerprint of the key that made the signature: a primary
	// key or a signing subkey. Upper-case hexadecimal; empty for Pinned.
	Signer string
	// Primary is the fingerprint of the primary key Signer belongs to: the one
	// Keyring.Keys lists.
	Primary string
	Hash    string    // "SHA256"
	Created time.Time // when the signature was made, as the signer says
	UserID  string    // of the key's primary identity
}

// signatureType is the only OpenPGP signature type allowed for the kind. Text
// signatures do not protect line endings, so they are for cleartext alone,
// whose payload has only one kind of them.
func (k SignatureKind) signatureType() packet.SignatureType {
	if k == Cleartext {
		return packet.SigTypeText
	}
	return packet.SigTypeBinary
}

// accept gives the signature of a message that was read to its end, or says
// why no signature of it is good enough.
func accept(md *openpgp.MessageDetails, kind SignatureKind, now time.Time) (Signature, error) {
	if !md.IsSigned || md.IsEncrypted {
		return Signature{}, errors.New("the message is not signed, or is encrypted")
	}
	if !md.IsVerified {
		return Signature{}, errors.New("the signature was not reached")
	}
	if md.SignatureError != nil {
		return Signature{}, md.SignatureError
	}
	sig := Signature{Kind: kind}
	var packets bytes.Buffer
	var refused error
	for _, c := range md.SignatureCandidates {
		if c.SignatureError != nil || c.SignedBy == nil || c.CorrespondingSig == nil {
			continue
		}
		if err := acceptCandidate(c, kind, now); err != nil {
			refused = fmt.Errorf("key %s: %w", fingerprint(c.SignedBy.PublicKey), err)
			continue
		}
		if err := c.CorrespondingSig.Serialize(&packets); err != nil {
			return Signature{}, fmt.Errorf("keep the signature: %w", err)
		}
		if sig.Signer == "" {
			describe(&sig, c, now)
		}
	}
	if sig.Signer == "" {
		if refused == nil {
			refused = errors.New("no signature of a trusted key")
		}
		return Signature{}, refused
	}
	sig.Packet = packets.Bytes()
	return sig, nil
}

func acceptCandidate(c *openpgp.SignatureCandidate, kind SignatureKind, now time.Time) error {
	s := c.CorrespondingSig
	if s.SigType != kind.signatureType() {
		return fmt.Errorf("signature type 0x%02x in a message of kind %s: sign with `gpg --sign`, without --textmode", uint8(s.SigType), kind)
	}
	if s.CreationTime.After(now.Add(clockSkew)) {
		return fmt.Errorf("the signature is of the future (%s)", s.CreationTime.UTC().Format(time.RFC3339))
	}
	return checkKey(c.SignedBy.Entity, c.SignedBy.PublicKey.KeyId, now)
}

func describe(sig *Signature, c *openpgp.SignatureCandidate, now time.Time) {
	sig.Signer = fingerprint(c.SignedBy.PublicKey)
	sig.Primary = fingerprint(c.SignedBy.Entity.PrimaryKey)
	sig.Hash = hashName(c.CorrespondingSig.Hash)
	sig.Created = c.CorrespondingSig.CreationTime.UTC()
	sig.UserID = userID(c.SignedBy.Entity, now)
}

func hashName(h crypto.Hash) string { return strings.ReplaceAll(h.String(), "SHA-", "SHA") }

func fingerprint(k *packet.PublicKey) string { return fmt.Sprintf("%X", k.Fingerprint) }

// userID is the primary identity of e, or any other, or "".
func userID(e *openpgp.Entity, now time.Time) string {
	if _, id := e.PrimaryIdentity(now, policy(now)); id != nil {
		return cleanText(id.Name)
	}
	if ids := identities(e); len(ids) > 0 {
		return ids[0]
	}
	return ""
}

package patch

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

var armourBegin = []byte("-----BEGIN PGP ")

// dearmourKeys gives the binary packets of a key file: as they are, or of each
// armoured block, between which any text may stand.
func dearmourKeys(data []byte) ([][]byte, error) {
	if len(data) == 0 {
		return nil, errors.New("the file is empty")
	}
	if data[0]&0x80 != 0 && !bytes.HasPrefix(data, []byte("\xef\xbb\xbf")) {
		return [][]byte{data}, nil
	}
	at := bytes.Index(data, armourBegin)
	if at < 0 {
		return nil, errors.New("neither an armoured nor a binary OpenPGP key")
	}
	var blobs [][]byte
	var errs []error
	for at >= 0 {
		block := data[at:]
		next := bytes.Index(block[1:], armourBegin)
		if next >= 0 {
			block = block[:next+1]
			next += at + 1
		}
		at = next
		blob, err := dearmourKey(block)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		blobs = append(blobs, blob)
	}
	return blobs, errors.Join(errs...)
}

func dearmourKey(block []byte) ([]byte, error) {
	b, err := armor.Decode(bytes.NewReader(block))
	if err != nil {
		return nil, fmt.Errorf("armour: %w", unexpected(err))
	}
	if b.Type != openpgp.PublicKeyType && b.Type != openpgp.PrivateKeyType {
		return nil, fmt.Errorf("a block %.64q where a public key is wanted", b.Type)
	}
	if !bytes.Contains(block, []byte("-----END "+b.Type+"-----")) {
		return nil, errors.New("armour: the end is missing")
	}
	blob, err := io.ReadAll(b.Body)
	if err != nil {
		return nil, fmt.Errorf("armour: %w", unexpected(err))
	}
	return blob, nil
}

// parseKeys reads all keys of a run of packets; what is not a key is passed
// over and told in errs.
func parseKeys(data []byte) (list openpgp.EntityList, errs []error) {
	packets := packet.NewReader(bytes.NewReader(data))
	for len(list) <= maxKeys && len(errs) < 16 {
		e, err := openpgp.ReadEntity(packets)
		if err == io.EOF {
			return list, errs
		}
		if err == nil {
			list = append(list, e)
			continue
		}
		errs = append(errs, fmt.Errorf("a key that cannot be read: %w", err))
		if !skippable(err) || !nextKey(packets) {
			return list, errs
		}
	}
	return list, append(errs, errors.New("too much that is not a key: the rest is not read"))
}

// revocations reads the key revocations that stand before any key: a file made
// by gpg beside each new key holds nothing else.
func revocations(data []byte) []*packet.Signature {
	var out []*packet.Signature
	packets := packet.NewReader(bytes.NewReader(data))
	for len(out) < maxSignatures {
		p, err := packets.Next()
		if err != nil {
			return out
		}
		s, ok := p.(*packet.Signature)
		if !ok {
			return out
		}
		if s.SigType == packet.SigTypeKeyRevocation {
			out = append(out, s)
		}
	}
	return out
}

// revoke attaches loose revocations to the key they are of. Whether they are
// genuine is checked like that of any other signature of the key.
func revoke(list openpgp.EntityList, loose []*packet.Signature) {
	for _, s := range loose {
		for _, e := range list {
			if s.CheckKeyIdOrFingerprint(e.PrimaryKey) {
				e.Revocations = append(e.Revocations, packet.NewVerifiableSig(s))
			}
		}
	}
}

func skippable(err error) bool {
	var unsupported pgperrors.UnsupportedError
	var structural pgperrors.StructuralError
	return errors.As(err, &unsupported) || errors.As(err, &structural)
}

// nextKey moves to the next primary key; false: there is none.
func nextKey(packets *packet.Reader) bool {
	for {
		p, err := packets.Next()
		if err != nil {
			if err != io.EOF && skippable(err) {
				continue
			}
			return false
		}
		switch p := p.(type) {
		case *packet.PublicKey:
			if !p.IsSubkey {
				packets.Unread(p)
				return true
			}
		case *packet.PrivateKey:
			if !p.IsSubkey {
				packets.Unread(p)
				return true
			}
		}
	}
}

func holdsSecret(e *openpgp.Entity) bool {
	if e.PrivateKey != nil {
		return true
	}
	for i := range e.Subkeys {
		if e.Subkeys[i].PrivateKey != nil {
			return true
		}
	}
	return false
}

func dropSecret(e *openpgp.Entity) {
	e.PrivateKey = nil
	for i := range e.Subkeys {
		e.Subkeys[i].PrivateKey = nil
	}
}

// mergeKey adds to the key have what another copy of it knows: revocations,
// identities with their signatures, subkeys with theirs.
func mergeKey(have, other *openpgp.Entity) {
	have.Revocations = append(have.Revocations, other.Revocations...)
	have.DirectSignatures = append(have.DirectSignatures, other.DirectSignatures...)
	for name, id := range other.Identities {
		mine, ok := have.Identities[name]
		if !ok {
			id.Primary = have
			have.Identities[name] = id
			continue
		}
		mine.SelfCertifications = append(mine.SelfCertifications, id.SelfCertifications...)
		mine.Revocations = append(mine.Revocations, id.Revocations...)
	}
	for _, sub := range other.Subkeys {
		mergeSubkey(have, sub)
	}
}

func mergeSubkey(have *openpgp.Entity, sub openpgp.Subkey) {
	for i := range have.Subkeys {
		mine := &have.Subkeys[i]
		if bytes.Equal(mine.PublicKey.Fingerprint, sub.PublicKey.Fingerprint) {
			mine.Bindings = append(mine.Bindings, sub.Bindings...)
			mine.Revocations = append(mine.Revocations, sub.Revocations...)
			return
		}
	}
	sub.Primary = have
	have.Subkeys = append(have.Subkeys, sub)
}

// readAtMost reads all of r, which must not be longer than most bytes.
func readAtMost(r io.Reader, most int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > most {
		return nil, fmt.Errorf("more than %d bytes", most)
	}
	return data, nil
}

// unexpected makes an end of data that came too early look like one.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

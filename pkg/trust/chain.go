package trust

import (
	"crypto/x509"
	"errors"
	"fmt"
)

// maxChain is how many certificates of a chain are looked at: three rotations
// may be missed.
const maxChain = 4

// ErrUntrusted is the answer to a chain that leads to no trusted key.
var ErrUntrusted = errors.New("the key is not one that is trusted here")

// VerifyChain decides about the certificates that the other side showed, the
// leaf first. The leaf's key must be trusted, or the leaf must be signed by the
// key of the next certificate and that key be trusted, and so on for up to
// four. viaOld tells that it was one of the latter. leaf is the SPKI of the
// leaf, also with ErrUntrusted.
func VerifyChain(raw [][]byte, trusted func(spki []byte) bool) (leaf []byte, viaOld bool, err error) {
	if len(raw) == 0 {
		return nil, false, errors.New("no certificate was shown")
	}
	var child *x509.Certificate
	for i, der := range raw[:min(len(raw), maxChain)] {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return leaf, false, fmt.Errorf("certificate %d of the chain: %w", i+1, err)
		}
		if child == nil {
			leaf = cert.RawSubjectPublicKeyInfo
		} else if !signedBy(child, cert) {
			break
		}
		if trusted(cert.RawSubjectPublicKeyInfo) {
			return leaf, i > 0, nil
		}
		child = cert
	}
	return leaf, false, fmt.Errorf("%w: %s", ErrUntrusted, Pin(leaf))
}

// signedBy tells whether the key of parent signed child. Whether parent may
// sign does not matter: a host signs for its own next key.
func signedBy(child, parent *x509.Certificate) bool {
	return parent.CheckSignature(child.SignatureAlgorithm, child.RawTBSCertificate, child.Signature) == nil
}

// OneOf gives a function for VerifyChain that trusts just those keys.
func OneOf(keys ...[]byte) func(spki []byte) bool {
	return func(spki []byte) bool {
		for _, k := range keys {
			if len(k) > 0 && string(k) == string(spki) {
				return true
			}
		}
		return false
	}
}

// Pinned gives a function for VerifyChain that trusts the key with that pin.
func Pinned(pin string) func(spki []byte) bool {
	return func(spki []byte) bool { return Pin(spki) == pin }
}

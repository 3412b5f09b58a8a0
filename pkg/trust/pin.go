package trust

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// Pin is the SHA-256 of a public key (DER of SubjectPublicKeyInfo), in
// lower-case hexadecimal.
func Pin(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// ParsePin takes a pin as people type it: in either case, with colons or
// spaces between the digits, and perhaps "sha256:" before them.
func ParsePin(text string) (string, error) {
	digits := strings.ToLower(strings.TrimSpace(text))
	digits = strings.TrimPrefix(digits, "sha256:")
	digits = strings.NewReplacer(":", "", " ", "", "-", "").Replace(digits)
	if b, err := hex.DecodeString(digits); err != nil || len(b) != sha256.Size {
		return "", fmt.Errorf("%.80q is not the SHA-256 of a key: 64 hexadecimal digits are wanted", text)
	}
	return digits, nil
}

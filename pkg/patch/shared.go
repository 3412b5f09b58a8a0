package patch

import (
	"crypto"
	"hash"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// share makes the digest of the payload and the hash of its signatures one and
// the same where they are: a binary signature with SHA-256 hashes the payload
// and then a few bytes of its own, which go into a copy. Hashing is most of
// what receiving a patch costs. It tells whether the library feeds digest now;
// otherwise the caller has to.
func share(md *openpgp.MessageDetails, digest hash.Hash) (fed bool) {
	for _, c := range md.SignatureCandidates {
		// A candidate with an error, or of nobody we know, is never fed.
		if c.SignatureError != nil || c.SignedByEntity == nil ||
			c.HashAlgorithm != crypto.SHA256 || c.SigType != packet.SigTypeBinary || len(c.Salt) > 0 {
			continue
		}
		c.Hash = &fork{Hash: digest}
		c.WrappedHash = silent{digest}
		if !fed {
			c.WrappedHash, fed = digest, true
		}
	}
	return fed
}

// fork is a copy of a hash as it is when it is first written to or summed. A
// hash that cannot be copied gives no sum, so that no signature holds.
type fork struct {
	hash.Hash
	forked, failed bool
}

func (f *fork) split() {
	if f.forked {
		return
	}
	f.forked = true
	c, ok := f.Hash.(hash.Cloner)
	if !ok {
		f.failed = true
		return
	}
	own, err := c.Clone()
	f.Hash, f.failed = own, err != nil
}

func (f *fork) Write(p []byte) (int, error) {
	f.split()
	if f.failed {
		return len(p), nil
	}
	return f.Hash.Write(p)
}

func (f *fork) Sum(b []byte) []byte {
	f.split()
	if f.failed {
		return b
	}
	return f.Hash.Sum(b)
}

// silent takes bytes that another signature has fed already.
type silent struct{ hash.Hash }

func (silent) Write(p []byte) (int, error) { return len(p), nil }

// feeder hashes what is read through it, unless the library does.
type feeder struct {
	r      io.Reader
	digest hash.Hash // nil: none is wanted
	shared bool
}

func (f *feeder) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if f.digest != nil && !f.shared {
		f.digest.Write(p[:n])
	}
	return n, err
}

package patch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"

	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// checkDetached verifies payload by the signature packets of sig and gives the
// signature as it was found.
func checkDetached(feed *feeder, sig Signature, keys *Keyring) (Signature, error) {
	if err := onlySignatures(sig.Packet); err != nil {
		return Signature{}, err
	}
	payload := io.Reader(feed)
	if sig.Kind == Cleartext {
		payload = &signedText{r: payload}
	}
	now := keys.now()
	md, err := openpgp.VerifyDetachedSignatureReader(keys.ring(now), payload, bytes.NewReader(sig.Packet), policy(now.Add(clockSkew)))
	if err != nil {
		return Signature{}, unexpected(err)
	}
	if sig.Kind == Inline && feed.digest != nil {
		feed.shared = share(md, feed.digest)
		defer func() { feed.shared = false }()
	}
	if _, err := drain(md.UnverifiedBody); err != nil {
		return Signature{}, err
	}
	return accept(md, sig.Kind, keys.now())
}

// VerifyDetached verifies a stored payload by the signature kept with it, and
// gives its digest (SHA-256, lower-case hexadecimal), in one pass and constant
// memory. pinned is as in Options. The digest is given whenever all of payload
// could be read, also when the signature does not hold: the two tell a changed
// payload from a key that is no longer trusted.
//
// Errors: INVALID_PATCH [] when the signature does not hold, by what keys
// trusts now; ctx's cause when it ends; an error of payload as it is.
func VerifyDetached(ctx context.Context, payload io.Reader, sig Signature, keys *Keyring, pinned []string) (string, error) {
	digest, _, err := VerifySigner(ctx, payload, sig, keys, pinned)
	return digest, err
}

// VerifySigner is VerifyDetached that also gives the fingerprint of the key that
// made the signature, as it was found and not as sig claims; "" for Pinned.
func VerifySigner(ctx context.Context, payload io.Reader, sig Signature, keys *Keyring, pinned []string) (digest, signer string, err error) {
	hash := sha256.New()
	src := &source{r: &contextReader{ctx, payload}}
	feed := &feeder{r: src, digest: hash}
	var found Signature
	switch sig.Kind {
	case Inline, Cleartext:
		found, err = checkDetached(feed, sig, keys)
	case Pinned:
	default:
		err = fmt.Errorf("unknown kind of signature %.32q", sig.Kind)
	}
	if src.err == nil {
		_, _ = drain(feed) // its error is that of src
	}
	if src.err != nil {
		return "", "", fmt.Errorf("read the payload: %w", src.err)
	}
	digest = hex.EncodeToString(hash.Sum(nil))
	if sig.Kind == Pinned && !isPinned(digest, pinned) {
		err = fmt.Errorf("not signed, and its SHA-256 %s is not pinned in the configuration", digest)
	}
	if err != nil {
		return digest, "", invalidPatch(err)
	}
	return digest, found.Signer, nil
}

// drain reads r to its end.
func drain(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 64<<10))
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

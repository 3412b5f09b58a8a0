package patch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/patchd/patchd/pkg/dom0"
)

// VerifyOptions say which file to look at and what to judge it by.
type VerifyOptions struct {
	Path string
	Keys *Keyring
	Options

	// Dom0 and Image, when both are given, are used to ask an accepted patch
	// for its `info` in the sandbox. Image makes a disk image of the payload,
	// which has that size, and says how to remove it.
	Dom0  dom0.Dom0
	Image func(ctx context.Context, payload io.Reader, size int64) (image string, remove func() error, err error)
}

// Report is what Verify found out about a patch file.
type Report struct {
	Path       string
	Size       int64         // of the file
	Kind       SignatureKind // what it claims to be; "" when it is nothing known
	Compressed bool
	// Accepted: an upload of this file to a host with these keys would pass
	// the signature check.
	Accepted bool
	Reason   string // why it is not accepted
	// Signature is who signed it; only when accepted.
	Signature Signature
	// Claimed names the keys the signatures say they are of, by fingerprint or
	// key id: not verified, for people to look for.
	Claimed []string
	// Digest and PayloadSize are of the payload, also where it was read to the
	// end but not accepted; else "" and what was read.
	Digest      string
	PayloadSize int64
	// Info is what the patch says about itself; nil when it was not asked.
	Info *Info
	// InfoProblem is why Info could not be had from an accepted patch.
	InfoProblem string
}

// Verify reads a patch file as an upload would and reports on it. A file that
// would be refused is no error.
func Verify(ctx context.Context, o VerifyOptions) (Report, error) {
	r := Report{Path: o.Path}
	file, err := os.Open(o.Path)
	if err != nil {
		return r, err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return r, err
	}
	if !st.Mode().IsRegular() {
		return r, fmt.Errorf("%s is not a file", o.Path)
	}
	r.Size = st.Size()
	src := &source{r: &contextReader{ctx, file}}
	r.judge(src, o)
	if src.err != nil {
		return r, fmt.Errorf("read %s: %w", o.Path, src.err)
	}
	if !r.Accepted || o.Dom0 == nil || o.Image == nil {
		return r, nil
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return r, err
	}
	info, err := r.ask(ctx, file, o)
	if ctx.Err() != nil {
		return r, context.Cause(ctx)
	}
	if err != nil {
		r.InfoProblem = err.Error()
		return r, nil
	}
	r.Info = &info
	return r, nil
}

// judge reads the message to its end.
func (r *Report) judge(src io.Reader, o VerifyOptions) {
	m := newMessage(src)
	err := m.begin(o.Keys, o.Options)
	if err == nil {
		_, err = drain(m)
	}
	r.Kind, r.Compressed, r.PayloadSize = m.kind, m.compressed, m.size
	r.Claimed = m.claimed()
	r.Digest = m.sum
	if err != nil {
		r.Reason = cleanText(reason(err))
		return
	}
	r.Accepted, r.Signature = true, m.Signature()
}

// reason is the cause behind an INVALID_PATCH, for people.
func reason(err error) string {
	if u, ok := err.(interface{ Unwrap() error }); ok && u.Unwrap() != nil {
		return u.Unwrap().Error()
	}
	return err.Error()
}

// ask runs `info` of the payload.
func (r *Report) ask(ctx context.Context, file io.Reader, o VerifyOptions) (info Info, err error) {
	m, err := Open(&contextReader{ctx, file}, o.Keys, o.Options)
	if err != nil {
		return Info{}, err
	}
	image, remove, err := o.Image(ctx, m, r.PayloadSize)
	if err != nil {
		return Info{}, fmt.Errorf("make an image of the payload: %w", err)
	}
	defer func() { err = errors.Join(err, remove()) }()
	if m.Digest() != r.Digest {
		return Info{}, errors.New("the file changed while it was read")
	}
	return Query(ctx, o.Dom0, image, 0)
}

// claimed names the issuers of the signatures that were met.
func (m *Message) claimed() []string {
	var out []string
	for _, c := range m.candidates() {
		if len(c.IssuerFingerprint) > 0 {
			out = append(out, fmt.Sprintf("%X", c.IssuerFingerprint))
		} else if s := c.CorrespondingSig; s != nil && len(s.IssuerFingerprint) > 0 {
			out = append(out, fmt.Sprintf("%X", s.IssuerFingerprint))
		} else {
			out = append(out, fmt.Sprintf("%016X", c.IssuerKeyId))
		}
	}
	return out
}

func (m *Message) candidates() []*openpgp.SignatureCandidate {
	if m.details != nil {
		return m.details.SignatureCandidates
	}
	var out []*openpgp.SignatureCandidate
	packets := packet.NewReader(bytes.NewReader(m.packets))
	for len(out) < maxSignatures {
		p, err := packets.Next()
		if err != nil {
			return out
		}
		if s, ok := p.(*packet.Signature); ok && s.IssuerKeyId != nil {
			out = append(out, &openpgp.SignatureCandidate{CorrespondingSig: s, IssuerKeyId: *s.IssuerKeyId})
		}
	}
	return out
}

package patch

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/patchd/patchd/pkg/xapi"
)

// Limits bound what a message may cost. A value of 0 is the default.
type Limits struct {
	// Cleartext is the most bytes of a cleartext signed text, which is held in
	// memory. Default 64 MiB.
	Cleartext int64
	// Decompressed is the most bytes that may come out of a compressed
	// message. Default 5 GiB: more than an image for a stream of unknown size
	// holds, so that whoever fills one says first what to do instead.
	Decompressed int64
}

// The default limits.
const (
	DefaultCleartext    = 64 << 20
	DefaultDecompressed = 5 << 30
)

// Options says how a message is checked.
type Options struct {
	// Pinned holds the SHA-256 (hexadecimal) of unsigned files that are
	// accepted. It comes from the configuration file and from nowhere else.
	Pinned []string
	Limits Limits
	// Ahead says that small reads cost nothing, for what is read lies in memory
	// already: then it is not copied once more.
	Ahead bool
}

// Message reads the payload of one patch file.
type Message struct {
	source *source
	body   io.Reader
	finish func(digest string) (Signature, error)

	compressed bool
	kind       SignatureKind
	hash       hash.Hash
	shared     bool // the library feeds hash
	size       int64
	sum        string // of the payload that was read to its end
	sig        Signature
	digest     string // sum, once the signature holds
	err        error

	// What was found of signatures, for a Report.
	details *openpgp.MessageDetails
	packets []byte
}

// Open begins to read a patch file: an OpenPGP signed message, binary or
// armoured, compressed or not; a cleartext signed text; or, where o.Pinned
// names its SHA-256, an unsigned file. It reads no further than to the first
// byte of the payload, but a cleartext message to its end.
//
// Errors: INVALID_PATCH []; the cause is for the log. An error of r that has a
// code of its own, or is that of a context, is given as it is.
func Open(r io.Reader, keys *Keyring, o Options) (*Message, error) {
	m := newMessage(r)
	if err := m.begin(keys, o); err != nil {
		return nil, err
	}
	return m, nil
}

func newMessage(r io.Reader) *Message {
	return &Message{source: &source{r: r}, hash: sha256.New()}
}

func (m *Message) begin(keys *Keyring, o Options) error {
	if o.Limits.Cleartext <= 0 {
		o.Limits.Cleartext = DefaultCleartext
	}
	if o.Limits.Decompressed <= 0 {
		o.Limits.Decompressed = DefaultDecompressed
	}
	if err := m.open(bufio.NewReaderSize(m.source, 256<<10), keys, o); err != nil {
		return m.coded(err)
	}
	return nil
}

func (m *Message) open(r *bufio.Reader, keys *Keyring, o Options) error {
	begin, err := r.Peek(len(CleartextBegin))
	if err != nil && err != io.EOF {
		return err
	}
	switch {
	case len(begin) == 0:
		return errors.New("the file is empty")
	case string(begin) == CleartextBegin:
		return m.openCleartext(r, keys, o)
	case bytes.HasPrefix(begin, []byte(messageBegin)):
		if line, err := readLine(r); err != nil || string(line) != messageBegin {
			return errors.New("armour: more than the type in the first line")
		}
		a, err := newArmour(r, messageKind)
		if err != nil {
			return err
		}
		return m.openInline(bufio.NewReaderSize(a, 32<<10), keys, o)
	case begin[0]&0x80 != 0:
		if o.Ahead {
			have := io.LimitReader(r, int64(r.Buffered()))
			r = bufio.NewReaderSize(io.MultiReader(have, m.source), 4<<10)
		}
		return m.openInline(r, keys, o)
	case len(o.Pinned) > 0:
		m.openPinned(r, o.Pinned)
		return nil
	}
	return errors.New("the file is not signed: sign it with `patchd patch build` or `gpg --sign`")
}

func (m *Message) openInline(r *bufio.Reader, keys *Keyring, o Options) error {
	m.kind = Inline
	first, err := r.Peek(1)
	if err != nil {
		return unexpected(err)
	}
	if isTag(first[0], tagCompressed) {
		m.compressed = true
		d, err := newDecompressor(r, o.Limits.Decompressed)
		if err != nil {
			return err
		}
		r = bufio.NewReaderSize(d, 32<<10)
	}
	f := newFramer(r)
	now := keys.now()
	md, err := openpgp.ReadMessage(f, keys.ring(now), nil, policy(now.Add(clockSkew)))
	if err != nil {
		return unexpected(err)
	}
	if !md.IsSigned || md.IsEncrypted {
		return errors.New("the message is not signed, or is encrypted")
	}
	m.body, m.details = md.UnverifiedBody, md
	m.shared = share(md, m.hash)
	m.finish = func(string) (Signature, error) {
		if !f.finished {
			return Signature{}, errors.New("the message was not read to its end")
		}
		return accept(md, Inline, keys.now())
	}
	return nil
}

func isTag(first, tag byte) bool {
	if first&0x40 != 0 {
		return first&0x3f == tag
	}
	return first&0x3f>>2 == tag
}

// openCleartext verifies the whole text at once: it is in memory anyway.
func (m *Message) openCleartext(r *bufio.Reader, keys *Keyring, o Options) error {
	m.kind = Cleartext
	payload, packets, err := readCleartext(r, o.Limits.Cleartext)
	if err != nil {
		return err
	}
	m.packets, m.size = packets, int64(len(payload))
	sig, err := checkDetached(&feeder{r: bytes.NewReader(payload)}, Signature{Kind: Cleartext, Packet: packets}, keys)
	if err != nil {
		return err
	}
	m.body, m.size = bytes.NewReader(payload), 0
	m.finish = func(string) (Signature, error) { return sig, nil }
	return nil
}

func (m *Message) openPinned(r io.Reader, pinned []string) {
	m.kind = Pinned
	m.body = r
	m.finish = func(digest string) (Signature, error) {
		if !isPinned(digest, pinned) {
			return Signature{}, fmt.Errorf("the file is not signed, and its SHA-256 %s is not pinned in the configuration", digest)
		}
		return Signature{Kind: Pinned, Hash: "SHA256"}, nil
	}
}

func isPinned(digest string, pinned []string) bool {
	return slices.ContainsFunc(pinned, func(p string) bool { return strings.EqualFold(strings.TrimSpace(p), digest) })
}

// Compressed tells whether the message begins with a compressed packet: the
// size of the payload is unknown then. Known as soon as Open has returned.
func (m *Message) Compressed() bool { return m.compressed }

// Kind is how the message claims to be signed. Known as soon as Open has
// returned; true only after io.EOF.
func (m *Message) Kind() SignatureKind { return m.kind }

// Read gives the payload. It gives io.EOF only when all of the message was
// read and its signature holds; until then the bytes are not verified.
//
// Errors: INVALID_PATCH [] as of Open. They stay: every further Read gives the
// same.
func (m *Message) Read(p []byte) (int, error) {
	if m.err != nil {
		return 0, m.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := m.body.Read(p)
	if !m.shared {
		m.hash.Write(p[:n])
	}
	m.size += int64(n)
	if err == io.EOF {
		err = m.end()
	}
	if err != nil && err != io.EOF {
		err = m.coded(err)
	}
	m.err = err
	return n, err
}

// end decides; io.EOF is yes.
func (m *Message) end() error {
	m.sum = hex.EncodeToString(m.hash.Sum(nil))
	sig, err := m.finish(m.sum)
	if err != nil {
		return err
	}
	m.sig, m.digest = sig, m.sum
	return io.EOF
}

// Signature is who signed the message: of the zero value until Read has given
// io.EOF.
func (m *Message) Signature() Signature { return m.sig }

// Digest is the SHA-256 of the payload, lower-case hexadecimal: "" until Read
// has given io.EOF.
func (m *Message) Digest() string { return m.digest }

// Size is how many bytes of the payload have been read.
func (m *Message) Size() int64 { return m.size }

// coded gives the error for a client; see Open.
func (m *Message) coded(err error) error {
	if own := m.source.err; own != nil && keepsCode(own) {
		return own
	}
	if m.source.err != nil && !errors.Is(err, m.source.err) {
		err = errors.Join(err, m.source.err)
	}
	return invalidPatch(err)
}

func keepsCode(err error) bool {
	var coded *xapi.Error
	return errors.As(err, &coded) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

func invalidPatch(cause error) error { return xapi.NewError(xapi.InvalidPatch).Because(cause) }

// source remembers the error of a reader, which the layers above it may hide.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

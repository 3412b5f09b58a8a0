package patch

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// OpenPGP packet tags that matter here (RFC 9580, 5).
const (
	tagEncryptedKey = 1
	tagSignature    = 2
	tagSymmetricKey = 3
	tagOnePass      = 4
	tagCompressed   = 8
	tagEncrypted    = 9
	tagLiteral      = 11
	tagProtected    = 18
	tagAEAD         = 20
)

// Bounds of what is not payload.
const (
	maxSignatures    = 8
	maxSignatureSize = 64 << 10 // bytes, of one packet
	maxOnePassSize   = 256      // bytes
)

// packetHeader is the head of one packet.
type packetHeader struct {
	tag     byte
	length  int64  // of the packet, or of its first part
	partial bool   // more parts follow
	endless bool   // to the end of the data (old format)
	raw     []byte // as read
}

// readPacketHeader reads one header; io.EOF means that nothing follows.
func readPacketHeader(r *bufio.Reader) (packetHeader, error) {
	first, err := r.ReadByte()
	if err != nil {
		return packetHeader{}, err
	}
	h := packetHeader{raw: []byte{first}}
	if first&0x80 == 0 {
		return h, errors.New("not an OpenPGP packet")
	}
	if first&0x40 != 0 {
		h.tag = first & 0x3f
		var raw []byte
		h.length, h.partial, raw, err = readPartLength(r)
		h.raw = append(h.raw, raw...)
		return h, err
	}
	h.tag = first & 0x3f >> 2
	if first&3 == 3 {
		h.endless = true
		return h, nil
	}
	for range 1 << (first & 3) {
		b, err := r.ReadByte()
		if err != nil {
			return h, unexpected(err)
		}
		h.raw = append(h.raw, b)
		h.length = h.length<<8 | int64(b)
	}
	return h, nil
}

// readPartLength reads a length of the new format.
func readPartLength(r *bufio.Reader) (n int64, partial bool, raw []byte, err error) {
	next := func() int64 {
		var b byte
		if err == nil {
			if b, err = r.ReadByte(); err == nil {
				raw = append(raw, b)
			}
		}
		return int64(b)
	}
	switch b := next(); {
	case err != nil:
	case b < 192:
		n = b
	case b < 224:
		n = (b-192)<<8 + next() + 192
	case b < 255:
		n, partial = 1<<(b&0x1f), true
	default:
		for range 4 {
			n = n<<8 | next()
		}
	}
	if err != nil {
		return 0, false, nil, unexpected(err)
	}
	return n, partial, raw, nil
}

// packetBody reads the body of one packet.
type packetBody struct {
	r *bufio.Reader
	packetHeader
}

// part moves to the next part once the present one is used up. It gives the
// bytes of the length; done: the packet has ended.
func (b *packetBody) part() (raw []byte, done bool, err error) {
	for b.length == 0 && b.partial {
		n, partial, more, err := readPartLength(b.r)
		if err != nil {
			return nil, false, err
		}
		raw = append(raw, more...)
		b.length, b.partial = n, partial
	}
	return raw, b.length == 0 && !b.endless, nil
}

// read reads from the present part.
func (b *packetBody) read(p []byte) (int, error) {
	if !b.endless && int64(len(p)) > b.length {
		p = p[:b.length]
	}
	n, err := b.r.Read(p)
	if !b.endless {
		b.length -= int64(n)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
	}
	return n, err
}

// Read reads the body without the lengths of its parts.
func (b *packetBody) Read(p []byte) (int, error) {
	_, done, err := b.part()
	if err != nil {
		return 0, err
	}
	if done {
		return 0, io.EOF
	}
	return b.read(p)
}

// framer passes a signed message on, byte for byte, as long as it is exactly
// that: one-pass signatures, one literal packet and as many signatures, or (old
// style) signatures and one literal packet; then the end. The library is
// lenient where it may be: it passes over unknown packets, padding, and
// whatever stands where nothing is read any more.
type framer struct {
	r        *bufio.Reader
	head     []byte // of the packet, or of its next part: to be passed on
	body     *packetBody
	onePass  int
	before   int // signatures before the literal packet
	after    int // and after it
	literal  bool
	failed   error
	finished bool
}

func newFramer(r *bufio.Reader) *framer { return &framer{r: r} }

func (f *framer) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for f.failed == nil {
		if len(f.head) > 0 {
			n := copy(p, f.head)
			f.head = f.head[n:]
			return n, nil
		}
		n, err := f.more(p)
		if n > 0 || err != nil {
			f.failed = err
			return n, err
		}
	}
	return 0, f.failed
}

// more reads of the body, or moves on to the next part or packet.
func (f *framer) more(p []byte) (int, error) {
	if f.body == nil {
		return 0, f.next()
	}
	raw, done, err := f.body.part()
	if err != nil {
		return 0, err
	}
	f.head = raw
	if done {
		f.body = nil
		return 0, nil
	}
	if len(raw) > 0 {
		return 0, nil
	}
	n, err := f.body.read(p)
	if err == io.EOF { // of an endless packet
		f.body, err = nil, nil
	}
	return n, err
}

// next begins the next packet, or ends the message.
func (f *framer) next() error {
	h, err := readPacketHeader(f.r)
	if err == io.EOF {
		if !f.literal || f.after != f.onePass {
			return fmt.Errorf("the message is cut short: %w", io.ErrUnexpectedEOF)
		}
		f.finished = true
		return io.EOF
	}
	if err != nil {
		return err
	}
	if err := f.admit(h); err != nil {
		return err
	}
	f.head = h.raw
	f.body = &packetBody{f.r, h}
	return nil
}

// admit tells whether a packet may stand here.
func (f *framer) admit(h packetHeader) error {
	switch {
	case f.literal && f.after == f.onePass:
		return errors.New("data after the end of the message")
	case h.tag == tagOnePass && !f.literal && f.before == 0 && f.onePass < maxSignatures:
		f.onePass++
		return h.bounded(maxOnePassSize)
	case h.tag == tagSignature && f.literal:
		f.after++
		return h.bounded(maxSignatureSize)
	case h.tag == tagSignature && f.onePass == 0 && f.before < maxSignatures:
		f.before++
		return h.bounded(maxSignatureSize)
	case h.tag == tagLiteral && !f.literal && f.onePass+f.before > 0:
		f.literal = true
		return nil
	}
	switch h.tag {
	case tagLiteral:
		if !f.literal {
			return errors.New("the message is not signed")
		}
	case tagCompressed:
		return errors.New("compressed data inside the message: nested messages are refused")
	case tagEncryptedKey, tagSymmetricKey, tagEncrypted, tagProtected, tagAEAD:
		return errors.New("the message is encrypted")
	}
	return fmt.Errorf("a packet with tag %d where none may stand", h.tag)
}

func (h packetHeader) bounded(most int64) error {
	if h.partial || h.endless || h.length > most {
		return fmt.Errorf("a packet with tag %d that is too long", h.tag)
	}
	return nil
}

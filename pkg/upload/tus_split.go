package upload

import "math"

// OpenPGP packet tags that a splitter knows (RFC 9580, 5).
const (
	tagCompressed = 8
	tagLiteral    = 11
)

// splitter tells, as a signed file goes by, which of its bytes are the payload
// that stands in the image, and which are around it: packet headers, signatures,
// the lengths of partial bodies. Of a file whose payload is not in it as it is
// (armoured, clear-signed, compressed), all bytes count as around it; of an
// unsigned one none do. It judges nothing: whether the file is one is told by
// pkg/patch. The zero value is at the beginning of a file.
type splitter struct {
	kind splitKind
	// of the packet: what is due next
	due    splitDue
	tag    byte
	old    byte   // old format: length bytes yet to come
	wide   byte   // new format: the same, of a length of five or two bytes
	first  byte   // of a length of two bytes
	n      uint64 // length so far
	left   int64  // bytes left of the packet or its part
	partly bool   // more parts follow
	prefix int    // bytes left before the payload of a literal packet
	named  bool   // the length of its file name is known
}

type splitKind byte

const (
	splitNew    splitKind = iota // nothing seen yet
	splitBinary                  // OpenPGP packets
	splitWhole                   // all is payload
	splitOpaque                  // nothing is
)

type splitDue byte

const (
	dueTag splitDue = iota
	dueOldLength
	dueLength
	dueMoreLength
	dueBody
)

// next tells how many of the first bytes of p, at least one, are of one kind,
// and of which.
func (s *splitter) next(p []byte) (n int, payload bool) {
	if s.kind == splitNew {
		s.begin(p[0])
	}
	switch s.kind {
	case splitWhole:
		return len(p), true
	case splitOpaque:
		return len(p), false
	}
	if s.inPayload() {
		n = int(min(int64(len(p)), s.left))
		s.take(n)
		return n, true
	}
	for n < len(p) && !s.inPayload() {
		if s.kind == splitOpaque {
			return len(p), false
		}
		s.step(p[n])
		n++
	}
	return n, false
}

func (s *splitter) begin(first byte) {
	switch {
	case first == '-':
		s.kind = splitOpaque
	case first&0x80 == 0:
		s.kind = splitWhole
	case first&0x40 != 0 && first&0x3f == tagCompressed, first&0x40 == 0 && first&0x3f>>2 == tagCompressed:
		s.kind = splitOpaque
	default:
		s.kind = splitBinary
	}
}

func (s *splitter) inPayload() bool {
	return s.due == dueBody && s.tag == tagLiteral && s.prefix == 0 && s.left > 0
}

// take passes n bytes of a body.
func (s *splitter) take(n int) {
	if s.left == math.MaxInt64 { // to the end of the file
		return
	}
	if s.left -= int64(n); s.left > 0 {
		return
	}
	s.due = dueTag
	if s.partly {
		s.due = dueLength
	}
}

// step passes one byte that is not payload.
func (s *splitter) step(b byte) {
	switch s.due {
	case dueTag:
		s.header(b)
	case dueOldLength:
		s.n = s.n<<8 | uint64(b)
		if s.old--; s.old == 0 {
			s.body(int64(s.n), false)
		}
	case dueLength:
		s.length(b)
	case dueMoreLength:
		s.n = s.n<<8 | uint64(b)
		if s.wide--; s.wide > 0 {
			return
		}
		if s.first != 0 {
			s.n = uint64(s.first-192)<<8 + s.n + 192
		}
		s.body(int64(s.n), false)
	case dueBody:
		if s.tag == tagLiteral && s.prefix > 0 {
			s.before(b)
		}
		s.take(1)
	}
}

// header begins a packet.
func (s *splitter) header(b byte) {
	s.n, s.prefix, s.named = 0, 2, false
	switch {
	case b&0x80 == 0:
		s.kind = splitOpaque
	case b&0x40 != 0:
		s.tag, s.due = b&0x3f, dueLength
	case b&3 == 3:
		s.tag = b & 0x3f >> 2
		s.body(math.MaxInt64, false)
	default:
		s.tag, s.old, s.due = b&0x3f>>2, 1<<(b&3), dueOldLength
	}
}

// length takes the first byte of a length in the new format.
func (s *splitter) length(b byte) {
	s.n, s.first = 0, 0
	switch {
	case b < 192:
		s.body(int64(b), false)
	case b < 224:
		s.first, s.wide, s.due = b, 1, dueMoreLength
	case b < 255:
		s.body(1<<(b&0x1f), true)
	default:
		s.wide, s.due = 4, dueMoreLength
	}
}

// body begins a body or its next part.
func (s *splitter) body(length int64, partly bool) {
	s.left, s.partly, s.due = length, partly, dueBody
	if length == 0 {
		s.due = dueTag
	}
}

// before takes a byte of what stands before the payload of a literal packet:
// its format, the length of a name, the name, four bytes of time.
func (s *splitter) before(byte1 byte) {
	s.prefix--
	if s.prefix == 0 && !s.named {
		s.prefix, s.named = int(byte1)+4, true
	}
}

package patch

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"hash"
	"io"
)

// ErrNoSegments is the error of a file whose payload does not stand in it byte
// for byte: it is armoured, compressed, clear-signed or not signed.
var ErrNoSegments = errors.New("the payload does not stand in the file as it is")

// Segments goes through a binary signed message and tells payload from framing:
// packet headers, signatures, and the length bytes that gpg puts before every
// 8 KiB. It verifies nothing and works in constant memory. All segments one
// after the other are the file.
//
//	for {
//		payload, err := s.Next() // io.EOF: the message has ended well
//		_, err = io.Copy(w, s)   // the bytes of the segment
//	}
type Segments struct {
	f       *framer
	payload bool // what the present segment is
	head    int  // bytes of the literal packet's own head still to come; -1, -2: not known yet
	err     error
	skipped [1]byte
}

// What is known of the head of a literal packet.
const (
	headBegins = -2 // a byte for the format, then
	headName   = -1 // one for the length of a name, then the name and four bytes
)

// NewSegments begins at the first byte of a message. The first Next says
// ErrNoSegments when it is another kind of file.
func NewSegments(r io.Reader) *Segments {
	b, ok := r.(*bufio.Reader)
	if !ok {
		b = bufio.NewReaderSize(r, 256<<10)
	}
	return &Segments{f: newFramer(b), head: headBegins}
}

// Next goes to the next segment, over what was not read of the present one, and
// tells whether it is payload. io.EOF is the end of a message that is framed as
// one must be.
//
// Errors: ErrNoSegments, those of the reader, and plain ones for what is no
// signed message. They stay.
func (s *Segments) Next() (payload bool, err error) {
	if s.err == nil && s.f.body == nil && !s.f.literal && s.f.onePass+s.f.before == 0 {
		s.err = s.begin()
	}
	if s.err == nil {
		s.err = s.skip()
	}
	if s.err == nil {
		s.err = s.advance()
	}
	if s.err != nil {
		return false, s.err
	}
	s.payload = s.inPayload()
	return s.payload, nil
}

// skip reads what is left of the present segment.
func (s *Segments) skip() error {
	if _, err := s.Read(s.skipped[:]); err == io.EOF {
		return nil
	}
	_, err := io.Copy(io.Discard, s)
	return err
}

// begin refuses what has no segments.
func (s *Segments) begin() error {
	first, err := s.f.r.Peek(1)
	if err == io.EOF {
		return ErrNoSegments
	}
	if err != nil {
		return err
	}
	if first[0]&0x80 == 0 || isTag(first[0], tagCompressed) {
		return ErrNoSegments
	}
	return nil
}

// advance makes sure that there is a byte to read; io.EOF when the message has
// ended.
func (s *Segments) advance() error {
	for len(s.f.head) == 0 {
		if s.f.body == nil {
			if err := s.f.next(); err != nil {
				return err
			}
			continue
		}
		raw, done, err := s.f.body.part()
		if err != nil {
			return err
		}
		if s.f.head = raw; len(raw) > 0 {
			return nil // a packet that has ended is left when this is read
		}
		if !done {
			return s.endless()
		}
		s.f.body = nil
	}
	return nil
}

// endless leaves a packet that ends with the data when they have.
func (s *Segments) endless() error {
	if !s.f.body.endless {
		return nil
	}
	_, err := s.f.r.Peek(1)
	if err == io.EOF {
		s.f.body = nil
		return s.advance()
	}
	return err
}

// inPayload tells what the next byte is.
func (s *Segments) inPayload() bool {
	return len(s.f.head) == 0 && s.f.body != nil && s.f.body.tag == tagLiteral && s.head == 0
}

// Read reads the present segment; io.EOF is its end.
func (s *Segments) Read(p []byte) (int, error) {
	if s.f.body == nil && len(s.f.head) == 0 || len(p) == 0 {
		return 0, io.EOF // before the first segment, or behind a packet
	}
	if s.payload != s.inPayload() || s.atEnd() {
		return 0, io.EOF
	}
	if len(s.f.head) > 0 {
		n := copy(p, s.f.head)
		s.f.head = s.f.head[n:]
		return n, nil
	}
	if s.f.body.tag == tagLiteral && s.head != 0 {
		return s.readHead(p)
	}
	n, err := s.f.body.read(p)
	if err == io.EOF && s.f.body.endless {
		s.f.body = nil
	}
	return n, err
}

// atEnd tells whether the part of the packet is used up.
func (s *Segments) atEnd() bool {
	return len(s.f.head) == 0 && !s.f.body.endless && s.f.body.length == 0
}

// readHead reads of the head of a literal packet.
func (s *Segments) readHead(p []byte) (int, error) {
	if s.head < 0 {
		p = p[:1]
	}
	n, err := s.f.body.read(p[:min(len(p), max(s.head, 1))])
	switch {
	case n == 0:
	case s.head == headBegins:
		s.head = headName
	case s.head == headName:
		s.head = int(p[0]) + 4
	default:
		s.head -= n
	}
	return n, err
}

// Outline is what can be said of a patch file without a key.
type Outline struct {
	Size int64 // of the file, in bytes
	Sum  [sha256.Size]byte
	// Segmented: NewSegments goes through the file.
	Segmented bool
	// Digest is the SHA-256 of the payload, lower-case hexadecimal, as a pool
	// records it when it accepts the file; "" when it cannot be told.
	Digest      string
	PayloadSize int64 // in bytes, where Digest is known
	// Info is what the patch will probably say when it is asked: an element that
	// stands near its beginning. Nil: there is none.
	Info *Info
}

// infoWithin is how many bytes of the payload are searched for Info.
const infoWithin = 256 << 10

// ReadOutline reads a patch file. A file that no pool would accept is no error;
// only those of r and of ctx are. Nothing is verified.
func ReadOutline(ctx context.Context, r io.ReadSeeker) (Outline, error) {
	src := &source{r: &contextReader{ctx, r}}
	sum := newAside()
	o, err := readSegmented(io.TeeReader(src, sum))
	if err != nil && src.err == nil {
		o = Outline{}
		io.Copy(sum, src) //nolint:errcheck // src keeps the error
	}
	o.Sum, o.Size = sum.close()
	if src.err != nil {
		return Outline{}, src.err
	}
	if o.Segmented {
		return o, nil
	}
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return Outline{}, err
	}
	o.readOther(src)
	return o, src.err
}

// readSegmented reads a file that has segments, and gives an error for others.
func readSegmented(r io.Reader) (Outline, error) {
	s, h, begin := NewSegments(r), sha256.New(), &head{most: infoWithin}
	o := Outline{Segmented: true}
	buf := make([]byte, 128<<10)
	for {
		payload, err := s.Next()
		if err == io.EOF {
			break
		}
		for err == nil {
			var n int
			if n, err = s.Read(buf); n > 0 && payload {
				h.Write(buf[:n])
				begin.Write(buf[:n])
				o.PayloadSize += int64(n)
			}
		}
		if err != io.EOF {
			return o, err
		}
	}
	o.Digest = hex.EncodeToString(h.Sum(nil))
	o.Info = findInfo(begin.Bytes())
	return o, nil
}

// readOther finds the digest of the payload of the other kinds of files.
func (o *Outline) readOther(src io.Reader) {
	r := bufio.NewReaderSize(src, 256<<10)
	first, err := r.Peek(len(CleartextBegin))
	if err != nil && err != io.EOF || len(first) == 0 {
		return
	}
	if string(first) == CleartextBegin {
		payload, _, err := readCleartext(r, DefaultCleartext)
		if err == nil {
			o.payload(sha256.Sum256(payload), int64(len(payload)), payload)
		}
		return
	}
	if first[0]&0x80 == 0 && !bytes.HasPrefix(first, []byte(messageBegin)) {
		o.Digest, o.PayloadSize = hex.EncodeToString(o.Sum[:]), o.Size // if it is pinned
		return
	}
	m, begin := newMessage(r), &head{most: infoWithin}
	if m.begin(NewKeyring("none", nil), Options{}) != nil {
		return
	}
	io.Copy(begin, m) //nolint:errcheck // without a key it always ends with an error
	var sum [sha256.Size]byte
	if n, err := hex.Decode(sum[:], []byte(m.sum)); err == nil && n == len(sum) {
		o.payload(sum, m.size, begin.Bytes())
	}
}

func (o *Outline) payload(sum [sha256.Size]byte, size int64, begin []byte) {
	o.Digest, o.PayloadSize, o.Info = hex.EncodeToString(sum[:]), size, findInfo(begin)
}

// findInfo gives the first element in a text that `info` could print.
func findInfo(text []byte) *Info {
	mark := []byte("<info")
	for range 16 {
		at := bytes.Index(text, mark)
		if at < 0 {
			return nil
		}
		text = text[at:]
		if end := elementEnd(text); end > 0 {
			if i, err := ParseInfo(text[:end]); err == nil {
				return &i
			}
		}
		text = text[len(mark):]
	}
	return nil
}

// elementEnd is where the element ends that text begins with; 0: nowhere.
func elementEnd(text []byte) int64 {
	d := xml.NewDecoder(bytes.NewReader(text))
	depth := 0
	for {
		t, err := d.RawToken()
		if err != nil {
			return 0
		}
		switch t.(type) {
		case xml.StartElement:
			depth++
		case xml.EndElement:
			depth--
		}
		if depth == 0 {
			return d.InputOffset()
		}
	}
}

// aside hashes what is written to it in a goroutine of its own, until close.
type aside struct {
	full, free chan []byte
	sum        chan hash.Hash
	buf        []byte
	size       int64
}

const asideChunk = 1 << 20

func newAside() *aside {
	a := &aside{full: make(chan []byte), free: make(chan []byte, 2), sum: make(chan hash.Hash), buf: make([]byte, 0, asideChunk)}
	a.free <- make([]byte, 0, asideChunk)
	go func() {
		h := sha256.New()
		for b := range a.full {
			h.Write(b)
			a.free <- b[:0]
		}
		a.sum <- h
	}()
	return a
}

func (a *aside) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), cap(a.buf)-len(a.buf))
		a.buf = append(a.buf, rest[:n]...)
		rest = rest[n:]
		if len(a.buf) == cap(a.buf) {
			a.full <- a.buf
			a.buf = <-a.free
		}
	}
	a.size += int64(len(p))
	return len(p), nil
}

// close ends the goroutine and gives sum and size of what was written.
func (a *aside) close() (sum [sha256.Size]byte, size int64) {
	a.full <- a.buf
	close(a.full)
	(<-a.sum).Sum(sum[:0])
	return sum, a.size
}

package delta

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
)

// ErrBase is the error of a delta that was made for another base: for one of
// another size, or for one whose bytes were different.
var ErrBase = errors.New("the base is not the one that the delta was made for")

const (
	maxWindow = 8 << 20   // of zstd, that a Decoder allows, in bytes
	maxSize   = 1 << 46   // of a file, in bytes
	readAhead = 256 << 10 // of the base, in bytes
	readLeast = 4 << 10
)

// Decoder gives the file that a delta makes of its base.
type Decoder struct {
	in       io.Reader
	base     io.ReaderAt
	baseSize int64

	ops     *bufio.Reader
	size    int64 // of the file; -1: not read yet
	given   int64
	hash    hash.Hash
	kind    uint64
	left    int64  // of the present operation
	from    int64  // in the base, of the present copy
	ahead   []byte // bytes of the base from byte aheadAt on
	aheadAt int64
	stride  int64 // how much was read of the base last
	buf     []byte
	err     error
}

var _ io.Reader = (*Decoder)(nil)

// NewDecoder reads the delta in r, whose base has baseSize bytes. Read gives
// io.EOF only when the delta has ended where it says and the file has the right
// size and SHA-256; whatever was given before any other error is worth nothing.
//
// Errors are those of r and of the base, ErrBase, and plain ones for a delta that
// is none. They stay.
func NewDecoder(r io.Reader, base io.ReaderAt, baseSize int64) *Decoder {
	return &Decoder{in: r, base: base, baseSize: baseSize, size: -1, hash: sha256.New()}
}

// Size reads the beginning of the delta and tells how long the file will be, in
// bytes. No more will come.
func (d *Decoder) Size() (int64, error) {
	if d.err == nil && d.size < 0 {
		d.err = d.begin()
	}
	if d.size < 0 {
		return 0, d.err
	}
	return d.size, nil
}

func (d *Decoder) begin() error {
	var magic [len(deltaMagic)]byte
	if _, err := io.ReadFull(d.in, magic[:]); err != nil {
		return bad(err)
	}
	if string(magic[:]) != deltaMagic {
		return errors.New("not a delta: it begins otherwise")
	}
	z, err := zstd.NewReader(d.in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return bad(err)
	}
	d.ops = bufio.NewReaderSize(z, 64<<10)
	baseSize, err := binary.ReadUvarint(d.ops)
	if err != nil {
		return bad(err)
	}
	size, err := binary.ReadUvarint(d.ops)
	if err != nil {
		return bad(err)
	}
	if size > maxSize {
		return fmt.Errorf("a delta of %d bytes: too large", size)
	}
	if baseSize != uint64(d.baseSize) {
		return fmt.Errorf("%w: it has %d bytes, not %d", ErrBase, d.baseSize, baseSize)
	}
	d.size = int64(size)
	return nil
}

// bad is what is said of a stream that cannot be read.
func bad(err error) error { return fmt.Errorf("the delta is damaged or cut short: %w", noEOF(err)) }

// Read gives the bytes of the file.
func (d *Decoder) Read(p []byte) (int, error) {
	if _, err := d.Size(); err != nil {
		return 0, err
	}
	total := 0
	for total < len(p) && d.err == nil {
		if d.left == 0 {
			d.err = d.next()
			continue
		}
		n, err := d.more(p[total:min(len(p), total+int(min(d.left, int64(len(p)))))])
		d.left -= int64(n)
		total += n
		d.err = err
	}
	d.hash.Write(p[:total])
	if d.err == errEnd {
		d.err = d.end()
	}
	if total > 0 && d.err != nil {
		return total, nil
	}
	return total, d.err
}

// errEnd is the end of the operations.
var errEnd = errors.New("end")

// next reads the next operation.
func (d *Decoder) next() error {
	op, err := binary.ReadUvarint(d.ops)
	if err != nil {
		return bad(err)
	}
	kind, length := op&3, int64(op>>2)
	switch {
	case kind == opEnd && length != d.given:
		return fmt.Errorf("the delta is damaged: it ends at byte %d, not %d", d.given, length)
	case kind == opEnd:
		return errEnd
	case length == 0 || length > d.size-d.given:
		return fmt.Errorf("the delta is damaged: %d bytes at byte %d of %d", length, d.given, d.size)
	case kind == opCopy:
		if err := d.seek(length); err != nil {
			return err
		}
	case kind != opData:
		return fmt.Errorf("the delta is damaged: there is no operation %d", kind)
	}
	d.kind, d.left = kind, length
	d.given += length
	return nil
}

// seek finds the place of a copy.
func (d *Decoder) seek(length int64) error {
	by, err := binary.ReadVarint(d.ops)
	if err != nil {
		return bad(err)
	}
	// Neither is negative, so this can only be too small or too large.
	if by < -d.from || by > d.baseSize-d.from || length > d.baseSize-d.from-by {
		return fmt.Errorf("the delta is damaged: a copy of %d bytes from outside of the base", length)
	}
	d.from += by
	return nil
}

// more reads some of the present operation.
func (d *Decoder) more(p []byte) (int, error) {
	if d.kind == opData {
		n, err := d.ops.Read(p)
		if err != nil {
			return n, bad(err)
		}
		return n, nil
	}
	if len(d.ahead) == 0 || d.aheadAt != d.from {
		if err := d.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, d.ahead)
	d.ahead = d.ahead[n:]
	d.aheadAt += int64(n)
	d.from += int64(n)
	return n, nil
}

// fill reads the base: what is asked, and further ahead the longer the copies
// follow each other. A delta of small copies from all over cannot make this read
// much more than it copies.
func (d *Decoder) fill() error {
	d.stride *= 2
	if d.aheadAt != d.from {
		d.stride = readLeast
	}
	want := min(max(d.left, d.stride, readLeast), readAhead, d.baseSize-d.from)
	d.stride = want
	if d.buf == nil {
		d.buf = make([]byte, readAhead)
	}
	n, err := d.base.ReadAt(d.buf[:want], d.from)
	if int64(n) < want {
		return fmt.Errorf("read the base: %w", noEOF(err))
	}
	d.ahead, d.aheadAt = d.buf[:n], d.from
	return nil
}

// end makes sure that the delta ends here, and the file is the right one.
func (d *Decoder) end() error {
	var want [sha256.Size]byte
	if _, err := io.ReadFull(d.ops, want[:]); err != nil {
		return bad(err)
	}
	if _, err := d.ops.ReadByte(); err == nil {
		return errors.New("the delta is damaged: data after its end")
	} else if err != io.EOF {
		return bad(err)
	}
	if d.given != d.size {
		return fmt.Errorf("the delta is damaged: it gives %d bytes of %d", d.given, d.size)
	}
	if !bytes.Equal(d.hash.Sum(nil), want[:]) {
		return fmt.Errorf("%w: what it gives has another SHA-256", ErrBase)
	}
	return io.EOF
}

package vdi

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// FrameKind says what a stream of frames tells about the bytes it does not name.
type FrameKind uint64

const (
	// FrameExtents describes a whole image: what no frame names is zeros.
	FrameExtents FrameKind = 1
	// FrameBlocks describes the named blocks, and nothing else.
	FrameBlocks FrameKind = 2
)

// A stream of frames: magic, kind and size of the image; then frames of offset,
// length, the SHA-256 of the data, and the data; then a frame with the offset
// frameEnd whose length is the sum of all lengths and whose SHA-256 is that of
// everything before it but the data. Numbers are little-endian and of 64 bits. A
// length with the bit frameZeros has neither SHA-256 nor data.
const (
	frameMagic  = "patchd vdi frames 1\n"
	frameHeader = len(frameMagic) + 16
	frameEnd    = 1<<64 - 1
	frameZeros  = 1 << 63
)

// ErrFrames is what a stream is that is no stream of frames, is damaged, or could
// not be read, with the error of its reader. One that is cut off is
// io.ErrUnexpectedEOF too.
var ErrFrames = errors.New("not a stream of image frames, or a damaged one")

// BlockRange is a stretch of blocks of MapBlock bytes; Last belongs to it.
type BlockRange struct{ First, Last int64 }

// ParseBlocks reads a list as in 0-3,17 of blocks of an image of size bytes,
// which may be in any order and overlap, and gives it in order.
func ParseBlocks(list string, size int64) ([]BlockRange, error) {
	var out []BlockRange
	for one := range strings.SplitSeq(list, ",") {
		a, b, isRange := strings.Cut(strings.TrimSpace(one), "-")
		if !isRange {
			b = a
		}
		first, err1 := strconv.ParseInt(a, 10, 64)
		last, err2 := strconv.ParseInt(b, 10, 64)
		if err := errors.Join(err1, err2); err != nil || first < 0 || last < first {
			return nil, fmt.Errorf("%.40q is neither a block nor a range of blocks", one)
		}
		out = append(out, BlockRange{first, last})
	}
	return JoinBlocks(out, size)
}

// JoinBlocks sorts and joins ranges of blocks of an image of size bytes.
func JoinBlocks(list []BlockRange, size int64) ([]BlockRange, error) {
	for _, r := range list {
		if r.First < 0 || r.Last < r.First || r.Last >= blocksOf(size) {
			return nil, fmt.Errorf("the image has no blocks %d-%d, only %d", r.First, r.Last, blocksOf(size))
		}
	}
	return SortBlocks(list), nil
}

// SortBlocks sorts and joins ranges of blocks in place.
func SortBlocks(list []BlockRange) []BlockRange {
	slices.SortFunc(list, func(a, b BlockRange) int { return cmp.Compare(a.First, b.First) })
	out := list[:0]
	for _, r := range list {
		if n := len(out); n > 0 && r.First <= out[n-1].Last+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
		} else {
			out = append(out, r)
		}
	}
	return out
}

// WriteExtents writes the data of an image of size bytes as frames. progress,
// when not nil, hears of the bytes of the image that are done with.
func WriteExtents(ctx context.Context, w io.Writer, f *os.File, size int64, progress func(done int64)) error {
	s, err := newFrameWriter(w, f, FrameExtents, size, progress)
	if err != nil {
		return err
	}
	defer s.in.close()
	for at := int64(0); at < size; {
		from, to, err := dataAfter(f, at, size)
		if err != nil {
			return err
		}
		if err := s.stretch(ctx, from, to, true); err != nil {
			return err
		}
		at = to
	}
	return s.end()
}

// WriteBlocks writes blocks of an image of size bytes as frames; ranges are
// those of ParseBlocks. progress is as with WriteExtents.
func WriteBlocks(ctx context.Context, w io.Writer, f *os.File, size int64, ranges []BlockRange, progress func(done int64)) error {
	s, err := newFrameWriter(w, f, FrameBlocks, size, progress)
	if err != nil {
		return err
	}
	defer s.in.close()
	for _, r := range ranges {
		if err := s.stretch(ctx, r.First*MapBlock, min((r.Last+1)*MapBlock, size), false); err != nil {
			return err
		}
	}
	return s.end()
}

// frameWriter writes one stream.
type frameWriter struct {
	w        io.Writer
	in       *image
	buf      []byte
	sum      uint64
	heads    hash.Hash // of all but the data
	progress func(done int64)
}

func newFrameWriter(w io.Writer, f *os.File, kind FrameKind, size int64, progress func(done int64)) (*frameWriter, error) {
	b := append(make([]byte, 0, frameHeader), frameMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(kind))
	b = binary.LittleEndian.AppendUint64(b, uint64(size))
	if progress == nil {
		progress = func(int64) {}
	}
	s := &frameWriter{w: w, buf: aligned(MapBlock), heads: sha256.New(), progress: progress}
	if err := s.head(b); err != nil {
		return nil, err
	}
	s.in = openImage(f, os.O_RDONLY)
	return s, nil
}

// stretch writes the frames of a stretch of the image, none longer than a block
// nor across the border of one; zeros are left out when sparse.
func (s *frameWriter) stretch(ctx context.Context, from, to int64, sparse bool) error {
	for from < to {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := s.buf[:min(to, (from/MapBlock+1)*MapBlock)-from]
		if err := s.in.readAt(b, from); err != nil {
			return fmt.Errorf("read image: %w", err)
		}
		if err := s.block(b, from, sparse); err != nil {
			return err
		}
		from += int64(len(b))
		s.progress(from)
	}
	return nil
}

// block writes what b, the bytes at off, holds: data and stretches of zeros in turn.
func (s *frameWriter) block(b []byte, off int64, sparse bool) error {
	for len(b) > 0 {
		n := leading(b, false)
		zeros := n == 0
		if zeros {
			n = leading(b, true)
		}
		if !zeros || !sparse {
			if err := s.frame(b[:n], off, zeros); err != nil {
				return err
			}
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// head writes what is not data.
func (s *frameWriter) head(b []byte) error {
	s.heads.Write(b)
	_, err := s.w.Write(b)
	return err
}

func (s *frameWriter) frame(data []byte, off int64, zeros bool) error {
	head := make([]byte, 0, 16+sha256.Size)
	head = binary.LittleEndian.AppendUint64(head, uint64(off))
	length := uint64(len(data))
	s.sum += length
	if zeros {
		return s.head(binary.LittleEndian.AppendUint64(head, length|frameZeros))
	}
	sum := sha256.Sum256(data)
	head = append(binary.LittleEndian.AppendUint64(head, length), sum[:]...)
	if err := s.head(head); err != nil {
		return err
	}
	_, err := s.w.Write(data)
	return err
}

func (s *frameWriter) end() error {
	head := binary.LittleEndian.AppendUint64(make([]byte, 0, 16), frameEnd)
	if err := s.head(binary.LittleEndian.AppendUint64(head, s.sum)); err != nil {
		return err
	}
	_, err := s.w.Write(s.heads.Sum(nil))
	return err
}

// Frame is one stretch of an image. Data is nil for zeros, and is overwritten
// by the next frame.
type Frame struct {
	Offset, Length int64
	Data           []byte
}

// FrameReader reads a stream of frames. It holds one block, whatever the stream says.
type FrameReader struct {
	Kind FrameKind
	Size int64 // of the image, in bytes

	r     io.Reader
	buf   []byte
	at    int64 // where the last frame ended
	sum   uint64
	heads hash.Hash
	done  bool
}

// NewFrameReader reads the head of a stream.
func NewFrameReader(r io.Reader) (*FrameReader, error) {
	head := make([]byte, frameHeader)
	if err := readFrame(r, head); err != nil {
		return nil, err
	}
	s := &FrameReader{
		r: r, heads: sha256.New(),
		Kind: FrameKind(binary.LittleEndian.Uint64(head[len(frameMagic):])),
		Size: int64(binary.LittleEndian.Uint64(head[len(frameMagic)+8:])),
	}
	switch {
	case string(head[:len(frameMagic)]) != frameMagic:
		return nil, ErrFrames
	case s.Kind != FrameExtents && s.Kind != FrameBlocks:
		return nil, fmt.Errorf("%w: kind %d", ErrFrames, s.Kind)
	case s.Size < 0 || s.Size > maxMapSize:
		return nil, fmt.Errorf("%w: an image of %d bytes", ErrFrames, uint64(s.Size))
	}
	s.heads.Write(head)
	return s, nil
}

// readFrame fills b; an end before that is io.ErrUnexpectedEOF.
func readFrame(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFrames, err)
	}
	return nil
}

// Next gives the next frame, io.EOF after the last. Frames are in order, do not
// overlap, lie within the image, and are not longer than a block.
func (s *FrameReader) Next() (Frame, error) {
	var head [16]byte
	if s.done {
		return Frame{}, io.EOF
	}
	if err := readFrame(s.r, head[:]); err != nil {
		return Frame{}, err
	}
	s.heads.Write(head[:])
	off, length := binary.LittleEndian.Uint64(head[:]), binary.LittleEndian.Uint64(head[8:])
	if off == frameEnd {
		return Frame{}, s.end(length)
	}
	zeros := length&frameZeros != 0
	length &^= frameZeros
	if off < uint64(s.at) || off > uint64(s.Size) || length == 0 || length > uint64(min(MapBlock, s.Size-int64(off))) {
		return Frame{}, fmt.Errorf("%w: %d bytes at %d", ErrFrames, length, off)
	}
	f := Frame{Offset: int64(off), Length: int64(length)}
	s.at, s.sum = f.Offset+f.Length, s.sum+length
	if zeros {
		return f, nil
	}
	if s.buf == nil {
		s.buf = aligned(MapBlock)
	}
	f.Data = s.buf[:length]
	return f, s.data(f)
}

// data reads the data of a frame.
func (s *FrameReader) data(f Frame) error {
	var sum [sha256.Size]byte
	if err := readFrame(s.r, sum[:]); err != nil {
		return err
	}
	s.heads.Write(sum[:])
	if err := readFrame(s.r, f.Data); err != nil {
		return err
	}
	if got := sha256.Sum256(f.Data); !bytes.Equal(got[:], sum[:]) {
		return fmt.Errorf("%w: the data at %d is not what was sent", ErrFrames, f.Offset)
	}
	return nil
}

// end reads the last frame and gives io.EOF.
func (s *FrameReader) end(length uint64) error {
	sum := make([]byte, sha256.Size)
	if err := readFrame(s.r, sum); err != nil {
		return err
	}
	if length != s.sum || !bytes.Equal(sum, s.heads.Sum(nil)) {
		return fmt.Errorf("%w: its end is that of another", ErrFrames)
	}
	s.done = true
	return io.EOF
}

// Apply writes the rest of the stream into f, which is at least as long as the
// image, and syncs it. What FrameExtents does not name becomes zeros, unless f
// is fresh and reads as zeros. What it has written when it fails stays.
func (s *FrameReader) Apply(ctx context.Context, f *os.File, fresh bool) error {
	out := openImage(f, os.O_RDWR)
	defer out.close()
	at := int64(0)
	gap := func(until int64) error {
		if fresh || s.Kind != FrameExtents || at == until {
			return nil
		}
		return out.zeroAt(at, until-at)
	}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		frame, err := s.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := errors.Join(gap(frame.Offset), out.frame(frame, fresh)); err != nil {
			return fmt.Errorf("write image: %w", err)
		}
		at = frame.Offset + frame.Length
	}
	if err := gap(s.Size); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync image: %w", err)
	}
	return nil
}

// frame writes one frame.
func (i *image) frame(f Frame, fresh bool) error {
	if f.Data != nil {
		_, err := i.place(f.Data, f.Offset, !fresh)
		return err
	}
	if fresh {
		return nil
	}
	return i.zeroAt(f.Offset, f.Length)
}

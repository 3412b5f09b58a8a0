package delta

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Index lists the chunks of a base, in order and without gaps.
type Index struct {
	Size   int64 // of the base, in bytes
	Chunks []Chunk

	bits int
}

// Chunk is one chunk of a base.
type Chunk struct {
	Off, Len int64 // in bytes
	Sum      [sha256.Size]byte
}

const (
	indexMagic = "patchd chunks 1\n"
	// maxChunks bounds an index: as many as the largest base has when all its
	// chunks are as short as can be.
	maxChunks = 4*expectedChunks + 1
	// maxBase is the size of the largest base, in bytes: 1 TiB.
	maxBase = expectedChunks << maxBits
)

// MaxIndex is the length of the longest encoded index, in bytes.
const MaxIndex = len(indexMagic) + 3*binary.MaxVarintLen64 + maxChunks*(binary.MaxVarintLen32+sha256.Size) + sha256.Size

var errIndex = errors.New("not an index of chunks, or a damaged one")

// BuildIndex reads a base of size bytes and lists its chunks. A base larger than
// 1 TiB, or one that ends early, is an error.
func BuildIndex(r io.Reader, size int64) (*Index, error) {
	return buildIndex(r, size, bitsFor(size))
}

func buildIndex(r io.Reader, size int64, bits int) (*Index, error) {
	if size < 0 || size > maxBase {
		return nil, fmt.Errorf("a base of %d bytes: at most %d can be listed", size, int64(maxBase))
	}
	ix := &Index{Size: size, bits: bits}
	c := newChunker(io.LimitReader(r, size), bits)
	for off := int64(0); ; {
		data, err := c.next()
		if err == io.EOF && off < size {
			err = fmt.Errorf("the base ends at byte %d of %d: %w", off, size, io.ErrUnexpectedEOF)
		}
		if err == io.EOF {
			return ix, nil
		}
		if err != nil {
			return nil, err
		}
		ix.Chunks = append(ix.Chunks, Chunk{off, int64(len(data)), sha256.Sum256(data)})
		off += int64(len(data))
	}
}

// Encode writes the index.
func (ix *Index) Encode(w io.Writer) error {
	h := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, h), 64<<10)
	var b []byte
	b = append(b, indexMagic...)
	b = append(b, byte(ix.bits))
	b = binary.AppendUvarint(b, uint64(ix.Size))
	b = binary.AppendUvarint(b, uint64(len(ix.Chunks)))
	for _, c := range ix.Chunks {
		if _, err := out.Write(b); err != nil {
			return err
		}
		b = binary.AppendUvarint(b[:0], uint64(c.Len))
		b = append(b, c.Sum[:]...)
	}
	if _, err := out.Write(b); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	_, err := w.Write(h.Sum(nil))
	return err
}

// ReadIndex reads an encoded index, and nothing may follow. Its memory is bounded
// by what r really holds.
func ReadIndex(r io.Reader) (*Index, error) {
	h := sha256.New()
	in := bufio.NewReaderSize(r, 64<<10)
	ix, err := readIndex(&summed{in, h})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errIndex, noEOF(err))
	}
	var sum [sha256.Size]byte
	if _, err := io.ReadFull(in, sum[:]); err != nil {
		return nil, fmt.Errorf("%w: %w", errIndex, noEOF(err))
	}
	if string(sum[:]) != string(h.Sum(nil)) {
		return nil, fmt.Errorf("%w: its SHA-256 is another", errIndex)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		return nil, fmt.Errorf("%w: data after its end", errIndex)
	}
	return ix, nil
}

func readIndex(r *summed) (*Index, error) {
	var head [len(indexMagic) + 1]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	if string(head[:len(indexMagic)]) != indexMagic {
		return nil, errors.New("it begins otherwise")
	}
	size, err := binary.ReadUvarint(r)
	if err != nil {
		return nil, err
	}
	count, err := binary.ReadUvarint(r)
	if err != nil {
		return nil, err
	}
	ix := &Index{Size: int64(size), bits: int(head[len(indexMagic)])}
	if ix.bits < minBits || ix.bits > maxBits || size > maxBase || count > maxChunks {
		return nil, fmt.Errorf("%d chunks of 2^%d bytes in %d bytes", count, ix.bits, size)
	}
	return ix, ix.readChunks(r, int(count))
}

func (ix *Index) readChunks(r *summed, count int) error {
	off := int64(0)
	for n := range count {
		length, err := binary.ReadUvarint(r)
		if err != nil {
			return err
		}
		last := n == count-1
		if length == 0 || length > uint64(maxChunk(ix.bits)) || length < uint64(minChunk(ix.bits)) && !last {
			return fmt.Errorf("chunk %d of %d has %d bytes", n, count, length)
		}
		c := Chunk{Off: off, Len: int64(length)}
		if _, err := io.ReadFull(r, c.Sum[:]); err != nil {
			return err
		}
		off += c.Len
		ix.Chunks = append(ix.Chunks, c)
	}
	if off != ix.Size {
		return fmt.Errorf("chunks of %d bytes in a base of %d", off, ix.Size)
	}
	return nil
}

// summed hashes what is read through it.
type summed struct {
	r *bufio.Reader
	h io.Writer
}

func (s *summed) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.h.Write(p[:n]) //nolint:errcheck // a hash takes everything
	return n, err
}

func (s *summed) ReadByte() (byte, error) {
	b, err := s.r.ReadByte()
	if err == nil {
		s.h.Write([]byte{b}) //nolint:errcheck // a hash takes everything
	}
	return b, err
}

// noEOF is err; an end is one that should not have come.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

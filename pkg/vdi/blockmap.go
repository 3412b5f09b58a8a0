package vdi

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
)

// MapBlock is the size of the blocks of a block map, in bytes.
const MapBlock = mib

// Map is the block map of an image: the SHA-256 of each block of MapBlock bytes
// that is not all zeros. The last block may be shorter. An image with a map
// never changes again.
type Map struct {
	Size   int64 // of the image, in bytes
	Blocks []Block
}

// Block is one block of a Map.
type Block struct {
	Index int64
	Sum   [sha256.Size]byte
}

// The encoded form: magic, size and count of blocks, then index and sum of each
// block, in order. Numbers are little-endian and of 64 bits.
const (
	mapMagic  = "patchd block map 1\n"
	mapHeader = len(mapMagic) + 16
	mapEntry  = 8 + sha256.Size
	// maxMapSize bounds the size of an image with a map: 64 TiB.
	maxMapSize = 64 << 40
)

var errMap = errors.New("not a block map, or a damaged one")

// EncodedSize is the length of the encoded form, in bytes.
func (m *Map) EncodedSize() int64 { return int64(mapHeader + mapEntry*len(m.Blocks)) }

// Encode writes the map.
func (m *Map) Encode(w io.Writer) error {
	b := make([]byte, 0, 64<<10)
	b = append(b, mapMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.Size))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(m.Blocks)))
	for _, blk := range m.Blocks {
		if len(b)+mapEntry > cap(b) {
			if _, err := w.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
		b = binary.LittleEndian.AppendUint64(b, uint64(blk.Index))
		b = append(b, blk.Sum[:]...)
	}
	_, err := w.Write(b)
	return err
}

// Digest is the SHA-256 of the encoded form, lower-case hexadecimal.
func (m *Map) Digest() string {
	h := sha256.New()
	m.Encode(h) //nolint:errcheck // a hash takes everything
	return hex.EncodeToString(h.Sum(nil))
}

// ReadMap reads an encoded map, and no further, and makes sure that it has that
// digest; "" takes any. Its memory is bounded by what r really holds.
func ReadMap(r io.Reader, digest string) (*Map, error) {
	h := sha256.New()
	r = io.TeeReader(r, h)
	head := make([]byte, mapHeader)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("%w: %w", errMap, err)
	}
	if string(head[:len(mapMagic)]) != mapMagic {
		return nil, errMap
	}
	m := &Map{Size: int64(binary.LittleEndian.Uint64(head[len(mapMagic):]))}
	count := int64(binary.LittleEndian.Uint64(head[len(mapMagic)+8:]))
	if m.Size <= 0 || m.Size > maxMapSize || count < 0 || count > blocksOf(m.Size) {
		return nil, fmt.Errorf("%w: %d blocks in %d bytes", errMap, count, m.Size)
	}
	if err := m.readBlocks(r, count); err != nil {
		return nil, err
	}
	if got := hex.EncodeToString(h.Sum(nil)); digest != "" && got != digest {
		return nil, fmt.Errorf("%w: its SHA-256 is %s, not %s", errMap, got, digest)
	}
	return m, nil
}

func (m *Map) readBlocks(r io.Reader, count int64) error {
	const batch = 1024
	buf := make([]byte, batch*mapEntry)
	last := int64(-1)
	for count > 0 {
		b := buf[:min(count, batch)*int64(mapEntry)]
		if _, err := io.ReadFull(r, b); err != nil {
			return fmt.Errorf("%w: %w", errMap, err)
		}
		for ; len(b) > 0; b = b[mapEntry:] {
			blk := Block{Index: int64(binary.LittleEndian.Uint64(b))}
			copy(blk.Sum[:], b[8:])
			if blk.Index <= last || blk.Index >= blocksOf(m.Size) {
				return fmt.Errorf("%w: block %d after %d", errMap, blk.Index, last)
			}
			last = blk.Index
			m.Blocks = append(m.Blocks, blk)
			count--
		}
	}
	return nil
}

// blocksOf is how many blocks an image of size bytes has.
func blocksOf(size int64) int64 { return (size + MapBlock - 1) / MapBlock }

// Sum gives the sum of block index; ok is false when it is all zeros.
func (m *Map) Sum(index int64) (sum [sha256.Size]byte, ok bool) {
	i, ok := m.Find(index)
	if !ok {
		return sum, false
	}
	return m.Blocks[i].Sum, true
}

// Find gives the place of block index in Blocks; ok is false when it is all zeros.
func (m *Map) Find(index int64) (at int, ok bool) {
	return slices.BinarySearchFunc(m.Blocks, index, func(b Block, index int64) int { return cmp.Compare(b.Index, index) })
}

// Span is the place of block index: its offset, and its length in bytes.
func (m *Map) Span(index int64) (off, length int64) {
	off = index * MapBlock
	return off, min(MapBlock, m.Size-off)
}

// Equal tells whether two maps say the same.
func (m *Map) Equal(o *Map) bool { return m.Size == o.Size && slices.Equal(m.Blocks, o.Blocks) }

// check tells whether data, the whole of block index, is as the map says.
func (m *Map) check(index int64, data []byte) bool {
	want, ok := m.Sum(index)
	if !ok {
		return isZero(data)
	}
	got := sha256.Sum256(data)
	return bytes.Equal(got[:], want[:])
}

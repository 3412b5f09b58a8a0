package delta

import (
	"crypto/sha256"
	"encoding/binary"
	"io"
)

// Chunks are 2^bits bytes long, more or less: from a quarter of that to four
// times as much. The last one of a payload may be shorter.
const (
	minBits = 8  // only tests go below defaultBits
	maxBits = 22 // the longest chunk has 16 MiB

	defaultBits = 16
	// expectedChunks is how many a payload is to have at most: a larger one gets
	// longer chunks. There may be four times as many, when all are short.
	expectedChunks = 1 << 18
)

func minChunk(bits int) int { return 1 << bits >> 2 }
func maxChunk(bits int) int { return 1 << bits << 2 }

// bitsFor is the length of the chunks of a payload.
func bitsFor(size int64) int {
	bits := defaultBits
	for bits < maxBits && size>>bits > expectedChunks {
		bits++
	}
	return bits
}

// gear gives each byte a random number. It is part of the format: the number of
// byte b is the first eight bytes, little-endian, of the SHA-256 of "patchd gear"
// and b.
var gear = func() (g [256]uint64) {
	for b := range g {
		sum := sha256.Sum256(append([]byte("patchd gear"), byte(b)))
		g[b] = binary.LittleEndian.Uint64(sum[:])
	}
	return g
}()

// cut gives the length of the chunk that data begins with, when data holds
// maxChunk bytes or all there are. A rolling sum of the last 64 bytes is kept; a
// chunk ends behind the byte where its highest bits are zeros. Up to the wanted
// length two more bits than on average must be zeros, beyond it two fewer:
// lengths are closer to each other that way.
func cut(data []byte, bits int) int {
	least := minChunk(bits)
	if len(data) <= least {
		return len(data)
	}
	data = data[:min(len(data), maxChunk(bits))]
	short := data[:min(len(data), 1<<bits)]
	var h uint64
	i := least
	for rare := 64 - uint(bits) - 2; i < len(short); i++ {
		h = h<<1 + gear[short[i]]
		if h>>rare == 0 {
			return i + 1
		}
	}
	for often := 64 - uint(bits) + 2; i < len(data); i++ {
		h = h<<1 + gear[data[i]]
		if h>>often == 0 {
			return i + 1
		}
	}
	return len(data)
}

// chunker cuts what it reads.
type chunker struct {
	r        io.Reader
	bits     int
	buf      []byte
	from, to int // of buf: what is read and not yet given
	err      error
}

func newChunker(r io.Reader, bits int) *chunker {
	return &chunker{r: r, bits: bits, buf: make([]byte, max(4*maxChunk(bits), 64<<10))}
}

// next gives the next chunk, which is good until the next call; io.EOF when
// there is none.
func (c *chunker) next() ([]byte, error) {
	most := maxChunk(c.bits)
	if c.to-c.from < most && c.err == nil {
		c.to = copy(c.buf, c.buf[c.from:c.to])
		c.from = 0
		var n int
		n, c.err = io.ReadFull(c.r, c.buf[c.to:])
		c.to += n
		if c.err == io.ErrUnexpectedEOF {
			c.err = io.EOF
		}
	}
	if c.err != nil && c.err != io.EOF {
		return nil, c.err
	}
	if c.from == c.to {
		return nil, io.EOF
	}
	chunk := c.buf[c.from:c.to]
	chunk = chunk[:cut(chunk, c.bits)]
	c.from += len(chunk)
	return chunk, nil
}

package delta

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// deltaMagic begins a delta; a zstd stream of the size of the base, that of the
// file, and operations follows.
const deltaMagic = "patchd delta 1\n"

// The operations: an unsigned varint whose lowest two bits are the kind and
// whose rest is a length in bytes.
const (
	opEnd  = 0 // the length is that of the file; its SHA-256 follows, and no more
	opCopy = 1 // a signed varint follows: where in the base, counted from the end of the last copy
	opData = 2 // the bytes follow
)

const (
	dataRun = 64 << 10 // the longest opData that Encode writes
	window  = 1 << 20  // of zstd, in bytes
)

// Source reads a file piece by piece.
type Source interface {
	// Next goes to the next segment and tells whether it is payload; io.EOF
	// after the last one.
	Next() (payload bool, err error)
	// Read reads the present segment, and gives io.EOF at its end.
	Read(p []byte) (int, error)
}

// File is what a delta is to give.
type File struct {
	Source Source // at the beginning of the file
	Size   int64  // in bytes
	Sum    [sha256.Size]byte
}

// Encode writes the delta that makes f of the base that ix lists. It reads the
// file once, and needs about 100 bytes of memory for each chunk of the base. A
// file that is not of that size is an error; its sum is believed.
func Encode(w io.Writer, f File, ix *Index) error {
	if _, err := io.WriteString(w, deltaMagic); err != nil {
		return err
	}
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return err
	}
	e := &encoder{out: z, ix: ix, known: make(map[[sha256.Size]byte]int, len(ix.Chunks)), last: -1}
	for i, c := range ix.Chunks {
		if _, ok := e.known[c.Sum]; !ok {
			e.known[c.Sum] = i
		}
	}
	err = e.encode(f)
	if err != nil {
		z.Reset(nil)
		return err
	}
	return z.Close()
}

type encoder struct {
	out   io.Writer
	ix    *Index
	known map[[sha256.Size]byte]int // the first chunk with that sum
	last  int                       // the chunk that was copied last; -1: none

	tap  tap
	at   int64 // payload that is encoded
	sent int64 // bytes of the file that are encoded

	data      []byte // of an opData that is not written yet
	from, n   int64  // an opCopy that is not written yet
	copiedEnd int64  // in the base, of the last opCopy
}

func (e *encoder) encode(f File) error {
	b := binary.AppendUvarint(nil, uint64(e.ix.Size))
	b = binary.AppendUvarint(b, uint64(f.Size))
	if _, err := e.out.Write(b); err != nil {
		return err
	}
	e.tap = tap{src: f.Source}
	c := newChunker(&e.tap, e.ix.bits)
	for {
		data, err := c.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := e.chunk(data); err != nil {
			return err
		}
	}
	for _, m := range e.tap.marks {
		if err := e.putData(m.framing); err != nil {
			return err
		}
	}
	if err := e.flush(); err != nil {
		return err
	}
	if e.sent != f.Size {
		return fmt.Errorf("the file changed while it was read: it has %d bytes, not %d", e.sent, f.Size)
	}
	b = binary.AppendUvarint(nil, uint64(e.sent)<<2|opEnd)
	_, err := e.out.Write(append(b, f.Sum[:]...))
	return err
}

// chunk encodes the next chunk of the payload and the framing within it.
func (e *encoder) chunk(data []byte) error {
	base := int64(-1)
	if i := e.find(sha256.Sum256(data)); i >= 0 {
		base, e.last = e.ix.Chunks[i].Off, i
	}
	end := e.at + int64(len(data))
	for e.at < end {
		n := end - e.at
		if len(e.tap.marks) > 0 {
			m := e.tap.marks[0]
			if m.at == e.at {
				if err := e.putData(m.framing); err != nil {
					return err
				}
				e.tap.marks = e.tap.marks[1:]
				continue
			}
			n = min(n, m.at-e.at)
		}
		var err error
		if base >= 0 {
			err = e.putCopy(base, n)
			base += n
		} else {
			err = e.putData(data[:n])
		}
		if err != nil {
			return err
		}
		data = data[n:]
		e.at += n
	}
	return nil
}

// find gives a chunk of the base with that sum, or -1: the one behind the last
// where that fits, for then the copy goes on.
func (e *encoder) find(sum [sha256.Size]byte) int {
	if i := e.last + 1; e.last >= 0 && i < len(e.ix.Chunks) && e.ix.Chunks[i].Sum == sum {
		return i
	}
	if i, ok := e.known[sum]; ok {
		return i
	}
	return -1
}

func (e *encoder) putCopy(from, n int64) error {
	if e.n > 0 && e.from+e.n == from {
		e.n += n
		return nil
	}
	if err := e.flush(); err != nil {
		return err
	}
	e.from, e.n = from, n
	return nil
}

func (e *encoder) putData(b []byte) error {
	if e.n > 0 {
		if err := e.flush(); err != nil {
			return err
		}
	}
	for len(b) > 0 {
		n := min(len(b), dataRun-len(e.data))
		e.data = append(e.data, b[:n]...)
		b = b[n:]
		if len(e.data) == dataRun {
			if err := e.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush writes the operation that was gathered.
func (e *encoder) flush() error {
	var b []byte
	switch {
	case e.n > 0:
		b = binary.AppendUvarint(nil, uint64(e.n)<<2|opCopy)
		b = binary.AppendVarint(b, e.from-e.copiedEnd)
		e.copiedEnd = e.from + e.n
		e.sent += e.n
		e.n = 0
	case len(e.data) > 0:
		b = binary.AppendUvarint(nil, uint64(len(e.data))<<2|opData)
		b = append(b, e.data...)
		e.sent += int64(len(e.data))
		e.data = e.data[:0]
	}
	_, err := e.out.Write(b)
	return err
}

// maxFraming is the most framing in one place, in bytes.
const maxFraming = 1 << 20

// tap reads the payload of a Source and notes the framing it meets.
type tap struct {
	src     Source
	payload bool
	within  bool // a segment
	at      int64
	marks   []mark
}

// mark is framing that stands before byte at of the payload.
type mark struct {
	at      int64
	framing []byte
}

func (t *tap) Read(p []byte) (int, error) {
	for {
		if !t.within {
			payload, err := t.src.Next()
			if err != nil {
				return 0, err
			}
			t.payload, t.within = payload, true
		}
		if !t.payload {
			framing, err := io.ReadAll(io.LimitReader(t.src, maxFraming+1))
			if err != nil {
				return 0, err
			}
			if len(framing) > maxFraming {
				return 0, fmt.Errorf("more than %d bytes that are no payload", maxFraming)
			}
			t.marks = append(t.marks, mark{t.at, framing})
			t.within = false
			continue
		}
		n, err := t.src.Read(p)
		t.at += int64(n)
		if err == io.EOF {
			t.within, err = false, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

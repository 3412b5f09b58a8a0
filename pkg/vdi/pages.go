package vdi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/diskfs/go-diskfs/backend"
)

// blockSize is the block size of every filesystem made here.
const blockSize = 4096

var zeroBlock [blockSize]byte

// pages is an image in memory that keeps only what is not zero, by blocks. The
// layout writer works on it; what it reserves but never writes takes no room.
// Over an image that is there it keeps what was changed. It is used by one
// goroutine.
type pages struct {
	size int64
	m    map[int64][]byte // by block number
	base io.ReaderAt      // what is below; nil: zeros
}

var (
	_ backend.Storage      = (*pages)(nil)
	_ backend.WritableFile = (*pages)(nil)
)

var errNoFile = errors.New("an image in memory has no file")

// ReadAt reads p; where nothing was written, what is below.
func (m *pages) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > m.size {
		return 0, io.ErrUnexpectedEOF
	}
	for n := 0; n < len(p); {
		at := off + int64(n)
		in := at % blockSize
		k := min(len(p)-n, int(blockSize-in))
		if pg, ok := m.m[at/blockSize]; ok {
			copy(p[n:n+k], pg[in:])
		} else if m.base == nil {
			clear(p[n : n+k])
		} else if _, err := m.base.ReadAt(p[n:n+k], at); err != nil {
			return n, err
		}
		n += k
	}
	return len(p), nil
}

// WriteAt writes p. Zeros do not make a block that is not there yet.
func (m *pages) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > m.size {
		return 0, fmt.Errorf("write of %d bytes at %d, beyond the image's %d", len(p), off, m.size)
	}
	for n := 0; n < len(p); {
		at := off + int64(n)
		in := at % blockSize
		k := min(len(p)-n, int(blockSize-in))
		pg, ok := m.m[at/blockSize]
		if !ok {
			if m.base == nil && isZero(p[n:n+k]) {
				n += k
				continue
			}
			pg = make([]byte, blockSize)
			if m.base != nil {
				if _, err := m.base.ReadAt(pg, at-in); err != nil {
					return n, err
				}
			}
			m.m[at/blockSize] = pg
		}
		copy(pg[in:], p[n:n+k])
		n += k
	}
	return len(p), nil
}

// load takes over what is not zero in f.
func (m *pages) load(f *os.File) error {
	buf := make([]byte, mib)
	for at := int64(0); at < m.size; {
		from, to, err := dataAfter(f, at, m.size)
		if err != nil {
			return err
		}
		for from < to {
			n := min(to-from, mib)
			if _, err := f.ReadAt(buf[:n], from); err != nil {
				return err
			}
			if _, err := m.WriteAt(buf[:n], from); err != nil {
				return err
			}
			from += n
		}
		at = to
	}
	return nil
}

// blocks are the numbers of the blocks that are kept, in order.
func (m *pages) blocks() []int64 {
	blocks := make([]int64, 0, len(m.m))
	for b, pg := range m.m {
		if m.base == nil && isZero(pg) {
			continue
		}
		blocks = append(blocks, b)
	}
	slices.Sort(blocks)
	return blocks
}

// writeTo writes every block to its place in w, neighbours in one piece.
func (m *pages) writeTo(w io.WriterAt) error {
	blocks := m.blocks()
	for i := 0; i < len(blocks); {
		j := i + 1
		for j < len(blocks) && blocks[j] == blocks[j-1]+1 && j-i < 256 {
			j++
		}
		buf := make([]byte, 0, (j-i)*blockSize)
		for _, b := range blocks[i:j] {
			buf = append(buf, m.m[b]...)
		}
		if _, err := w.WriteAt(buf, blocks[i]*blockSize); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// The rest makes pages a backend.Storage; the layout writer uses none of it.

func (m *pages) Writable() (backend.WritableFile, error) { return m, nil }
func (m *pages) Sys() (*os.File, error)                  { return nil, errNoFile }
func (m *pages) Path() string                            { return "" }
func (m *pages) Stat() (fs.FileInfo, error)              { return nil, errNoFile }
func (m *pages) Read([]byte) (int, error)                { return 0, errNoFile }
func (m *pages) Seek(int64, int) (int64, error)          { return 0, errNoFile }
func (m *pages) Close() error                            { return nil }

// isZero tells whether p holds nothing but zeros.
func isZero(p []byte) bool {
	for len(p) > blockSize {
		if !bytes.Equal(p[:blockSize], zeroBlock[:]) {
			return false
		}
		p = p[blockSize:]
	}
	return bytes.Equal(p, zeroBlock[:len(p)])
}

package vdi

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// Payload is `patch` inside an image that is not mounted. Many goroutines may
// read it.
type Payload struct {
	f    io.ReaderAt
	size int64
	runs []run
	ends []int64 // offset in the file where each run ends
}

// OpenPayload finds `patch` in an image that was made here. The Payload is
// valid while f is open and the image does not change.
func OpenPayload(f *os.File) (*Payload, error) {
	v, err := openExt4(f)
	if err != nil {
		return nil, fmt.Errorf("open payload: %w", err)
	}
	inode, err := v.lookup(FileName)
	if err != nil {
		return nil, fmt.Errorf("open payload: %w", err)
	}
	runs, size, err := v.extents(inode)
	if err != nil {
		return nil, fmt.Errorf("open payload: %w", err)
	}
	if countBlocks(runs) != blocksFor(size) {
		return nil, fmt.Errorf("open payload: %d bytes in %d blocks", size, countBlocks(runs))
	}
	return newPayload(f, runs, size), nil
}

func newPayload(f io.ReaderAt, runs []run, size int64) *Payload {
	p := &Payload{f: f, size: size, runs: slices.Clone(runs)}
	at := int64(0)
	for _, r := range runs {
		at += r.count * blockSize
		p.ends = append(p.ends, at)
	}
	return p
}

// Size is the length of the payload in bytes.
func (p *Payload) Size() int64 { return p.size }

// ReadAt implements io.ReaderAt.
func (p *Payload) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read before the beginning of the payload")
	}
	n := 0
	for n < len(b) {
		if off >= p.size {
			return n, io.EOF
		}
		i, found := slices.BinarySearch(p.ends, off)
		if found {
			i++
		}
		r := p.runs[i]
		in := off - (p.ends[i] - r.count*blockSize)
		k := min(int64(len(b)-n), r.count*blockSize-in, p.size-off)
		if got, err := p.f.ReadAt(b[n:n+int(k)], r.start*blockSize+in); err != nil {
			return n + got, fmt.Errorf("read payload: %w", err)
		}
		n, off = n+int(k), off+k
	}
	return n, nil
}

// Fits tells whether a payload of that many bytes can be written over a copy of
// the image in f (Options.Over): it was made here for virtualSize bytes, and
// its `patch` takes just as many blocks.
func Fits(f *os.File, virtualSize, payload int64) (bool, error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false, fmt.Errorf("image: %w", err)
	}
	size := min(virtualSize, maxSize)
	if end < virtualSize || payload < 0 || size < minSize {
		return false, nil
	}
	if _, err := f.ReadAt(make([]byte, blockSize), 0); err != nil {
		return false, fmt.Errorf("read image: %w", err)
	}
	l, err := openFileLayout(&pages{size: size, m: map[int64][]byte{}, base: f})
	if err != nil {
		return false, nil //nolint:nilerr // an image of another kind does not fit
	}
	return countBlocks(l.rows) == blocksFor(payload), nil
}

package vdi

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/patchd/patchd/pkg/fault"
)

// ErrWrongBlock is what a block is that does not have the sum its map says.
var ErrWrongBlock = errors.New("the block is not as the map says")

// Stored is an image that is open to be read, with its map.
type Stored struct {
	Map  *Map
	File *os.File
	// Damaged hears of a block that is not as the map says; nil: nobody does.
	Damaged func(index int64)
	// Gone is closed when somebody wants the image for himself, and waits for
	// Close; nil: nobody does.
	Gone <-chan struct{}
	// Close gives the image back; File is closed by it.
	Close func()
}

// Filling is an image that is made from blocks as they come, in any order and
// from many goroutines. No block is written that is not as the map says.
type Filling struct {
	m  *Map
	to *image
	// dirty tells, of each block of the map, that the image held something else.
	dirty []bool
}

// Fill begins to fill f, which has at least the length of m, and tells which of
// the blocks of m, by their place in it, it has already. A block device that is
// not resumed is taken to read as zeros. What f has beside the blocks of m
// is made zeros. progress, when not nil, hears of the bytes that were looked at and
// found good; its calls do not overlap.
func Fill(ctx context.Context, f *os.File, m *Map, resume bool, progress func(done, total int64)) (g *Filling, good []bool, err error) {
	end, longer, err := measure(f)
	if err == nil && end != m.Size && (end < m.Size || !longer) {
		err = fmt.Errorf("the image has %d bytes, not %d", end, m.Size)
	}
	if err != nil {
		return nil, nil, err
	}
	g = &Filling{m: m, to: openImage(f, os.O_RDWR), dirty: make([]bool, len(m.Blocks))}
	good = make([]bool, len(m.Blocks))
	fresh, err := isFresh(f, resume)
	if err == nil && !fresh {
		err = g.look(ctx, good, progress)
	}
	if err != nil {
		g.Close()
		return nil, nil, err
	}
	return g, good, nil
}

// look finds out what the image has already.
func (g *Filling) look(ctx context.Context, good []bool, tell func(done, total int64)) error {
	p := newProgress(g.m, tell)
	emit := func(emit func(span) error) error {
		return eachData(g.to.f, g.m.Size, func(first, end int64) error { return g.m.spans(first, end, 1, emit) })
	}
	return work(ctx, MapBlock, emit, func(_ context.Context, s span, buf []byte) error {
		at, mapped := g.m.Find(s.off / MapBlock)
		if err := g.to.readAt(buf, s.off); err != nil {
			return fmt.Errorf("read block %d: %w", s.off/MapBlock, err)
		}
		if g.m.check(s.off/MapBlock, buf) {
			if mapped {
				good[at] = true
				p.add(s.n)
			}
			return nil
		}
		if mapped {
			g.dirty[at] = true
			return nil
		}
		return g.to.zeroAt(s.off, s.n)
	})
}

// Put writes block at, by its place in the map. ErrWrongBlock when data is not
// that block: then nothing was written.
func (g *Filling) Put(at int, data []byte) error {
	b := g.m.Blocks[at]
	off, length := g.m.Span(b.Index)
	if int64(len(data)) != length || !g.m.check(b.Index, data) {
		return ErrWrongBlock
	}
	if err := fault.Point("vdi.block"); err != nil {
		return err
	}
	if _, err := g.to.place(data, off, g.dirty[at]); err != nil {
		return fmt.Errorf("write block %d: %w", b.Index, err)
	}
	return fault.Point("vdi.block.done")
}

// Get reads block at, by its place in the map, into data, which has its length.
// ErrWrongBlock when the image does not hold it.
func (g *Filling) Get(at int, data []byte) error {
	b := g.m.Blocks[at]
	return g.m.ReadBlock(g.to.f, b.Index, data)
}

// Sync makes what was written durable.
func (g *Filling) Sync() error { return g.to.f.Sync() }

// Close ends the filling; the file stays open.
func (g *Filling) Close() { g.to.close() }

// ReadBlock reads block index of an image into data, which has its length.
// ErrWrongBlock when the image does not hold it as the map says.
func (m *Map) ReadBlock(f *os.File, index int64, data []byte) error {
	off, _ := m.Span(index)
	if _, err := f.ReadAt(data, off); err != nil {
		return fmt.Errorf("read block %d: %w", index, err)
	}
	if !m.check(index, data) {
		return ErrWrongBlock
	}
	return nil
}

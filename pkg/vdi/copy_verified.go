package vdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/fault"
)

// CopyOptions steer CopyVerified.
type CopyOptions struct {
	// Resume goes on with a copy that was interrupted, or that somebody may have
	// written to: blocks of dst that are as the map says are kept, everything
	// else is written or made zeros. Without it dst must read as zeros.
	Resume bool
	// Progress hears of the bytes that are done and of those to do, counted in
	// whole blocks; its calls do not overlap.
	Progress func(done, total int64)

	point func(name string) error // stands in for fault.Point
}

// CopyVerified makes dst the image that m describes, from src: each block goes
// through SHA-256 on its way and is written only when it is as the map says.
// Where src should hold nothing it is made sure that it holds zeros. Holes stay
// holes. Where one filesystem holds both and clones, dst is a clone and is read
// instead. dst is synced at the end. moved is how many bytes were written.
//
// dst is as long as the map's Size, or is a block device that is longer. A block
// of src that is damaged ends the copy with a *DamageError; what dst holds then
// is of no use but to Resume. A full disk keeps errors.Is(err, syscall.ENOSPC).
func CopyVerified(ctx context.Context, dst, src *os.File, m *Map, o CopyOptions) (moved int64, err error) {
	if o.point == nil {
		o.point = fault.Point
	}
	if err := m.checkLengths(dst, src); err != nil {
		return 0, err
	}
	if err := errors.Join(context.Cause(ctx), o.point("vdi.copy")); err != nil {
		return 0, err
	}
	fresh, err := isFresh(dst, o.Resume)
	if err != nil {
		return 0, err
	}
	if fresh && clone(dst, src) {
		err = m.Verify(ctx, dst, o.Progress)
	} else {
		moved, err = m.copyBlocks(ctx, dst, src, o, fresh)
	}
	if err != nil {
		return moved, err
	}
	if err := dst.Sync(); err != nil {
		return moved, fmt.Errorf("copy image: sync: %w", err)
	}
	return moved, o.point("vdi.copy.done")
}

// checkLengths refuses a target that is not as long as the map says, and finds
// a source damaged that is not.
func (m *Map) checkLengths(dst, src *os.File) error {
	end, longer, err := measure(dst)
	if err == nil && end != m.Size && (end < m.Size || !longer) {
		err = fmt.Errorf("copy image: the target has %d bytes, not %d", end, m.Size)
	}
	if err != nil {
		return err
	}
	end, longer, err = measure(src)
	if err == nil && end != m.Size && (end < m.Size || !longer) {
		return &DamageError{Blocks: []int64{min(end, m.Size) / MapBlock}, Total: 1, Size: end, Want: m.Size}
	}
	return err
}

// isFresh tells whether a target needs no look at what it holds: a file that is
// one hole, or a block device that the caller says reads as zeros.
func isFresh(f *os.File, resume bool) (bool, error) {
	_, device, err := measure(f)
	if err != nil || device {
		return !resume, err
	}
	_, err = unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return true, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return !resume, nil
	case err != nil:
		return false, fmt.Errorf("find data: %w", err)
	}
	return false, nil
}

func (m *Map) copyBlocks(ctx context.Context, dst, src *os.File, o CopyOptions, fresh bool) (moved int64, err error) {
	from := openImage(src, os.O_RDONLY)
	defer from.close()
	c := newMender(m, dst, []source{from}, o.Progress)
	defer c.to.close()
	c.strict, c.point = true, o.point
	err = work(ctx, copyStep, func(emit func(span) error) error {
		if fresh {
			err = c.emitAll(emit)
		} else {
			err = c.emitBad(emit)
		}
		if err != nil {
			return err
		}
		return c.emitUnmapped(src, emit)
	}, c.do)
	return c.moved, err
}

// Repair makes f the image that m describes again: every block that is not as
// the map says is taken from the first of sources that has it as the map says,
// and what the map does not have is made zeros. Then f is synced and verified as
// a whole. repaired is how many blocks were written or made zeros. It may be
// interrupted and called again.
//
// No byte is written that was not checked. Blocks that no source has are left as
// they are and named by a *DamageError. progress, when not nil, hears of the
// bytes looked at and of those to be looked at; its calls do not overlap.
func Repair(ctx context.Context, f *os.File, m *Map, sources []io.ReaderAt, progress func(done, total int64)) (repaired int64, err error) {
	return m.repair(ctx, f, sources, progress, fault.Point)
}

func (m *Map) repair(ctx context.Context, f *os.File, sources []io.ReaderAt, progress func(done, total int64), point func(string) error) (repaired int64, err error) {
	if err := m.restoreLength(f); err != nil {
		return 0, err
	}
	var from []source
	for _, s := range sources {
		from = append(from, plainSource{s})
	}
	c := newMender(m, f, from, progress)
	defer c.to.close()
	c.point = point
	if err := work(ctx, copyStep, c.emitBad, c.do); err != nil {
		return c.mended, err
	}
	if err := f.Sync(); err != nil {
		return c.mended, fmt.Errorf("repair image: sync: %w", err)
	}
	if c.left.Total > 0 {
		return c.mended, &c.left
	}
	if c.mended == 0 {
		return 0, nil
	}
	return c.mended, m.Verify(ctx, f, nil)
}

// restoreLength gives a file the length of its map.
func (m *Map) restoreLength(f *os.File) error {
	end, device, err := measure(f)
	switch {
	case err != nil || end == m.Size || device && end > m.Size:
		return err
	case device:
		return &DamageError{Blocks: []int64{end / MapBlock}, Total: 1, Size: end, Want: m.Size}
	}
	if err := f.Truncate(m.Size); err != nil {
		return fmt.Errorf("length of image: %w", err)
	}
	return nil
}

// source is where blocks come from.
type source interface {
	readAt(b []byte, off int64) error
}

// plainSource is a source that reads as it likes.
type plainSource struct{ r io.ReaderAt }

func (s plainSource) readAt(b []byte, off int64) error {
	n, err := s.r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// The kinds of span a mender works on.
const (
	fetchMissing  = iota // blocks that the target does not have
	checkTarget          // one block that it has
	checkUnmapped        // one block of the source that must be zeros
)

// mender makes an image as its map says.
type mender struct {
	m        *Map
	to       *image
	from     []source
	strict   bool // a block that no source has ends the work
	point    func(name string) error
	progress *progress

	mu     sync.Mutex
	moved  int64 // bytes
	mended int64 // blocks
	left   DamageError
}

func newMender(m *Map, f *os.File, from []source, tell func(done, total int64)) *mender {
	return &mender{m: m, to: openImage(f, os.O_RDWR), from: from, point: fault.Point, progress: newProgress(m, tell)}
}

// emitMissing gives a stretch of blocks that are to be fetched.
func (c *mender) emitMissing(first, end int64, emit func(span) error) error {
	return c.m.spans(first, end, copyStep/MapBlock, emit)
}

// emitAll gives every block of the map.
func (c *mender) emitAll(emit func(span) error) error {
	b := c.m.Blocks
	for i := 0; i < len(b); {
		j := i + 1
		for j < len(b) && b[j].Index == b[j-1].Index+1 {
			j++
		}
		if err := c.emitMissing(b[i].Index, b[j-1].Index+1, emit); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// emitBad gives what the target holds, to be looked at, and what it lacks.
func (c *mender) emitBad(emit func(span) error) error {
	return c.m.divide(c.to.f, c.m.Size, func(first, end int64) error {
		return c.m.spans(first, end, 1, func(s span) error {
			s.kind = checkTarget
			return emit(s)
		})
	}, func(first, end int64) error { return c.emitMissing(first, end, emit) })
}

// emitUnmapped gives the blocks of the source that hold data the map knows nothing of.
func (c *mender) emitUnmapped(src *os.File, emit func(span) error) error {
	return eachData(src, c.m.Size, func(first, end int64) error {
		for i := first; i < end; i++ {
			if _, ok := c.m.Sum(i); ok {
				continue
			}
			off, n := c.m.Span(i)
			if err := emit(span{off, n, checkUnmapped}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *mender) do(_ context.Context, s span, buf []byte) error {
	var err error
	switch s.kind {
	case fetchMissing:
		err = c.fetch(s, buf, false)
	case checkTarget:
		err = c.check(s, buf)
	case checkUnmapped:
		if err = c.from[0].readAt(buf, s.off); err == nil && !isZero(buf) {
			err = damaged(s.off)
		}
	}
	if err != nil {
		return err
	}
	if s.kind != checkUnmapped {
		c.progress.add(s.n)
	}
	return nil
}

func damaged(off int64) error { return &DamageError{Blocks: []int64{off / MapBlock}, Total: 1} }

// check looks at one block of the target, and mends it.
func (c *mender) check(s span, buf []byte) error {
	index := s.off / MapBlock
	if err := c.to.readAt(buf, s.off); err == nil && c.m.check(index, buf) {
		return nil
	} else if err != nil && !errors.Is(err, unix.EIO) {
		return fmt.Errorf("read block %d: %w", index, err)
	}
	if _, ok := c.m.Sum(index); ok {
		return c.fetch(s, buf, true)
	}
	return c.write(s, func() (int64, error) { return 0, c.to.zeroAt(s.off, s.n) })
}

// fetch takes blocks from a source and writes them.
func (c *mender) fetch(s span, buf []byte, dirty bool) error {
	if len(c.from) > 0 && c.from[0].readAt(buf, s.off) == nil && c.allGood(s, buf) {
		return c.write(s, func() (int64, error) { return c.to.place(buf, s.off, dirty) })
	}
	return c.m.spans(s.off/MapBlock, (s.off+s.n+MapBlock-1)/MapBlock, 1, func(s span) error {
		return c.fetchOne(s, buf[:s.n], dirty)
	})
}

func (c *mender) allGood(s span, buf []byte) bool {
	for at := int64(0); at < s.n; at += MapBlock {
		if !c.m.check((s.off+at)/MapBlock, buf[at:min(at+MapBlock, s.n)]) {
			return false
		}
	}
	return true
}

// fetchOne takes one block from the first source that has it.
func (c *mender) fetchOne(s span, buf []byte, dirty bool) error {
	var failed error
	for _, src := range c.from {
		if err := src.readAt(buf, s.off); err != nil {
			failed = err
		} else if c.allGood(s, buf) {
			return c.write(s, func() (int64, error) { return c.to.place(buf, s.off, dirty) })
		}
	}
	if c.strict && (failed == nil || errors.Is(failed, unix.EIO) || errors.Is(failed, io.ErrUnexpectedEOF)) {
		return errors.Join(damaged(s.off), failed)
	}
	if c.strict {
		return fmt.Errorf("read block %d: %w", s.off/MapBlock, failed)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left.add(s.off / MapBlock)
	return nil
}

// write changes the target between two points.
func (c *mender) write(s span, change func() (moved int64, err error)) error {
	if err := c.point("vdi.block"); err != nil {
		return err
	}
	moved, err := change()
	c.mu.Lock()
	c.moved += moved
	c.mended += (s.n + MapBlock - 1) / MapBlock
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("write block %d: %w", s.off/MapBlock, err)
	}
	return c.point("vdi.block.done")
}

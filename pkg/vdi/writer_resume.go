package vdi

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// prepare looks at an image that is not fresh: it finds the blocks of `patch`
// and those that are filled, and makes sure that the rest of an interrupted
// image reads as zeros.
func (w *Writer) prepare(expect int64) error {
	if w.o.Done == 0 && !w.o.Over {
		return nil
	}
	err := effect("vdi.layout", func() (err error) {
		if w.o.Over {
			w.layout, err = openOver(w.f, w.size, expect)
			return err
		}
		w.layout, err = newLayout(w.ctx, w.size, w.o)
		return err
	})
	if err != nil {
		return err
	}
	for n := w.o.Done / blockSize; n > 0; {
		r, err := w.reserve(n)
		if err != nil {
			return err
		}
		w.prior = appendRun(w.prior, r)
		n -= r.count
	}
	w.resume = newPayload(w.f, w.prior, w.o.Done)
	w.flushed.Store(w.o.Done)
	if w.o.Over {
		return nil
	}
	return effect("vdi.clear", func() error { return clearOutside(w.f, w.prior, w.size) })
}

// openOver finds `patch` in a copy of an earlier image.
func openOver(f *os.File, size, expect int64) (layouter, error) {
	l, err := openFileLayout(&pages{size: size, m: map[int64][]byte{}, base: f})
	if err != nil {
		return nil, fmt.Errorf("image to write over: %w", err)
	}
	if has := countBlocks(l.rows); expect >= 0 && has != blocksFor(expect) {
		return nil, fmt.Errorf("image to write over: `patch` has %d blocks, %d are needed", has, blocksFor(expect))
	}
	return l, nil
}

func countBlocks(runs []run) (n int64) {
	for _, r := range runs {
		n += r.count
	}
	return n
}

// Resume reads the first Done bytes of the payload back from the image. It may
// be read while they are given to Write.
func (w *Writer) Resume() io.Reader {
	if w.resume == nil {
		return strings.NewReader("")
	}
	return io.NewSectionReader(w.resume, 0, w.o.Done)
}

// clearOutside makes everything but the runs, which are in order of the disk,
// read as zeros.
func clearOutside(f *os.File, keep []run, size int64) error {
	at := int64(0)
	for _, r := range keep {
		if err := zeroRange(f, at, r.start*blockSize-at); err != nil {
			return err
		}
		at = (r.start + r.count) * blockSize
	}
	return zeroRange(f, at, size-at)
}

// zeroRange makes n bytes at off read as zeros, and gives their room back where
// the storage can.
func zeroRange(f *os.File, off, n int64) error {
	if n <= 0 {
		return nil
	}
	for _, mode := range []uint32{unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE} {
		err := unix.Fallocate(int(f.Fd()), mode, off, n)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("clear %d bytes at %d: %w", n, off, err)
		}
	}
	return writeZeros(f, off, off+n)
}

// writeZeros overwrites what holds data between two offsets.
func writeZeros(f *os.File, at, end int64) error {
	zeros := make([]byte, mib)
	for at < end {
		from, to, err := dataAfter(f, at, end)
		if err != nil {
			return err
		}
		for from < to {
			n := min(to-from, mib)
			if _, err := f.WriteAt(zeros[:n], from); err != nil {
				return fmt.Errorf("clear: %w", err)
			}
			from += n
		}
		at = to
	}
	return nil
}

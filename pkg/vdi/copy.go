package vdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/fault"
)

// copyStep is how much is copied between two looks at the context.
const copyStep = 16 * mib

// Copy copies the bytes of src to the same places of dst, which reads as zeros
// and is at least as long, and syncs dst. Holes stay holes; blocks are shared
// where one filesystem holds both and can share. progress, when not nil, hears
// of the bytes passed, holes included, and of src's length.
//
// A full disk keeps errors.Is(err, syscall.ENOSPC).
func Copy(ctx context.Context, dst, src *os.File, progress func(done, total int64)) error {
	total, err := src.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("copy image: %w", err)
	}
	if end, err := dst.Seek(0, io.SeekEnd); err != nil || end < total {
		return errors.Join(err, fmt.Errorf("copy image: the target has %d bytes, not %d", end, total))
	}
	if progress == nil {
		progress = func(int64, int64) {}
	}
	if err := fault.Point("vdi.copy"); err != nil {
		return err
	}
	c := copier{dst: dst, src: src}
	for at := int64(0); at < total; {
		from, to, err := dataAfter(src, at, total)
		if err != nil {
			return fmt.Errorf("copy image: %w", err)
		}
		for from < to {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(to-from, copyStep)
			if err := c.copy(from, n); err != nil {
				return fmt.Errorf("copy image: %w", err)
			}
			from += n
			progress(from, total)
		}
		at = to
		progress(at, total)
	}
	if err := dst.Sync(); err != nil {
		return fmt.Errorf("copy image: sync: %w", err)
	}
	return fault.Point("vdi.copy.done")
}

// dataAfter finds the next stretch of data at or after at; from == to == total
// when there is none. What cannot tell holes is data from end to end.
func dataAfter(f *os.File, at, total int64) (from, to int64, err error) {
	from, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return total, total, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ESPIPE):
		return at, total, nil
	case err != nil:
		return 0, 0, fmt.Errorf("find data: %w", err)
	case from >= total:
		return total, total, nil
	}
	to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, fmt.Errorf("find hole: %w", err)
	}
	return from, min(to, total), nil
}

// copier copies stretches of bytes: by copy_file_range as long as the kernel
// takes it, else through a buffer, where zeros are left out.
type copier struct {
	dst, src *os.File
	plain    bool
	buf      []byte
}

func (c *copier) copy(off, n int64) error {
	for n > 0 && !c.plain {
		from, to := off, off
		k, err := unix.CopyFileRange(int(c.src.Fd()), &from, int(c.dst.Fd()), &to, int(n), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EIO):
			return err
		case err != nil || k == 0:
			c.plain = true // other filesystem, block device, old kernel
		}
		off, n = off+int64(max(k, 0)), n-int64(max(k, 0))
	}
	for n > 0 {
		if c.buf == nil {
			c.buf = make([]byte, mib)
		}
		k, err := c.src.ReadAt(c.buf[:min(n, mib)], off)
		if k == 0 {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		if !isZero(c.buf[:k]) {
			if _, err := c.dst.WriteAt(c.buf[:k], off); err != nil {
				return err
			}
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// Allocated is the room f takes on its filesystem, in bytes; the whole length of
// a block device.
func Allocated(f *os.File) (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("stat image: %w", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return f.Seek(0, io.SeekEnd)
	}
	return st.Blocks * 512, nil
}

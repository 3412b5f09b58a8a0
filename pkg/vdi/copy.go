package vdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/fault"
)

// copyStep is how much is copied between two looks at the context, and at most
// in one write.
const copyStep = 4 * mib

// Copy copies the bytes of src to the same places of dst, which reads as zeros
// and is at least as long, and syncs dst. Holes stay holes; blocks are shared
// where one filesystem holds both and can share. progress, when not nil, hears
// of the bytes passed, holes included, and of src's length; its calls do not overlap.
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
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if !clone(dst, src) {
		c := newCopier(dst, src, total, progress)
		defer c.close()
		if err := work(ctx, copyStep, c.emit, c.copy); err != nil {
			return fmt.Errorf("copy image: %w", err)
		}
	}
	progress(total, total)
	if err := dst.Sync(); err != nil {
		return fmt.Errorf("copy image: sync: %w", err)
	}
	return fault.Point("vdi.copy.done")
}

// copier copies stretches of bytes: by copy_file_range as long as the kernel
// takes it, else through buffers, where zeros are left out.
type copier struct {
	dst, src *image
	size     int64
	progress func(done, total int64)
	plain    atomic.Bool // no copy_file_range: other filesystem, block device, old kernel

	mu     sync.Mutex
	passed int64
}

func newCopier(dst, src *os.File, size int64, progress func(done, total int64)) *copier {
	return &copier{dst: openImage(dst, os.O_RDWR), src: openImage(src, os.O_RDONLY), size: size, progress: progress}
}

func (c *copier) close() {
	c.dst.close()
	c.src.close()
}

// emit gives every stretch of data.
func (c *copier) emit(emit func(span) error) error {
	for at := int64(0); at < c.size; {
		from, to, err := dataAfter(c.src.f, at, c.size)
		if err != nil {
			return err
		}
		c.pass(from - at)
		for from < to {
			n := min(to-from, copyStep)
			if err := emit(span{off: from, n: n}); err != nil {
				return err
			}
			from += n
		}
		at = to
	}
	return nil
}

// pass tells that n more bytes are done with.
func (c *copier) pass(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.passed += n
	c.progress(c.passed, c.size)
}

func (c *copier) copy(_ context.Context, s span, buf []byte) error {
	off, n, err := c.inKernel(s.off, s.n)
	if err == nil && n > 0 {
		buf = buf[:n]
		if err = c.src.readAt(buf, off); err != nil {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		_, err = c.dst.place(buf, off, false)
	}
	if err == nil {
		c.pass(s.n)
	}
	return err
}

// inKernel copies by copy_file_range and gives what is left to do.
func (c *copier) inKernel(off, n int64) (int64, int64, error) {
	for n > 0 && !c.plain.Load() {
		from, to := off, off
		k, err := unix.CopyFileRange(int(c.src.f.Fd()), &from, int(c.dst.f.Fd()), &to, int(n), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EIO):
			return off, n, err
		case err != nil || k == 0:
			c.plain.Store(true)
		}
		off, n = off+int64(max(k, 0)), n-int64(max(k, 0))
	}
	return off, n, nil
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

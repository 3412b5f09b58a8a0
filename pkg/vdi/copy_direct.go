package vdi

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// image reads and writes an image past the page cache where the filesystem
// takes that. What lies in the page cache anyway is read from there. Many
// goroutines may use it.
type image struct {
	f      *os.File
	direct *os.File // nil: not possible
	plain  atomic.Bool
}

// openImage makes an image of f; flags are os.O_RDONLY or os.O_RDWR.
func openImage(f *os.File, flags int) *image {
	i := &image{f: f}
	d, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags|unix.O_DIRECT, 0)
	if err == nil {
		i.direct = d
		return i
	}
	i.plain.Store(true)
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_SEQUENTIAL) //nolint:errcheck // a hint
	return i
}

func (i *image) close() {
	if i.direct != nil {
		i.direct.Close()
	}
}

// readAt fills b, a part of an aligned buffer; io.ErrUnexpectedEOF when the
// image ends before.
func (i *image) readAt(b []byte, off int64) error {
	n := 0
	if !i.plain.Load() && off%blockSize == 0 && !cached(i.f, off, int64(len(b))) {
		whole := (len(b) + blockSize - 1) / blockSize * blockSize
		k, err := pread(i.direct, b[:whole], off)
		if errors.Is(err, unix.EINVAL) {
			i.plain.Store(true)
		} else if err != nil {
			return err
		}
		n = min(max(k, 0), len(b))
	}
	if n == len(b) {
		return nil
	}
	if _, err := i.f.ReadAt(b[n:], off+int64(n)); err == io.EOF {
		return io.ErrUnexpectedEOF
	} else if err != nil {
		return err
	}
	return nil
}

func pread(f *os.File, b []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(int(f.Fd()), b, off)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// cached tells whether all of a stretch is in the page cache.
func cached(f *os.File, off, n int64) bool {
	var st unix.Cachestat_t
	err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: uint64(off), Len: uint64(n)}, &st, 0)
	return err == nil && int64(st.Cache)*int64(os.Getpagesize()) >= n
}

// writeAt writes b, whose length needs no alignment.
func (i *image) writeAt(b []byte, off int64) error {
	if !i.plain.Load() && off%blockSize == 0 {
		whole := len(b) / blockSize * blockSize
		n, err := i.direct.WriteAt(b[:whole], off)
		if errors.Is(err, unix.EINVAL) {
			i.plain.Store(true)
		} else if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	if len(b) == 0 {
		return nil
	}
	_, err := i.f.WriteAt(b, off)
	return err
}

// zeroAt makes a stretch read as zeros: a hole where that can be, else zeros.
func (i *image) zeroAt(off, n int64) error {
	err := unix.Fallocate(int(i.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err == nil || !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	for ; n > 0; off, n = off+int64(len(zeroPiece)), n-int64(len(zeroPiece)) {
		if _, err := i.f.WriteAt(zeroPiece[:min(n, int64(len(zeroPiece)))], off); err != nil {
			return err
		}
	}
	return nil
}

// piece is the unit in which zeros are left out.
const piece = 64 << 10

var zeroPiece [piece]byte

// place writes b at off, without its zeros: the image has a hole there, or,
// when it is dirty, is given one. It tells how many bytes were written.
func (i *image) place(b []byte, off int64, dirty bool) (moved int64, err error) {
	for len(b) > 0 {
		n := leading(b, false)
		if n == 0 {
			n = leading(b, true)
			if dirty {
				err = i.zeroAt(off, int64(n))
			}
		} else {
			var k int64
			k, err = i.placeData(b[:n], off, dirty)
			moved += k
		}
		if err != nil {
			return moved, err
		}
		b, off = b[n:], off+int64(n)
	}
	return moved, nil
}

// leading is the length of the pieces at the start of b that are, or are not, all zeros.
func leading(b []byte, zeros bool) int {
	n := 0
	for n < len(b) && isZero(b[n:min(n+piece, len(b))]) == zeros {
		n = min(n+piece, len(b))
	}
	return n
}

// placeData writes b but for the blocks of zeros at its ends.
func (i *image) placeData(b []byte, off int64, dirty bool) (int64, error) {
	if !dirty {
		for len(b) > blockSize && isZero(b[:blockSize]) {
			b, off = b[blockSize:], off+blockSize
		}
		for len(b) > blockSize && len(b)%blockSize == 0 && isZero(b[len(b)-blockSize:]) {
			b = b[:len(b)-blockSize]
		}
	}
	return int64(len(b)), i.writeAt(b, off)
}

// clone makes dst share all blocks of src; false where that is not possible.
func clone(dst, src *os.File) bool {
	return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil
}

// aligned gives a buffer of n bytes, at least 32 KiB, for O_DIRECT: the runtime
// puts such large ones on a page of their own. Were it not so, the kernel would
// refuse it and the image be read and written plainly.
func aligned(n int64) []byte { return make([]byte, n) }

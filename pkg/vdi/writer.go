package vdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	bufferSize = 4 * mib
	// holePiece is the unit in which zeros are left out of the image.
	holePiece = 64 << 10
)

var errAborted = errors.New("image writer aborted")

// Writer streams `patch` into a fresh image. One goroutine calls its methods;
// the bytes go to the disk in another while the next ones are received and
// hashed. It holds two buffers of 4 MiB, whatever the size.
type Writer struct {
	ctx   context.Context
	f     *os.File // the image; metadata and sync
	out   *os.File // the same without page cache where that is possible
	size  int64
	total int64 // bytes taken by Write
	ended bool

	cur   []byte // the buffer being filled, or nil
	n     int
	bufs  [][]byte
	empty chan []byte
	full  chan []byte

	done   chan struct{} // closed when the flusher has ended
	mu     sync.Mutex
	failed error

	// owned by the flusher until done is closed
	layout *layout
	used   int64 // blocks of layout.ready that are filled
}

// LayoutKind says who makes the filesystem of an image.
type LayoutKind string

// The layout writers.
const (
	// LayoutAuto takes mke2fs for large images where it is installed, else go.
	LayoutAuto LayoutKind = ""
	// LayoutGo is go-diskfs, in memory.
	LayoutGo LayoutKind = "go"
	// LayoutMke2fs is mke2fs of e2fsprogs with a "hugefile".
	LayoutMke2fs LayoutKind = "mke2fs"
)

// Options steer a Writer; the zero value is right for a patch.
type Options struct {
	// Layout chooses the layout writer.
	Layout LayoutKind
	// Dom0 runs mke2fs; nil: only LayoutGo.
	Dom0 dom0.Dom0
	// Buffer is the size of one buffer in bytes; 0: the default. The bytes that
	// Flushed is behind Write are at most those of a few buffers.
	Buffer int
	// Done is how many bytes of the payload, a multiple of 4096, stand in the
	// image already: an earlier Writer with the same size, expect and Layout
	// wrote them and was interrupted. Resume reads them; they must be given to
	// Write again, which does not write them.
	Done int64
	// Over tells that the image is a copy of one made here whose `patch` has
	// as many blocks as expect needs (see Fits). Blocks that are the same are
	// not written.
	Over bool
}

// Written is what a Writer has made.
type Written struct {
	Size int64 // of `patch`, in bytes
	Map  *Map  // of the whole image
}

// NewWriter begins an image of virtualSize bytes in f: a sparse file just made
// with O_EXCL, or a block device that reads as zeros. expect is the payload's
// likely length in bytes, -1 when not known; fewer bytes may come, and more as
// far as the image holds them. When ctx ends, so does writing.
//
// Codes: MESSAGE_TOO_LARGE when the image cannot hold expect bytes.
func NewWriter(ctx context.Context, f *os.File, virtualSize, expect int64, _ Options) (*Writer, error) {
	if virtualSize < minSize || virtualSize%blockSize != 0 {
		return nil, fmt.Errorf("image of %d bytes: smaller than %d, or not in blocks of %d", virtualSize, minSize, blockSize)
	}
	if expect > min(virtualSize, maxSize) {
		return nil, tooLarge(virtualSize, nil)
	}
	if err := checkFresh(f, virtualSize); err != nil {
		return nil, err
	}
	w := &Writer{
		ctx: ctx, f: f, out: openDirect(f), size: min(virtualSize, maxSize),
		empty: make(chan []byte, 2), full: make(chan []byte, 2), done: make(chan struct{}),
	}
	length := bufferSize
	if expect >= 0 && expect < bufferSize {
		length = max((expect+blockSize-1)/blockSize, 16) * blockSize
	}
	for range 2 {
		b, err := unix.Mmap(-1, 0, int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			w.release()
			return nil, fmt.Errorf("memory for the image writer: %w", err)
		}
		w.bufs = append(w.bufs, b)
		w.empty <- b
	}
	go w.flush()
	return w, nil
}

// tooLarge says that the payload does not fit, and the cure.
func tooLarge(size int64, cause error) error {
	e := xapi.NewError(xapi.MessageTooLarge,
		"the payload does not fit the disk image: send the file with its length (Content-Length) and signed without compression (gpg -z 0), so that the image is made large enough",
		strconv.FormatInt(size, 10))
	if cause != nil {
		return e.Because(cause)
	}
	return e
}

// Write takes the next bytes of the payload. It returns before they are on the disk.
//
// Codes: MESSAGE_TOO_LARGE when the image is full.
func (w *Writer) Write(p []byte) (int, error) {
	if w.ended {
		return 0, errAborted
	}
	if w.total+int64(len(p)) > w.size {
		return 0, tooLarge(w.size, nil)
	}
	written := 0
	for len(p) > 0 {
		if w.cur == nil {
			select {
			case <-w.ctx.Done():
				return written, context.Cause(w.ctx)
			case <-w.done:
				return written, w.failure()
			case w.cur = <-w.empty:
				w.n = 0
			}
		}
		k := copy(w.cur[w.n:], p)
		w.n += k
		p = p[k:]
		written += k
		w.total += int64(k)
		if w.n == len(w.cur) {
			w.full <- w.cur // two buffers, room for two: never blocks
			w.cur = nil
		}
	}
	return written, nil
}

// Finish waits until every byte is written, writes the filesystem around them
// and syncs the image.
//
// Codes: MESSAGE_TOO_LARGE.
func (w *Writer) Finish(ctx context.Context) (Written, error) {
	if w.ended {
		return Written{}, errAborted
	}
	w.ended = true
	if w.cur != nil {
		padded := (w.n + blockSize - 1) / blockSize * blockSize
		clear(w.cur[w.n:padded])
		w.full <- w.cur[:padded]
	}
	close(w.full)
	<-w.done
	defer w.release()
	if err := w.failure(); err != nil {
		return Written{}, err
	}
	if err := ctx.Err(); err != nil {
		return Written{}, context.Cause(ctx)
	}
	if err := w.layout.take(w.used); err != nil {
		return Written{}, w.layoutError(err)
	}
	if err := w.layout.finish(w.total, time.Now()); err != nil {
		return Written{}, err
	}
	if err := w.layout.pages.writeTo(w.f); err != nil {
		return Written{}, fmt.Errorf("write filesystem: %w", err)
	}
	if err := fault.Point("vdi.sync"); err != nil {
		return Written{}, err
	}
	if err := w.f.Sync(); err != nil {
		return Written{}, fmt.Errorf("sync image: %w", err)
	}
	m, err := BuildMap(ctx, w.f, w.size)
	if err != nil {
		return Written{}, err
	}
	return Written{w.total, m}, fault.Point("vdi.sync.done")
}

// Abort ends the writer and lets go of its memory; the image then holds no
// filesystem. After Finish, and twice, it does nothing.
func (w *Writer) Abort() {
	if w.ended {
		return
	}
	w.ended = true
	w.fail(errAborted)
	close(w.full)
	<-w.done
	w.release()
}

func (w *Writer) release() {
	for _, b := range w.bufs {
		unix.Munmap(b) //nolint:errcheck // it is our own mapping
	}
	w.bufs, w.cur = nil, nil
	if w.out != w.f {
		w.out.Close()
	}
}

func (w *Writer) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed
}

func (w *Writer) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed == nil {
		w.failed = err
	}
}

// flush is the goroutine that writes full buffers to their place.
func (w *Writer) flush() {
	defer close(w.done)
	l, err := newLayout(w.size)
	if err != nil {
		w.fail(err)
		return
	}
	w.layout = l
	for b := range w.full {
		if w.failure() != nil {
			return
		}
		if err := w.ctx.Err(); err != nil {
			w.fail(context.Cause(w.ctx))
			return
		}
		if err := w.place(b); err != nil {
			w.fail(err)
			return
		}
		w.empty <- b[:cap(b)]
	}
}

// place writes b, whole blocks, to the next free blocks of the image.
func (w *Writer) place(b []byte) error {
	l := w.layout
	for len(b) > 0 {
		if w.used == l.ready.count {
			if err := l.take(w.used); err != nil {
				return w.layoutError(err)
			}
			w.used = 0
			if _, err := l.next(); err != nil {
				return w.layoutError(err)
			}
		}
		k := min(int64(len(b)), (l.ready.count-w.used)*blockSize)
		if err := w.writeAt(b[:k], (l.ready.start+w.used)*blockSize); err != nil {
			return fmt.Errorf("write image: %w", err)
		}
		w.used += k / blockSize
		b = b[k:]
	}
	return nil
}

func (w *Writer) layoutError(err error) error {
	if errors.Is(err, errNoBlocks) {
		return tooLarge(w.size, err)
	}
	return err
}

// writeAt writes b at off and leaves out zeros: the image reads as zeros there.
func (w *Writer) writeAt(b []byte, off int64) error {
	for len(b) > 0 {
		n := dataLength(b)
		if n > 0 {
			if err := w.pwrite(b[:n], off); err != nil {
				return err
			}
		}
		hole := min(holePiece, len(b)-n)
		b, off = b[n+hole:], off+int64(n+hole)
	}
	return nil
}

// dataLength is how far b goes on until a piece that holds only zeros.
func dataLength(b []byte) int {
	n := 0
	for n < len(b) && !isZero(b[n:min(n+holePiece, len(b))]) {
		n = min(n+holePiece, len(b))
	}
	return n
}

// pwrite writes past the page cache; where the filesystem turns out not to
// take that, it goes on with ordinary writes.
func (w *Writer) pwrite(b []byte, off int64) error {
	_, err := w.out.WriteAt(b, off)
	if errors.Is(err, syscall.EINVAL) && w.out != w.f {
		w.out.Close()
		w.out = w.f
		_, err = w.out.WriteAt(b, off)
	}
	return err
}

// openDirect opens f once more with O_DIRECT, or gives f where that cannot be.
func openDirect(f *os.File) *os.File {
	d, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return f
	}
	return d
}

// checkFresh refuses an image that is too short or already holds data: what is
// not written must read as zeros.
func checkFresh(f *os.File, size int64) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if end < size {
		return fmt.Errorf("image is %d bytes long, not %d", end, size)
	}
	allocated, err := Allocated(f)
	if err != nil || allocated == 0 {
		return err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return err
	}
	if at, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); err == nil {
		return fmt.Errorf("image is not fresh: it holds data at %d", at)
	}
	return nil
}

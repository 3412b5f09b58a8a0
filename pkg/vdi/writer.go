package vdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// bufferSize is as fast as larger ones: what is hashed and written is still
	// in the processor's cache.
	bufferSize = mib
	// buffers is how many there are: one is filled while others are hashed and written.
	buffers = 4
	// holePiece is the unit in which zeros are left out of the image.
	holePiece = 64 << 10
)

var errAborted = errors.New("image writer aborted")

// Writer streams `patch` into an image. One goroutine calls its methods, which
// only copy; of two others, one writes full buffers to the disk and one makes
// the block map. It holds a few buffers, whatever the size.
type Writer struct {
	ctx    context.Context // ends with the one of NewWriter, and by Abort
	cancel context.CancelCauseFunc
	f      *os.File // the image; metadata and sync
	out    *os.File // the same without page cache where that is possible
	o      Options
	length int64 // of the image
	size   int64 // of its filesystem
	total  int64 // bytes taken by Write
	ended  bool

	cur   *buffer // the buffer being filled, or nil
	mem   []byte
	empty chan *buffer
	full  chan job
	hash  chan *buffer

	flushed atomic.Int64
	done    chan struct{} // closed when the flusher has ended
	mapped  chan struct{} // closed when the mapper has ended
	mu      sync.Mutex
	failed  error

	// owned by the flusher until done is closed
	layout layouter
	ready  run   // of the layout, not yet taken
	used   int64 // blocks of ready that are filled
	prior  []run // where the bytes of an earlier Writer are, not yet given again
	old    []byte

	resume *Payload // the bytes of an earlier Writer

	sums mapper // owned by the mapper until mapped is closed
}

// buffer holds a piece of the payload on its way to the image.
type buffer struct {
	mem   []byte
	n     int   // bytes filled
	skip  int   // the first bytes that stand in the image already
	parts []run // where the blocks go
	users atomic.Int32
}

// job is a buffer to write, or a question for the end of what was sent before.
type job struct {
	b     *buffer
	reply chan struct{}
}

// Options steer a Writer; the zero value is right for a patch.
type Options struct {
	// Layout chooses the layout writer.
	Layout LayoutKind
	// Dom0 runs mke2fs; nil: only LayoutGo.
	Dom0 dom0.Dom0
	// Buffer is the size of one buffer in bytes, a multiple of 4096; 0: 1 MiB.
	// Flushed is behind Write by four buffers at most.
	Buffer int
	// Done is how many bytes of the payload, a multiple of 4096, stand in the
	// image already: an earlier Writer with the same size, expect and Layout
	// wrote them and was interrupted. Resume reads them; they must be given to
	// Write again, which does not write them. Whatever else is in the image goes.
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
// with O_EXCL, or a block device that reads as zeros; with Done or Over what
// these say. expect is the payload's likely length in bytes, -1 when not known;
// fewer bytes may come, and more as far as the image holds them. When ctx ends,
// so does writing.
//
// Codes: MESSAGE_TOO_LARGE when the image cannot hold expect bytes.
func NewWriter(ctx context.Context, f *os.File, virtualSize, expect int64, o Options) (*Writer, error) {
	if err := checkRequest(f, virtualSize, expect, o); err != nil {
		return nil, err
	}
	w := &Writer{
		f: f, o: o, length: virtualSize, size: min(virtualSize, maxSize),
		empty: make(chan *buffer, buffers), full: make(chan job, buffers+1), hash: make(chan *buffer, buffers),
		done: make(chan struct{}), mapped: make(chan struct{}),
	}
	w.sums.size = virtualSize
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	if err := w.prepare(expect); err != nil {
		w.cancel(err)
		return nil, err
	}
	w.out = openDirect(f)
	if err := w.allocate(expect); err != nil {
		w.release()
		return nil, err
	}
	go w.flush()
	go w.makeMap()
	return w, nil
}

// checkRequest refuses what cannot become an image.
func checkRequest(f *os.File, virtualSize, expect int64, o Options) error {
	if virtualSize < minSize || virtualSize%blockSize != 0 {
		return fmt.Errorf("image of %d bytes: smaller than %d, or not in blocks of %d", virtualSize, minSize, blockSize)
	}
	if expect > min(virtualSize, maxSize) {
		return tooLarge(virtualSize, nil)
	}
	if o.Done < 0 || o.Done%blockSize != 0 || o.Done > virtualSize {
		return fmt.Errorf("%d bytes of the payload cannot be there: not in blocks of %d", o.Done, blockSize)
	}
	if o.Buffer < 0 || o.Buffer%blockSize != 0 || int64(o.Buffer) > 64*mib {
		return fmt.Errorf("buffers of %d bytes: not in blocks of %d, or too large", o.Buffer, blockSize)
	}
	return checkImage(f, virtualSize, o.Done > 0 || o.Over)
}

// allocate makes the buffers: outside of the heap, aligned as O_DIRECT wants them.
func (w *Writer) allocate(expect int64) error {
	length, count := int64(bufferSize), buffers
	if w.o.Buffer > 0 {
		length = int64(w.o.Buffer)
	}
	if expect >= 0 && expect < length {
		length, count = max(blocksFor(expect), 16)*blockSize, 2
	}
	mem, err := unix.Mmap(-1, 0, int(length)*count, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return fmt.Errorf("memory for the image writer: %w", err)
	}
	w.mem = mem
	for i := range count {
		w.empty <- &buffer{mem: mem[i*int(length) : (i+1)*int(length)]}
	}
	return nil
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
	written := 0
	for len(p) > 0 {
		if w.total+int64(len(p)) > w.size {
			return written, tooLarge(w.size, nil)
		}
		if err := w.room(); err != nil {
			return written, err
		}
		k := copy(w.cur.mem[w.cur.n:], p)
		w.filled(k)
		p = p[k:]
		written += k
	}
	return written, nil
}

// ReadFrom takes everything r gives, straight into the buffers: with it io.Copy
// needs none of its own.
//
// Codes: as Write.
func (w *Writer) ReadFrom(r io.Reader) (int64, error) {
	if w.ended {
		return 0, errAborted
	}
	for taken, idle := int64(0), 0; ; {
		if err := w.room(); err != nil {
			return taken, err
		}
		n, err := r.Read(w.cur.mem[w.cur.n:])
		if w.total+int64(n) > w.size {
			return taken, tooLarge(w.size, nil)
		}
		taken += int64(n)
		w.filled(n)
		if err == io.EOF {
			return taken, nil
		}
		if err != nil {
			return taken, err
		}
		if idle++; n > 0 {
			idle = 0
		}
		if idle > 100 {
			return taken, io.ErrNoProgress
		}
	}
}

// room makes sure that there is a buffer with room in it.
func (w *Writer) room() error {
	if w.cur != nil {
		return nil
	}
	select {
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	case <-w.done:
		return w.failure()
	case w.cur = <-w.empty:
		w.cur.n = 0
		return nil
	}
}

// filled counts n more bytes in the buffer and sends it off when it is full.
func (w *Writer) filled(n int) {
	w.cur.n += n
	w.total += int64(n)
	if w.cur.n == len(w.cur.mem) {
		w.send()
	}
}

// send gives the buffer to the flusher. There is room for all of them, so it
// never blocks.
func (w *Writer) send() {
	w.full <- job{b: w.cur}
	w.cur = nil
}

// Flushed is how many bytes of the payload, from its beginning, were written to
// the image or stood there before; a crash of this process does not lose them.
// It may be called by any goroutine.
func (w *Writer) Flushed() int64 { return w.flushed.Load() }

// Sync brings to the disk what Write has got, but for the last bytes that do not
// make up a block of 4096; then Flushed counts it.
func (w *Writer) Sync() error {
	if w.ended {
		return errAborted
	}
	if err := w.sendBlocks(); err != nil {
		return err
	}
	reply := make(chan struct{})
	select {
	case w.full <- job{reply: reply}:
	case <-w.done:
		return w.failure()
	}
	select {
	case <-reply:
	case <-w.done:
		return w.failure()
	}
	if err := w.failure(); err != nil {
		return err
	}
	return effect("vdi.datasync", func() error {
		if err := unix.Fdatasync(int(w.f.Fd())); err != nil {
			return fmt.Errorf("sync image: %w", err)
		}
		return nil
	})
}

// sendBlocks sends off the whole blocks of the buffer that is being filled.
func (w *Writer) sendBlocks() error {
	if w.cur == nil || w.cur.n < blockSize {
		return nil
	}
	b := w.cur
	var tail [blockSize]byte
	rest := copy(tail[:], b.mem[b.n/blockSize*blockSize:b.n])
	b.n -= rest
	w.send()
	if rest == 0 {
		return nil
	}
	if err := w.room(); err != nil {
		return err
	}
	w.cur.n = copy(w.cur.mem, tail[:rest])
	return nil
}

// Abort ends the writer and lets go of its memory. A fresh image then holds no
// filesystem. After Finish, and twice, it does nothing.
func (w *Writer) Abort() {
	if w.ended {
		return
	}
	w.ended = true
	w.fail(errAborted)
	w.cancel(errAborted)
	w.wait()
	w.release()
}

// wait ends the goroutines.
func (w *Writer) wait() {
	close(w.full)
	<-w.done
	<-w.mapped
}

func (w *Writer) release() {
	w.cancel(errAborted)
	if w.mem != nil {
		unix.Munmap(w.mem) //nolint:errcheck // it is our own mapping
	}
	if w.old != nil {
		unix.Munmap(w.old) //nolint:errcheck // it is our own mapping
	}
	w.mem, w.old, w.cur = nil, nil, nil
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

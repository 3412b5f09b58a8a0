package vdi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/fault"
)

// effect passes the points around f where a process may die.
func effect(name string, f func() error) error {
	if err := fault.Point(name); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	return fault.Point(name + ".done")
}

// flush is the goroutine that lays out the image and writes full buffers to
// their place. After a failure it ends.
func (w *Writer) flush() {
	defer close(w.done)
	defer close(w.hash)
	if err := w.begin(); err != nil {
		w.fail(err)
		return
	}
	for k := range w.full {
		if w.failure() != nil {
			return
		}
		if err := context.Cause(w.ctx); err != nil {
			w.fail(err)
			return
		}
		if k.b == nil {
			close(k.reply)
			continue
		}
		if err := w.place(k.b); err != nil {
			w.fail(err)
			return
		}
		w.free(k.b)
	}
}

// begin makes the layout, where that was not done before.
func (w *Writer) begin() error {
	if w.layout != nil {
		return nil
	}
	return effect("vdi.layout", func() (err error) {
		w.layout, err = newLayout(w.ctx, w.size, w.o)
		return err
	})
}

// free gives a buffer back that is both written and hashed.
func (w *Writer) free(b *buffer) {
	if b.users.Add(-1) == 0 {
		w.empty <- b
	}
}

// place finds the blocks for a buffer, has them hashed, and writes them.
func (w *Writer) place(b *buffer) error {
	padded := (b.n + blockSize - 1) / blockSize * blockSize
	clear(b.mem[b.n:padded])
	b.parts, b.skip = b.parts[:0], 0
	for blocks := int64(padded / blockSize); blocks > 0; {
		r, prior, err := w.blocks(blocks)
		if err != nil {
			return err
		}
		if prior {
			b.skip += int(r.count) * blockSize
		}
		b.parts = append(b.parts, r)
		blocks -= r.count
	}
	b.users.Store(2)
	w.hash <- b
	err := effect("vdi.write", func() error { return w.writeParts(b) })
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	w.flushed.Add(int64(max(b.n-b.skip, 0)))
	return nil
}

// blocks gives the next blocks of the file, at most n of them. prior tells that
// they hold their bytes already.
func (w *Writer) blocks(n int64) (r run, prior bool, err error) {
	if len(w.prior) > 0 {
		p := &w.prior[0]
		r = run{p.start, min(n, p.count)}
		if p.start, p.count = p.start+r.count, p.count-r.count; p.count == 0 {
			w.prior = w.prior[1:]
		}
		return r, true, nil
	}
	r, err = w.reserve(n)
	return r, false, err
}

// reserve takes the next blocks from the layout, at most n of them.
func (w *Writer) reserve(n int64) (run, error) {
	if w.used == w.ready.count {
		if err := w.layout.take(w.used); err != nil {
			return run{}, w.layoutError(err)
		}
		w.used, w.ready = 0, run{}
		r, err := w.layout.next()
		if err != nil {
			return run{}, w.layoutError(err)
		}
		w.ready = r
	}
	r := run{w.ready.start + w.used, min(n, w.ready.count-w.used)}
	w.used += r.count
	return r, nil
}

func (w *Writer) layoutError(err error) error {
	if errors.Is(err, errNoBlocks) {
		return tooLarge(w.size, err)
	}
	return err
}

// writeParts writes a buffer to its blocks.
func (w *Writer) writeParts(b *buffer) error {
	at := 0
	for _, r := range b.parts {
		p := b.mem[at : at+int(r.count)*blockSize]
		at += len(p)
		if at <= b.skip {
			continue
		}
		write := w.writeData
		if w.o.Over {
			write = w.writeChanged
		}
		if err := write(p, r.start*blockSize); err != nil {
			return err
		}
	}
	return nil
}

// writeData writes b at off and leaves out zeros: the image reads as zeros there.
func (w *Writer) writeData(b []byte, off int64) error {
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

// writeChanged writes those blocks of b that are not in the image already.
func (w *Writer) writeChanged(b []byte, off int64) error {
	if w.old == nil {
		mem, err := unix.Mmap(-1, 0, int(bufferSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return fmt.Errorf("memory to compare: %w", err)
		}
		w.old = mem
	}
	for len(b) > 0 {
		p := b[:min(len(b), len(w.old))]
		if err := w.pread(w.old[:len(p)], off); err != nil {
			return fmt.Errorf("compare: %w", err)
		}
		if err := w.writeDifferent(p, w.old[:len(p)], off); err != nil {
			return err
		}
		b, off = b[len(p):], off+int64(len(p))
	}
	return nil
}

func (w *Writer) writeDifferent(b, old []byte, off int64) error {
	same := func(i int) bool { return bytes.Equal(b[i:i+blockSize], old[i:i+blockSize]) }
	for i := 0; i < len(b); {
		if same(i) {
			i += blockSize
			continue
		}
		j := i + blockSize
		for j < len(b) && !same(j) {
			j += blockSize
		}
		if err := w.pwrite(b[i:j], off+int64(i)); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// pwrite writes past the page cache; where the filesystem turns out not to
// take that, it goes on with ordinary writes.
func (w *Writer) pwrite(b []byte, off int64) error {
	_, err := w.out.WriteAt(b, off)
	if errors.Is(err, syscall.EINVAL) && w.out != w.f {
		w.ordinary()
		_, err = w.out.WriteAt(b, off)
	}
	return err
}

func (w *Writer) pread(b []byte, off int64) error {
	_, err := w.out.ReadAt(b, off)
	if errors.Is(err, syscall.EINVAL) && w.out != w.f {
		w.ordinary()
		_, err = w.out.ReadAt(b, off)
	}
	return err
}

func (w *Writer) ordinary() {
	w.out.Close()
	w.out = w.f
}

// openDirect opens f once more with O_DIRECT, or gives f where that cannot be.
func openDirect(f *os.File) *os.File {
	d, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return f
	}
	return d
}

// checkImage refuses an image that is too short, and one that holds data where
// it must be fresh: what is not written must read as zeros.
func checkImage(f *os.File, size int64, begun bool) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if end < size {
		return fmt.Errorf("image is %d bytes long, not %d", end, size)
	}
	allocated, err := Allocated(f)
	if err != nil || allocated == 0 || begun {
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

package vdi

import (
	"context"
	"fmt"
	"io"
	"os"
	"testing"
)

// repeat gives the same MiB again and again.
type repeat struct {
	chunk []byte
	at    int
	left  int64
}

func (r *repeat) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(int64(len(p)), r.left)], r.chunk[r.at:])
	r.at = (r.at + n) % len(r.chunk)
	r.left -= int64(n)
	return n, nil
}

// BenchmarkFill1GiB compares the writers with a raw file, all to the end of fsync.
func BenchmarkFill1GiB(b *testing.B) {
	chunk, _ := io.ReadAll(payload(mib))
	source := func() io.Reader { return &repeat{chunk: chunk, left: gib} }
	run := func(name string, f func(b *testing.B, image *os.File)) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(gib)
			for range b.N {
				image := fresh(b, 4*gib)
				f(b, image)
				b.StopTimer()
				image.Close()
				os.Remove(image.Name())
				b.StartTimer()
			}
		})
	}
	for _, o := range layouts(b) {
		run("image "+string(o.Layout), func(b *testing.B, f *os.File) { fillImage(b, f, o, source()) })
	}
	for _, size := range []int{256 << 10, 1 << 20, 8 << 20} {
		run(fmt.Sprintf("image go, buffers of %d KiB", size>>10), func(b *testing.B, f *os.File) {
			fillImage(b, f, Options{Layout: LayoutGo, Buffer: size}, source())
		})
	}
	run("raw file, buffered", func(b *testing.B, f *os.File) {
		if _, err := io.CopyBuffer(struct{ io.Writer }{f}, source(), make([]byte, 4*mib)); err != nil {
			b.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
	})
	run("raw file, O_DIRECT", func(b *testing.B, f *os.File) {
		w := &Writer{f: f, out: openDirect(f), empty: make(chan *buffer, buffers)}
		defer w.out.Close()
		if err := w.allocate(-1); err != nil {
			b.Fatal(err)
		}
		buf := (<-w.empty).mem
		in := source()
		for at := int64(0); at < gib; at += int64(len(buf)) {
			io.ReadFull(in, buf)
			if _, err := w.out.WriteAt(buf, at); err != nil {
				b.Fatal(err)
			}
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
	})
}

func fillImage(b *testing.B, f *os.File, o Options, r io.Reader) {
	w, err := NewWriter(context.Background(), f, 4*gib, gib, o)
	if err != nil {
		b.Fatal(err)
	}
	defer w.Abort()
	if _, err := io.Copy(w, r); err != nil {
		b.Fatal(err)
	}
	if _, err := w.Finish(context.Background()); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkLayout is the making of a layout, its end, and the hashing of its
// metadata: what an image costs beside its bytes.
func BenchmarkLayout(b *testing.B) {
	for _, size := range []int64{40 * mib, 128 * mib, gib, 4 * gib, 32 * gib, 1024 * gib} {
		for _, o := range layouts(b) {
			if o.Layout == LayoutGo && size > 32*gib {
				continue // half a minute
			}
			b.Run(fmt.Sprintf("%s %d MiB", o.Layout, size/mib), func(b *testing.B) {
				for range b.N {
					if _, err := newLayout(context.Background(), size, o); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run(fmt.Sprintf("%s %d MiB, a whole image of one byte", o.Layout, size/mib), func(b *testing.B) {
				for range b.N {
					f := fresh(b, size)
					w, err := NewWriter(context.Background(), f, size, 1, o)
					if err != nil {
						b.Fatal(err)
					}
					if _, err := w.Write([]byte("x")); err != nil {
						b.Fatal(err)
					}
					if _, err := w.Finish(context.Background()); err != nil {
						b.Fatal(err)
					}
					f.Close()
					os.Remove(f.Name())
				}
			})
		}
	}
}

package vdi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/xapi"
)

// payload gives n bytes that repeat nowhere near; the same for the same n.
func payload(n int64) io.Reader {
	var seed [32]byte
	copy(seed[:], fmt.Sprint(n))
	return io.LimitReader(rand.NewChaCha8(seed), n)
}

// fresh makes an image file of size bytes with nothing in it.
func fresh(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "image"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// layouts are the options of every layout writer.
func layouts(t testing.TB) []Options {
	t.Helper()
	d, err := dom0.New(dom0.Options{AllowNoCgroup: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return []Options{{Layout: LayoutGo}, {Layout: LayoutMke2fs, Dom0: d}}
}

// eachLayout runs a test for every layout writer.
func eachLayout(t *testing.T, f func(t *testing.T, o Options)) {
	for _, o := range layouts(t) {
		t.Run(string(o.Layout), func(t *testing.T) { f(t, o) })
	}
}

// write makes an image of what r gives.
func write(t testing.TB, size, expect int64, r io.Reader) (*os.File, int64) {
	t.Helper()
	return writeWith(t, Options{}, size, expect, r)
}

// writeWith makes an image as o says, and holds its map against the image.
func writeWith(t testing.TB, o Options, size, expect int64, r io.Reader) (*os.File, int64) {
	t.Helper()
	f := fresh(t, size)
	return f, writeTo(t, f, o, size, expect, r).Size
}

func writeTo(t testing.TB, f *os.File, o Options, size, expect int64, r io.Reader) Written {
	t.Helper()
	w, err := NewWriter(context.Background(), f, size, expect, o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if _, err := io.Copy(w, r); err != nil {
		t.Fatal(err)
	}
	done, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	checkMap(t, f, done.Map, size)
	return done
}

// checkMap compares a map with the image it is of.
func checkMap(t testing.TB, f *os.File, m *Map, size int64) {
	t.Helper()
	want, err := BuildMap(context.Background(), f, size)
	if err != nil {
		t.Fatal(err)
	}
	if !m.Equal(want) {
		t.Fatalf("the map made on the way has %d blocks, the image %d: %s", len(m.Blocks), len(want.Blocks), mapDifference(m, want))
	}
}

func mapDifference(got, want *Map) string {
	for i := range max(len(got.Blocks), len(want.Blocks)) {
		if i >= len(got.Blocks) || i >= len(want.Blocks) || got.Blocks[i] != want.Blocks[i] {
			return fmt.Sprintf("first difference at entry %d: %v, want %v", i, got.Blocks[i:min(i+1, len(got.Blocks))], want.Blocks[i:min(i+1, len(want.Blocks))])
		}
	}
	return fmt.Sprintf("sizes %d and %d", got.Size, want.Size)
}

// fsck fails the test unless e2fsck finds nothing at all.
func fsck(t testing.TB, image string) {
	t.Helper()
	out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput()
	if err != nil {
		t.Fatalf("e2fsck -fn: %v\n%s", err, out)
	}
}

// mount mounts the image through a loop device.
func mount(t testing.TB, image string, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts and needs root")
	}
	dir := t.TempDir()
	busy(func() bool {
		out, err := exec.Command("mount", "-t", "ext4", "-o", "loop,"+options, image, dir).CombinedOutput()
		if err != nil && !bytes.Contains(out, []byte("busy")) {
			t.Fatalf("mount: %v\n%s", err, out)
		}
		return err != nil
	})
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

func unmount(t testing.TB, dir string) {
	t.Helper()
	busy(func() bool {
		err := unix.Unmount(dir, 0)
		if err != nil && err != unix.EINVAL && err != unix.EBUSY {
			t.Errorf("umount %s: %v", dir, err)
		}
		return err == unix.EBUSY
	})
}

// busy tries again for a while: other processes of the machine take loop
// devices, and hold mounts for a moment between fork and exec.
func busy(try func() bool) {
	for range 250 {
		if !try() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// same compares two streams byte for byte.
func same(t testing.TB, got, want io.Reader) {
	t.Helper()
	g, w := make([]byte, mib), make([]byte, mib)
	for at := int64(0); ; at += mib {
		n, _ := io.ReadFull(got, g)
		m, _ := io.ReadFull(want, w)
		if !bytes.Equal(g[:n], w[:m]) {
			t.Fatalf("other bytes than were written, within the MiB at %d (%d and %d bytes there)", at, n, m)
		}
		if n < len(g) {
			return
		}
	}
}

// checkMounted mounts the image and compares `patch` with want.
func checkMounted(t *testing.T, image string, size int64, want io.Reader) {
	t.Helper()
	dir := mount(t, image, "ro,noload")
	f, err := os.Open(filepath.Join(dir, FileName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() != size || st.Mode() != 0o755 {
		t.Errorf("patch has %d bytes and mode %v, want %d and -rwxr-xr-x", st.Size(), st.Mode(), size)
	}
	same(t, f, want)
	f.Close()
	unmount(t, dir)
}

// openPatch opens `patch` in an image that stays mounted until the test ends.
func openPatch(t *testing.T, image string, size int64) *os.File {
	t.Helper()
	p, err := os.Open(filepath.Join(mount(t, image, "ro,noload"), FileName))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if st, err := p.Stat(); err != nil || st.Size() != size {
		t.Errorf("patch has %d bytes, %v; want %d", st.Size(), err, size)
	}
	return p
}

// checkEnd compares the end of `patch`: zeros, then the payload of n bytes.
func checkEnd(t *testing.T, image string, size, n int64) {
	t.Helper()
	p := openPatch(t, image, size)
	zeros := min(size-n, 2*mib)
	same(t, io.NewSectionReader(p, size-n-zeros, n+zeros), io.MultiReader(io.LimitReader(zeroReader{}, zeros), payload(n)))
}

func TestWriteSizes(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		for _, n := range []int64{0, 1, 4095, 4096, 4097, 65536, mib - 1, mib, 3 * mib, 4*mib - 1, 4 * mib, 4*mib + 1, 9*mib + 5} {
			for _, known := range []bool{true, false} {
				t.Run(fmt.Sprintf("%d bytes, length known %v", n, known), func(t *testing.T) {
					size, expect := Size(n), n
					if !known {
						size, expect = Size(-1), -1
					}
					f, got := writeWith(t, o, size, expect, payload(n))
					if got != n {
						t.Fatalf("Finish says %d bytes, want %d", got, n)
					}
					fsck(t, f.Name())
					checkMounted(t, f.Name(), n, payload(n))
				})
			}
		}
	})
}

func TestImageSizesAreCleanUpToTheLastGroup(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		sizes := []int64{4, 5, 7, 8, 40, 64, 127, 128, 129, 130, 255, 256, 257, 385, 513, 640, 641, 896, 897, 1023, 1024, 1025, 1153, 2049, 3201, 3457, 4096, 8193, 33 * 1024}
		if testing.Short() {
			sizes = sizes[:12]
		}
		for _, m := range sizes {
			t.Run(fmt.Sprintf("%d MiB", m), func(t *testing.T) {
				f, _ := writeWith(t, o, m*mib, -1, strings.NewReader("#!/bin/sh\n"))
				fsck(t, f.Name())
			})
		}
	})
}

func TestScratch(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		f, _ := writeWith(t, o, 300*mib, 70*mib, payload(70*mib))
		dir := mount(t, f.Name(), "rw")
		s, err := os.Create(filepath.Join(dir, "scratch"))
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(s, payload(400*mib))
		if err == nil || n < 220*mib {
			t.Errorf("%d bytes of scratch, then %v", n, err)
		}
		s.Close()
		unmount(t, dir)
		fsck(t, f.Name())
		checkMounted(t, f.Name(), 70*mib, payload(70*mib))
	})
}

func TestZerosStayHoles(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		const zeros = 2*gib + 1000
		f, n := writeWith(t, o, Size(-1), -1, io.MultiReader(payload(mib+1), io.LimitReader(zeroReader{}, zeros), payload(mib)))
		if n != zeros+2*mib+1 {
			t.Fatalf("%d bytes", n)
		}
		fsck(t, f.Name())
		if a, err := Allocated(f); err != nil || a > 4*mib {
			t.Errorf("image takes %d bytes, %v", a, err)
		}
		p := openPatch(t, f.Name(), n)
		same(t, io.NewSectionReader(p, 0, 3*mib), io.MultiReader(payload(mib+1), io.LimitReader(zeroReader{}, 2*mib-1)))
		same(t, io.NewSectionReader(p, n/2, 3*mib), io.LimitReader(zeroReader{}, 3*mib))
		same(t, io.NewSectionReader(p, n-mib-9, mib+9), io.MultiReader(io.LimitReader(zeroReader{}, 9), payload(mib)))
	})
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestNewWriterRefuses(t *testing.T) {
	used := fresh(t, 8*mib)
	if _, err := used.WriteAt([]byte("old"), 5*mib); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name         string
		f            *os.File
		size, expect int64
		want         string
	}{
		{"an image that holds data", used, 8 * mib, 1, "not fresh"},
		{"an image shorter than said", fresh(t, 4*mib), 8 * mib, 1, "bytes long"},
		{"an image below the smallest", fresh(t, mib), mib, 1, "smaller than"},
		{"more than the image holds", fresh(t, 4*mib), 4 * mib, 5 * mib, xapi.MessageTooLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, err := NewWriter(context.Background(), c.f, c.size, c.expect, Options{})
			if err == nil {
				w.Abort()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestWriteOnAFullDiskKeepsENOSPC(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=6m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unmount(t, dir) })
		f, err := os.Create(filepath.Join(dir, "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(64 * mib); err != nil {
			t.Fatal(err)
		}
		w, err := NewWriter(context.Background(), f, 64*mib, -1, o)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		if _, err = io.Copy(w, payload(32*mib)); err == nil {
			_, err = w.Finish(context.Background())
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a full disk gives %v", err)
		}
	})
}

func TestCancelEndsWriting(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		ctx, cancel := context.WithCancelCause(context.Background())
		f := fresh(t, 64*mib)
		w, err := NewWriter(ctx, f, 64*mib, -1, o)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		why := errors.New("the task was cancelled")
		if _, err := io.Copy(w, payload(mib)); err != nil {
			t.Fatal(err)
		}
		cancel(why)
		if _, err = io.Copy(w, payload(40*mib)); err == nil {
			_, err = w.Finish(ctx)
		}
		if !errors.Is(err, why) {
			t.Errorf("writing after cancel: %v", err)
		}
	})
}

func TestAbortLeavesNoFilesystem(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		f := fresh(t, 64*mib)
		w, err := NewWriter(context.Background(), f, 64*mib, -1, o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(w, payload(9*mib)); err != nil {
			t.Fatal(err)
		}
		w.Abort()
		w.Abort()
		if _, err := w.Write([]byte("x")); err == nil {
			t.Error("a write after Abort is taken")
		}
		if _, err := w.Finish(context.Background()); err == nil {
			t.Error("Finish after Abort is taken")
		}
		if _, err := openExt4(f); err == nil {
			t.Error("the image of an aborted writer holds a filesystem")
		}
	})
}

func TestAPanicOfTheLayoutWriterIsAnError(t *testing.T) {
	err := guard("lay out", func() error { panic("makeslice: len out of range") })
	if err == nil || !strings.Contains(err.Error(), "makeslice") {
		t.Errorf("a panic gives %v", err)
	}
}

// Whatever the size and however the bytes come, they are read back as written.
func TestWriteReadsBack(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		rapid.Check(t, func(rt *rapid.T) {
			size := rapid.Int64Range(4, 300).Draw(rt, "MiB") * mib
			n := rapid.Int64Range(0, min(size*2/3, 5*mib)).Draw(rt, "payload")
			data, _ := io.ReadAll(payload(n))
			for range rapid.IntRange(0, 3).Draw(rt, "zeroed stretches") {
				from := rapid.Int64Range(0, n).Draw(rt, "from")
				clear(data[from:rapid.Int64Range(from, n).Draw(rt, "to")])
			}
			dir, err := os.MkdirTemp(t.TempDir(), "")
			if err != nil {
				rt.Fatal(err)
			}
			defer os.RemoveAll(dir)
			f, err := os.Create(filepath.Join(dir, "image"))
			if err != nil {
				rt.Fatal(err)
			}
			defer f.Close()
			f.Truncate(size)
			w, err := NewWriter(context.Background(), f, size, rapid.SampledFrom([]int64{-1, n, min(n+4096, size), n / 2}).Draw(rt, "expected"), o)
			if err != nil {
				rt.Fatal(err)
			}
			defer w.Abort()
			for rest := data; len(rest) > 0; {
				k := rapid.IntRange(1, len(rest)).Draw(rt, "piece")
				if _, err := w.Write(rest[:k]); err != nil {
					rt.Fatal(err)
				}
				rest = rest[k:]
			}
			got, err := w.Finish(context.Background())
			if err != nil || got.Size != n {
				rt.Fatalf("Finish: %d, %v; want %d", got.Size, err, n)
			}
			if out, err := exec.Command("e2fsck", "-fn", f.Name()).CombinedOutput(); err != nil {
				rt.Fatalf("e2fsck: %v\n%s", err, out)
			}
			checkMap(t, f, got.Map, size)
			p, err := OpenPayload(f)
			if err != nil {
				rt.Fatal(err)
			}
			back := make([]byte, p.Size())
			if _, err := io.ReadFull(io.NewSectionReader(p, 0, p.Size()), back); err != nil {
				rt.Fatal(err)
			}
			if !bytes.Equal(back, data) {
				rt.Fatal("other bytes than were written")
			}
		})
	})
}

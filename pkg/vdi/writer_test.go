package vdi

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// write makes an image of what r gives.
func write(t testing.TB, size, expect int64, r io.Reader) (*os.File, int64) {
	t.Helper()
	f := fresh(t, size)
	w, err := NewWriter(context.Background(), f, size, expect)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if _, err := io.Copy(w, r); err != nil {
		t.Fatal(err)
	}
	n, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return f, n
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
	if out, err := exec.Command("mount", "-t", "ext4", "-o", "loop,"+options, image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

func unmount(t testing.TB, dir string) {
	t.Helper()
	err := unix.Unmount(dir, 0)
	if err != nil && err != unix.EINVAL {
		t.Errorf("umount %s: %v", dir, err)
	}
}

func digest(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
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
	if got := digest(t, f); got != digest(t, want) {
		t.Error("patch does not hold the bytes that were written")
	}
	f.Close()
	unmount(t, dir)
}

func TestWriteSizes(t *testing.T) {
	for _, n := range []int64{0, 1, 4095, 4096, 4097, 65536, mib - 1, mib, 3 * mib, bufferSize - 1, bufferSize, bufferSize + 1, 9*mib + 5} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d bytes, length known %v", n, known), func(t *testing.T) {
				size, expect := Size(n), n
				if !known {
					size, expect = Size(-1), -1
				}
				f, got := write(t, size, expect, payload(n))
				if got != n {
					t.Fatalf("Finish says %d bytes, want %d", got, n)
				}
				fsck(t, f.Name())
				checkMounted(t, f.Name(), n, payload(n))
			})
		}
	}
}

func TestImageSizesAreCleanUpToTheLastGroup(t *testing.T) {
	sizes := []int64{4, 5, 7, 8, 40, 64, 127, 128, 129, 130, 255, 256, 257, 385, 513, 640, 641, 896, 897, 1023, 1024, 1025, 1153, 2049, 3201, 3457, 4096, 8193, 33 * 1024}
	if testing.Short() {
		sizes = sizes[:12]
	}
	for _, m := range sizes {
		t.Run(fmt.Sprintf("%d MiB", m), func(t *testing.T) {
			f, _ := write(t, m*mib, -1, strings.NewReader("#!/bin/sh\n"))
			fsck(t, f.Name())
		})
	}
}

func TestScratch(t *testing.T) {
	f, _ := write(t, 300*mib, 70*mib, payload(70*mib))
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
}

func TestZerosStayHoles(t *testing.T) {
	zeros := func() io.Reader { return io.LimitReader(zeroReader{}, 3*gib+1000) }
	f, n := write(t, Size(-1), -1, io.MultiReader(payload(mib+1), zeros(), payload(mib)))
	if n != 3*gib+1000+2*mib+1 {
		t.Fatalf("%d bytes", n)
	}
	fsck(t, f.Name())
	a, err := Allocated(f)
	if err != nil || a > 4*mib {
		t.Errorf("image takes %d bytes, %v", a, err)
	}
	checkMounted(t, f.Name(), n, io.MultiReader(payload(mib+1), zeros(), payload(mib)))
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func BenchmarkFill1GiB(b *testing.B) {
	chunk, _ := io.ReadAll(payload(mib))
	b.Run("image", func(b *testing.B) {
		b.SetBytes(gib)
		for range b.N {
			f := fresh(b, 4*gib)
			w, err := NewWriter(context.Background(), f, 4*gib, gib)
			if err != nil {
				b.Fatal(err)
			}
			for range gib / mib {
				if _, err := w.Write(chunk); err != nil {
					b.Fatal(err)
				}
			}
			if _, err := w.Finish(context.Background()); err != nil {
				b.Fatal(err)
			}
			os.Remove(f.Name())
		}
	})
	b.Run("raw file", func(b *testing.B) {
		b.SetBytes(gib)
		for range b.N {
			f := fresh(b, 4*gib)
			for i := range gib / mib {
				if _, err := f.WriteAt(chunk, i*mib); err != nil {
					b.Fatal(err)
				}
			}
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
			os.Remove(f.Name())
		}
	})
}

func BenchmarkLayout(b *testing.B) {
	for _, size := range []int64{4 * mib, 4 * gib, 32 * gib} {
		b.Run(fmt.Sprintf("%d MiB", size/mib), func(b *testing.B) {
			for range b.N {
				if _, err := newLayout(size); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}


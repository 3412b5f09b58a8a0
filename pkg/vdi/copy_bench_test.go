package vdi

import (
	"context"
	"crypto/sha256"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// cold drops what the page cache has of f.
func cold(b *testing.B, f *os.File) {
	b.Helper()
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkVerify1GiB compares with one goroutine that reads the file into SHA-256.
func BenchmarkVerify1GiB(b *testing.B) {
	f, m := sample(b, b.TempDir(), gib)
	for _, state := range []string{"cold", "cached"} {
		run := func(name string, read func() error) {
			b.Run(state+"/"+name, func(b *testing.B) {
				b.SetBytes(gib)
				for range b.N {
					b.StopTimer()
					if state == "cold" {
						cold(b, f)
					} else if _, err := io.Copy(io.Discard, io.NewSectionReader(f, 0, m.Size)); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
					if err := read(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		run("baseline", func() error {
			_, err := io.Copy(sha256.New(), io.NewSectionReader(f, 0, gib))
			return err
		})
		run("verify", func() error { return m.Verify(context.Background(), f, nil) })
		run("map", func() error { _, err := BuildMap(context.Background(), f, m.Size); return err })
	}
}

// BenchmarkCopy1GiB copies between two ext4 filesystems, as cp and fsync do.
func BenchmarkCopy1GiB(b *testing.B) {
	src, m := sample(b, mkfs(b, 3*gib), gib)
	to := mkfs(b, 3*gib)
	copied := func(copy func(dst *os.File) error) func(b *testing.B) {
		return func(b *testing.B) {
			b.SetBytes(gib)
			for range b.N {
				b.StopTimer()
				cold(b, src)
				dst, err := os.Create(filepath.Join(to, "copy"))
				if err == nil {
					err = dst.Truncate(m.Size)
				}
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				err = copy(dst)
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				dst.Close()
				os.Remove(dst.Name())
			}
		}
	}
	b.Run("baseline", copied(func(dst *os.File) error {
		if err := exec.Command("cp", "--sparse=always", src.Name(), dst.Name()).Run(); err != nil {
			return err
		}
		return dst.Sync()
	}))
	b.Run("verified", copied(func(dst *os.File) error {
		_, err := CopyVerified(context.Background(), dst, src, m, CopyOptions{})
		return err
	}))
	b.Run("plain", copied(func(dst *os.File) error { return Copy(context.Background(), dst, src, nil) }))
}

// sample makes an image of 4 times n bytes, n of them data, and its map.
func sample(t testing.TB, dir string, n int64) (*os.File, *Map) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "sample"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(4 * n); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyBuffer(io.NewOffsetWriter(f, 0), payload(n), make([]byte, mib)); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	m, err := BuildMap(context.Background(), f, 4*n)
	if err != nil {
		t.Fatal(err)
	}
	return f, m
}

// mkfs mounts a fresh filesystem of size bytes.
func mkfs(t testing.TB, size int64) string {
	t.Helper()
	f := fresh(t, size)
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", f.Name()).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return mount(t, f.Name(), "rw")
}

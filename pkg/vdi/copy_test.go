package vdi

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCopyKeepsHoles(t *testing.T) {
	for _, c := range []struct {
		name string
		dir  func(t *testing.T) string
	}{
		{"within one filesystem", func(t *testing.T) string { return t.TempDir() }},
		{"to another filesystem", func(t *testing.T) string {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=100m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unmount(t, dir) })
			return dir
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			src, _ := write(t, Size(-1), -1, payload(20*mib+77))
			dst, err := os.Create(filepath.Join(c.dir(t), "copy"))
			if err != nil {
				t.Fatal(err)
			}
			defer dst.Close()
			if err := dst.Truncate(Size(-1)); err != nil {
				t.Fatal(err)
			}
			var last int64
			err = Copy(context.Background(), dst, src, func(done, total int64) {
				if done < last || total != Size(-1) {
					t.Errorf("progress %d of %d after %d", done, total, last)
				}
				last = done
			})
			if err != nil || last != Size(-1) {
				t.Fatalf("Copy: %v, %d bytes passed", err, last)
			}
			a, _ := Allocated(src)
			b, err := Allocated(dst)
			if err != nil || b > a+mib || b < 20*mib {
				t.Errorf("the copy takes %d bytes, %v; the source %d", b, err, a)
			}
			fsck(t, dst.Name())
			checkMounted(t, dst.Name(), 20*mib+77, payload(20*mib+77))
			dst.Close()
		})
	}
}

func TestCopyThroughABufferGivesTheSameBytes(t *testing.T) {
	src, dst := fresh(t, 8*mib), fresh(t, 8*mib)
	if _, err := io.Copy(io.NewOffsetWriter(src, 100), payload(3*mib+5)); err != nil {
		t.Fatal(err)
	}
	c := newCopier(dst, src, 8*mib, func(int64, int64) {})
	defer c.close()
	c.plain.Store(true)
	if err := work(t.Context(), copyStep, c.emit, c.copy); err != nil {
		t.Fatal(err)
	}
	same(t, io.NewSectionReader(dst, 0, 8*mib), io.NewSectionReader(src, 0, 8*mib))
}

func TestCopyRefusesAShorterTarget(t *testing.T) {
	if err := Copy(context.Background(), fresh(t, mib), fresh(t, 2*mib), nil); err == nil {
		t.Error("a copy into a shorter image succeeds")
	}
}

func TestCopyEndsWhenCancelled(t *testing.T) {
	src, _ := write(t, 64*mib, -1, payload(mib))
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("stop")
	cancel(why)
	if err := Copy(ctx, fresh(t, 64*mib), src, nil); !errors.Is(err, why) {
		t.Errorf("cancelled copy: %v", err)
	}
}

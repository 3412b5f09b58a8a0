package vdi

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

// wantDamage makes sure that err names just those blocks.
func wantDamage(t interface{ Fatalf(string, ...any) }, err error, blocks ...int64) {
	var d *DamageError
	if !errors.As(err, &d) || !slices.Equal(d.Blocks, blocks) || d.Total != int64(len(blocks)) {
		t.Fatalf("%v, want damage of %v", err, blocks)
	}
}

func TestVerifyFindsTheOneByteThatChanged(t *testing.T) {
	make := images(t)
	rapid.Check(t, func(t *rapid.T) {
		size := imageSize(t)
		f := make(size)
		scribble(t, f, size)
		m, err := BuildMap(t.Context(), f, size)
		if err != nil {
			t.Fatal(err)
		}
		for i := range blocksOf(size) {
			off, n := m.Span(i)
			b := contents(t, f)[off : off+n]
			if _, ok := m.Sum(i); ok == isZero(b) {
				t.Fatalf("the map says of block %d that it is zeros: %v", i, !ok)
			}
		}
		if err := m.Verify(t.Context(), f, nil); err != nil {
			t.Fatal(err)
		}
		at := rapid.Int64Range(0, size-1).Draw(t, "at")
		var b [1]byte
		f.ReadAt(b[:], at)
		b[0] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		f.WriteAt(b[:], at)
		wantDamage(t, m.Verify(t.Context(), f, nil), at/MapBlock)
	})
}

func TestVerify(t *testing.T) {
	const size = 40 * mib
	make := images(t)
	f := make(size)
	for _, i := range []int64{0, 1, 5, 39} {
		f.WriteAt([]byte("data"), i*mib+100)
	}
	m, err := BuildMap(t.Context(), f, size)
	if err != nil || len(m.Blocks) != 4 {
		t.Fatalf("%d blocks, %v", len(m.Blocks), err)
	}
	t.Run("data of zeros where the map has nothing is in order", func(t *testing.T) {
		f.WriteAt(bytes.Repeat([]byte{0}, 1<<20), 3*mib)
		if err := m.Verify(t.Context(), f, nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("a hole where the map has a block is damage", func(t *testing.T) {
		g := make(size)
		wantDamage(t, m.Verify(t.Context(), g, nil), 0, 1, 5, 39)
	})
	t.Run("only the first sixteen are named", func(t *testing.T) {
		g := make(size)
		for i := range int64(40) {
			g.WriteAt([]byte("junk"), i*mib)
		}
		var d *DamageError
		if err := m.Verify(t.Context(), g, nil); !errors.As(err, &d) || d.Total != 40 || len(d.Blocks) != 16 || d.Blocks[15] != 15 || !slices.IsSorted(d.Blocks) {
			t.Errorf("%v", err)
		}
	})
	t.Run("another length is damage", func(t *testing.T) {
		for _, l := range []int64{size + 1, size - 1, 2 * mib, 0} {
			if err := f.Truncate(l); err != nil {
				t.Fatal(err)
			}
			var d *DamageError
			if err := m.Verify(t.Context(), f, nil); !errors.As(err, &d) || d.Size != l || d.Want != size || d.Total == 0 {
				t.Errorf("%d bytes: %v", l, err)
			}
			f.Truncate(size)
			for _, i := range []int64{0, 1, 5, 39} {
				f.WriteAt([]byte("data"), i*mib+100)
			}
			if err := m.Verify(t.Context(), f, nil); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("progress grows to the bytes of the map's blocks", func(t *testing.T) {
		last, all := int64(0), int64(0)
		if err := m.Verify(t.Context(), f, func(done, total int64) {
			if done <= last || done > total {
				t.Errorf("%d of %d after %d", done, total, last)
			}
			last, all = done, total
		}); err != nil || last != all || last < 4*mib {
			t.Errorf("%d of %d, %v", last, all, err)
		}
	})
	t.Run("a cancel ends it, and every goroutine", func(t *testing.T) {
		defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("stop")
		calls := 0
		err := m.Verify(ctx, f, func(int64, int64) { calls++; cancel(why) })
		if !errors.Is(err, why) || calls > workers() {
			t.Errorf("%v after %d calls", err, calls)
		}
	})
}

func TestVerifyOfABlockDevice(t *testing.T) {
	make := images(t)
	f := make(5 * mib)
	f.WriteAt([]byte("data"), mib)
	m, err := BuildMap(t.Context(), f, 4*mib)
	if err != nil {
		t.Fatal(err)
	}
	image := fresh(t, 5*mib)
	if _, err := image.Write(contents(t, f)); err != nil {
		t.Fatal(err)
	}
	dev := loop(t, image.Name())
	if err := m.Verify(t.Context(), dev, nil); err != nil {
		t.Errorf("a device that is longer by zeros: %v", err)
	}
	dev.WriteAt([]byte{1}, 5*mib-1)
	wantDamage(t, m.Verify(t.Context(), dev, nil), 4)
	dev.WriteAt([]byte{0, 0}, 5*mib-2)
	dev.WriteAt([]byte{1}, 3*mib)
	wantDamage(t, m.Verify(t.Context(), dev, nil), 3)
	if n, err := Repair(t.Context(), dev, m, nil, nil); err != nil || n != 1 {
		t.Errorf("Repair: %d blocks, %v", n, err)
	}
	long := &Map{Size: 6 * mib}
	var d *DamageError
	if err := long.Verify(t.Context(), dev, nil); !errors.As(err, &d) || d.Want != 6*mib {
		t.Errorf("a device that is too short: %v", err)
	}
}

// loop opens a loop device over a file.
func loop(t *testing.T, path string) *os.File {
	t.Helper()
	var name string
	busy(func() bool {
		out, err := exec.Command("losetup", "-f", "--show", path).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "busy") {
			t.Fatalf("losetup: %v %s", err, out)
		}
		name = strings.TrimSpace(string(out))
		return err != nil
	})
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", name).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v %s", err, out)
		}
	})
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

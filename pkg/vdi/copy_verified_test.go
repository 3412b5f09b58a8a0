package vdi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

// failAt is a point function whose nth call, from 0 on, and all after it fail,
// as in a process that has died.
func failAt(n int64) (point func(string) error, calls *atomic.Int64) {
	calls = new(atomic.Int64)
	return func(name string) error {
		if calls.Add(1) > n {
			return fmt.Errorf("dead at %s", name)
		}
		return nil
	}, calls
}

func TestCopyVerifiedGivesTheSameImage(t *testing.T) {
	make := images(t)
	rapid.Check(t, func(t *rapid.T) {
		size := imageSize(t)
		src, dst := make(size), make(size)
		scribble(t, src, size)
		m, err := BuildMap(t.Context(), src, size)
		if err != nil {
			t.Fatal(err)
		}
		resume := rapid.Bool().Draw(t, "resume")
		if resume {
			scribble(t, dst, size) // junk, and by chance what is right
			if rapid.Bool().Draw(t, "half") {
				io.Copy(io.NewOffsetWriter(dst, 0), io.NewSectionReader(src, 0, size/2))
			}
		}
		moved, err := CopyVerified(t.Context(), dst, src, m, CopyOptions{Resume: resume})
		if err != nil || moved > int64(len(m.Blocks))*MapBlock {
			t.Fatalf("%d bytes moved, %v", moved, err)
		}
		if !bytes.Equal(contents(t, dst), contents(t, src)) {
			t.Fatal("the copy is not the source")
		}
		a, _ := Allocated(src)
		a += 8 * piece // a hole that is smaller is filled
		if b, err := Allocated(dst); err != nil || !resume && (b > a || moved > a) {
			t.Fatalf("%d bytes allocated and %d moved, the source has %d: %v", b, moved, a, err)
		}
	})
}

func TestCopyVerifiedRefusesADamagedSource(t *testing.T) {
	make := images(t)
	rapid.Check(t, func(t *rapid.T) {
		size := imageSize(t)
		src, dst := make(size), make(size)
		scribble(t, src, size)
		m, err := BuildMap(t.Context(), src, size)
		if err != nil {
			t.Fatal(err)
		}
		at := rapid.Int64Range(0, size-1).Draw(t, "at")
		var b [1]byte
		src.ReadAt(b[:], at)
		b[0]++
		src.WriteAt(b[:], at)
		_, err = CopyVerified(t.Context(), dst, src, m, CopyOptions{})
		wantDamage(t, err, at/MapBlock)
		got := contents(t, dst)
		off, n := m.Span(at / MapBlock)
		if !isZero(got[off : off+n]) {
			t.Fatal("a damaged block was written")
		}
	})
}

func TestCopyVerifiedMovesWhatIsAllocated(t *testing.T) {
	src, _ := write(t, Size(40*mib), 40*mib, payload(40*mib+77))
	m, err := BuildMap(t.Context(), src, Size(40*mib))
	if err != nil {
		t.Fatal(err)
	}
	a, err := Allocated(src)
	if err != nil {
		t.Fatal(err)
	}
	dst := fresh(t, m.Size)
	if moved, err := CopyVerified(t.Context(), dst, src, m, CopyOptions{}); err != nil || moved > a*102/100 {
		t.Errorf("%d bytes moved of %d allocated, %v", moved, a, err)
	}
	fsck(t, dst.Name())
}

func TestCopyVerifiedRefusesOtherLengths(t *testing.T) {
	m := &Map{Size: 2 * mib}
	make := images(t)
	if _, err := CopyVerified(t.Context(), make(3*mib), make(2*mib), m, CopyOptions{}); err == nil {
		t.Error("a target that is too long is taken")
	}
	var d *DamageError
	if _, err := CopyVerified(t.Context(), make(2*mib), make(3*mib), m, CopyOptions{}); !errors.As(err, &d) || d.Size != 3*mib {
		t.Errorf("a source that is too long: %v", err)
	}
}

func TestCopyVerifiedGoesOnAfterEveryPoint(t *testing.T) {
	make := images(t)
	src := make(32 * mib)
	io.Copy(io.NewOffsetWriter(src, 3*mib), payload(18*mib+5))
	m, err := BuildMap(t.Context(), src, 32*mib)
	if err != nil {
		t.Fatal(err)
	}
	all := int64(len(m.Blocks)) * MapBlock
	for n := int64(0); ; n++ {
		dst := make(32 * mib)
		point, calls := failAt(n)
		first, err := CopyVerified(t.Context(), dst, src, m, CopyOptions{point: point})
		if calls.Load() <= n {
			if err != nil || n < 6 {
				t.Fatalf("%d points: %v", n, err)
			}
			return
		}
		if err == nil {
			t.Fatalf("dead at point %d without an error", n)
		}
		second, err := CopyVerified(t.Context(), dst, src, m, CopyOptions{Resume: true})
		if err != nil || first+second > all {
			t.Fatalf("resumed after point %d: %d and %d bytes of %d, %v", n, first, second, all, err)
		}
		if err := m.Verify(t.Context(), dst, nil); err != nil {
			t.Fatalf("resumed after point %d: %v", n, err)
		}
	}
}

func TestCopyVerifiedOntoAFullDisk(t *testing.T) {
	dir := mkfs(t, 16*mib)
	make := images(t)
	src := make(64 * mib)
	io.Copy(io.NewOffsetWriter(src, 0), payload(12*mib))
	m, err := BuildMap(t.Context(), src, 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, bytes.Repeat([]byte{1}, 6<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dst, err := os.Create(filepath.Join(dir, "copy"))
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	dst.Truncate(64 * mib)
	if _, err := CopyVerified(t.Context(), dst, src, m, CopyOptions{}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("a copy onto a full disk: %v", err)
	}
	if err := Copy(t.Context(), dst, src, nil); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("a plain copy onto a full disk: %v", err)
	}
	os.Remove(filler)
	if _, err := CopyVerified(t.Context(), dst, src, m, CopyOptions{Resume: true}); err != nil {
		t.Errorf("resumed with room: %v", err)
	}
	same(t, io.NewSectionReader(dst, 0, 64*mib), io.NewSectionReader(src, 0, 64*mib))
}

func TestCopyVerifiedClonesWhereItCan(t *testing.T) {
	dir := mountXFS(t)
	src, m := sample(t, dir, 4*mib)
	dst, err := os.Create(filepath.Join(dir, "copy"))
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	dst.Truncate(m.Size)
	if moved, err := CopyVerified(t.Context(), dst, src, m, CopyOptions{}); err != nil || moved != 0 {
		t.Errorf("%d bytes moved, %v", moved, err)
	}
	same(t, io.NewSectionReader(dst, 0, m.Size), io.NewSectionReader(src, 0, m.Size))
	src.WriteAt([]byte("x"), 5)
	dst.Truncate(0)
	dst.Truncate(m.Size)
	_, err = CopyVerified(t.Context(), dst, src, m, CopyOptions{})
	wantDamage(t, err, 0)
}

func TestCopiesEndWhenCancelled(t *testing.T) {
	make := images(t)
	src := make(64 * mib)
	io.Copy(io.NewOffsetWriter(src, 0), payload(64*mib))
	m, err := BuildMap(t.Context(), src, 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	why := errors.New("stop")
	for name, run := range map[string]func(ctx context.Context, progress func(int64, int64)) error{
		"verified": func(ctx context.Context, progress func(int64, int64)) error {
			_, err := CopyVerified(ctx, make(64*mib), src, m, CopyOptions{Progress: progress})
			return err
		},
		"plain": func(ctx context.Context, progress func(int64, int64)) error {
			return Copy(ctx, make(64*mib), src, progress)
		},
		"repair": func(ctx context.Context, progress func(int64, int64)) error {
			_, err := Repair(ctx, make(64*mib), m, []io.ReaderAt{src}, progress)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
			ctx, cancel := context.WithCancelCause(t.Context())
			calls := 0
			if err := run(ctx, func(int64, int64) { calls++; cancel(why) }); !errors.Is(err, why) || calls > workers() {
				t.Errorf("%v after %d calls", err, calls)
			}
		})
	}
}

func TestRepairTakesEachBlockFromWhereItIsGood(t *testing.T) {
	make := images(t)
	rapid.Check(t, func(t *rapid.T) {
		size := imageSize(t)
		whole := make(size)
		scribble(t, whole, size)
		m, err := BuildMap(t.Context(), whole, size)
		if err != nil {
			t.Fatal(err)
		}
		// Each holder has the image but for some junk of its own.
		holder := func() *os.File {
			f := make(size)
			io.Copy(io.NewOffsetWriter(f, 0), io.NewSectionReader(whole, 0, size))
			scribble(t, f, size)
			return f
		}
		f, one, two := holder(), holder(), holder()
		before := contents(t, f)
		var lost []int64
		for i := range blocksOf(size) {
			off, n := m.Span(i)
			good := func(f *os.File) bool { return m.check(i, contents(t, f)[off:off+n]) }
			if _, ok := m.Sum(i); ok && !good(f) && !good(one) && !good(two) {
				lost = append(lost, i)
			}
		}
		_, err = Repair(t.Context(), f, m, []io.ReaderAt{one, two}, nil)
		if len(lost) > 0 {
			wantDamage(t, err, lost...)
			wantDamage(t, m.Verify(t.Context(), f, nil), lost...)
			after := contents(t, f)
			for _, i := range lost {
				off, n := m.Span(i)
				if !bytes.Equal(before[off:off+n], after[off:off+n]) {
					t.Fatalf("block %d was changed to what nobody has checked", i)
				}
			}
			_, err = Repair(t.Context(), f, m, []io.ReaderAt{one, whole}, nil)
		}
		if err != nil || !bytes.Equal(contents(t, f), contents(t, whole)) {
			t.Fatalf("the image is not what it was: %v", err)
		}
		if n, err := Repair(t.Context(), f, m, nil, nil); n != 0 || err != nil {
			t.Fatalf("a second repair: %d blocks, %v", n, err)
		}
	})
}

func TestRepairGoesOnAfterEveryPoint(t *testing.T) {
	make := images(t)
	whole := make(16 * mib)
	io.Copy(io.NewOffsetWriter(whole, 0), payload(6*mib))
	m, err := BuildMap(t.Context(), whole, 16*mib)
	if err != nil {
		t.Fatal(err)
	}
	for n := int64(0); ; n++ {
		f := make(20 * mib)                                                     // too long
		io.Copy(io.NewOffsetWriter(f, 0), io.NewSectionReader(whole, 0, 2*mib)) // good
		io.Copy(io.NewOffsetWriter(f, 3*mib), payload(5*mib))                   // junk over data and holes
		point, calls := failAt(n)
		_, err := m.repair(t.Context(), f, []io.ReaderAt{whole}, nil, point)
		if calls.Load() <= n {
			if err != nil || n < 8 {
				t.Fatalf("%d points: %v", n, err)
			}
			return
		}
		if err == nil {
			t.Fatalf("dead at point %d without an error", n)
		}
		if _, err := Repair(t.Context(), f, m, []io.ReaderAt{whole}, nil); err != nil {
			t.Fatalf("again after point %d: %v", n, err)
		}
		if err := m.Verify(t.Context(), f, nil); err != nil {
			t.Fatalf("after point %d: %v", n, err)
		}
	}
}

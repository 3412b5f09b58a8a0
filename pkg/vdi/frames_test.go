package vdi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"

	"pgregory.net/rapid"
)

// images gives a maker of image files for tests of many images: in memory where
// that can be, for each is synced. They are gone after the test.
func images(t *testing.T) func(size int64) *os.File {
	dir, err := os.MkdirTemp("/dev/shm", "patchd-vdi-test")
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var made []*os.File
	t.Cleanup(func() {
		for _, f := range made {
			f.Close()
		}
	})
	return func(size int64) *os.File {
		f, err := os.CreateTemp(dir, "image")
		if err == nil {
			err = errors.Join(f.Truncate(size), os.Remove(f.Name()))
		}
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, f)
		if len(made) > 64 {
			made[0].Close()
			made = made[1:]
		}
		return f
	}
}

// scribble writes a few stretches of data, and of zeros, into an image.
func scribble(t *rapid.T, f *os.File, size int64) {
	for range rapid.IntRange(0, 6).Draw(t, "stretches") {
		off := rapid.Int64Range(0, size-1).Draw(t, "offset")
		n := min(rapid.Int64Range(1, 2*mib).Draw(t, "length"), size-off)
		b := make([]byte, n)
		if rapid.Bool().Draw(t, "data") {
			if _, err := io.ReadFull(payload(n), b); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
}

// imageSize is rarely a round number of blocks.
func imageSize(t *rapid.T) int64 {
	return rapid.OneOf(rapid.Int64Range(1, 6*mib), rapid.SampledFrom([]int64{mib, 4 * mib, 3*mib + 4096, 4095})).Draw(t, "size")
}

func contents(t interface{ Fatal(...any) }, f *os.File) []byte {
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

func TestFramesGiveTheImageBack(t *testing.T) {
	make := images(t)
	rapid.Check(t, func(t *rapid.T) {
		size := imageSize(t)
		src, fresh, used := make(size), make(size), make(size)
		scribble(t, src, size)
		scribble(t, used, size)
		var stream bytes.Buffer
		if err := WriteExtents(context.Background(), &stream, src, size, nil); err != nil {
			t.Fatal(err)
		}
		for _, dst := range []*os.File{fresh, used} {
			r, err := NewFrameReader(bytes.NewReader(stream.Bytes()))
			if err != nil || r.Size != size || r.Kind != FrameExtents {
				t.Fatalf("head: %+v %v", r, err)
			}
			if err := r.Apply(context.Background(), dst, dst == fresh); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(contents(t, dst), contents(t, src)) {
				t.Fatal("the image is not what was sent")
			}
		}
		a, _ := Allocated(src)
		a += 8 * piece // a hole that is smaller is filled
		if b, err := Allocated(fresh); err != nil || b > a {
			t.Fatalf("%d bytes allocated, of the source %d: %v", b, a, err)
		}
	})
}

func TestFramesOfBlocksChangeJustThose(t *testing.T) {
	make := images(t)
	rapid.Check(t, func(t *rapid.T) {
		size := imageSize(t)
		src, dst := make(size), make(size)
		scribble(t, src, size)
		scribble(t, dst, size)
		want := contents(t, dst)
		var list []BlockRange
		for range rapid.IntRange(1, 4).Draw(t, "ranges") {
			first := rapid.Int64Range(0, blocksOf(size)-1).Draw(t, "first")
			list = append(list, BlockRange{first, rapid.Int64Range(first, blocksOf(size)-1).Draw(t, "last")})
		}
		from := contents(t, src)
		for _, r := range list {
			end := min((r.Last+1)*MapBlock, size)
			copy(want[r.First*MapBlock:end], from[r.First*MapBlock:end])
		}
		list, err := JoinBlocks(list, size)
		if err != nil {
			t.Fatal(err)
		}
		var stream bytes.Buffer
		if err := WriteBlocks(context.Background(), &stream, src, size, list, nil); err != nil {
			t.Fatal(err)
		}
		r, err := NewFrameReader(&stream)
		if err == nil {
			err = r.Apply(context.Background(), dst, false)
		}
		if err != nil || !bytes.Equal(contents(t, dst), want) {
			t.Fatalf("the image is not what it should be: %v", err)
		}
	})
}

func TestNoFrameIsTakenFromADamagedStream(t *testing.T) {
	make := images(t)
	src := make(2*mib + 100)
	src.WriteAt([]byte("one"), 0)
	src.WriteAt([]byte("two"), mib+5)
	src.WriteAt(bytes.Repeat([]byte{7}, 100), 2*mib)
	var stream bytes.Buffer
	list, err := ParseBlocks("0-2", 2*mib+100)
	if err == nil {
		err = WriteBlocks(context.Background(), &stream, src, 2*mib+100, list, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	read := func(b []byte) error {
		r, err := NewFrameReader(bytes.NewReader(b))
		for err == nil {
			_, err = r.Next()
		}
		if err == io.EOF {
			return nil
		}
		return err
	}
	if err := read(stream.Bytes()); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		b := bytes.Clone(stream.Bytes())
		at := rapid.IntRange(0, len(b)-1).Draw(t, "at")
		if err := read(b[:at]); !errors.Is(err, ErrFrames) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d: %v", at, err)
		}
		b[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if err := read(b); !errors.Is(err, ErrFrames) {
			t.Fatalf("one bit at %d: %v", at, err)
		}
	})
}

func TestListsOfBlocks(t *testing.T) {
	for _, c := range []struct {
		list string
		want []BlockRange
	}{
		{"0", []BlockRange{{0, 0}}},
		{"0-3,17", []BlockRange{{0, 3}, {17, 17}}},
		{"17, 2-3,0-1,3", []BlockRange{{0, 3}, {17, 17}}},
		{"18", nil}, {"", nil}, {"-1", nil}, {"3-1", nil}, {"1-", nil}, {"x", nil}, {"0,,1", nil}, {"0-99999999999999999999", nil},
	} {
		got, err := ParseBlocks(c.list, 17*mib+1)
		if (err == nil) != (c.want != nil) || len(got) != len(c.want) {
			t.Errorf("%q: %v %v", c.list, got, err)
			continue
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("%q: %v", c.list, got)
			}
		}
	}
}

// FuzzFrames reads streams that anybody may send.
func FuzzFrames(f *testing.F) {
	src, err := os.Create(f.TempDir() + "/image")
	if err != nil {
		f.Fatal(err)
	}
	defer src.Close()
	src.Truncate(mib + 3)
	src.WriteAt([]byte("data"), 70000)
	for _, kind := range []FrameKind{FrameExtents, FrameBlocks} {
		var b bytes.Buffer
		if kind == FrameExtents {
			err = WriteExtents(context.Background(), &b, src, mib+3, nil)
		} else {
			err = WriteBlocks(context.Background(), &b, src, mib+3, []BlockRange{{1, 1}}, nil)
		}
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := NewFrameReader(bytes.NewReader(b))
		if err != nil {
			return
		}
		for at := int64(0); ; {
			frame, err := r.Next()
			if err != nil {
				return
			}
			if frame.Offset < at || frame.Length <= 0 || frame.Length > MapBlock || frame.Offset+frame.Length > r.Size ||
				frame.Data != nil && int64(len(frame.Data)) != frame.Length {
				t.Fatalf("frame of %d bytes at %d after %d, in %d", frame.Length, frame.Offset, at, r.Size)
			}
			at = frame.Offset + frame.Length
		}
	})
}

package delta

import (
	"bytes"
	"io"
	"testing"
)

// FuzzDelta makes deltas of two texts, and takes the second one for a delta.
func FuzzDelta(f *testing.F) {
	f.Add([]byte("a base"), []byte("a file"))
	f.Add(noise(1, 5000), noise(1, 6000))
	f.Add([]byte("0123456789"), stream(f, uint64(10), uint64(3), uint64(3)<<2|opCopy, int64(4), uint64(3)<<2|opEnd))
	f.Fuzz(func(t *testing.T, base, data []byte) {
		roundTrip(t, base, [][]byte{data[:len(data)/2], data[len(data)/2:]}, minBits)
		for _, delta := range [][]byte{data, stream(t, string(data))} {
			r := NewDecoder(bytes.NewReader(delta), bytes.NewReader(base), int64(len(base)))
			size, err := r.Size()
			if err != nil || size > 1<<24 {
				continue
			}
			if n, err := io.Copy(io.Discard, r); n > size || err == nil && n != size {
				t.Fatalf("%d bytes of %d, %v", n, size, err)
			}
		}
	})
}

// FuzzIndex reads indexes; one that is taken is complete, and is written as it
// was read.
func FuzzIndex(f *testing.F) {
	for _, n := range []int{0, 1, 5000} {
		var b bytes.Buffer
		if err := index(f, noise(uint64(n), n), minBits).Encode(&b); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		ix, err := ReadIndex(bytes.NewReader(text))
		if err != nil {
			return
		}
		at := int64(0)
		for _, c := range ix.Chunks {
			if c.Off != at || c.Len <= 0 {
				t.Fatalf("%+v at %d", c, at)
			}
			at += c.Len
		}
		var b bytes.Buffer
		if err := ix.Encode(&b); err != nil || at != ix.Size {
			t.Fatalf("%d bytes of %d, %v", at, ix.Size, err)
		}
		again, err := ReadIndex(&b)
		if err != nil || again.Size != ix.Size || len(again.Chunks) != len(ix.Chunks) {
			t.Fatalf("%+v, %v", again, err)
		}
	})
}

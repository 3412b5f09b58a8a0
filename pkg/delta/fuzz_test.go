package delta

import (
	"bytes"
	"crypto/sha256"
	"io"
	"testing"
)

// FuzzDelta makes deltas of two texts, and takes the second one for a delta.
func FuzzDelta(f *testing.F) {
	f.Add([]byte("a base"), []byte("a file"))
	f.Add(noise(1, 1000), noise(1, 1200))
	sum := sha256.Sum256([]byte("345"))
	known := append([]byte{10, 3, 3<<2 | opCopy, 6, 3 << 2}, sum[:]...)
	if got, err := decode(raw(known), []byte("0123456789")); err != nil || string(got) != "345" {
		f.Fatalf("%q, %v", got, err)
	}
	f.Add([]byte("0123456789"), known)
	f.Fuzz(func(t *testing.T, base, data []byte) {
		roundTrip(t, base, [][]byte{data[:len(data)/2], data[len(data)/2:]}, minBits)
		for _, delta := range [][]byte{append([]byte(deltaMagic), data...), raw(data)} {
			r := NewDecoder(bytes.NewReader(delta), bytes.NewReader(base), int64(len(base)))
			size, err := r.Size()
			if err != nil || size > 1<<20 {
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

// raw is a delta of operations that are not compressed: one zstd frame of one
// block.
func raw(ops []byte) []byte {
	ops = ops[:min(len(ops), 1<<16)]
	b := append([]byte(deltaMagic), 0x28, 0xb5, 0x2f, 0xfd, 0, 0x50) // a window of 1 MiB
	n := len(ops)<<3 | 1                                             // the last block
	return append(append(b, byte(n), byte(n>>8), byte(n>>16)), ops...)
}

package patch

import (
	"bytes"
	"crypto/sha256"
	"math/rand"
	"testing"
)

func TestHashAheadIsTheHash(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	for _, size := range []int{0, 1, aheadBlock - 1, aheadBlock, aheadBlock + 1, 5*aheadBlock + 77} {
		data := make([]byte, size)
		r.Read(data)
		want := sha256.Sum256(data)
		a := newAhead(sha256.New())
		for rest := data; len(rest) > 0; {
			n := min(1+r.Intn(2*aheadBlock), len(rest))
			piece := bytes.Clone(rest[:n])
			a.Write(piece)
			clear(piece) // the caller may use its buffer again at once
			rest = rest[n:]
		}
		if !bytes.Equal(a.Sum(nil), want[:]) || !bytes.Equal(a.Sum(nil), want[:]) {
			t.Errorf("%d bytes have another hash", size)
		}
	}
}

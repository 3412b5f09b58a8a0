package peer

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// bitset has one bit for each block of a map, by its place there.
type bitset []uint64

func newBits(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) set(i int)      { b[i/64] |= 1 << (i % 64) }
func (b bitset) clear(i int)    { b[i/64] &^= 1 << (i % 64) }
func (b bitset) has(i int) bool { return b[i/64]&(1<<(i%64)) != 0 }

// fill sets the first n bits.
func (b bitset) fill(n int) {
	for i := range b {
		b[i] = ^uint64(0)
	}
	if n%64 != 0 {
		b[len(b)-1] = 1<<(n%64) - 1
	}
}

// or adds the bits of o.
func (b bitset) or(o bitset) {
	for i := range b {
		b[i] |= o[i]
	}
}

// encode gives the bits as bytes, for n blocks.
func (b bitset) encode(n int) []byte {
	out := make([]byte, (n+7)/8)
	for i := range out {
		out[i] = byte(b[i/8] >> (i % 8 * 8))
	}
	return out
}

// decodeBits reads what encode has made, for n blocks.
func decodeBits(raw []byte, n int) (bitset, error) {
	if len(raw) != (n+7)/8 {
		return nil, fmt.Errorf("%d bytes tell of the blocks, not %d", len(raw), (n+7)/8)
	}
	b := newBits(n)
	for i, c := range raw {
		b[i/8] |= uint64(c) << (i % 8 * 8)
	}
	if n%64 != 0 {
		b[len(b)-1] &= 1<<(n%64) - 1
	}
	return b, nil
}

// pick gives the places of up to most bits of as many words as word knows,
// neighbours where that can be, from start on and then from the beginning.
func pick(words, start, most int, word func(i int) uint64) (out []int) {
	for k := range words + 1 {
		i := (start/64 + k) % words
		w, before := word(i), uint64(1)<<(start%64)-1
		switch k {
		case 0:
			w &^= before
		case words:
			w &= before
		}
		for w != 0 && len(out) < most {
			at := bits.TrailingZeros64(w)
			w &^= 1 << at
			out = append(out, i*64+at)
		}
		if len(out) == most {
			break
		}
	}
	return out
}

// maxAsked is how many blocks one request may ask for.
const maxAsked = 16

// parseList reads a list as in 3,17-20, in the order given.
func parseList(list string) ([]int64, error) {
	if len(list) > 24*2*maxAsked {
		return nil, fmt.Errorf("the list of blocks is too long")
	}
	var out []int64
	for one := range strings.SplitSeq(list, ",") {
		a, b, isRange := strings.Cut(one, "-")
		if !isRange {
			b = a
		}
		first, err1 := strconv.ParseInt(a, 10, 64)
		last, err2 := strconv.ParseInt(b, 10, 64)
		if err1 != nil || err2 != nil || first < 0 || last < first {
			return nil, fmt.Errorf("%.40q is neither a block nor a range of blocks", one)
		}
		if last-first >= maxAsked || len(out)+int(last-first) >= maxAsked {
			return nil, fmt.Errorf("more than %d blocks are asked for", maxAsked)
		}
		for i := first; i <= last; i++ {
			out = append(out, i)
		}
	}
	return out, nil
}

// formatList is what parseList reads.
func formatList(blocks []int64) string {
	var b strings.Builder
	for i := 0; i < len(blocks); {
		j := i + 1
		for j < len(blocks) && blocks[j] == blocks[j-1]+1 {
			j++
		}
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.FormatInt(blocks[i], 10))
		if j > i+1 {
			b.WriteByte('-')
			b.WriteString(strconv.FormatInt(blocks[j-1], 10))
		}
		i = j
	}
	return b.String()
}

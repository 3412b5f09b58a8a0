package vdi

import (
	"crypto/sha256"
	"hash"
)

// mapper makes a block map of what passes on its way to the image: of those
// blocks of the map whose bytes come one after another, from first to last.
type mapper struct {
	size   int64
	blocks []Block        // whole, and not all zeros
	whole  []run          // of blocks of the map, zeros too, neighbours joined
	mixed  map[int64]bool // blocks of which only a part has come

	sum   hash.Hash
	index int64 // the block that is being hashed
	at    int64 // how far, in bytes; 0: none is
	zero  bool  // it held only zeros so far
}

// add takes bytes that go to off.
func (m *mapper) add(off int64, p []byte) {
	for len(p) > 0 {
		index, in := off/MapBlock, off%MapBlock
		length := min(MapBlock, m.size-index*MapBlock)
		k := min(int64(len(p)), length-in)
		switch {
		case m.at > 0 && index == m.index && in == m.at:
			m.update(p[:k], length)
		case in != 0:
			m.close()
			m.mix(index)
		case k == length:
			m.close()
			m.complete(index, isZero(p[:k]), func() [sha256.Size]byte { return sha256.Sum256(p[:k]) })
		default:
			m.close()
			if m.sum == nil {
				m.sum = sha256.New()
			}
			m.sum.Reset()
			m.index, m.zero = index, true
			m.update(p[:k], length)
		}
		p, off = p[k:], off+k
	}
}

// update adds to the block that is being hashed. Zeros at its beginning wait
// until something else comes: mostly nothing does.
func (m *mapper) update(p []byte, length int64) {
	if m.zero && !isZero(p) {
		m.zero = false
		for n := m.at; n > 0; n -= min(n, blockSize) {
			m.sum.Write(zeroBlock[:min(n, blockSize)])
		}
	}
	if !m.zero {
		m.sum.Write(p)
	}
	if m.at += int64(len(p)); m.at == length {
		m.at = 0
		m.complete(m.index, m.zero, func() (s [sha256.Size]byte) { m.sum.Sum(s[:0]); return s })
	}
}

func (m *mapper) complete(index int64, zero bool, sum func() [sha256.Size]byte) {
	m.whole = appendRun(m.whole, run{index, 1})
	if !zero {
		m.blocks = append(m.blocks, Block{index, sum()})
	}
}

// close gives up a block that is not whole.
func (m *mapper) close() {
	if m.at > 0 {
		m.at = 0
		m.mix(m.index)
	}
}

func (m *mapper) mix(index int64) {
	if m.mixed == nil {
		m.mixed = map[int64]bool{}
	}
	m.mixed[index] = true
}

// covers tells whether the whole of a block has passed.
func (m *mapper) covers(index int64) bool {
	for _, r := range m.whole {
		if index >= r.start && index < r.start+r.count {
			return true
		}
	}
	return false
}

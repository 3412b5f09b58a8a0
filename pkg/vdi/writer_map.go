package vdi

import (
	"crypto/sha256"
	"hash"
)

// mapper makes a block map of what passes on its way to the image: of those
// blocks of the map whose bytes come one after another, from first to last.
type mapper struct {
	size   int64
	blocks []Block             // whole, and not all zeros
	whole  []run               // of blocks of the map, zeros too, neighbours joined
	mixed  map[int64][]stretch // blocks of which only parts have come, and these

	sum   hash.Hash
	index int64 // the block that is being hashed
	from  int64 // where that began within it
	at    int64 // how far it is; from: none is being hashed
	zero  bool  // it held only zeros so far
}

// stretch is a part of a block of the map as it was given: what is read back from
// the storage counts only when it is still that.
type stretch struct {
	from, to int64 // bytes within the block
	zero     bool
	sum      [sha256.Size]byte // unless zero
}

// holds tells whether data, a whole block, has the stretch in its place.
func (c stretch) holds(data []byte) bool {
	if c.to > int64(len(data)) {
		return false
	}
	data = data[c.from:c.to]
	if c.zero {
		return isZero(data)
	}
	return sha256.Sum256(data) == c.sum
}

// add takes bytes that go to off.
func (m *mapper) add(off int64, p []byte) {
	for len(p) > 0 {
		index, in := off/MapBlock, off%MapBlock
		length := min(MapBlock, m.size-index*MapBlock)
		k := min(int64(len(p)), length-in)
		switch {
		case m.at > m.from && index == m.index && in == m.at:
			m.update(p[:k], length)
		case k == length:
			m.close()
			m.complete(index, isZero(p[:k]), func() [sha256.Size]byte { return sha256.Sum256(p[:k]) })
		default:
			m.close()
			if m.sum == nil {
				m.sum = sha256.New()
			}
			m.sum.Reset()
			m.index, m.from, m.at, m.zero = index, in, in, true
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
		for n := m.at - m.from; n > 0; n -= min(n, blockSize) {
			m.sum.Write(zeroBlock[:min(n, blockSize)])
		}
	}
	if !m.zero {
		m.sum.Write(p)
	}
	if m.at += int64(len(p)); m.at < length {
		return
	}
	if m.from > 0 {
		m.close()
		return
	}
	m.at = 0
	m.complete(m.index, m.zero, m.digest)
}

func (m *mapper) digest() (s [sha256.Size]byte) {
	m.sum.Sum(s[:0])
	return s
}

func (m *mapper) complete(index int64, zero bool, sum func() [sha256.Size]byte) {
	m.whole = appendRun(m.whole, run{index, 1})
	if !zero {
		m.blocks = append(m.blocks, Block{index, sum()})
	}
}

// close ends what is being hashed: a stretch of a block.
func (m *mapper) close() {
	if m.at == m.from {
		return
	}
	c := stretch{from: m.from, to: m.at, zero: m.zero}
	if !c.zero {
		c.sum = m.digest()
	}
	if m.mixed == nil {
		m.mixed = map[int64][]stretch{}
	}
	m.mixed[m.index] = append(m.mixed[m.index], c)
	m.from, m.at = 0, 0
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

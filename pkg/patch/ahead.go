package patch

import "hash"

// aheadBlock is how many bytes are hashed at once beside the caller.
const aheadBlock = 256 << 10

// ahead is a hash that runs beside its caller: the digest of the payload on
// one core, the signature's own hash on another. At most one block is being
// hashed at a time, in a goroutine that ends with it, so that one which is
// given up leaves nothing behind. What fits one block is hashed in place.
type ahead struct {
	hash.Hash
	fill, other []byte
	busy        chan struct{} // closed when the block under way is hashed; nil: none
}

func newAhead(h hash.Hash) *ahead { return &ahead{Hash: h} }

func (a *ahead) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if a.fill == nil {
			a.fill = make([]byte, 0, aheadBlock)
		}
		k := min(len(p), aheadBlock-len(a.fill))
		a.fill = append(a.fill, p[:k]...)
		p = p[k:]
		if len(a.fill) == aheadBlock {
			a.start()
		}
	}
	return n, nil
}

// start hashes the full block in the background and gives the other one to fill.
func (a *ahead) start() {
	a.wait()
	block, done := a.fill, make(chan struct{})
	a.fill, a.other, a.busy = a.other[:0], block, done
	go func() {
		a.Hash.Write(block)
		close(done)
	}()
}

func (a *ahead) wait() {
	if a.busy != nil {
		<-a.busy
		a.busy = nil
	}
}

// Sum is the hash of all that was written.
func (a *ahead) Sum(b []byte) []byte {
	a.wait()
	a.Hash.Write(a.fill)
	a.fill = a.fill[:0]
	return a.Hash.Sum(b)
}

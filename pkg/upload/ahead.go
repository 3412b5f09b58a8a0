package upload

import (
	"io"
	"sync"
)

// aheadRoom is how far ahead of who works on a stream it is received, in bytes.
const aheadRoom = 1 << 20

// ahead reads a body in a goroutine of its own: while one part of a stream is
// checked and hashed, the next is received. One goroutine uses it.
type ahead struct {
	b    *body
	done chan struct{} // closed when the body is no longer read

	mu       sync.Mutex
	more     sync.Cond // something was received, or the end
	less     sync.Cond // something was taken, or nobody wants more
	ring     []byte
	received int64
	taken    int64
	ended    bool // b.err tells how
	unwanted bool
}

// readAhead begins to read b. Until close nobody else may.
func readAhead(b *body) *ahead {
	a := &ahead{b: b, done: make(chan struct{}), ring: make([]byte, aheadRoom)}
	a.more.L, a.less.L = &a.mu, &a.mu
	go a.run()
	return a
}

func (a *ahead) run() {
	defer close(a.done)
	for {
		p := a.room()
		if p == nil {
			return
		}
		n, err := a.b.Read(p)
		a.mu.Lock()
		a.received += int64(n)
		a.ended = err != nil
		a.more.Signal()
		a.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// room gives a free part of the ring. When it was full, it waits until half of
// it is free: many small steps would cost more than what is gained. Nil: nobody
// wants more.
func (a *ahead) room() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	size := int64(len(a.ring))
	if a.received-a.taken == size {
		for a.received-a.taken > size/2 && !a.unwanted {
			a.less.Wait()
		}
	}
	if a.unwanted {
		return nil
	}
	at := a.received % size
	return a.ring[at:min(size, at+size-(a.received-a.taken))]
}

// Read gives what was received, in order, then the error of the body.
func (a *ahead) Read(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.received == a.taken && !a.ended {
		a.more.Wait()
	}
	if a.received == a.taken {
		return 0, a.b.err
	}
	size := int64(len(a.ring))
	at := a.taken % size
	have := a.ring[at:min(size, at+a.received-a.taken)]
	a.mu.Unlock()
	n := copy(p, have) // nobody writes there until it is taken
	a.mu.Lock()
	a.taken += int64(n)
	if a.received-a.taken <= size/2 {
		a.less.Signal()
	}
	return n, nil
}

// end makes sure that the body ends here, as its length said.
func (a *ahead) end() error { return ends(a) }

// size is how many bytes of the body were received. Known after its end.
func (a *ahead) size() int64 { return a.b.n }

// close ends the reading; a body that is read to its open end is waited for.
func (a *ahead) close() {
	a.mu.Lock()
	a.unwanted = true
	a.less.Signal()
	over := a.ended || a.b.openEnd
	a.mu.Unlock()
	if !over {
		a.b.stop()
	}
	<-a.done
}

var _ io.Reader = (*ahead)(nil)

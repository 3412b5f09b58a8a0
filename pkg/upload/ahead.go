package upload

import "io"

// A stream is read so far ahead of who works on it, in pieces.
const (
	aheadPieces = 4
	aheadPiece  = 128 << 10
)

// ahead reads a body in a goroutine of its own: while one part of a stream is
// checked and hashed, the next is received. It is used by one goroutine.
type ahead struct {
	b     *body
	full  chan []byte // closed at the end, which b.err tells
	empty chan []byte
	quit  chan struct{}
	cur   []byte // what is left of piece
	piece []byte
}

// readAhead begins to read b. Until close nobody else may.
func readAhead(b *body) *ahead {
	a := &ahead{b: b, full: make(chan []byte, aheadPieces), empty: make(chan []byte, aheadPieces), quit: make(chan struct{})}
	for range aheadPieces {
		a.empty <- make([]byte, aheadPiece)
	}
	go a.run()
	return a
}

func (a *ahead) run() {
	defer close(a.full)
	for {
		select {
		case <-a.quit:
			return
		case p := <-a.empty:
			n, err := a.b.Read(p)
			if n > 0 {
				a.full <- p[:n] // there is room for all of them
			}
			if err != nil {
				return
			}
		}
	}
}

// Read gives what was received, in order, then the error of the body.
func (a *ahead) Read(p []byte) (int, error) {
	if len(a.cur) == 0 {
		if a.piece != nil {
			a.empty <- a.piece[:cap(a.piece)]
		}
		var ok bool
		if a.piece, ok = <-a.full; !ok {
			a.piece = nil
			return 0, a.b.err
		}
		a.cur = a.piece
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	return n, nil
}

// end makes sure that the body ends here, as its length said.
func (a *ahead) end() error { return ends(a) }

// size is how many bytes of the body were received.
func (a *ahead) size() int64 { return a.b.n }

// close ends the reading; a body that is read to its open end is waited for.
func (a *ahead) close() {
	close(a.quit)
	if !a.b.openEnd {
		a.b.stop()
	}
	for range a.full {
	}
}

var _ io.Reader = (*ahead)(nil)

package peer

import (
	"sync"
	"time"
)

// given is who was given which block of one image lately.
type given struct {
	mu   sync.Mutex
	to   map[int64]gift // by block
	last time.Time
}

// gift is a block that a reader has, or is being sent.
type gift struct {
	reader string
	at     time.Time // when it was sent; zero: it is on its way
}

const (
	// givenFor is how long a host remembers after the last request.
	givenFor = 30 * time.Second
	// giftFor is how long a block that was sent counts as given: by then others
	// know who has it, or he is gone.
	giftFor = time.Second
	// maxGivenImages and maxGivenBlocks bound what it remembers.
	maxGivenImages = 16
	maxGivenBlocks = 1 << 18
)

// remember gives what is remembered of an image.
func (n *Node) remember(digest string) *given {
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.given[digest]
	if g == nil || now.Sub(g.last) > givenFor {
		for d, o := range n.given {
			if now.Sub(o.last) > givenFor || len(n.given) >= maxGivenImages {
				delete(n.given, d)
			}
		}
		g = &given{to: map[int64]gift{}}
		n.given[digest] = g
	}
	g.last = now
	return g
}

// take marks the blocks that reader gets, and gives those that it does not
// because another one was given them. Without first it gets all.
func (g *given) take(blocks []int64, reader string, first bool) (already []int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, b := range blocks {
		o, ok := g.to[b]
		switch {
		case first && ok && o.reader != reader && (o.at.IsZero() || time.Since(o.at) < giftFor):
			already = append(already, b)
		case ok || len(g.to) < maxGivenBlocks:
			g.to[b] = gift{reader: reader}
		}
	}
	return already
}

// sent tells how many of blocks reader got; it may ask for the others again, and
// so may everybody else.
func (g *given) sent(blocks []int64, reader string, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, b := range blocks {
		switch {
		case g.to[b].reader != reader:
		case i < n:
			g.to[b] = gift{reader, time.Now()}
		default:
			delete(g.to, b)
		}
	}
}

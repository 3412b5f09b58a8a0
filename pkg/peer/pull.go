package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// PullOptions say how an image is pulled.
type PullOptions struct {
	// Sources names who has blocks, and gives the ticket to ask them with. It is
	// asked again while the pull goes on: others come, and tickets end.
	Sources func(ctx context.Context) (sources []Source, ticket []byte, err error)
	// Resume tells that the image may hold blocks of an earlier pull.
	Resume bool
	// Progress hears of the bytes that are there and of all; nil: nobody does. Its
	// calls do not overlap.
	Progress func(done, total int64)
}

// pull is one image on its way.
type pull struct {
	n      *Node
	m      *vdi.Map
	digest string
	fill   *vdi.Filling
	o      PullOptions
	end    context.CancelCauseFunc
	again  chan struct{} // the sources are to be asked for anew

	readers sync.WaitGroup // of what is there already

	mu      sync.Mutex
	closed  bool
	todo    bitset           // blocks that are not here
	left    int              // how many that are
	done    int64            // bytes that are here
	total   int64            // bytes of all blocks
	moved   int64            // bytes that came over the wire and were good
	busy    map[int]*request // by block
	flights map[*request]bool
	from    map[xapi.UUID]*origin
	ticket  []byte
	trouble error         // why the sources cannot be learned
	last    time.Time     // when a block came
	changed chan struct{} // closed when something else may be picked
	polls   sync.WaitGroup
}

// lanes is how many requests of one pull are on their way at most.
const lanes = 8

// Pull makes dst, which has at least the length of m, the image that m
// describes, with blocks of several hosts at once. What dst has already is kept
// with Resume; holes stay holes. Each block is held against the map before it is
// written; a source that sends a wrong one is told of by Bad and not asked again.
// While it goes on this host gives to others what it has. moved is how many bytes
// came over the wire.
//
// It ends with an error that names the sources when no block has come for GiveUp;
// what is there may be resumed. dst stays open.
func (n *Node) Pull(ctx context.Context, m *vdi.Map, dst *os.File, o PullOptions) (moved int64, err error) {
	fill, good, err := vdi.Fill(ctx, dst, m, o.Resume, o.Progress)
	if err != nil {
		return 0, err
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	p := &pull{
		n: n, m: m, digest: m.Digest(), fill: fill, o: o, end: end, again: make(chan struct{}, 1),
		todo: newBits(len(m.Blocks)), busy: map[int]*request{}, flights: map[*request]bool{}, from: map[xapi.UUID]*origin{},
		last: time.Now(), changed: make(chan struct{}),
	}
	for at, b := range m.Blocks {
		_, length := m.Span(b.Index)
		p.total += length
		if good[at] {
			p.done += length
			continue
		}
		p.todo.set(at)
		p.left++
	}
	defer p.close()
	if p.left > 0 {
		n.begin(p)
		if err := p.run(ctx); err != nil {
			return p.moved, err
		}
	}
	return p.moved, fill.Sync()
}

// begin lets others read what the pull has.
func (n *Node) begin(p *pull) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pulls[p.digest] = append(n.pulls[p.digest], p)
}

// close ends the pull for its readers.
func (p *pull) close() {
	n := p.n
	n.mu.Lock()
	n.pulls[p.digest] = slices.DeleteFunc(n.pulls[p.digest], func(o *pull) bool { return o == p })
	if len(n.pulls[p.digest]) == 0 {
		delete(n.pulls, p.digest)
	}
	n.mu.Unlock()
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.readers.Wait()
	p.fill.Close()
}

// enter counts one more reader; ok is false when the pull has ended.
func (p *pull) enter() (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, false
	}
	p.readers.Add(1)
	return p.readers.Done, true
}

func (p *pull) doneBits() bitset {
	b := newBits(len(p.m.Blocks))
	b.fill(len(p.m.Blocks))
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range b {
		b[i] &^= p.todo[i]
	}
	return b
}

func (p *pull) hasDone(at int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.todo.has(at)
}

// run pulls until every block is here.
func (p *pull) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer p.polls.Wait() // the sources begin them
	defer wg.Wait()
	defer p.end(nil)
	wg.Go(func() { p.followSources(ctx) })
	var workers sync.WaitGroup
	for range lanes {
		workers.Go(func() { p.work(ctx) })
	}
	workers.Wait()
	p.mu.Lock()
	left := p.left
	p.mu.Unlock()
	if left == 0 {
		return nil
	}
	return context.Cause(ctx)
}

// How often the sources are asked for: soon at first, for those that begin at the
// same time do not know each other, then less often.
const (
	sourcesFirst = 250 * time.Millisecond
	sourcesLast  = 4 * time.Second
)

// followSources learns who has blocks until the pull ends.
func (p *pull) followSources(ctx context.Context) {
	for wait := sourcesFirst; ; wait = min(2*wait, sourcesLast) {
		p.askSources(ctx)
		select {
		case <-ctx.Done():
			return
		case <-p.again:
			wait = sourcesFirst
		case <-time.After(wait):
		}
		if wait == sourcesFirst {
			select {
			case <-ctx.Done():
				return
			case <-time.After(sourcesFirst / 4): // however often it is asked for
			}
		}
	}
}

func (p *pull) askSources(ctx context.Context) {
	list, ticket, err := p.o.Sources(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.wake()
	if p.trouble = err; err != nil {
		return
	}
	p.ticket = ticket
	named := map[xapi.UUID]bool{}
	for _, s := range list {
		named[s.Host] = true
		p.know(ctx, s)
	}
	for id, o := range p.from {
		if !named[id] && !o.dropped && o.fails > 0 {
			o.gone = true
		}
	}
}

// know takes up a source, or what is new of it.
func (p *pull) know(ctx context.Context, s Source) {
	o := p.from[s.Host]
	if o == nil {
		o = &origin{have: newBits(len(p.m.Blocks)), denied: newBits(len(p.m.Blocks)), skip: newBits(len(p.m.Blocks))}
		p.from[s.Host] = o
	}
	if o.client == nil || o.URL != s.URL {
		o.client = p.n.Client(s)
	}
	o.Source, o.gone = s, false
	if !s.Partial {
		o.have.fill(len(p.m.Blocks))
		return
	}
	if !o.polled {
		o.polled = true
		p.polls.Go(func() { p.poll(ctx, o) })
	}
}

// wake lets everybody look again. The lock is held.
func (p *pull) wake() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// askAgain has the sources asked for soon.
func (p *pull) askAgain() {
	select {
	case p.again <- struct{}{}:
	default:
	}
}

// came takes note of a block that is here now.
func (p *pull) came(at int, length int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = time.Now()
	p.moved += length
	if !p.todo.has(at) {
		return // another source was quicker
	}
	p.todo.clear(at)
	p.left--
	p.done += length
	if p.o.Progress != nil {
		p.o.Progress(p.done, p.total)
	}
	if p.left == 0 {
		p.end(nil)
	}
}

// gaveUp is the error of a pull that no block came for. The lock is held.
func (p *pull) gaveUp() error {
	names := make([]string, 0, len(p.from))
	for _, o := range p.from {
		names = append(names, o.describe())
	}
	slices.Sort(names)
	if len(names) == 0 {
		names = append(names, "there is no host that has any")
	}
	err := fmt.Errorf("%d of %d blocks could not be fetched: for %s none came: %s",
		p.left, len(p.m.Blocks), p.n.GiveUp, strings.Join(names, "; "))
	if p.trouble != nil {
		err = errors.Join(err, fmt.Errorf("who has blocks could not be learned: %w", p.trouble))
	}
	return err
}

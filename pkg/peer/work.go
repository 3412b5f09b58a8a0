package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/patchd/patchd/pkg/vdi"
)

// maxRefusal bounds what is read of an answer that is no 200, in bytes.
const maxRefusal = 16 << 10

// headerGiven lists the blocks that an answer leaves out because another host
// was given them.
const headerGiven = "X-Patchd-Given"

// request is one that is on its way.
type request struct {
	from   *origin
	places []int
	first  bool
	since  time.Time // when the block that it waits for began
}

// refused is the error of an answer that is no 200.
func refused(status int, raw []byte) error {
	var body refusal
	if json.Unmarshal(raw, &body) == nil && body.Message != "" {
		return fmt.Errorf("%d: %.200s", status, body.Message)
	}
	return fmt.Errorf("it answers %d", status)
}

// work asks sources for blocks until the pull ends.
func (p *pull) work(ctx context.Context) {
	buf := make([]byte, vdi.MapBlock)
	for {
		r, ok := p.next(ctx)
		if !ok {
			return
		}
		err := p.fetch(ctx, r, buf)
		p.release(r, err)
	}
}

// next waits for something to ask for; ok is false when the pull ends.
func (p *pull) next(ctx context.Context) (r *request, ok bool) {
	for ctx.Err() == nil {
		p.mu.Lock()
		now := time.Now()
		r := p.choose(now)
		changed := p.changed
		if r == nil && now.Sub(p.last) > p.n.GiveUp {
			p.end(p.gaveUp())
		}
		p.mu.Unlock()
		if r != nil {
			return r, true
		}
		p.askAgain()
		t := time.NewTimer(pollEvery/2 + rand.N(pollEvery/2))
		select {
		case <-ctx.Done():
		case <-changed:
		case <-t.C: // somebody may have become slow, or may be asked again
		}
		t.Stop()
	}
	return nil, false
}

// choose picks a source and blocks to ask it for, nil when there is nothing. The
// lock is held.
func (p *pull) choose(now time.Time) *request {
	stuck := map[*origin]bool{}
	for r := range p.flights {
		if now.Sub(r.since) > slow {
			stuck[r.from] = true
		}
	}
	var list []*origin
	others := newBits(len(p.m.Blocks)) // what those have that are relied on
	for _, o := range p.from {
		if !o.Reserved && o.fails == 0 && !o.dropped && !o.gone && !stuck[o] {
			for i := range others {
				others[i] |= o.have[i] &^ o.denied[i]
			}
		}
		if o.asked(now) && !stuck[o] {
			list = append(list, o)
		}
	}
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	slices.SortStableFunc(list, func(a, b *origin) int {
		if a.Reserved != b.Reserved {
			if a.Reserved {
				return 1
			}
			return -1
		}
		return a.flying - b.flying
	})
	most := max(1, min(4, lanes/max(1, len(list))))
	for _, o := range list {
		if o.flying >= most {
			continue
		}
		if places := p.pick(o, others, now); len(places) > 0 {
			return p.take(o, places, now, o.Reserved)
		}
	}
	for _, o := range list {
		if o.flying < most {
			if at, ok := p.late(o, now); ok {
				return p.take(o, []int{at}, now, false)
			}
		}
	}
	return nil
}

// pick gives blocks that a source is to be asked for, from a random place on, so
// that hosts which fetch at the same time have something for each other.
func (p *pull) pick(o *origin, others bitset, now time.Time) []int {
	if o.Reserved && now.Sub(o.skips) > skipFor {
		clear(o.skip)
		o.skips = now
	}
	busy := newBits(len(p.m.Blocks))
	for at := range p.busy {
		busy.set(at)
	}
	return pick(len(p.todo), rand.IntN(len(p.m.Blocks)), p.batch(), func(i int) uint64 {
		w := p.todo[i] &^ busy[i] & o.have[i] &^ o.denied[i]
		if o.Reserved {
			w &^= others[i] | o.skip[i]
		}
		return w
	})
}

// batch is how many blocks one request asks for: few when little is left, or when
// others wait for what this host fetches.
func (p *pull) batch() int {
	most := 4
	for _, o := range p.from {
		if o.Partial {
			most = 2
		}
	}
	return max(1, min(most, p.left/(2*lanes)))
}

// late finds a block that is on its way from another source for too long.
func (p *pull) late(o *origin, now time.Time) (at int, ok bool) {
	for at, r := range p.busy {
		if r.from != o && now.Sub(r.since) > slow && p.todo.has(at) && o.have.has(at) && !o.denied.has(at) {
			return at, true
		}
	}
	return 0, false
}

func (p *pull) take(o *origin, places []int, now time.Time, first bool) *request {
	r := &request{from: o, places: places, first: first, since: now}
	for _, at := range places {
		p.busy[at] = r
	}
	o.flying++
	p.flights[r] = true
	return r
}

// release gives back what a request was to fetch, and takes note of how it went.
func (p *pull) release(r *request, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range r.places {
		if p.busy[at] == r {
			delete(p.busy, at)
		}
	}
	r.from.flying--
	delete(p.flights, r)
	if err != nil {
		r.from.failed(err)
	}
	p.wake()
}

// fetch asks for the blocks of a request and writes them. An error is that of the
// source; what is wrong here ends the pull.
func (p *pull) fetch(ctx context.Context, r *request, buf []byte) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := fmt.Errorf("no block came for %s", p.n.Stall)
	clock := time.AfterFunc(p.n.Stall, func() { cancel(stalled) })
	defer clock.Stop()
	blocks := make([]int64, len(r.places))
	for i, at := range r.places {
		blocks[i] = p.m.Blocks[at].Index
	}
	path := PathBlocks + "?map=" + p.digest + "&blocks=" + formatList(blocks)
	if r.first {
		path += "&first=1"
	}
	resp, err := p.get(ctx, r.from, path)
	if err == nil {
		err = p.read(ctx, r, resp, buf, func() { clock.Reset(p.n.Stall) })
		resp.Body.Close()
	}
	switch {
	case err == nil || !errors.Is(context.Cause(ctx), stalled) && ctx.Err() != nil:
		return nil // all is well, or the pull has ended
	case errors.Is(context.Cause(ctx), stalled):
		return stalled
	}
	return err
}

// read takes an answer. ticked hears of each block.
func (p *pull) read(ctx context.Context, r *request, resp *http.Response, buf []byte, ticked func()) error {
	if resp.StatusCode != http.StatusOK {
		return p.readRefusal(r, resp)
	}
	left := map[int64]bool{}
	if list := resp.Header.Get(headerGiven); list != "" {
		given, err := parseList(list)
		if err != nil {
			return err
		}
		p.given(r, given)
		for _, b := range given {
			left[b] = true
		}
	}
	for _, at := range r.places {
		b := p.m.Blocks[at].Index
		if left[b] {
			continue
		}
		_, length := p.m.Span(b)
		if _, err := io.ReadFull(resp.Body, buf[:length]); err != nil {
			return err
		}
		ticked()
		if p.hasDone(at) {
			p.came(at, length)
			continue
		}
		if err := p.fill.Put(at, buf[:length]); errors.Is(err, vdi.ErrWrongBlock) {
			p.wrong(ctx, r.from, b)
			return err
		} else if err != nil {
			p.end(err)
			return nil
		}
		p.n.count(func(s *Stats) { s.BytesReceived += length })
		p.came(at, length)
		p.mu.Lock()
		r.since, r.from.fails, r.from.err = time.Now(), 0, nil
		p.mu.Unlock()
	}
	return nil
}

// wrong drops a source that has sent a wrong block.
func (p *pull) wrong(ctx context.Context, o *origin, block int64) {
	p.mu.Lock()
	o.dropped = true
	source := o.Source
	p.mu.Unlock()
	p.n.count(func(s *Stats) { s.BlocksBad++ })
	p.n.Log.WithField("host", source.Host).WithField("name", source.Name).WithField("block", block).WithField("map", p.digest).
		Error("a host has sent a block that is not as the map says; it is not asked again for this image")
	if p.n.Bad != nil {
		p.n.Bad(ctx, source, p.digest, block)
	}
}

// given takes note of blocks that a source has given to others.
func (p *pull) given(r *request, blocks []int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range blocks {
		if at, ok := p.m.Find(b); ok {
			r.from.skip.set(at)
		}
	}
}

// readRefusal takes an answer that has no blocks.
func (p *pull) readRefusal(r *request, resp *http.Response) error {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
	if err != nil {
		return err
	}
	var body refusal
	switch resp.StatusCode {
	case http.StatusConflict:
		if err := json.Unmarshal(raw, &body); err != nil {
			return fmt.Errorf("its answer makes no sense: %w", err)
		}
		p.given(r, body.Given)
		return p.missing(r, body)
	case http.StatusServiceUnavailable:
		wait, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		p.mu.Lock()
		defer p.mu.Unlock()
		r.from.until = time.Now().Add(time.Duration(max(1, min(wait, 10)))*time.Second/2 + rand.N(time.Second))
		return nil
	case http.StatusForbidden:
		p.askAgain() // the ticket may have ended
	case http.StatusNotFound:
		p.mu.Lock()
		defer p.mu.Unlock()
		if clear(r.from.have); r.from.Partial {
			return nil // it has ended its own pull, and does not have it for good yet
		}
		r.from.have.fill(len(p.m.Blocks)) // asked again later
	}
	return refused(resp.StatusCode, raw)
}

// missing takes note of blocks that a source does not have. One that denies
// nothing of what it was asked for makes no sense.
func (p *pull) missing(r *request, body refusal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(body.Given)
	for _, b := range body.Missing {
		at, ok := p.m.Find(b)
		if ok && slices.Contains(r.places, at) {
			r.from.denied.set(at)
			n++
		}
	}
	if n == 0 {
		return errors.New("it refuses blocks and does not say which")
	}
	return nil
}

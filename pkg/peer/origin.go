package peer

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"
)

// origin is a source of one pull, and what the pull knows of it. Its fields are
// guarded by the lock of the pull.
type origin struct {
	Source
	client *http.Client

	have   bitset // blocks that it says it has
	denied bitset // blocks that it said it had, and did not give
	skip   bitset // blocks that it has given to others: they are to be asked
	skips  time.Time
	polled bool // somebody follows what it has

	flying  int       // requests that are on their way
	fails   int       // how often it failed since it last gave something
	until   time.Time // it is left alone before that
	err     error     // why it failed last
	dropped bool      // it has sent a wrong block
	gone    bool      // it failed, and is no source any more
}

// describe says who it is and what is wrong with it.
func (o *origin) describe() string {
	name := fmt.Sprintf("%s (%s)", cmp.Or(o.Name, o.URL), o.Host)
	switch {
	case o.dropped:
		return name + " has sent a wrong block"
	case o.err != nil:
		return name + ": " + o.err.Error()
	}
	return name + " has none that is missing"
}

// asked tells whether it may be asked now.
func (o *origin) asked(now time.Time) bool {
	return !o.dropped && !o.gone && !now.Before(o.until)
}

// failed takes note of a failure and leaves the source alone for a while. The
// lock is held.
func (o *origin) failed(err error) {
	o.fails++
	o.err = err
	wait := 100 * time.Millisecond << min(o.fails-1, 6)
	o.until = time.Now().Add(wait/2 + rand.N(wait))
}

const (
	// pollEvery is how often a source that is fetching itself is asked what it has.
	pollEvery = 150 * time.Millisecond
	// skipFor is how long a block that a source has given to others is not asked
	// of it again.
	skipFor = 500 * time.Millisecond
	// slow is how long a block may be on its way before others are asked for it.
	slow = 2 * time.Second
)

// poll follows what a source has that is fetching the image itself.
func (p *pull) poll(ctx context.Context, o *origin) {
	for wait := time.Duration(0); ; wait = pollEvery/2 + rand.N(pollEvery) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		p.mu.Lock()
		ask, whole := o.asked(time.Now()), !o.Partial
		p.mu.Unlock()
		if whole {
			p.mu.Lock()
			o.polled = false
			p.mu.Unlock()
			return
		}
		if ask {
			p.pollOnce(ctx, o)
		}
	}
}

func (p *pull) pollOnce(ctx context.Context, o *origin) {
	ctx, cancel := context.WithTimeout(ctx, p.n.Stall)
	defer cancel()
	have, err := p.askHave(ctx, o)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil && ctx.Err() == context.Canceled:
	case err != nil:
		o.failed(err)
	case o.Partial:
		if !slices.Equal(o.have, have) {
			o.have = have
			p.wake()
		}
	}
}

// askHave asks a source which blocks it has.
func (p *pull) askHave(ctx context.Context, o *origin) (bitset, error) {
	resp, err := p.get(ctx, o, PathBlocks+"?have=1&map="+p.digest)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	size := (len(p.m.Blocks) + 7) / 8
	raw, err := io.ReadAll(io.LimitReader(resp.Body, int64(max(size, maxRefusal))+1))
	switch {
	case err != nil:
		return nil, err
	case resp.StatusCode == http.StatusNotFound: // not yet, or not any more
		return newBits(len(p.m.Blocks)), nil
	case resp.StatusCode != http.StatusOK:
		return nil, refused(resp.StatusCode, raw)
	}
	return decodeBits(raw, len(p.m.Blocks))
}

// get asks a source for something.
func (p *pull) get(ctx context.Context, o *origin, path string) (*http.Response, error) {
	p.mu.Lock()
	url, ticket, client := o.URL, p.ticket, o.client
	p.mu.Unlock()
	return get(ctx, client, url+path, ticket)
}

func get(ctx context.Context, client *http.Client, url string, ticket []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(HeaderTicket, base64.StdEncoding.EncodeToString(ticket))
	return client.Do(req)
}

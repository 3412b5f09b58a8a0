package pool

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// fetchingFor is how long a host counts as fetching after it last said so.
	fetchingFor = 15 * time.Second
	// maxSources bounds the hosts that one is told of.
	maxSources = 24
	// maxFetching bounds what a coordinator remembers of hosts that fetch.
	maxFetching = 1 << 16
)

// fetching is who fetches which image just now, in the coordinator's memory: by
// digest of the map, when each host last said so.
type fetching struct {
	mu sync.Mutex
	at map[string]map[xapi.Ref]time.Time
	n  int // hosts in all of them
}

// note takes note that a host fetches an image, or no more, and lists the others
// that do. It takes time by how many fetch that image.
func (f *fetching) note(now time.Time, digest string, host xapi.Ref, does bool) (others []xapi.Ref) {
	f.mu.Lock()
	defer f.mu.Unlock()
	of := f.at[digest]
	for other, at := range of {
		switch {
		case other == host || now.Sub(at) > fetchingFor:
			delete(of, other)
			f.n--
		default:
			others = append(others, other)
		}
	}
	if does && f.n < maxFetching {
		if of == nil {
			f.forgetOld(now)
			of = map[xapi.Ref]time.Time{}
			f.at[digest] = of
		}
		of[host] = now
		f.n++
	}
	if len(of) == 0 {
		delete(f.at, digest)
	}
	return others
}

// forgetOld drops images that nobody fetches any more: whoever begins with another
// one pays for it. Call it with mu held.
func (f *fetching) forgetOld(now time.Time) {
	if f.at == nil {
		f.at = map[string]map[xapi.Ref]time.Time{}
	}
	for digest, of := range f.at {
		for host, at := range of {
			if now.Sub(at) > fetchingFor {
				delete(of, host)
				f.n--
			}
		}
		if len(of) == 0 {
			delete(f.at, digest)
		}
	}
}

// Sources tells a host which other ones have blocks of the images with a map, or
// are fetching them, and gives it the ticket to ask them with. fetching tells
// that it fetches them itself, and others may ask it. It is called again while
// that goes on. Codes: HANDLE_INVALID, OPERATION_NOT_ALLOWED when no open job of
// the host needs such an image.
func (p *Pool) Sources(ctx context.Context, host xapi.Ref, digest string, fetches bool) (Sources, error) {
	var out Sources
	var holders []SourcePeer
	var partial []SourcePeer
	now := p.Now()
	reader, err := p.host(host)
	if err != nil {
		return out, err
	}
	if err := p.mayReadNow(ctx, host, digest); err != nil {
		return out, err
	}
	err = p.Store.View(func(v *store.View) error {
		whole, err := p.holders(v, digest)
		if err != nil {
			return err
		}
		for ref := range whole {
			if peer, ok := p.sourcePeer(v, ref); ok && ref != host {
				peer.Reserved = ref == p.Self
				holders = append(holders, peer)
			}
		}
		for _, ref := range p.fetching.note(now, digest, host, fetches) {
			if peer, ok := p.sourcePeer(v, ref); ok && !whole[ref] {
				peer.Partial = true
				partial = append(partial, peer)
			}
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	out.Peers = boundSources(holders, partial)
	if p.Ticket != nil {
		if out.Ticket, err = p.Ticket(reader, digest); err != nil {
			return out, fmt.Errorf("make a ticket for host %s: %w", reader.UUID, err)
		}
	}
	return out, nil
}

// boundSources bounds what one host is told of: by chance, so that all are asked, but
// the coordinator, which is always named.
func boundSources(holders, partial []SourcePeer) []SourcePeer {
	for _, list := range [][]SourcePeer{holders, partial} {
		rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	}
	var out, rest []SourcePeer
	for _, h := range holders {
		if h.Reserved {
			out = append(out, h)
		} else {
			rest = append(rest, h)
		}
	}
	rest = rest[:min(len(rest), maxSources/2)]
	out = append(out, rest...)
	return append(out, partial[:min(len(partial), max(0, maxSources-len(out)))]...)
}

// mayReadNow is mayRead as of now: a host with the database may have seen its job
// before this one has.
func (p *Pool) mayReadNow(ctx context.Context, host xapi.Ref, digest string) error {
	look := func() error {
		return p.Store.View(func(v *store.View) error { return p.mayRead(v, host, digest) })
	}
	err := look()
	if !xapi.Is(err, xapi.OperationNotAllowed) {
		return err
	}
	if err := p.Store.Sync(ctx); err != nil {
		return err
	}
	return look()
}

// mayRead refuses a map that no open job of the host names.
func (p *Pool) mayRead(v *store.View, host xapi.Ref, digest string) error {
	if host == p.Self {
		return nil
	}
	for _, ref := range v.Refs(ClassJob, "host", string(host)) {
		job, err := store.Get[Job](v, ClassJob, ref)
		if err != nil {
			return err
		}
		if digest != "" && job.State != JobDone && mapOfJob(v, job) == digest {
			return nil
		}
	}
	return xapi.NewError(xapi.OperationNotAllowed, "no job of this host needs that image")
}

// holders are the hosts that have a VDI with a map in an SR they have plugged. Of
// a shared one those that have its record: hosts with the pool database, else the
// one that works on it.
func (p *Pool) holders(v *store.View, digest string) (map[xapi.Ref]bool, error) {
	hosts := map[xapi.Ref]bool{}
	for _, ref := range v.Refs(ClassVDI, "_map", digest) {
		rec, err := store.Get[VDI](v, ClassVDI, ref)
		if err != nil {
			return nil, err
		}
		if rec.Missing || rec.Damage != "" {
			continue
		}
		known, first := false, xapi.Ref("")
		for _, link := range v.Refs(ClassPBD, "SR", string(rec.SR)) {
			pbd, err := store.Get[PBD](v, ClassPBD, link)
			if err != nil {
				return nil, err
			}
			if !pbd.CurrentlyAttached {
				continue
			}
			host, err := store.Get[Host](v, ClassHost, pbd.Host)
			if err == nil && (host.Coordinator || pbd.Host == p.Self) {
				hosts[pbd.Host], known = true, true
			} else if first == "" {
				first = pbd.Host
			}
		}
		if !known && first != "" {
			hosts[first] = true
		}
	}
	return hosts, nil
}

// sourcePeer is a host as another one must know it; ok is false when it cannot be
// asked now.
func (p *Pool) sourcePeer(v *store.View, ref xapi.Ref) (s SourcePeer, ok bool) {
	rec, err := store.Get[Host](v, ClassHost, ref)
	if err != nil || rec.URL == "" || len(rec.Keys) == 0 || rec.Leaving || !p.there(ref) {
		return s, false
	}
	s.Host, s.URL, s.Name = rec.UUID, rec.URL, rec.NameLabel
	for _, k := range rec.Keys {
		s.Keys = append(s.Keys, k.SPKI)
	}
	return s, true
}

package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/peer"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// MessageBadPeer is the notice of a host that has given another one wrong bytes.
const MessageBadPeer = "PATCHD_PEER_WRONG_BYTES"

// openPeers makes this host one that gives blocks of images to others, and takes
// them from others.
func (s *Server) openPeers() {
	s.peers = &peers{server: s, clients: map[string]*http.Client{}}
	s.node = peer.New(peer.Options{
		Images: s.pool, Log: s.log, Reader: readerOf, Verify: s.peers.verify, Client: s.peers.client, Bad: s.peers.bad,
	})
	s.pool.Fetcher, s.pool.Ticket = s.peers, s.ticket
	s.pool.StageOn = func(ctx context.Context, patch, host xapi.Ref) error {
		return s.pool.PatchStage(ctx, patch, []xapi.Ref{host})
	}
}

// readerOf is the host that makes a request for blocks, by the SHA-256 of the key
// that it has shown; "" when it has shown none.
func readerOf(r *http.Request) string {
	if r.TLS == nil || r.TLS.NegotiatedProtocol != trust.Protocol || trust.PeerKey(*r.TLS) == nil {
		return ""
	}
	return trust.Pin(trust.PeerKey(*r.TLS))
}

// ticket lets a host read the images of a map from the others.
func (s *Server) ticket(reader pool.Host, digest string) ([]byte, error) {
	if len(reader.Keys) == 0 {
		return nil, xapi.NewError(xapi.OperationNotAllowed, "the host has no key")
	}
	return s.identity.Seal(trust.Ticket{
		Pool: s.pool.PoolUUID, Host: reader.UUID, Pin: trust.Pin(reader.Keys[len(reader.Keys)-1].SPKI), Map: digest,
		Expires: time.Now().Add(trust.TicketLife),
	})
}

// peers is how this host deals with the others.
type peers struct {
	server *Server

	mu      sync.Mutex
	clients map[string]*http.Client // by URL and keys
}

// maxPeerClients bounds the hosts that connections are kept to.
const maxPeerClients = 64

// client speaks to one host and to no other.
func (p *peers) client(to peer.Source) *http.Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := to.URL
	for _, k := range to.Keys {
		name += "\x00" + string(k)
	}
	c := p.clients[name]
	if c == nil {
		if len(p.clients) >= maxPeerClients {
			p.closeLocked()
		}
		c = link.NewHTTP(p.server.identity, to.URL, trust.OneOf(to.Keys...))
		p.clients[name] = c
	}
	return c
}

// close ends connections that nobody uses.
func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeLocked()
}

func (p *peers) closeLocked() {
	for _, c := range p.clients {
		c.CloseIdleConnections()
	}
	clear(p.clients)
}

// verify looks at the ticket with which a host asks for blocks. Code:
// OPERATION_NOT_ALLOWED.
func (p *peers) verify(ticket []byte, reader, digest string) error {
	keys, revoked, err := p.server.trusted()
	if err != nil {
		return err
	}
	t, err := trust.OpenTicket(ticket, keys, time.Now())
	if err != nil {
		return err
	}
	if slices.Contains(revoked, reader) {
		return xapi.NewError(xapi.OperationNotAllowed, "the key of the reader was revoked")
	}
	return t.Allows(p.server.pool.PoolUUID, digest, reader)
}

// trusted are the keys of the hosts that may lead, and the SHA-256 of those that
// nobody may let in.
func (s *Server) trusted() (keys [][]byte, revoked []string, err error) {
	var coordinators []pool.Peer
	if s.member != nil {
		o, ok := s.link.Orders()
		if !ok {
			return nil, nil, xapi.NewError(xapi.OperationNotAllowed, "this host has not heard from its coordinator yet")
		}
		coordinators, revoked = o.Coordinators, o.Revoked
	} else {
		if coordinators, err = s.pool.Coordinators(); err != nil {
			return nil, nil, err
		}
		_, rec, err := s.pool.Record()
		if err != nil {
			return nil, nil, err
		}
		for _, k := range rec.Revoked {
			revoked = append(revoked, k.Pin)
		}
	}
	for _, c := range coordinators {
		keys = append(keys, c.Keys...)
	}
	return keys, revoked, nil
}

// bad tells the pool of a host that has given wrong bytes.
func (p *peers) bad(ctx context.Context, from peer.Source, digest string, block int64) {
	s := p.server
	log := s.log.WithField("host", from.Host).WithField("name", from.Name).WithField("block", block).WithField("map", digest)
	log.Error("a host has given a wrong block and is not asked again")
	coordinator, _ := s.agentServes()
	body := fmt.Sprintf("host %s (%s) gave host %s a wrong block (%d) of the image with map %s; it is not asked again for this image. Verify the disk images of that host",
		from.Name, from.Host, s.hostname, block, digest)
	if _, err := coordinator.MessageCreate(context.WithoutCancel(ctx), MessageBadPeer, 2, "Host", s.pool.SelfUUID, body); err != nil {
		log.WithError(err).Error("no message could be left")
	}
}

// sources asks the coordinator, which may be this host, who has blocks.
func (p *peers) sources(ctx context.Context, digest string, fetching bool) (out []peer.Source, ticket []byte, err error) {
	from, err := p.ask(ctx, digest, fetching)
	if err != nil {
		return nil, nil, err
	}
	for _, h := range from.Peers {
		out = append(out, peer.Source{Host: h.Host, Name: h.Name, URL: h.URL, Keys: h.Keys, Partial: h.Partial, Reserved: h.Reserved})
	}
	return out, from.Ticket, nil
}

// ask asks whoever leads. The link of a host that is elected ends before it leads:
// what is under way then asks this host itself, as soon as it does.
func (p *peers) ask(ctx context.Context, digest string, fetching bool) (pool.Sources, error) {
	s := p.server
	if s.link != nil && s.leads.Load() == nil {
		from, err := s.link.Sources(ctx, digest, fetching)
		if err == nil || s.member != nil || !s.link.Ended() {
			return from, err
		}
		select {
		case <-s.leading:
		case <-ctx.Done():
			return from, errors.Join(context.Cause(ctx), err)
		}
	}
	return s.pool.Sources(ctx, s.pool.Self, digest, fetching)
}

// FetchMap gets a block map from whoever has it, now or in a moment.
func (p *peers) FetchMap(ctx context.Context, digest string) (*vdi.Map, error) {
	for end := time.Now().Add(sourcePatience); ; {
		from, ticket, err := p.sources(ctx, digest, false)
		if err != nil {
			return nil, err
		}
		if len(from) > 0 {
			return p.server.node.FetchMap(ctx, digest, from, ticket)
		}
		if time.Now().After(end) {
			return nil, errors.New("no host that is there has the image")
		}
		select {
		case <-time.After(sourcePause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// How long a host that has an image is waited for, as after a coordinator has
// died and the hosts are about to connect to the next one, and how often it is
// looked for.
const (
	sourcePatience = 6 * time.Second
	sourcePause    = 300 * time.Millisecond
)

// Pull gets the blocks of an image from whoever has them.
func (p *peers) Pull(ctx context.Context, m *vdi.Map, dst *os.File, resume bool, progress func(done, total int64)) error {
	digest := m.Digest()
	moved, err := p.server.node.Pull(ctx, m, dst, peer.PullOptions{
		Resume: resume, Progress: progress,
		Sources: func(ctx context.Context) ([]peer.Source, []byte, error) { return p.sources(ctx, digest, true) },
	})
	p.server.log.WithField("map", digest).WithField("bytes", moved).WithField("failed", err != nil).Info("an image was fetched from other hosts")
	return err
}

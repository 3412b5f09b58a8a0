package server

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/patchd/patchd/pkg/agent"
	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// linkPath is where hosts connect to the coordinator.
const linkPath = "/patchd/link"

var _ agent.Coordinator = (*link.Client)(nil)

// openLink settles whether this host is a member, and makes the link of one that
// has to have it: a member, or a host that may lead and does not.
func (s *Server) openLink(ctx context.Context) (err error) {
	if s.member, err = s.settleRole(ctx); err != nil {
		return err
	}
	if s.member == nil && s.config.Store == "" {
		return nil
	}
	o := link.ClientOptions{
		Identity: s.identity, Log: s.log, Version: s.version, Facts: s.facts,
		Coordinators: s.otherCoordinators, Ejected: s.ejected,
	}
	if s.member != nil {
		known := &memberKeeper{state: s.state, m: *s.member}
		o.Coordinators, o.Learn, o.LoadTerm, o.SaveTerm = known.coordinators, known.learn, known.term, known.setTerm
		o.Connected = func(context.Context) { s.told.reset() }
	}
	if s.link, err = link.NewClient(o); err != nil {
		return fmt.Errorf("make the link to the coordinator: %w", err)
	}
	if s.member != nil {
		s.told = newInventory(s.store, s.pool, s.link, s.log)
	}
	return nil
}

// agentServes is whom this host's agent works for, and on what.
func (s *Server) agentServes() (agent.Coordinator, agent.Storage) {
	if s.member == nil && s.link == nil {
		return s.pool, s.pool
	}
	if s.member == nil {
		return clusterHost{s.pool, s}, s.pool
	}
	s.pool.Busy = func(job xapi.UUID) bool { return s.agent.Knows(job) }
	return s.link, memberStorage{s.pool, s.told}
}

// otherCoordinators are the hosts that may lead, as the database has them.
func (s *Server) otherCoordinators() []pool.Peer {
	peers, err := s.pool.Coordinators()
	if err != nil {
		s.log.WithError(err).Warn("the coordinators cannot be read")
	}
	return peers
}

// leadingPeer is the host that leads, as a member or a standby knows it.
func (s *Server) leadingPeer() pool.Peer {
	if s.member == nil {
		if _, h, ok := s.leadingHost(); ok && h.UUID != s.hostUUID {
			return h.Peer()
		}
		return pool.Peer{}
	}
	if p := s.link.State().Leader; p.URL != "" {
		return p
	}
	for _, p := range s.member.Coordinators {
		return p
	}
	return pool.Peer{}
}

// keepLink keeps this host connected to the coordinator while ctx lasts.
func (s *Server) keepLink(ctx context.Context) {
	if err := s.link.Run(ctx); err != nil && ctx.Err() == nil {
		s.log.WithError(err).Error("the link to the coordinator ended")
	}
}

// memberKeeper keeps what a member must know of its pool over restarts.
type memberKeeper struct {
	state stateDir
	mu    sync.Mutex
	m     membership
}

// coordinators are the hosts that may lead; where the host was found that let
// this one in comes last.
func (k *memberKeeper) coordinators() []pool.Peer {
	k.mu.Lock()
	defer k.mu.Unlock()
	peers := append([]pool.Peer(nil), k.m.Coordinators...)
	if k.m.Joined != "" && len(peers) > 0 {
		first := k.m.Answer.Coordinators
		for _, p := range first {
			p.URL = k.m.Joined
			peers = append(peers, p)
			break
		}
	}
	return peers
}

// learn keeps what orders say of the pool, when that has changed.
func (k *memberKeeper) learn(o pool.Orders) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if samePeers(k.m.Coordinators, o.Coordinators) && k.m.PoolName == o.PoolName {
		return
	}
	k.m.Coordinators, k.m.PoolName = o.Coordinators, o.PoolName
	k.save()
}

func (k *memberKeeper) term() (link.Term, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.m.Term, nil
}

func (k *memberKeeper) setTerm(t link.Term) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.m.Term = t
	return k.save()
}

// save writes the file; one that says that this host leaves stays as it is. Call
// it with mu held.
func (k *memberKeeper) save() error {
	now, err := k.state.membership()
	if err != nil || now == nil || now.Phase != phaseMember {
		return errors.Join(err, errNoMember)
	}
	return k.state.setMembership(k.m)
}

var errNoMember = errors.New("this host is leaving its pool")

func samePeers(a, b []pool.Peer) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Host != b[i].Host || a[i].URL != b[i].URL || len(a[i].Keys) != len(b[i].Keys) {
			return false
		}
		for j := range a[i].Keys {
			if string(a[i].Keys[j]) != string(b[i].Keys[j]) {
				return false
			}
		}
	}
	return true
}

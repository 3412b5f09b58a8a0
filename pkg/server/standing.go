package server

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/agent"
	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/upload"
	"github.com/patchd/patchd/pkg/xapi"
)

// The roles of a host, as `patchd status` and /healthz tell them.
const (
	roleCoordinator = "coordinator"
	roleStandby     = "standby"
	roleMember      = "member"
)

// campaignPause is how long a candidate waits when the cluster fails it.
const campaignPause = 500 * time.Millisecond

// stand is the part of a host that follows the database of a pool and does not
// lead it: calls are told who does, uploads are sent there. It returns when this
// host is elected.
func (s *Server) stand(ctx context.Context, serving func()) error {
	handler, err := s.standbyRoutes()
	if err != nil {
		return err
	}
	defer s.cli.Close()
	s.ways.setHandler(handler)
	s.log.Info("this host stands by")
	serving()
	standing, stop := context.WithCancel(ctx)
	var linked sync.WaitGroup
	linked.Go(func() { s.keepLink(standing) })
	defer linked.Wait()
	defer stop()
	for {
		s.leader, err = s.store.Campaign(ctx, string(s.hostUUID))
		if err == nil {
			s.ways.setHandler(http.HandlerFunc(booting))
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.log.WithError(err).Warn("this host cannot stand for election; it tries again")
		select {
		case <-time.After(campaignPause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// coordinator tells whether this host may speak for the pool now and, where it
// may not, the address of the one that does: "" when nobody knows.
func (s *Server) coordinator() (address string, here bool) {
	if l := s.leads.Load(); l != nil {
		return "", l.Held()
	}
	if s.member != nil {
		return addressOf(s.leadingPeer().URL), false
	}
	_, h, ok := s.leadingHost()
	if !ok || h.UUID == s.hostUUID {
		return "", false // elected and not ready, or gone and not expired
	}
	return h.Address, false
}

// leadingHost is the record of the host that holds the election.
func (s *Server) leadingHost() (ref xapi.Ref, h pool.Host, ok bool) {
	var name string
	err := s.store.View(func(v *store.View) error {
		name, _ = v.Leader()
		return nil
	})
	if err != nil || name == "" {
		return "", h, false
	}
	ref, h, err = s.pool.HostByUUID(xapi.UUID(name))
	return ref, h, err == nil
}

// role is what any host tells of itself, also to callers who cannot log in here.
func (s *Server) role() map[string]string {
	role := map[string]string{"role": roleStandby, "pool": string(s.pool.PoolUUID), "host": string(s.hostUUID)}
	if s.leads.Load() != nil {
		role["role"] = roleCoordinator
	}
	if s.member != nil {
		return s.memberRole(role)
	}
	if _, h, ok := s.leadingHost(); ok {
		role["coordinator"], role["coordinator_name"], role["coordinator_address"] = string(h.UUID), h.NameLabel, h.Address
		tellPeer(role, h.Peer())
	}
	return role
}

// redirect is where the coordinator answers a request that came here, as a URL
// without a path.
func (s *Server) redirect(r *http.Request) (base string, ok bool) {
	address, url := "", ""
	if s.member != nil {
		url = s.leadingPeer().URL
		address = addressOf(url)
	} else if _, h, ok := s.leadingHost(); ok && h.UUID != s.hostUUID {
		address, url = h.Address, h.URL
	}
	if address == "" {
		return "", false
	}
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if _, tcp := local.(*net.TCPAddr); !tcp {
		return url, url != "" // the unix socket
	}
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	return onHost(scheme, local, address)
}

// standbyRoutes binds the wire of a host that stands by.
func (s *Server) standbyRoutes() (http.Handler, error) {
	api, r, err := s.apiRoutes()
	if err != nil {
		return nil, err
	}
	r.Handle(linkPath, link.NotLeading(func() (pool.Peer, bool) {
		p := s.leadingPeer()
		return p, p.URL != ""
	}))
	upload.Redirect(r, s.redirect)
	api.Routes(r)
	return r, nil
}

// healthz answers 200 with the role of this host, and 503 where it leads and the
// database does not answer.
func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	address, here := s.coordinator()
	switch {
	case here:
		fmt.Fprintf(w, "ok\nrole: %s\n", roleCoordinator)
	case s.leads.Load() != nil:
		http.Error(w, "the pool database does not answer", http.StatusServiceUnavailable)
	default:
		fmt.Fprintf(w, "ok\nrole: %s\ncoordinator: %s\n", s.role()["role"], address)
	}
}

// clusterHost is what the agent of a host with the pool's database works for:
// the database itself, but classic files lie on the host that leads.
type clusterHost struct {
	*pool.Pool
	s *Server
}

var _ agent.Coordinator = clusterHost{}

// FetchPatch gives the file of a patch: that of this host, else the leader's.
func (c clusterHost) FetchPatch(ctx context.Context, uuid xapi.UUID) (io.ReadCloser, int64, error) {
	f, size, err := c.Pool.FetchPatch(ctx, uuid)
	if err == nil || c.s.leads.Load() != nil {
		return f, size, err
	}
	return c.s.link.FetchPatch(ctx, uuid)
}

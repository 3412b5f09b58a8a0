package pool

import (
	"context"
	"slices"
	"sync"

	"github.com/patchd/patchd/pkg/xapi"
)

// glance is a look at a VDI or an SR that gives way: it hinders nobody, and ends
// when somebody wants the object for himself, who waits until it has.
type glance struct {
	cancel context.CancelFunc
	gone   chan struct{}
}

// glance begins one that ends with ctx; ok is false while somebody has the
// object for himself. end must be called once nothing of the object is open.
func (s *Storage) glance(ctx context.Context, object xapi.Ref) (look context.Context, end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.held[object]; taken {
		return nil, nil, false
	}
	look, cancel := context.WithCancel(ctx)
	g := &glance{cancel, make(chan struct{})}
	if s.looks == nil {
		s.looks = map[xapi.Ref][]*glance{}
	}
	s.looks[object] = append(s.looks[object], g)
	return look, sync.OnceFunc(func() {
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.looks[object] = slices.DeleteFunc(s.looks[object], func(o *glance) bool { return o == g })
		if len(s.looks[object]) == 0 {
			delete(s.looks, object)
		}
		close(g.gone)
	}), true
}

// clear sends away who glances at an object that is taken.
func (s *Storage) clear(object xapi.Ref) {
	s.mu.Lock()
	looks := slices.Clone(s.looks[object])
	s.mu.Unlock()
	for _, g := range looks {
		g.cancel()
	}
	for _, g := range looks {
		<-g.gone
	}
}

// glanceVDI looks up a VDI to be read in passing. ok is false when it, or its
// SR, is not to be had now.
func (p *Pool) glanceVDI(ctx context.Context, ref xapi.Ref) (l look, within context.Context, end func(), ok bool) {
	within, endVDI, ok := p.storage.glance(ctx, ref)
	if !ok {
		return l, nil, nil, false
	}
	rec, err := p.vdi(ref)
	if err != nil {
		endVDI()
		return l, nil, nil, false
	}
	within, endSR, ok := p.storage.glance(within, rec.SR)
	if !ok {
		endVDI()
		return l, nil, nil, false
	}
	end = func() { endSR(); endVDI() }
	repo, err := p.Repository(rec.SR)
	if err != nil {
		end()
		return l, nil, nil, false
	}
	return look{ref, rec, repo}, within, end, true
}

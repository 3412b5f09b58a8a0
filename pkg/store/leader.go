package store

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// Leadership is the term of one leader. While it is not resigned every
// transaction of its store is fenced: it commits only if the election key
// still stands, else it fails with ErrDeposed.
type Leadership struct {
	// Revision is that of the election. A later leader has a greater one.
	Revision int64

	s        *Store
	key      string
	session  *concurrency.Session
	election *concurrency.Election
	done     chan struct{}
	cancel   context.CancelFunc
	once     sync.Once
	err      error
}

// Campaign waits until this store leads, under the name candidate. A store
// that leads, or was deposed and has not resigned, cannot campaign again. The
// error is the cause of ctx, ErrClosed, or that of the cluster.
func (s *Store) Campaign(ctx context.Context, candidate string) (*Leadership, error) {
	if s.lead.Load() != nil {
		return nil, errors.New("this store has an election that it did not resign")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.ctx, func() { cancel(ErrClosed) })()
	lease, err := s.client.Grant(ctx, s.opts.leaseTTL())
	if err != nil {
		return nil, campaignError(ctx, err)
	}
	session, err := concurrency.NewSession(s.client, concurrency.WithContext(s.io), concurrency.WithLease(lease.ID))
	if err != nil {
		return nil, campaignError(ctx, err)
	}
	election := concurrency.NewElection(session, s.keys.leaders())
	if err := election.Campaign(ctx, candidate); err != nil {
		return nil, errors.Join(campaignError(ctx, err), session.Close())
	}
	l := &Leadership{
		Revision: election.Rev(), s: s, key: election.Key(),
		session: session, election: election, done: make(chan struct{}),
	}
	if !s.lead.CompareAndSwap(nil, l) {
		return nil, errors.Join(errors.New("this store campaigned twice"), session.Close())
	}
	// What earlier leaders wrote must be in view before this one acts on it.
	if err := s.Sync(ctx); err != nil {
		s.lead.Store(nil)
		return nil, errors.Join(campaignError(ctx, err), session.Close())
	}
	l.watch()
	return l, nil
}

func campaignError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("campaign: %w", err)
}

// watch closes done when the lease is lost or the key is gone.
func (l *Leadership) watch() {
	ctx, cancel := context.WithCancel(l.session.Ctx())
	l.cancel = cancel
	go func() { // Resign, and so Close, waits for it
		defer close(l.done)
		defer cancel()
		_ = l.s.Until(ctx, func(v *View) (bool, error) {
			_, rev := v.Leader()
			return rev != l.Revision, nil
		})
	}()
}

// Done is closed when the leadership has ended: resigned, the lease not renewed
// in time, the key deleted, or the store closed. Writes are fenced whether
// anybody looks at it or not.
func (l *Leadership) Done() <-chan struct{} { return l.done }

// Resign ends the leadership, so that another candidate follows at once, and
// the fencing with it. A second call returns what the first did.
func (l *Leadership) Resign(ctx context.Context) error {
	l.once.Do(func() {
		l.cancel()
		<-l.done
		l.session.Orphan()
		if _, err := l.s.client.Revoke(ctx, l.session.Lease()); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			l.err = fmt.Errorf("resign: %w", err)
		}
		l.s.lead.CompareAndSwap(l, nil)
	})
	return l.err
}

// held is the comparison that this leadership stands.
func (l *Leadership) held() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.Revision)
}

// stands tells whether kvs, what is at the key, is this leadership.
func (l *Leadership) stands(kvs []*mvccpb.KeyValue) bool {
	return len(kvs) == 1 && kvs[0].CreateRevision == l.Revision
}

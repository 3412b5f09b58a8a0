package store

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Leadership is the term of one leader. While it is not resigned every
// transaction of its store is fenced: it commits only if the election key
// still stands, else it fails with ErrDeposed.
type Leadership struct {
	// Revision is that of the election. A later leader has a greater one.
	Revision int64

	s      *Store
	key    string
	lease  *lease
	done   chan struct{}
	cancel context.CancelFunc
}

// Campaign waits until this store leads, under the name candidate. A store
// that leads, or was deposed and has not resigned, cannot campaign again. A
// lease that is lost while it waits is taken anew. The error is the cause of
// ctx, ErrClosed, or that of the cluster.
func (s *Store) Campaign(ctx context.Context, candidate string) (*Leadership, error) {
	if s.lead.Load() != nil {
		return nil, errors.New("this store has an election that it did not resign")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.ctx, func() { cancel(ErrClosed) })()
	for {
		l, err := s.stand(ctx, candidate)
		if err == nil || !errors.Is(err, errLeaseLost) {
			return l, err
		}
		s.warn(err, "a candidate's lease was lost: it stands again")
	}
}

// stand is one candidacy: it waits until its key is the oldest.
func (s *Store) stand(ctx context.Context, candidate string) (_ *Leadership, err error) {
	le, err := s.grant(ctx)
	if err != nil {
		return nil, campaignError(ctx, err)
	}
	defer func() {
		if err == nil {
			return
		}
		end, cancel := context.WithTimeout(s.io, closeGrace)
		defer cancel()
		if gone := le.end(end); gone != nil {
			s.warn(gone, "the lease of a candidate stays until it expires")
		}
	}()
	l := &Leadership{s: s, key: fmt.Sprintf("%s/%x", s.keys.leaders(), int64(le.id)), lease: le, done: make(chan struct{})}
	if l.Revision, err = s.enter(ctx, l.key, candidate, le.id); err != nil {
		return nil, campaignError(ctx, err)
	}
	wait, cancel := le.context(ctx)
	defer cancel()
	err = s.Until(wait, func(v *View) (bool, error) {
		_, first := v.Leader()
		return first == l.Revision, nil
	})
	if err != nil {
		return nil, campaignError(wait, err)
	}
	if !s.lead.CompareAndSwap(nil, l) {
		return nil, errors.New("this store campaigned twice")
	}
	// What earlier leaders wrote must be in view before this one acts on it.
	if err := s.Sync(wait); err != nil {
		s.lead.Store(nil)
		return nil, campaignError(wait, err)
	}
	l.watch()
	return l, nil
}

// enter writes the key of a candidate and gives its revision.
func (s *Store) enter(ctx context.Context, key, candidate string, id clientv3.LeaseID) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	got, err := s.client.Put(ctx, key, candidate, clientv3.WithLease(id))
	if err != nil {
		return 0, err
	}
	return got.Header.Revision, nil
}

func campaignError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("campaign: %w", err)
}

// watch closes done when the lease is lost or the key is gone.
func (l *Leadership) watch() {
	ctx, cancel := l.lease.context(l.s.io)
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

// Done is closed when the leadership has ended: resigned, the lease lost, the
// key deleted, or the store closed. Writes are fenced whether anybody looks at
// it or not.
func (l *Leadership) Done() <-chan struct{} { return l.done }

// Held tells whether nobody else can lead at this moment. It is false once the
// leadership has ended, and while the cluster does not answer for longer than
// the lease lives: then nothing may be told in the pool's name.
func (l *Leadership) Held() bool {
	select {
	case <-l.done:
		return false
	default:
		return l.lease.held()
	}
}

// Resign ends the leadership, so that another candidate follows at once, and
// the fencing with it. A second call returns what the first did.
func (l *Leadership) Resign(ctx context.Context) error {
	err := l.Abdicate(ctx)
	l.s.lead.CompareAndSwap(l, nil)
	return err
}

// Abdicate is Resign with the fence left standing: whatever this store still
// writes fails with ErrDeposed, until it is closed.
func (l *Leadership) Abdicate(ctx context.Context) error {
	l.cancel()
	<-l.done
	if err := l.lease.end(ctx); err != nil {
		return fmt.Errorf("resign: %w", err)
	}
	return nil
}

// held is the comparison that this leadership stands.
func (l *Leadership) held() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.Revision)
}

// stands tells whether kvs, what is at the key, is this leadership.
func (l *Leadership) stands(kvs []*mvccpb.KeyValue) bool {
	return len(kvs) == 1 && kvs[0].CreateRevision == l.Revision
}

package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A lease is renewed this many times in its life, so that one or two answers
// that come late on a busy machine cost nothing.
const renewals = 6

// patience is how many lives of a lease without any answer from the cluster it
// is still tried for: a cluster that comes back has kept it.
const patience = 5

// errLeaseLost is the cause when a lease has ended.
var errLeaseLost = errors.New("the lease was not renewed in time")

// lease is one that this process renews until it is lost or ended.
type lease struct {
	s     *Store
	id    clientv3.LeaseID
	ttl   time.Duration
	until atomic.Pointer[time.Time] // it stands that long for certain
	lost  chan struct{}
	stop  context.CancelFunc
	once  sync.Once
	err   error
}

// grant takes a lease of the store's time to live.
func (s *Store) grant(ctx context.Context) (*lease, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	sent := time.Now()
	got, err := s.client.Grant(ctx, s.opts.leaseTTL())
	if err != nil {
		return nil, err
	}
	// A cluster may give more than was asked for.
	le := &lease{s: s, id: got.ID, ttl: time.Duration(got.TTL) * time.Second, lost: make(chan struct{})}
	le.holds(sent)
	keep, stop := context.WithCancel(s.io)
	le.stop = stop
	go func() { // end waits for it
		defer close(le.lost)
		le.keep(keep)
	}()
	return le, nil
}

// holds notes that the lease was renewed by a request sent at that time.
func (le *lease) holds(sent time.Time) {
	until := sent.Add(le.ttl)
	le.until.Store(&until)
}

// held tells whether the lease stands for certain. It is false, too, while the
// cluster does not answer for longer than the lease lives.
func (le *lease) held() bool { return time.Now().Before(*le.until.Load()) }

// keep renews the lease until the cluster says that it is gone, or says nothing
// for too long.
func (le *lease) keep(ctx context.Context) {
	tick := time.NewTicker(max(le.ttl/renewals, 50*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		sent := time.Now()
		err := le.renew(ctx)
		switch {
		case err == nil:
			le.holds(sent)
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			return
		case time.Since(*le.until.Load()) > (patience-1)*le.ttl:
			return
		}
	}
}

func (le *lease) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), max(le.ttl/3, time.Second))
	defer cancel()
	_, err := le.s.client.KeepAliveOnce(ctx, le.id)
	return err
}

// context is ctx that ends with the lease, too.
func (le *lease) context(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() { // ends with ctx, or the lease
		select {
		case <-le.lost:
			cancel(errLeaseLost)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// end gives the lease back, and with it goes what hangs on it. A second call
// returns what the first did.
func (le *lease) end(ctx context.Context) error {
	le.once.Do(func() {
		le.stop()
		<-le.lost
		ctx, cancel := context.WithTimeout(ctx, attemptTime)
		defer cancel()
		if _, err := le.s.client.Revoke(ctx, le.id); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			le.err = fmt.Errorf("give a lease back: %w", err)
		}
	})
	return le.err
}

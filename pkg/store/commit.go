package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// attemptTime bounds one request to etcd.
	attemptTime = 5 * time.Second
	// settleTime is how long a commit whose caller has gone, or given up, is
	// still asked about.
	settleTime = 5 * time.Second
	// maxRuns is how often a transaction runs before it gives up.
	maxRuns = 1000
)

var (
	errConflict = errors.New("something that was read has changed")
	errLost     = errors.New("no answer from the store")
)

// Update runs f and commits what it did, all or nothing. When something that f
// read was changed meanwhile f runs again, so f must have no effect but on its
// Tx. Update returns when the change is durable and the local view shows it; a
// transaction that changes nothing returns at once.
//
// The error is that of f; ErrDeposed; ErrTooBig; MESSAGE_TOO_LARGE;
// OUT_OF_SPACE when the database is full; the cause of ctx, and then nothing
// was or will be written; or, only when a cluster did not answer for as long as
// ctx allowed and a little longer, ErrUnknown.
func (s *Store) Update(ctx context.Context, f func(tx *Tx) error) error {
	_, err := s.Commit(ctx, f)
	return err
}

// Commit is Update that also gives the revision of the change, or that of the
// view f read when f changed nothing.
func (s *Store) Commit(ctx context.Context, f func(tx *Tx) error) (int64, error) {
	sl, err := s.takeSlot(ctx)
	if err != nil {
		return 0, err
	}
	defer s.giveSlot(sl)
	for n := range maxRuns {
		if n == 3 {
			if err := s.takeTurn(ctx); err != nil {
				return 0, err
			}
			defer func() { <-s.turn }()
		}
		rev, err := s.run(ctx, sl, f)
		if !errors.Is(err, errConflict) {
			return rev, err
		}
		if err := s.backOff(ctx, n, rev); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("gave up after %d runs: %w", maxRuns, errConflict)
}

// takeTurn lets transactions that keep meeting conflicts pass one by one.
func (s *Store) takeTurn(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.ctx.Done():
		return ErrClosed
	}
}

// backOff waits for a view newer than rev, a moment at most, and a random
// while.
func (s *Store) backOff(ctx context.Context, n int, rev int64) error {
	limit := min(time.Millisecond<<min(n, 6), 50*time.Millisecond)
	pause, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = s.Wait(pause, rev) // the reason to go on is checked below
	return s.pause(ctx, rand.N(limit))
}

func (s *Store) pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.ctx.Done():
		return ErrClosed
	}
}

// run runs f once and commits. With errConflict the revision is that of the
// view f read.
func (s *Store) run(ctx context.Context, sl *slot, f func(tx *Tx) error) (int64, error) {
	if ctx.Err() != nil || s.ctx.Err() != nil {
		return 0, s.ended(ctx)
	}
	tx, fence := newTx(s.state.Load().view), s.lead.Load()
	if err := f(tx); err != nil {
		return 0, err
	}
	p, err := tx.plan(s.keys, fence)
	if err != nil {
		return 0, err
	}
	if len(p.ops) == 0 {
		return tx.v.rev, nil
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if err := fault.Point("store.update"); err != nil {
		return 0, err
	}
	rev, err := s.settle(ctx, sl, p)
	if err != nil {
		return tx.v.rev, err
	}
	s.shown(ctx, rev)
	return rev, nil
}

// shown waits until the view shows revision rev, a moment even where ctx has
// ended. The change has happened, so the end of ctx or of the store is no error.
func (s *Store) shown(ctx context.Context, rev int64) {
	if s.Wait(ctx, rev-1) == nil {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, time.Second)
	defer cancel()
	_ = s.Wait(ctx, rev-1)
}

// settle commits p and finds out what became of it, however often the answer
// is lost. It returns the revision; or a definite error, errConflict among
// them, and then p did not and will not commit; or ErrUnknown, only when ctx or
// the store has ended and no answer came for settleTime.
func (s *Store) settle(ctx context.Context, sl *slot, p plan) (int64, error) {
	rev, err := s.attempt(sl, p)
	for n := 0; errors.Is(err, errLost); n++ {
		s.warn(err, "a commit was not answered")
		if s.pause(ctx, min(10*time.Millisecond<<min(n, 6), 500*time.Millisecond)) != nil {
			return s.burn(sl, p, s.ended(ctx))
		}
		if rev, err = s.attempt(sl, p); err != nil && !errors.Is(err, errLost) {
			return s.burn(sl, p, err)
		}
	}
	return rev, err
}

// ended is why nobody waits any more.
func (s *Store) ended(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return ErrClosed
}

// attempt sends p once. It gives the revision when p committed, now or by an
// earlier attempt; errConflict, ErrDeposed or another definite error when this
// attempt did not; errLost when that is not known.
func (s *Store) attempt(sl *slot, p plan) (int64, error) {
	for {
		ops := append(p.ops[:len(p.ops):len(p.ops)], clientv3.OpPut(sl.key, sl.value(p.id)))
		look := []clientv3.Op{clientv3.OpGet(sl.key)}
		if p.fence != nil {
			look = append(look, clientv3.OpGet(p.fence.key))
		}
		got, err := s.txn(append(p.cmps[:len(p.cmps):len(p.cmps)], sl.same()), ops, look)
		if err != nil {
			return 0, err
		}
		if got.Succeeded {
			if err := fault.Point("store.update.done"); err != nil {
				return 0, fmt.Errorf("%w: %w", errLost, err) // what a failure after a commit is
			}
			sl.rev = got.Header.Revision
			return sl.rev, nil
		}
		known := sl.rev
		if sl.learn(got.Responses[0].GetResponseRange().Kvs, p.id) {
			return sl.rev, nil
		}
		if p.fence != nil && !p.fence.stands(got.Responses[1].GetResponseRange().Kvs) {
			return 0, ErrDeposed
		}
		if sl.rev == known {
			return 0, errConflict
		}
	}
}

// burn makes sure that no attempt of p can commit any more, and returns why;
// or the revision when one did commit.
func (s *Store) burn(sl *slot, p plan, why error) (int64, error) {
	deadline := time.Now().Add(settleTime)
	for {
		put := []clientv3.Op{clientv3.OpPut(sl.key, sl.value("burnt"))}
		got, err := s.txn([]clientv3.Cmp{sl.same()}, put, []clientv3.Op{clientv3.OpGet(sl.key)})
		switch {
		case err == nil && got.Succeeded:
			sl.rev = got.Header.Revision
			return 0, why
		case err == nil:
			if sl.learn(got.Responses[0].GetResponseRange().Kvs, p.id) {
				return sl.rev, nil
			}
		case time.Now().After(deadline) || s.io.Err() != nil:
			return 0, fmt.Errorf("%w: %w: %w", ErrUnknown, why, err)
		default:
			_ = s.pause(s.io, 50*time.Millisecond)
		}
	}
}

// txn sends one transaction. An error that does not say that nothing happened
// is errLost.
func (s *Store) txn(cmps []clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(s.io, attemptTime)
	defer cancel()
	got, err := s.client.Txn(ctx).If(cmps...).Then(then...).Else(otherwise...).Commit()
	if err == nil {
		return got, nil
	}
	switch code(err) {
	case codes.ResourceExhausted:
		if errors.Is(err, rpctypes.ErrNoSpace) {
			return nil, xapi.NewError(xapi.OutOfSpace, "pool database").Because(err)
		}
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.NotFound:
		return nil, fmt.Errorf("commit: %w", err)
	}
	return nil, fmt.Errorf("%w: %w", errLost, err)
}

// code is the gRPC code of an error of the client.
func code(err error) codes.Code {
	var e rpctypes.EtcdError
	if errors.As(err, &e) {
		return e.Code()
	}
	return status.Code(err)
}

// Unreachable tells whether an error of Open is that the cluster does not answer.
func Unreachable(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	switch code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	}
	return false
}

package store

import (
	"context"
	"errors"
	"sync"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/patchd/patchd/pkg/xapi"
)

// lossy loses requests and answers of a client.
type lossy struct {
	clientv3.KV
	mu   sync.Mutex
	next []loss
	late []func()
}

// loss is what happens to one transaction.
type loss int

const (
	arrives    loss = iota
	lostBefore      // the request is lost
	lostAfter       // it commits, and the answer is lost
	delayed         // no answer comes, and it commits when late is run
)

func (l *lossy) Txn(ctx context.Context) clientv3.Txn {
	return &lossyTxn{l.KV.Txn(context.WithoutCancel(ctx)), l}
}

func (l *lossy) draw() loss {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.next) == 0 {
		return arrives
	}
	now := l.next[0]
	l.next = l.next[1:]
	return now
}

func (l *lossy) runLate() {
	l.mu.Lock()
	late := l.late
	l.late = nil
	l.mu.Unlock()
	for _, f := range late {
		f()
	}
}

type lossyTxn struct {
	clientv3.Txn
	l *lossy
}

func (t *lossyTxn) If(c ...clientv3.Cmp) clientv3.Txn  { t.Txn = t.Txn.If(c...); return t }
func (t *lossyTxn) Then(o ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Then(o...); return t }
func (t *lossyTxn) Else(o ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(o...); return t }

func (t *lossyTxn) Commit() (*clientv3.TxnResponse, error) {
	switch t.l.draw() {
	case lostBefore:
		return nil, rpctypes.ErrTimeout
	case lostAfter:
		if _, err := t.Txn.Commit(); err != nil {
			return nil, err
		}
		return nil, rpctypes.ErrTimeoutDueToConnectionLost
	case delayed:
		t.l.mu.Lock()
		defer t.l.mu.Unlock()
		t.l.late = append(t.l.late, func() { _, _ = t.Txn.Commit() })
		return nil, context.DeadlineExceeded
	}
	t.l.runLate()
	return t.Txn.Commit()
}

// TestAnswersThatAreLost counts: whatever is lost, an increment that succeeded
// is there once, and one that failed is not there.
func TestAnswersThatAreLost(t *testing.T) {
	for name, losses := range map[string][]loss{
		"the request":                            {lostBefore},
		"the answer":                             {lostAfter},
		"two answers":                            {lostAfter, lostAfter},
		"the request, then the answer":           {lostBefore, lostBefore, lostAfter},
		"it commits late, before the second try": {delayed, arrives},
		"two of it are late":                     {delayed, delayed, lostBefore},
	} {
		t.Run(name, func(t *testing.T) {
			s := openDir(t, t.TempDir())
			ref := xapi.NewRef()
			put(t, s, "VDI", ref, disk{})
			l := &lossy{KV: s.client.KV, next: losses}
			s.client.KV = l
			for want := 1; want <= 3; want++ {
				// A blind write beside it: nothing but the slot tells whether it happened.
				err := s.Update(t.Context(), func(tx *Tx) error {
					tx.Put("VDI", xapi.NewRef(), disk{SR: "mark"})
					return increaseIn(tx, ref)
				})
				if err != nil {
					t.Fatal(err)
				}
				l.runLate()
				if n := number(t, s, ref); n != want || len(view(t, s).Refs("VDI", "SR", "mark")) != want {
					t.Errorf("n is %d after %d", n, want)
				}
			}
		})
	}
}

// TestALateCommitDoesNotFollowAConflict: the first attempt hangs, the second
// meets a conflict that goes away again; the first must not commit then.
func TestALateCommitDoesNotFollowAConflict(t *testing.T) {
	s := openDir(t, t.TempDir())
	ref, blocker := xapi.NewRef(), xapi.NewRef()
	put(t, s, "VDI", ref, disk{})
	l := &lossy{KV: s.client.KV}
	runs := 0
	err := s.Update(t.Context(), func(tx *Tx) error {
		runs++
		tx.Has("VDI", blocker)
		tx.Put("run", xapi.NewRef(), disk{N: runs})
		if runs == 1 {
			l.next = []loss{delayed}
			s.client.KV = &conflicting{l, func() { put(t, s, "VDI", blocker, disk{}) }, func() {
				update(t, s, func(tx *Tx) { tx.Delete("VDI", blocker) })
				l.runLate() // the first attempt, with nothing in its way now
			}, 0}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.client.KV = l.KV
	l.runLate()
	if err := s.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := view(t, s).Count("run"); n != 1 {
		t.Errorf("%d commits of %d runs", n, runs)
	}
}

// conflicting runs before ahead of the second transaction, and after behind it.
type conflicting struct {
	*lossy
	before, after func()
	n             int
}

func (c *conflicting) Txn(ctx context.Context) clientv3.Txn {
	return &conflictingTxn{lossyTxn{c.KV.Txn(context.WithoutCancel(ctx)), c.lossy}, c}
}

type conflictingTxn struct {
	lossyTxn
	c *conflicting
}

func (t *conflictingTxn) If(c ...clientv3.Cmp) clientv3.Txn  { t.Txn = t.Txn.If(c...); return t }
func (t *conflictingTxn) Then(o ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Then(o...); return t }
func (t *conflictingTxn) Else(o ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(o...); return t }

func (t *conflictingTxn) Commit() (*clientv3.TxnResponse, error) {
	t.c.n++
	switch t.c.n {
	case 1:
		return t.lossyTxn.Commit()
	case 2:
		t.c.before()
		defer t.c.after()
	}
	return t.Txn.Commit()
}

func TestACallerThatLeavesWhileAnswersAreLost(t *testing.T) {
	for name, first := range map[string]loss{"it had committed": lostAfter, "it had not": lostBefore, "it is late": delayed} {
		t.Run(name, func(t *testing.T) {
			s := openDir(t, t.TempDir())
			ref := xapi.NewRef()
			put(t, s, "VDI", ref, disk{})
			why := errors.New("logged out")
			ctx, cancel := context.WithCancelCause(t.Context())
			l := &lossy{KV: s.client.KV, next: []loss{first}}
			s.client.KV = leaving{l, func() { cancel(why) }}
			err := increase(ctx, s, ref)
			s.client.KV = l.KV
			l.runLate()
			if err := s.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			n := number(t, s, ref)
			if err == nil && n != 1 || err != nil && (n != 0 || !errors.Is(err, why)) {
				t.Errorf("n is %d, error %v", n, err)
			}
		})
	}
}

// leaving cancels the caller once a transaction is on its way.
type leaving struct {
	*lossy
	leave func()
}

func (l leaving) Txn(ctx context.Context) clientv3.Txn {
	l.leave()
	return l.lossy.Txn(ctx)
}

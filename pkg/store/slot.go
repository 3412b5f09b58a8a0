package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// writers is how many transactions one store commits at the same time.
const writers = 32

// stale is the age after which the slots of a store that ended without saying
// so are swept. No commit is under way for that long.
const stale = 24 * time.Hour

// slot is a key that only one transaction at a time writes. Each commit
// compares the slot's last revision and puts the id of its run there. That
// makes a commit whose answer was lost knowable: a second try cannot commit
// beside the first, and finds the first's id when that one did commit.
type slot struct {
	key string
	rev int64 // of the key, as far as is known; 0: not there
}

func newSlots(k keys, name string) chan *slot {
	slots := make(chan *slot, writers)
	for n := range writers {
		slots <- &slot{key: k.txn(fmt.Sprintf("%s-%d", name, n))}
	}
	return slots
}

// takeSlot gives a slot that no other transaction has; giveSlot returns it.
func (s *Store) takeSlot(ctx context.Context) (*slot, error) {
	select {
	case sl := <-s.slots:
		return sl, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-s.ctx.Done():
		return nil, ErrClosed
	}
}

func (s *Store) giveSlot(sl *slot) { s.slots <- sl }

// forgetOwn deletes what an embedded store's earlier processes left: nobody
// else can be alive.
func (s *Store) forgetOwn(ctx context.Context) error {
	_, err1 := s.client.Delete(ctx, s.keys.folder(folderTxn), clientv3.WithPrefix())
	_, err2 := s.client.Delete(ctx, s.keys.leaders()+"/", clientv3.WithPrefix())
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("forget earlier processes: %w", err)
	}
	return nil
}

// value is what a commit puts into its slot: the id of the run and the time.
func (sl *slot) value(id string) string {
	return id + " " + time.Now().UTC().Format(time.RFC3339)
}

// same is the comparison that nobody has written the slot.
func (sl *slot) same() clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(sl.key), "=", sl.rev)
}

// learn takes what is in the slot, and tells whether run id put it there.
func (sl *slot) learn(kvs []*mvccpb.KeyValue, id string) bool {
	sl.rev = 0
	if len(kvs) == 0 {
		return false
	}
	sl.rev = kvs[0].ModRevision
	return strings.HasPrefix(string(kvs[0].Value), id+" ")
}

// drain waits until no transaction is under way, for as long as ctx lasts, and
// deletes the keys of the slots.
func (s *Store) drain(ctx context.Context) error {
	used := false
	for range writers {
		select {
		case sl := <-s.slots:
			used = used || sl.rev != 0
		case <-ctx.Done():
			return errors.New("a transaction did not end")
		}
	}
	if !used {
		return nil
	}
	_, err := s.client.Delete(ctx, s.keys.txn(s.name+"-"), clientv3.WithPrefix())
	return err
}

// sweepSlots deletes the slots of stores that ended long ago.
func (s *Store) sweepSlots(ctx context.Context) error {
	got, err := s.client.Get(ctx, s.keys.folder(folderTxn), clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("list old transactions: %w", err)
	}
	for _, kv := range got.Kvs {
		_, at, _ := strings.Cut(string(kv.Value), " ")
		if t, err := time.Parse(time.RFC3339, at); err == nil && time.Since(t) < stale {
			continue
		}
		same := clientv3.Compare(clientv3.ModRevision(string(kv.Key)), "=", kv.ModRevision)
		if _, err := s.client.Txn(ctx).If(same).Then(clientv3.OpDelete(string(kv.Key))).Commit(); err != nil {
			return fmt.Errorf("sweep old transactions: %w", err)
		}
	}
	return nil
}

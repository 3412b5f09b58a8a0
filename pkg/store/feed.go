package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// history is how many revisions before the newest one a store begins to
	// follow, so that event tokens survive a restart.
	history = 1000
	// page is how many keys are read at a time.
	page = 1000
	// rest is the pause between two attempts to follow again.
	rest = 200 * time.Millisecond
)

// errOther tells that the data is not what it was: restored under our feet.
var errOther = errors.New("the data of the store was replaced")

// load reads all records as of a revision a little in the past where that is
// still there, else as of now. Orphans are touch keys without a record.
func (s *Store) load(ctx context.Context) (*builder, []id, error) {
	meta, err := s.client.Get(ctx, s.keys.meta("id"))
	if err != nil {
		return nil, nil, err
	}
	if len(meta.Kvs) == 0 {
		return nil, nil, errOther
	}
	now := meta.Header.Revision
	at := max(now-history, meta.Kvs[0].ModRevision)
	kvs, err := s.list(ctx, at)
	if errors.Is(err, rpctypes.ErrCompacted) {
		at = now
		kvs, err = s.list(ctx, at)
	}
	if err != nil {
		return nil, nil, err
	}
	b := newBuilder(string(meta.Kvs[0].Value), s.decl)
	orphans := b.fill(s.keys, kvs)
	b.v.rev, b.v.horizon = at, at
	return b, orphans, nil
}

// list reads every key below the prefix as of rev.
func (s *Store) list(ctx context.Context, rev int64) ([]*mvccpb.KeyValue, error) {
	var all []*mvccpb.KeyValue
	from, end := s.keys.all(), clientv3.GetPrefixRangeEnd(s.keys.all())
	for {
		got, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithRev(rev), clientv3.WithLimit(page))
		if err != nil {
			return nil, err
		}
		all = append(all, got.Kvs...)
		if !got.More || len(got.Kvs) == 0 {
			return all, nil
		}
		from = string(got.Kvs[len(got.Kvs)-1].Key) + "\x00"
	}
}

// fill takes a whole listing: records first, then touches, for a touch of a
// record that is not there is an orphan.
func (b *builder) fill(k keys, kvs []*mvccpb.KeyValue) (orphans []id) {
	for _, kv := range kvs {
		folder, rest := k.split(string(kv.Key))
		switch folder {
		case folderLeader:
			b.v.leaders[rest] = candidate{string(kv.Value), kv.CreateRevision}
		case folderTouch, folderGen, folderTxn, folderMeta:
		default:
			b.put(id{folder, xapi.Ref(rest)}, kv.Value, kv.CreateRevision, kv.ModRevision)
		}
	}
	for _, kv := range kvs {
		folder, rest := k.split(string(kv.Key))
		if folder != folderTouch {
			continue
		}
		i, ok := splitID(rest)
		if ok && b.v.entry(i) == nil {
			orphans = append(orphans, i)
		}
		b.touch(i, kv.ModRevision, true)
	}
	return orphans
}

// apply takes one event of the watch. It fails with errOther when the event
// says that the data is another.
func (b *builder) apply(k keys, e *clientv3.Event) error {
	folder, rest := k.split(string(e.Kv.Key))
	gone, rev := e.Type == mvccpb.DELETE, e.Kv.ModRevision
	switch folder {
	case folderGen, folderTxn:
	case folderMeta:
		if rest == "id" && (gone || string(e.Kv.Value) != b.v.store) {
			return errOther
		}
	case folderLeader:
		if gone {
			delete(b.v.leaders, rest)
		} else {
			b.v.leaders[rest] = candidate{string(e.Kv.Value), e.Kv.CreateRevision}
		}
	case folderTouch:
		if i, ok := splitID(rest); ok && !gone {
			b.touch(i, rev, true)
		}
	default:
		i := id{folder, xapi.Ref(rest)}
		if gone {
			b.remove(i, rev)
		} else {
			b.put(i, e.Kv.Value, e.Kv.CreateRevision, rev)
		}
	}
	b.v.rev = rev
	return nil
}

// follow feeds b from one watch until the store is closed. When the watch
// breaks it goes on where it stopped; where that is compacted, or the data is
// another, it lists everything again.
func (s *Store) follow(b *builder) {
	for s.ctx.Err() == nil {
		err := s.watch(b)
		if s.ctx.Err() != nil {
			return
		}
		s.warn(err, "the watch of the store broke")
		if errors.Is(err, rpctypes.ErrCompacted) || errors.Is(err, errOther) {
			if again, err := s.relist(b); err != nil {
				s.warn(err, "the store cannot be read")
			} else {
				b = again
			}
		}
		select {
		case <-time.After(rest):
		case <-s.ctx.Done():
		}
	}
}

// watch applies events until the watch ends, and says why it did.
func (s *Store) watch(b *builder) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(s.ctx))
	defer cancel()
	events := s.client.Watch(ctx, s.keys.all(), clientv3.WithPrefix(), clientv3.WithRev(b.v.rev+1),
		clientv3.WithProgressNotify(), clientv3.WithFragment())
	for got := range events {
		if err := got.Err(); err != nil {
			return err
		}
		if got.Header.Revision < b.v.rev {
			return fmt.Errorf("revision %d after %d: %w", got.Header.Revision, b.v.rev, errOther)
		}
		for _, e := range got.Events {
			if err := b.apply(s.keys, e); err != nil {
				return err
			}
		}
		if len(got.Events) > 0 {
			s.publish(b.view())
		}
	}
	return errors.New("it ended")
}

// relist brings b to the present by reading everything: what is missing was
// deleted. Data of another identity gives a new builder without a past.
func (s *Store) relist(b *builder) (*builder, error) {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	meta, err := s.client.Get(ctx, s.keys.meta("id"))
	if err != nil {
		return nil, err
	}
	if len(meta.Kvs) == 0 {
		return nil, errOther
	}
	now, store := meta.Header.Revision, string(meta.Kvs[0].Value)
	kvs, err := s.list(ctx, now)
	if err != nil {
		return nil, err
	}
	if store != b.v.store || now < b.v.rev {
		b = newBuilder(store, s.decl)
		b.fill(s.keys, kvs)
		b.v.horizon = now
	} else {
		b.drop(s.keys, kvs, now)
		b.fill(s.keys, kvs)
	}
	b.v.rev = now
	s.publish(b.view())
	return b, nil
}

// drop removes, as of revision rev, what a listing does not show any more.
func (b *builder) drop(k keys, kvs []*mvccpb.KeyValue, rev int64) {
	there := make(map[id]bool, len(kvs))
	for _, kv := range kvs {
		folder, rest := k.split(string(kv.Key))
		there[id{folder, xapi.Ref(rest)}] = true
	}
	var gone []id
	b.v.ordered.Ascend(func(e *entry) bool {
		if !there[e.id] {
			gone = append(gone, e.id)
		}
		return true
	})
	for _, i := range gone {
		b.remove(i, rev)
	}
	clear(b.v.leaders)
}

// sweep deletes touch keys whose record is gone.
func (s *Store) sweep(ctx context.Context, orphans []id) error {
	for _, i := range orphans {
		gone := clientv3.Compare(clientv3.CreateRevision(s.keys.record(i)), "=", 0)
		if _, err := s.client.Txn(ctx).If(gone).Then(clientv3.OpDelete(s.keys.touch(i))).Commit(); err != nil {
			return fmt.Errorf("sweep touch keys: %w", err)
		}
	}
	return nil
}

func (s *Store) warn(err error, text string) {
	if s.log != nil {
		s.log.WithError(err).Warn(text)
	}
}

package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/patchd/patchd/pkg/xapi"
)

// Schema is the version of the data this package writes. It reads no newer.
const Schema = 1

// initialise gives new data its identity, and refuses data that is newer, or
// was only half restored.
func (s *Store) initialise(ctx context.Context) error {
	// Both are of one revision: another host may be at it just now.
	got, err := s.client.Txn(ctx).Then(
		clientv3.OpGet(s.keys.folder(folderMeta), clientv3.WithPrefix()),
		clientv3.OpGet(s.keys.all(), clientv3.WithPrefix(), clientv3.WithCountOnly()),
	).Commit()
	if err != nil {
		return fmt.Errorf("reach the store: %w", err)
	}
	meta := map[string]string{}
	for _, kv := range got.Responses[0].GetResponseRange().Kvs {
		_, name := s.keys.split(string(kv.Key))
		meta[name] = string(kv.Value)
	}
	if _, half := meta["restoring"]; half {
		return errors.New("a restore of this store did not finish: run `patchd store restore` again")
	}
	if _, ok := meta["id"]; ok {
		return checkSchema(meta["schema"])
	}
	if n := got.Responses[1].GetResponseRange().Count; n > 0 {
		return fmt.Errorf("%d keys below %s are not patchd's: choose another prefix", n, s.keys.prefix)
	}
	done, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(s.keys.meta("id")), "=", 0)).
		Then(s.identity(nil)...).Commit()
	if err != nil {
		return fmt.Errorf("make the store: %w", err)
	}
	if !done.Succeeded {
		return s.initialise(ctx) // another host was first
	}
	return nil
}

// identity are the operations that make the data a store with a new id.
func (s *Store) identity(more []clientv3.Op) []clientv3.Op {
	return append(more,
		clientv3.OpPut(s.keys.meta("id"), string(xapi.NewUUID())),
		clientv3.OpPut(s.keys.meta("schema"), strconv.Itoa(Schema)))
}

func checkSchema(text string) error {
	version, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("the store has no readable schema version: %q", text)
	}
	if version > Schema {
		return fmt.Errorf("the store was written by a newer patchd: its schema version is %d, "+
			"this one reads up to %d; install the newer patchd or restore a backup", version, Schema)
	}
	return nil
}

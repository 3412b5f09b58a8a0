package store

import (
	"errors"
	"fmt"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/patchd/patchd/pkg/xapi"
)

// TestCompactedWatch: a store that fell so far behind that its past is
// compacted lists everything, and still knows what happened since.
func TestCompactedWatch(t *testing.T) {
	s := openDir(t, t.TempDir())
	kept, changed, gone, made, sr := xapi.NewRef(), xapi.NewRef(), xapi.NewRef(), xapi.NewRef(), xapi.NewRef()
	put(t, s, "SR", sr, disk{})
	for _, ref := range []xapi.Ref{kept, changed, gone} {
		put(t, s, "VDI", ref, disk{SR: sr})
	}
	behind, _, err := s.load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	behind.v.rev = view(t, s).Revision()
	rev := behind.v.rev
	replay(t, s, behind)

	put(t, s, "VDI", changed, disk{SR: sr, N: 1})
	put(t, s, "VDI", made, disk{})
	end := update(t, s, func(tx *Tx) { tx.Delete("VDI", gone) })
	if _, err := s.client.Compact(t.Context(), end); err != nil {
		t.Fatal(err)
	}
	if err := s.watch(behind); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Fatal("the watch ended with", err)
	}
	if _, err := s.relist(behind); err != nil {
		t.Fatal(err)
	}
	changes, ok := view(t, s).Since(rev)
	want := map[xapi.Ref]Op{changed: Mod, made: Add, gone: Del, sr: Mod}
	if !ok || len(changes) != len(want) {
		t.Fatal(changes, ok)
	}
	for _, c := range changes {
		if want[c.Ref] != c.Op {
			t.Error(c)
		}
	}
}

// replay makes b what the store has now, as its own watch would.
func replay(t *testing.T, s *Store, b *builder) {
	t.Helper()
	kvs, err := s.list(t.Context(), b.v.rev)
	if err != nil {
		t.Fatal(err)
	}
	b.drop(s.keys, kvs, b.v.rev)
	b.fill(s.keys, kvs)
}

func TestReplacedData(t *testing.T) {
	s := openDir(t, t.TempDir())
	ref := xapi.NewRef()
	rev := put(t, s, "VDI", ref, disk{N: 1})
	other := string(xapi.NewUUID())
	if _, err := s.client.Put(t.Context(), s.keys.meta("id"), other); err != nil {
		t.Fatal(err)
	}
	err := s.Until(t.Context(), func(v *View) (bool, error) { return v.StoreID() == other, nil })
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := view(t, s).Since(rev); ok || s.ID() != other {
		t.Error("the past of other data is shown")
	}
	if err := increase(t.Context(), s, ref); err != nil || number(t, s, ref) != 2 {
		t.Error("it does not go on:", err)
	}
}

func TestTombstonesAreBounded(t *testing.T) {
	b := newBuilder("s", declare(nil))
	rev := int64(0)
	for n := range maxTombstones + 50 {
		i := id{"task", xapi.Ref(fmt.Sprint(n))}
		rev++
		b.put(i, []byte(`{}`), rev, rev)
		rev++
		b.remove(i, rev)
		b.v.rev = rev
	}
	v := b.view()
	if v.byRef.Len() != maxTombstones || v.changes.Len() != maxTombstones || v.Count("task") != 0 {
		t.Error(v.byRef.Len(), v.changes.Len())
	}
	if _, ok := v.Since(99); ok {
		t.Error("a forgotten past is shown")
	}
	if changes, ok := v.Since(101); !ok || len(changes) != 1 {
		t.Error(len(changes), ok)
	}
}

func TestRecordsThatAreNoObjectsAreKept(t *testing.T) {
	b := newBuilder("s", declare(testIndexes))
	b.put(id{"VDI", "r"}, []byte(`[1`), 1, 1)
	b.put(id{"VDI", "q"}, []byte(`{"uuid":7,"SR":null}`), 2, 2)
	if v := b.view(); v.Count("VDI") != 2 || v.index.Len() != 0 {
		t.Error(v.Count("VDI"), v.index.Len())
	}
}

func TestOrphanedTouchesAreSwept(t *testing.T) {
	s := openDir(t, t.TempDir())
	here, orphan := id{"VDI", xapi.NewRef()}, id{"VDI", xapi.NewRef()}
	put(t, s, here.class, here.ref, disk{})
	for _, i := range []id{here, orphan} {
		if _, err := s.client.Put(t.Context(), s.keys.touch(i), ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	kvs, err := s.list(t.Context(), view(t, s).Revision())
	if err != nil {
		t.Fatal(err)
	}
	orphans := newBuilder(s.ID(), s.decl).fill(s.keys, kvs)
	if len(orphans) != 1 || orphans[0] != orphan {
		t.Fatal(orphans)
	}
	if err := s.sweep(t.Context(), []id{orphan, here}); err != nil {
		t.Fatal(err)
	}
	for i, want := range map[id]int{here: 1, orphan: 0} {
		if got, err := s.client.Get(t.Context(), s.keys.touch(i)); err != nil || len(got.Kvs) != want {
			t.Error(i, got, err)
		}
	}
}

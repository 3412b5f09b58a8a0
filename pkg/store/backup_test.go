package store

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

// filled is a store with some records in an order that is not that of refs.
func filled(t *testing.T) (s *Store, order []xapi.Ref) {
	t.Helper()
	s = openDir(t, t.TempDir())
	for n := range 250 {
		ref := xapi.NewRef()
		order = append(order, ref)
		if n%50 == 0 {
			put(t, s, "pool", xapi.NewRef(), map[string]string{"name_label": "<&> \u2028"})
		}
		put(t, s, "VDI", ref, disk{N: n})
	}
	update(t, s, func(tx *Tx) { tx.Delete("VDI", order[0]) })
	return s, order[1:]
}

func compare(t *testing.T, got, want *Store, order []xapi.Ref) {
	t.Helper()
	v, w := view(t, got), view(t, want)
	if v.StoreID() == w.StoreID() {
		t.Error("the copy has the same identity")
	}
	list := v.List("VDI")
	if len(list) != len(order) || v.Count("pool") != w.Count("pool") {
		t.Fatalf("%d records, want %d", len(list), len(order))
	}
	for n, it := range list {
		old, _ := w.Get("VDI", it.Ref)
		if it.Ref != order[n] || string(it.Raw) != string(old.Raw) {
			t.Fatalf("record %d is %+v, want %+v", n, it, old)
		}
	}
	for _, it := range v.List("pool") {
		if old, _ := w.Get("pool", it.Ref); string(it.Raw) != string(old.Raw) {
			t.Errorf("%s became %s", old.Raw, it.Raw)
		}
	}
}

func TestBackupAndRestore(t *testing.T) {
	s, order := filled(t)
	var copy bytes.Buffer
	if err := s.Backup(t.Context(), &copy); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := Restore(t.Context(), Options{Dir: dir}, bytes.NewReader(copy.Bytes())); err != nil {
		t.Fatal(err)
	}
	if err := Restore(t.Context(), Options{Dir: dir}, bytes.NewReader(copy.Bytes())); err == nil {
		t.Error("restored over data")
	}
	compare(t, openDir(t, dir), s, order)
}

func TestMigrateToACluster(t *testing.T) {
	s, order := filled(t)
	at, _ := cluster(t, 1)
	if err := s.Migrate(t.Context(), Options{URL: at}); err != nil {
		t.Fatal(err)
	}
	if err := s.Migrate(t.Context(), Options{URL: at}); err == nil {
		t.Error("migrated over data")
	}
	compare(t, open(t, Options{URL: at}), s, order)
}

func TestDamagedBackupsAreRefused(t *testing.T) {
	s, _ := filled(t)
	var out bytes.Buffer
	if err := s.Backup(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	good := out.String()
	dir := t.TempDir()
	lines := strings.SplitAfter(good, "\n")
	for name, text := range map[string]string{
		"empty":            "",
		"another file":     "hello\n",
		"cut short":        strings.Join(lines[:100], ""),
		"a record changed": strings.Replace(good, `"n":9`, `"n":8`, 1),
		"a record missing": strings.Join(append(append([]string{}, lines[:9]...), lines[10:]...), ""),
		"a newer schema":   strings.Replace(good, fmt.Sprintf(`"schema":%d`, Schema), `"schema":99`, 1),
		"a bad name":       lines[0] + `{"class":"touch","ref":"a","created":1,"value":{}}` + "\n",
	} {
		if err := Restore(t.Context(), Options{Dir: dir}, strings.NewReader(text)); err == nil {
			t.Error(name, "was restored")
		}
	}
	if err := Restore(t.Context(), Options{Dir: dir}, strings.NewReader(good)); err != nil {
		t.Error("after the bad ones:", err)
	}
}

// TestHalfRestored: the process died while it restored.
func TestHalfRestored(t *testing.T) {
	s, order := filled(t)
	var copy bytes.Buffer
	if err := s.Backup(t.Context(), &copy); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	half, err := connect(t.Context(), Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := half.beginRestore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := half.client.Put(t.Context(), half.keys.record(id{"VDI", "left"}), "{}"); err != nil {
		t.Fatal(err)
	}
	closeStore(t, half)
	if _, err := Open(t.Context(), Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "did not finish") {
		t.Error("opened half restored data:", err)
	}
	if err := Restore(t.Context(), Options{Dir: dir}, &copy); err != nil {
		t.Fatal(err)
	}
	compare(t, openDir(t, dir), s, order)
}

package store

import (
	"encoding/json"
	"fmt"
	"strings"

	"k8s.io/utils/third_party/forked/golang/btree"

	"github.com/patchd/patchd/pkg/xapi"
)

// Item is one record as it is stored.
type Item struct {
	Class string
	Ref   xapi.Ref
	// Raw is the JSON object. It is shared: nobody may write into it.
	Raw json.RawMessage
	// Created is the revision the record appeared in, Modified that of its
	// last event, touches included.
	Created, Modified int64
}

// Decode fills into from the record.
func (i Item) Decode(into any) error {
	if err := json.Unmarshal(i.Raw, into); err != nil {
		return fmt.Errorf("decode %s %s: %w", i.Class, i.Ref, err)
	}
	return nil
}

// Op is what happened to a record.
type Op string

// The operations, in the words of the event class.
const (
	Add Op = "add"
	Mod Op = "mod"
	Del Op = "del"
)

// Change is what happened to one record since some revision.
type Change struct {
	Class string
	Ref   xapi.Ref
	Op    Op
	// Revision is that of the last event of the record.
	Revision int64
	// Item is the record as of the view; it is empty for Del.
	Item Item
}

// View is all records as of one revision. It never changes, so it can be kept
// and read from any goroutine; it holds memory as long as it is kept.
type View struct {
	store   string
	rev     int64
	horizon int64
	decl    *declared

	byRef   *btree.BTree[*entry]
	ordered *btree.BTree[*entry]
	changes *btree.BTree[*entry]
	index   *btree.BTree[indexKey]
	counts  map[string]int
	leaders map[string]candidate
}

// candidate is one that campaigns, or leads.
type candidate struct {
	name    string
	created int64
}

// StoreID is the identity of the data this view is of.
func (v *View) StoreID() string { return v.store }

// Revision is that of the last change the view shows.
func (v *View) Revision() int64 { return v.rev }

// Get gives one record.
func (v *View) Get(class string, ref xapi.Ref) (Item, bool) {
	e := v.entry(id{class, ref})
	if e == nil {
		return Item{}, false
	}
	return e.item(), true
}

// entry is the living record i, or nil.
func (v *View) entry(i id) *entry {
	e, ok := v.byRef.Get(&entry{id: i})
	if !ok || e.deleted {
		return nil
	}
	return e
}

// ByUUID gives the record of the class with that uuid.
func (v *View) ByUUID(class string, uuid xapi.UUID) (Item, bool) {
	for _, ref := range v.Refs(class, "uuid", string(uuid)) {
		return v.Get(class, ref)
	}
	return Item{}, false
}

// List gives all records of a class, oldest first, then by ref.
func (v *View) List(class string) []Item {
	items := make([]Item, 0, v.counts[class])
	v.ordered.AscendGreaterOrEqual(&entry{id: id{class: class}}, func(e *entry) bool {
		if e.class != class {
			return false
		}
		items = append(items, e.item())
		return true
	})
	return items
}

// Refs gives the records of a class whose indexed field holds value, in the
// order of List. A field that is not declared finds nothing.
func (v *View) Refs(class, field, value string) []xapi.Ref {
	var refs []xapi.Ref
	from := indexKey{class: class, field: field, value: value}
	v.index.AscendGreaterOrEqual(from, func(k indexKey) bool {
		if k.class != class || k.field != field || k.value != value {
			return false
		}
		refs = append(refs, k.ref)
		return true
	})
	return refs
}

// Count is the number of records of a class.
func (v *View) Count(class string) int { return v.counts[class] }

// Leader is the candidate that leads, and the revision it was elected with.
// It is empty when nobody does.
func (v *View) Leader() (name string, revision int64) {
	for _, c := range v.leaders {
		if revision == 0 || c.created < revision {
			name, revision = c.name, c.created
		}
	}
	return name, revision
}

// Since gives what happened after rev, one change for each record, ordered by
// the revision of its last event. A record that was made and deleted after rev
// is not shown. ok is false when rev is too old, or not of this view's past:
// whoever asks has to start afresh.
//
// It takes time by the number of changes, not of records.
func (v *View) Since(rev int64) (changes []Change, ok bool) {
	if rev < v.horizon || rev > v.rev {
		return nil, false
	}
	v.changes.AscendGreaterOrEqual(&entry{modified: rev + 1}, func(e *entry) bool {
		c := Change{Class: e.class, Ref: e.ref, Revision: e.modified}
		switch {
		case e.deleted && e.first > rev:
			return true
		case e.deleted:
			c.Op = Del
		case e.created > rev:
			c.Op, c.Item = Add, e.item()
		default:
			c.Op, c.Item = Mod, e.item()
		}
		changes = append(changes, c)
		return true
	})
	return changes, true
}

// Get decodes one record of the view. HANDLE_INVALID [class, ref] when it is
// not there.
func Get[T any](v *View, class string, ref xapi.Ref) (T, error) {
	var into T
	item, ok := v.Get(class, ref)
	if !ok {
		return into, xapi.NewError(xapi.HandleInvalid, class, string(ref))
	}
	return into, item.Decode(&into)
}

// All decodes all records of a class.
func All[T any](v *View, class string) (map[xapi.Ref]T, error) {
	all := make(map[xapi.Ref]T, v.Count(class))
	for _, item := range v.List(class) {
		var one T
		if err := item.Decode(&one); err != nil {
			return nil, err
		}
		all[item.Ref] = one
	}
	return all, nil
}

// entry is one record, or the tombstone of one. It is never changed once a
// view shows it.
type entry struct {
	id
	raw      json.RawMessage
	created  int64
	recorded int64 // revision of the record's own key: what a transaction compares
	modified int64 // revision of the last event, touches and children included
	first    int64 // created of the first life that is remembered under this ref
	deleted  bool
	touched  bool     // a touch key exists
	fields   []string // values of the declared fields of the class
}

func (e *entry) item() Item {
	return Item{Class: e.class, Ref: e.ref, Raw: e.raw, Created: e.created, Modified: e.modified}
}

type indexKey struct {
	class, field, value string
	created             int64
	ref                 xapi.Ref
}

func lessRef(a, b *entry) bool {
	if c := strings.Compare(a.class, b.class); c != 0 {
		return c < 0
	}
	return a.ref < b.ref
}

func lessOrdered(a, b *entry) bool {
	if c := strings.Compare(a.class, b.class); c != 0 {
		return c < 0
	}
	if a.created != b.created {
		return a.created < b.created
	}
	return a.ref < b.ref
}

func lessChange(a, b *entry) bool {
	if a.modified != b.modified {
		return a.modified < b.modified
	}
	return lessRef(a, b)
}

func lessIndex(a, b indexKey) bool {
	if c := strings.Compare(a.class, b.class); c != 0 {
		return c < 0
	}
	if c := strings.Compare(a.field, b.field); c != 0 {
		return c < 0
	}
	if c := strings.Compare(a.value, b.value); c != 0 {
		return c < 0
	}
	if a.created != b.created {
		return a.created < b.created
	}
	return a.ref < b.ref
}

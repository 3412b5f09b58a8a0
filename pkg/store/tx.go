package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/patchd/patchd/pkg/xapi"
)

// Tx is one run of a transaction. It reads one view, so what it sees fits
// together, and its own writes on top. Everything it read is compared when it
// commits: if any of it changed meanwhile, nothing is written and the function
// runs again. A Tx belongs to the goroutine of that function.
type Tx struct {
	v      *View
	reads  map[id]*entry   // what the view showed; nil: not there
	listed map[string]bool // classes read as a whole
	looked map[string]bool // classes read by an index
	writes map[id]*json.RawMessage
	touch  map[id]bool
	order  []id
	err    error
}

func newTx(v *View) *Tx {
	return &Tx{
		v: v, reads: map[id]*entry{}, listed: map[string]bool{}, looked: map[string]bool{},
		writes: map[id]*json.RawMessage{}, touch: map[id]bool{},
	}
}

// Revision is that of the view the transaction reads.
func (tx *Tx) Revision() int64 { return tx.v.rev }

// read gives record i with the writes of the transaction, and notes that it
// was read. pending: it was written here.
func (tx *Tx) read(i id) (raw json.RawMessage, there bool) {
	e := tx.base(i)
	if w, ok := tx.writes[i]; ok {
		if w == nil {
			return nil, false
		}
		return *w, true
	}
	if e == nil {
		return nil, false
	}
	return e.raw, true
}

// base is record i as the view shows it; nil: not there.
func (tx *Tx) base(i id) *entry {
	if e, ok := tx.reads[i]; ok {
		return e
	}
	e := tx.v.entry(i)
	tx.reads[i] = e
	return e
}

// Get decodes a record into into. HANDLE_INVALID [class, ref] when it is not
// there.
func (tx *Tx) Get(class string, ref xapi.Ref, into any) error {
	raw, ok := tx.read(id{class, ref})
	if !ok {
		return xapi.NewError(xapi.HandleInvalid, class, string(ref))
	}
	return Item{Class: class, Ref: ref, Raw: raw}.Decode(into)
}

// Peek is Get of a record whose change does not make the transaction run again: for
// what holds as well when the record is a moment older. The records that Refs found
// may be looked at in any number that way.
func (tx *Tx) Peek(class string, ref xapi.Ref, into any) error {
	i := id{class, ref}
	if _, mine := tx.writes[i]; mine {
		return tx.Get(class, ref, into)
	}
	e := tx.v.entry(i)
	if e == nil {
		return xapi.NewError(xapi.HandleInvalid, class, string(ref))
	}
	return e.item().Decode(into)
}

// Has tells whether a record is there.
func (tx *Tx) Has(class string, ref xapi.Ref) bool {
	_, ok := tx.read(id{class, ref})
	return ok
}

// GetRaw gives a record field by field. HANDLE_INVALID [class, ref] when it is
// not there.
func (tx *Tx) GetRaw(class string, ref xapi.Ref) (map[string]json.RawMessage, error) {
	var fields map[string]json.RawMessage
	return fields, tx.Get(class, ref, &fields)
}

// Read decodes one record. HANDLE_INVALID [class, ref] when it is not there.
func Read[T any](tx *Tx, class string, ref xapi.Ref) (T, error) {
	var into T
	return into, tx.Get(class, ref, &into)
}

// List gives all records of a class, oldest first; those made by this
// transaction come last. Any change of the class makes the transaction run
// again.
func (tx *Tx) List(class string) []Item {
	tx.listed[class] = true
	items := tx.v.List(class)
	items = slices.DeleteFunc(items, func(it Item) bool {
		_, ok := tx.writes[id{class, it.Ref}]
		return ok
	})
	for _, i := range tx.order {
		if w := tx.writes[i]; i.class == class && w != nil {
			items = append(items, tx.pending(i, *w))
		}
	}
	slices.SortStableFunc(items, byAge)
	return items
}

// pending is a record as this transaction would leave it.
func (tx *Tx) pending(i id, raw json.RawMessage) Item {
	it := Item{Class: i.class, Ref: i.ref, Raw: raw, Created: math.MaxInt64, Modified: math.MaxInt64}
	if e := tx.base(i); e != nil {
		it.Created = e.created
	}
	return it
}

// Refs gives the records of a class whose indexed field holds value, in the
// order of List. Records of the class that appear, vanish or change an indexed
// field make the transaction run again; other changes do not.
func (tx *Tx) Refs(class, field, value string) []xapi.Ref {
	tx.looked[class] = true
	var items []Item
	for _, ref := range tx.v.Refs(class, field, value) {
		if _, ok := tx.writes[id{class, ref}]; !ok {
			it, _ := tx.v.Get(class, ref)
			items = append(items, it)
		}
	}
	n := slices.Index(tx.v.decl.of(class), field)
	for _, i := range tx.order {
		w := tx.writes[i]
		if n >= 0 && i.class == class && w != nil && tx.v.decl.values(class, *w)[n] == value {
			items = append(items, tx.pending(i, *w))
		}
	}
	slices.SortStableFunc(items, byAge)
	refs := make([]xapi.Ref, 0, len(items))
	for _, it := range items {
		refs = append(refs, it.Ref)
	}
	return refs
}

// RefsBoth is Refs of the records that hold a value in each of two indexed fields:
// of those, however many hold only the first, nothing is read.
func (tx *Tx) RefsBoth(class string, first, second [2]string) []xapi.Ref {
	n := slices.Index(tx.v.decl.of(class), second[0])
	return slices.DeleteFunc(tx.Refs(class, first[0], first[1]), func(ref xapi.Ref) bool {
		i := id{class, ref}
		if w := tx.writes[i]; w != nil {
			return n < 0 || tx.v.decl.values(class, *w)[n] != second[1]
		}
		e := tx.v.entry(i)
		return n < 0 || e == nil || e.fields[n] != second[1]
	})
}

// ByUUID gives the ref of the record of a class with that uuid.
func (tx *Tx) ByUUID(class string, uuid xapi.UUID) (xapi.Ref, bool) {
	refs := tx.Refs(class, "uuid", string(uuid))
	if len(refs) == 0 {
		return xapi.NullRef, false
	}
	return refs[0], true
}

func byAge(a, b Item) int {
	switch {
	case a.Created != b.Created && a.Created < b.Created:
		return -1
	case a.Created != b.Created:
		return 1
	case a.Ref < b.Ref:
		return -1
	case a.Ref > b.Ref:
		return 1
	}
	return 0
}

// Put writes a record, new or not. What is written as it already is makes no
// event. A value that does not encode, or a name that is no key, fails the
// transaction.
func (tx *Tx) Put(class string, ref xapi.Ref, v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		tx.fail(fmt.Errorf("encode %s %s: %w", class, ref, err))
		return
	}
	tx.set(id{class, ref}, (*json.RawMessage)(&raw))
}

// PutRaw writes a record field by field.
func (tx *Tx) PutRaw(class string, ref xapi.Ref, fields map[string]json.RawMessage) {
	tx.Put(class, ref, fields)
}

// Delete removes a record. One that is not there stays so.
func (tx *Tx) Delete(class string, ref xapi.Ref) { tx.set(id{class, ref}, nil) }

// Touch makes an event of a record without changing it. One that is not there
// makes none.
func (tx *Tx) Touch(class string, ref xapi.Ref) { tx.touch[id{class, ref}] = true }

func (tx *Tx) set(i id, raw *json.RawMessage) {
	if !validClass(i.class) || !validRef(i.ref) {
		tx.fail(fmt.Errorf("%q/%q cannot name a record", i.class, i.ref))
		return
	}
	tx.base(i)
	if _, again := tx.writes[i]; !again {
		tx.order = append(tx.order, i)
	}
	tx.writes[i] = raw
}

func (tx *Tx) fail(err error) {
	if tx.err == nil {
		tx.err = err
	}
}

// idle tells whether write i leaves the record as it is.
func (tx *Tx) idle(i id) bool {
	e, w := tx.reads[i], tx.writes[i]
	if e == nil || w == nil {
		return e == nil && w == nil
	}
	return bytes.Equal(e.raw, *w)
}

// moves tells whether write i changes what List or an index finds.
func (tx *Tx) moves(i id) bool {
	e, w := tx.reads[i], tx.writes[i]
	if e == nil || w == nil {
		return true
	}
	return !slices.Equal(e.fields, tx.v.decl.values(i.class, *w))
}

package store

import (
	"encoding/json"
	"maps"
	"slices"

	"k8s.io/utils/third_party/forked/golang/btree"

	"github.com/patchd/patchd/pkg/xapi"
)

// maxTombstones is how many deleted records a view remembers. Who asks for
// changes older than the oldest of them starts afresh.
const maxTombstones = 10000

const degree = 16

// declared is which fields of which class are indexed, and which parents
// they touch.
type declared struct {
	fields  map[string][]string
	parents map[string][]string // parallel to fields; "" without a parent
}

func declare(indexes []Index) *declared {
	d := &declared{fields: map[string][]string{}, parents: map[string][]string{}}
	for _, ix := range indexes {
		d.fields[ix.Class] = append(d.fields[ix.Class], ix.Field)
		d.parents[ix.Class] = append(d.parents[ix.Class], ix.Parent)
	}
	return d
}

// of names the indexed fields of a class; the first is always uuid.
func (d *declared) of(class string) []string {
	return append([]string{"uuid"}, d.fields[class]...)
}

// parent is the class that field n of class refers to, or "".
func (d *declared) parent(class string, n int) string {
	if n == 0 {
		return ""
	}
	return d.parents[class][n-1]
}

// values reads the indexed fields of a record. A record that is not a JSON
// object has none.
func (d *declared) values(class string, raw json.RawMessage) []string {
	names := d.of(class)
	values := make([]string, len(names))
	var object map[string]json.RawMessage
	if json.Unmarshal(raw, &object) != nil {
		return values
	}
	for n, name := range names {
		var text string
		if json.Unmarshal(object[name], &text) == nil {
			values[n] = text
		}
	}
	return values
}

// builder makes views: one goroutine feeds it with changes and takes a view
// whenever a revision is complete.
type builder struct {
	v     View // the working copy
	tombs []tomb
}

type tomb struct {
	id
	rev int64
}

func newBuilder(store string, d *declared) *builder {
	return &builder{v: View{
		store: store, decl: d,
		byRef:   btree.New(degree, lessRef),
		ordered: btree.New(degree, lessOrdered),
		changes: btree.New(degree, lessChange),
		index:   btree.New(degree, lessIndex),
		counts:  map[string]int{},
		leaders: map[string]candidate{},
	}}
}

// view gives the state so far; the builder goes on with copies.
func (b *builder) view() *View {
	v := b.v
	v.byRef, v.ordered = b.v.byRef.Clone(), b.v.ordered.Clone()
	v.changes, v.index = b.v.changes.Clone(), b.v.index.Clone()
	v.counts, v.leaders = maps.Clone(b.v.counts), maps.Clone(b.v.leaders)
	return &v
}

// put takes a record as it is from revision rev on.
func (b *builder) put(i id, raw []byte, created, rev int64) {
	old, known := b.v.byRef.Get(&entry{id: i})
	if known && old.recorded >= rev {
		return // replayed
	}
	e := &entry{
		id: i, raw: raw, created: created, recorded: rev, modified: rev, first: created,
		fields: b.v.decl.values(i.class, raw),
	}
	if known {
		e.first, e.touched = old.first, old.touched && !old.deleted
	}
	if known && !old.deleted {
		b.unlink(old)
		b.related(i.class, old.fields, e.fields, rev)
	} else {
		if known {
			b.v.changes.Delete(old)
		}
		b.related(i.class, nil, e.fields, rev)
	}
	b.link(e)
}

// remove takes the deletion of a record in revision rev.
func (b *builder) remove(i id, rev int64) {
	old := b.v.entry(i)
	if old == nil || old.recorded >= rev {
		return
	}
	b.unlink(old)
	b.related(i.class, old.fields, nil, rev)
	e := &entry{id: i, created: old.created, recorded: rev, modified: rev, first: old.first, deleted: true}
	b.v.byRef.ReplaceOrInsert(e)
	b.v.changes.ReplaceOrInsert(e)
	b.tombs = append(b.tombs, tomb{i, rev})
	b.prune()
}

// touch takes an event of a record that is not a change of it.
func (b *builder) touch(i id, rev int64, key bool) {
	old := b.v.entry(i)
	if old == nil {
		return
	}
	e := *old
	e.modified, e.touched = max(e.modified, rev), e.touched || key
	b.v.changes.Delete(old)
	b.v.byRef.ReplaceOrInsert(&e)
	b.v.ordered.ReplaceOrInsert(&e)
	b.v.changes.ReplaceOrInsert(&e)
}

// related touches the parents of a child whose references went from old to
// now; nil stands for no child.
func (b *builder) related(class string, old, now []string, rev int64) {
	for n := range b.v.decl.of(class) {
		parent := b.v.decl.parent(class, n)
		var was, is string
		if old != nil {
			was = old[n]
		}
		if now != nil {
			is = now[n]
		}
		if parent == "" || was == is {
			continue
		}
		b.touch(id{parent, xapi.Ref(was)}, rev, false)
		b.touch(id{parent, xapi.Ref(is)}, rev, false)
	}
}

func (b *builder) link(e *entry) {
	b.v.byRef.ReplaceOrInsert(e)
	b.v.ordered.ReplaceOrInsert(e)
	b.v.changes.ReplaceOrInsert(e)
	for _, k := range b.indexKeys(e) {
		b.v.index.ReplaceOrInsert(k)
	}
	b.v.counts[e.class]++
}

func (b *builder) unlink(e *entry) {
	b.v.ordered.Delete(e)
	b.v.changes.Delete(e)
	for _, k := range b.indexKeys(e) {
		b.v.index.Delete(k)
	}
	b.v.counts[e.class]--
}

func (b *builder) indexKeys(e *entry) []indexKey {
	var ks []indexKey
	for n, field := range b.v.decl.of(e.class) {
		if e.fields[n] != "" {
			ks = append(ks, indexKey{e.class, field, e.fields[n], e.created, e.ref})
		}
	}
	return ks
}

// prune forgets the oldest tombstones and moves the horizon past them.
func (b *builder) prune() {
	for len(b.tombs) > maxTombstones {
		t := b.tombs[0]
		b.tombs = b.tombs[1:]
		e, ok := b.v.byRef.Get(&entry{id: t.id})
		if ok && e.deleted && e.modified == t.rev {
			b.v.byRef.Delete(e)
			b.v.changes.Delete(e)
		}
		b.v.horizon = max(b.v.horizon, t.rev)
	}
	if cap(b.tombs) > 4*maxTombstones {
		b.tombs = slices.Clone(b.tombs)
	}
}

package store

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/patchd/patchd/pkg/xapi"
)

// model is what a view has to show, kept the simple way: every version of
// everything.
type model struct {
	versions map[int64]map[id]modelRecord // by revision, all records
	revs     []int64
	first    map[id]int64
}

type modelRecord struct {
	disk
	created, modified int64
}

func (m *model) now() map[id]modelRecord { return m.versions[m.revs[len(m.revs)-1]] }

// since gives the changes after rev by comparing all versions.
func (m *model) since(rev int64) map[id]Op {
	changes := map[id]Op{}
	for i, r := range m.now() {
		switch {
		case r.created > rev:
			changes[i] = Add
		case r.modified > rev:
			changes[i] = Mod
		}
	}
	for n, at := range m.revs {
		if n == 0 {
			continue
		}
		for i := range m.versions[m.revs[n-1]] {
			_, still := m.versions[at][i]
			_, now := m.now()[i]
			if !still && !now && at > rev && m.first[i] <= rev {
				changes[i] = Del
			}
		}
	}
	return changes
}

// step is one random transaction, on the model as it would be.
type step struct {
	put    map[id]disk
	del    []id
	touch  []id
	result map[id]modelRecord
}

func drawStep(t *rapid.T, m *model, round int) step {
	ids := rapid.SliceOfNDistinct(rapid.IntRange(0, 11), 1, 4, rapid.ID[int]).Draw(t, "records")
	st := step{put: map[id]disk{}, result: maps.Clone(m.now())}
	for _, n := range ids {
		i := id{[]string{"SR", "VDI", "VDI"}[n%3], xapi.Ref(fmt.Sprintf("r%d-%d", round, n))}
		_, there := st.result[i]
		switch rapid.IntRange(0, 3).Draw(t, "verb") {
		case 0:
			st.del = append(st.del, i)
			delete(st.result, i)
		case 1:
			if there {
				st.touch = append(st.touch, i)
			}
		default:
			d := disk{N: rapid.IntRange(0, 2).Draw(t, "n"), UUID: xapi.UUID("u" + string(i.ref))}
			if i.class == "VDI" {
				d.SR = xapi.Ref(fmt.Sprintf("r%d-%d", round, 3*rapid.IntRange(0, 3).Draw(t, "SR")))
			}
			st.put[i] = d
		}
	}
	return st
}

// commit takes a step into the model as of revision rev.
func (m *model) commit(st step, rev int64) {
	before := m.now()
	modified := map[id]bool{}
	for _, i := range st.touch {
		modified[i] = true
	}
	parents := func(i id, d disk) {
		if i.class == "VDI" {
			modified[id{"SR", d.SR}] = true
		}
	}
	for _, i := range st.del {
		if old, ok := before[i]; ok {
			parents(i, old.disk)
		}
	}
	for i, d := range st.put {
		old, there := before[i]
		switch {
		case there && old.disk == d:
			continue
		case there:
			st.result[i] = modelRecord{d, old.created, rev}
		default:
			st.result[i] = modelRecord{d, rev, rev}
			if _, known := m.first[i]; !known {
				m.first[i] = rev
			}
		}
		if !there || old.SR != d.SR {
			parents(i, d)
			if there {
				parents(i, old.disk)
			}
		}
	}
	for i := range modified {
		if r, ok := st.result[i]; ok {
			r.modified = rev
			st.result[i] = r
		}
	}
	m.versions[rev] = st.result
	m.revs = append(m.revs, rev)
}

// check compares a view with the model.
func (m *model) check(t *rapid.T, v *View) {
	for _, class := range []string{"SR", "VDI"} {
		var want []id
		for i := range m.now() {
			if i.class == class {
				want = append(want, i)
			}
		}
		slices.SortFunc(want, func(a, b id) int {
			return cmp.Or(cmp.Compare(m.now()[a].created, m.now()[b].created), cmp.Compare(a.ref, b.ref))
		})
		got := v.List(class)
		if len(got) != len(want) || v.Count(class) != len(want) {
			t.Fatalf("%d of %s, count %d, want %d", len(got), class, v.Count(class), len(want))
		}
		for n, it := range got {
			r := m.now()[want[n]]
			var d disk
			if err := it.Decode(&d); err != nil || it.Ref != want[n].ref || d != r.disk ||
				it.Created != r.created || it.Modified != r.modified {
				t.Fatalf("%s number %d is %+v, want %v %+v", class, n, it, want[n], r)
			}
			if by, ok := v.ByUUID(class, d.UUID); !ok || by.Ref != it.Ref {
				t.Fatalf("%s is not found by uuid", it.Ref)
			}
			if class == "VDI" && !slices.Contains(v.Refs("VDI", "SR", string(d.SR)), it.Ref) {
				t.Fatalf("%s is not found by SR", it.Ref)
			}
		}
	}
	for _, rev := range m.revs {
		changes, ok := v.Since(rev)
		want := m.since(rev)
		if !ok || len(changes) != len(want) {
			t.Fatalf("since %d: %+v %v, want %v", rev, changes, ok, want)
		}
		last := rev
		for _, c := range changes {
			if want[id{c.Class, c.Ref}] != c.Op || c.Revision < last {
				t.Fatalf("since %d: %+v, want %v", rev, c, want)
			}
			last = c.Revision
		}
	}
}

// TestViewAgainstModel writes at random and compares all that a view answers,
// the past included, with a model; then reads it again from the disk, and by
// listing.
func TestViewAgainstModel(t *testing.T) {
	s := openDir(t, t.TempDir())
	round := 0
	rapid.Check(t, func(r *rapid.T) {
		round++ // refs are never used again
		rev := update(t, s, func(tx *Tx) {
			for _, class := range []string{"SR", "VDI"} {
				for _, it := range tx.List(class) {
					tx.Delete(class, it.Ref)
				}
			}
			tx.Put("mark", xapi.NewRef(), disk{})
		})
		m := &model{versions: map[int64]map[id]modelRecord{rev: {}}, revs: []int64{rev}, first: map[id]int64{}}
		for range rapid.IntRange(1, 40).Draw(r, "steps") {
			st := drawStep(r, m, round)
			before := view(t, s)
			rev := update(t, s, func(tx *Tx) {
				for i, d := range st.put {
					tx.Put(i.class, i.ref, d)
				}
				for _, i := range st.del {
					tx.Delete(i.class, i.ref)
				}
				for _, i := range st.touch {
					tx.Touch(i.class, i.ref)
				}
			})
			if rev != before.Revision() {
				m.commit(st, rev)
			}
			m.check(r, view(t, s))
		}
		again, _, err := s.load(t.Context())
		if err != nil {
			r.Fatal(err)
		}
		if again.v.ordered.Len() != view(t, s).ordered.Len() && again.v.rev == view(t, s).rev {
			r.Fatal("a listing shows something else")
		}
	})
}

package store

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// TestStore is the contract, on the embedded etcd and on a real one.
func TestStore(t *testing.T) {
	cases := map[string]func(t *testing.T, s *Store){
		"what is written is read":                       readBack,
		"a transaction sees its own writes":             ownWrites,
		"increments by many are all counted":            increments,
		"two that list cannot both add":                 noWriteSkew,
		"a record deleted meanwhile is noticed by List": deletionNoticed,
		"a child touches its old and its new parent":    parents,
		"what stays the same makes no event":            noChange,
		"a touch is an event and no conflict":           touches,
		"too much for one transaction is refused":       tooBig,
		"names that are no keys are refused":            badNames,
		"a cancelled update writes nothing":             cancelled,
		"until wakes on change and ends with the cause": untilWakes,
		"the leader's writes are fenced":                fenced,
	}
	t.Run("embedded", func(t *testing.T) {
		s := openDir(t, t.TempDir())
		for name, f := range cases {
			t.Run(name, func(t *testing.T) { f(t, s) })
		}
	})
	t.Run("cluster", func(t *testing.T) {
		at, _ := cluster(t, 1)
		s := open(t, Options{URL: at + "/pools/one"})
		for name, f := range cases {
			t.Run(name, func(t *testing.T) { f(t, s) })
		}
		other := open(t, Options{URL: at + "/pools/two"})
		if view(t, other).Count("VDI") != 0 || other.ID() == s.ID() {
			t.Error("two pools with different prefixes see each other")
		}
	})
}

func readBack(t *testing.T, s *Store) {
	ref, uuid := xapi.NewRef(), xapi.NewUUID()
	rev := put(t, s, "VDI", ref, disk{UUID: uuid, N: 7})
	v := view(t, s)
	it, ok := v.Get("VDI", ref)
	if !ok || it.Created != rev || it.Modified != rev || v.Revision() < rev {
		t.Fatalf("got %+v %v, revision %d, view %d", it, ok, rev, v.Revision())
	}
	if it, ok := v.ByUUID("VDI", uuid); !ok || it.Ref != ref {
		t.Error("not found by uuid")
	}
	if _, err := Get[disk](v, "VDI", xapi.NewRef()); !xapi.Is(err, xapi.HandleInvalid) {
		t.Error("unknown ref:", err)
	}
	gone := update(t, s, func(tx *Tx) { tx.Delete("VDI", ref) })
	if _, ok := v.Get("VDI", ref); !ok {
		t.Error("an old view changed")
	}
	if _, ok := view(t, s).ByUUID("VDI", uuid); ok || gone <= rev {
		t.Error("a deleted record is found")
	}
	all, err := All[disk](v, "VDI")
	if err != nil || all[ref].N != 7 {
		t.Error("all:", all, err)
	}
}

func ownWrites(t *testing.T, s *Store) {
	a, b, sr := xapi.NewRef(), xapi.NewRef(), xapi.NewRef()
	put(t, s, "VDI", a, disk{SR: sr, N: 1})
	update(t, s, func(tx *Tx) {
		before := len(tx.List("VDI"))
		tx.Put("VDI", b, disk{SR: sr, UUID: "u"})
		tx.Put("VDI", a, disk{SR: xapi.NullRef})
		if refs := tx.Refs("VDI", "SR", string(sr)); !slices.Equal(refs, []xapi.Ref{b}) {
			t.Error("refs:", refs)
		}
		if l := tx.List("VDI"); len(l) != before+1 || l[len(l)-1].Ref != b {
			t.Error("list:", l)
		}
		tx.Delete("VDI", a)
		if tx.Has("VDI", a) || !tx.Has("VDI", b) {
			t.Error("has")
		}
		if _, ok := tx.ByUUID("VDI", "u"); !ok {
			t.Error("by uuid")
		}
		fields, err := tx.GetRaw("VDI", b)
		fields["n"] = json.RawMessage("9")
		tx.PutRaw("VDI", b, fields)
		if err != nil {
			t.Error(err)
		}
	})
	if n := number(t, s, b); n != 9 {
		t.Error("n is", n)
	}
}

func increments(t *testing.T, s *Store) {
	ref := xapi.NewRef()
	put(t, s, "VDI", ref, disk{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 10 {
				if err := increase(t.Context(), s, ref); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := number(t, s, ref); n != 80 {
		t.Error("counted", n)
	}
}

func noWriteSkew(t *testing.T, s *Store) {
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			err := s.Update(t.Context(), func(tx *Tx) error {
				if len(tx.List("only")) == 0 && len(tx.Refs("lonely", "uuid", "u")) == 0 {
					tx.Put("only", xapi.NewRef(), disk{})
					tx.Put("lonely", xapi.NewRef(), disk{UUID: "u"})
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if v := view(t, s); v.Count("only") != 1 || v.Count("lonely") != 1 {
		t.Error(v.Count("only"), "records, want one")
	}
}

func deletionNoticed(t *testing.T, s *Store) {
	a, b := xapi.NewRef(), xapi.NewRef()
	put(t, s, "victim", a, disk{})
	runs := 0
	update(t, s, func(tx *Tx) {
		count := len(tx.List("victim"))
		if runs++; runs == 1 {
			update(t, s, func(tx *Tx) { tx.Delete("victim", a) })
		}
		tx.Put("sum", b, disk{N: count})
	})
	d, err := Get[disk](view(t, s), "sum", b)
	if err != nil || d.N != 0 || runs != 2 {
		t.Error(d, err, runs)
	}
}

func parents(t *testing.T, s *Store) {
	a, b, child := xapi.NewRef(), xapi.NewRef(), xapi.NewRef()
	put(t, s, "SR", a, disk{})
	put(t, s, "SR", b, disk{})
	modified := func(ref xapi.Ref) int64 { it, _ := view(t, s).Get("SR", ref); return it.Modified }
	if rev := put(t, s, "VDI", child, disk{SR: a}); modified(a) != rev || modified(b) >= rev {
		t.Error("an added child does not touch its parent")
	}
	if rev := put(t, s, "VDI", child, disk{SR: a, N: 1}); modified(a) >= rev {
		t.Error("a child that stays touches its parent")
	}
	if rev := put(t, s, "VDI", child, disk{SR: b}); modified(a) != rev || modified(b) != rev {
		t.Error("a child that moves does not touch both parents")
	}
	if rev := update(t, s, func(tx *Tx) { tx.Delete("VDI", child) }); modified(b) != rev {
		t.Error("a deleted child does not touch its parent")
	}
}

func noChange(t *testing.T, s *Store) {
	ref := xapi.NewRef()
	rev := put(t, s, "VDI", ref, disk{N: 1})
	put(t, s, "VDI", ref, disk{N: 1})
	update(t, s, func(tx *Tx) { tx.Delete("VDI", xapi.NewRef()) })
	if it, _ := view(t, s).Get("VDI", ref); it.Modified != rev {
		t.Error("modified by writing the same")
	}
}

func touches(t *testing.T, s *Store) {
	ref := xapi.NewRef()
	put(t, s, "VDI", ref, disk{N: 1})
	runs := 0
	var touched int64
	update(t, s, func(tx *Tx) {
		d, err := Read[disk](tx, "VDI", ref)
		if runs++; runs == 1 {
			touched = update(t, s, func(tx *Tx) { tx.Touch("VDI", ref); tx.Touch("VDI", xapi.NewRef()) })
		}
		d.N++
		tx.Put("VDI", ref, d)
		if err != nil {
			t.Error(err)
		}
	})
	changes, ok := view(t, s).Since(touched - 1)
	if runs != 1 || !ok || len(changes) != 1 || changes[0].Op != Mod {
		t.Error(runs, changes, ok)
	}
	update(t, s, func(tx *Tx) { tx.Delete("VDI", ref) })
	got, err := s.client.Get(t.Context(), s.keys.touch(id{"VDI", ref}))
	if err != nil || len(got.Kvs) != 0 {
		t.Error("the touch key stayed", err)
	}
}

func tooBig(t *testing.T, s *Store) {
	err := s.Update(t.Context(), func(tx *Tx) error {
		for range 127 {
			tx.Put("VDI", xapi.NewRef(), disk{})
		}
		return nil
	})
	if !errors.Is(err, ErrTooBig) {
		t.Error("too many operations:", err)
	}
	var refs []xapi.Ref
	update(t, s, func(tx *Tx) {
		refs = refs[:0]
		for range 120 {
			refs = append(refs, xapi.NewRef())
			tx.Put("bulk", refs[len(refs)-1], disk{})
		}
	})
	update(t, s, func(tx *Tx) {
		for _, ref := range refs {
			tx.Delete("bulk", ref)
		}
	})
	large := map[string]string{"text": strings.Repeat("x", MaxBytes)}
	err = s.Update(t.Context(), func(tx *Tx) error { tx.Put("VDI", xapi.NewRef(), large); return nil })
	if !xapi.Is(err, xapi.MessageTooLarge) || !errors.Is(err, ErrTooBig) {
		t.Error("too many bytes:", err)
	}
	large["text"] = large["text"][:MaxBytes-1000]
	put(t, s, "large", xapi.NewRef(), large)
}

func badNames(t *testing.T, s *Store) {
	for _, i := range []id{{"", "a"}, {"VDI", ""}, {"VDI", xapi.NullRef}, {"a/b", "a"}, {"VDI", "a/b"}, {"touch", "a"}, {"x y", "a"}} {
		err := s.Update(t.Context(), func(tx *Tx) error { tx.Put(i.class, i.ref, disk{}); return nil })
		if err == nil {
			t.Errorf("%+v names a record", i)
		}
	}
	err := s.Update(t.Context(), func(tx *Tx) error { tx.Put("VDI", "a", make(chan int)); return nil })
	if err == nil {
		t.Error("a channel was encoded")
	}
}

func cancelled(t *testing.T, s *Store) {
	why := errors.New("logged out")
	ctx, cancel := context.WithCancelCause(t.Context())
	ref := xapi.NewRef()
	err := s.Update(ctx, func(tx *Tx) error { cancel(why); return increaseIn(tx, ref) })
	if !errors.Is(err, why) {
		t.Error("cancelled while it ran:", err)
	}
	if err := s.Update(ctx, func(tx *Tx) error { return increaseIn(tx, ref) }); !errors.Is(err, why) {
		t.Error("cancelled before:", err)
	}
	if _, there := view(t, s).Get("VDI", ref); there {
		t.Error("it was written")
	}
}

func increaseIn(tx *Tx, ref xapi.Ref) error {
	d, _ := Read[disk](tx, "VDI", ref)
	d.N++
	tx.Put("VDI", ref, d)
	return nil
}

func untilWakes(t *testing.T, s *Store) {
	ref := xapi.NewRef()
	started, woke := make(chan bool), make(chan error)
	go func() {
		first := true
		woke <- s.Until(t.Context(), func(v *View) (bool, error) {
			if first {
				first = false
				close(started)
			}
			_, ok := v.Get("VDI", ref)
			return ok, nil
		})
	}()
	<-started
	put(t, s, "VDI", ref, disk{})
	if err := <-woke; err != nil {
		t.Error(err)
	}
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := s.Wait(ctx, view(t, s).Revision()); !errors.Is(err, why) {
		t.Error("cause:", err)
	}
}

func fenced(t *testing.T, s *Store) {
	l, err := s.Campaign(t.Context(), "host a")
	if err != nil {
		t.Fatal(err)
	}
	if name, rev := view(t, s).Leader(); name != "host a" || rev != l.Revision {
		t.Error("leader:", name, rev)
	}
	if _, err := s.Campaign(t.Context(), "host b"); err == nil {
		t.Error("campaigned twice")
	}
	ref := xapi.NewRef()
	put(t, s, "VDI", ref, disk{})
	if _, err := s.client.Delete(t.Context(), l.key); err != nil {
		t.Fatal(err)
	}
	if err := increase(t.Context(), s, ref); !errors.Is(err, ErrDeposed) {
		t.Error("a deposed leader wrote:", err)
	}
	<-l.Done()
	if err := l.Resign(t.Context()); err != nil {
		t.Error(err)
	}
	if err := increase(t.Context(), s, ref); err != nil {
		t.Error("after resigning:", err)
	}
	again, err := s.Campaign(t.Context(), "host b")
	if err != nil || again.Revision <= l.Revision {
		t.Fatal(again, err)
	}
	if err := again.Resign(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAClosedStoreAnswersSo(t *testing.T) {
	s := openDir(t, t.TempDir())
	waiting := make(chan error)
	go func() { waiting <- s.Wait(context.Background(), 1<<60) }()
	closeStore(t, s)
	update := s.Update(t.Context(), func(tx *Tx) error { return nil })
	for _, err := range []error{<-waiting, update, s.View(func(*View) error { return nil })} {
		if !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
}

func TestAStoreInUseIsNotOpenedTwice(t *testing.T) {
	dir := t.TempDir()
	openDir(t, dir)
	if _, err := Open(t.Context(), Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Error(err)
	}
}

func TestTheEmbeddedStoreHasNoSockets(t *testing.T) {
	sockets := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.HasPrefix(to, "socket:") {
				n++
			}
		}
		return n
	}
	before := sockets()
	openDir(t, t.TempDir())
	if after := sockets(); after > before {
		t.Errorf("%d sockets more", after-before)
	}
}

func TestNewerDataIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := openDir(t, dir)
	if _, err := s.client.Put(t.Context(), s.keys.meta("schema"), "99"); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	if _, err := Open(t.Context(), Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "newer patchd") {
		t.Error(err)
	}
}

func TestTokensSurviveARestart(t *testing.T) {
	dir := t.TempDir()
	s := openDir(t, dir)
	a, b, c := xapi.NewRef(), xapi.NewRef(), xapi.NewRef()
	put(t, s, "VDI", a, disk{})
	rev := put(t, s, "VDI", b, disk{})
	name := s.ID()
	update(t, s, func(tx *Tx) { tx.Delete("VDI", a) })
	put(t, s, "VDI", c, disk{})
	update(t, s, func(tx *Tx) { tx.Touch("VDI", b) })
	closeStore(t, s)
	s = openDir(t, dir)
	changes, ok := view(t, s).Since(rev)
	if !ok || s.ID() != name || len(changes) != 3 {
		t.Fatal(changes, ok)
	}
	if changes[0].Op != Del || changes[1].Op != Add || changes[2].Op != Mod || changes[2].Ref != b {
		t.Error(changes)
	}
}

func TestParseURL(t *testing.T) {
	for text, want := range map[string]target{
		"etcd://a:1,b":         {endpoints: []string{"a:1", "b:2379"}},
		"etcds://[::1]:5/p/q/": {endpoints: []string{"[::1]:5"}, tls: true, prefix: "/p/q"},
		"etcd://[::1]":         {endpoints: []string{"[::1]:2379"}},
	} {
		got, err := parseURL(text)
		if err != nil || !slices.Equal(got.endpoints, want.endpoints) || got.tls != want.tls || got.prefix != want.prefix {
			t.Errorf("%s: %+v %v", text, got, err)
		}
	}
	for _, text := range []string{"http://a", "etcd://", "etcd://a,,b", "etcd://u:p@a", "a:2379"} {
		if got, err := parseURL(text); err == nil {
			t.Errorf("%s: %+v", text, got)
		}
	}
}

// TestSpeed keeps an eye on the two figures that everything else rests on. The
// bounds are far from what is measured (0.1 s, 0.4 ms), for slow machines.
func TestSpeed(t *testing.T) {
	dir, start := t.TempDir(), time.Now()
	s := openDir(t, dir)
	opened := time.Since(start)
	ref := xapi.NewRef()
	start = time.Now()
	for n := range 200 {
		put(t, s, "VDI", ref, disk{N: n})
	}
	each := time.Since(start) / 200
	t.Logf("open %v, transaction %v", opened, each)
	if opened > 10*time.Second || each > 100*time.Millisecond {
		t.Error("slow")
	}
}

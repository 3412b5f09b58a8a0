package event

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type record struct {
	SR xapi.Ref `json:"SR"`
	N  int      `json:"n"`
}

// snapshot is what the tests render: the record, and the revision of the view.
type snapshot struct {
	raw string
	rev int64
}

func render(v *store.View, it store.Item) (any, error) {
	return snapshot{string(it.Raw), v.Revision()}, nil
}

func setUp(t *testing.T) (*Broker, *store.Store) {
	t.Helper()
	s, err := store.Open(t.Context(), store.Options{
		Dir: t.TempDir(), Indexes: []store.Index{{Class: "VDI", Field: "SR", Parent: "SR"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return New(s, []string{"VDI", "SR", "task", "pool_patch"}), s
}

func put(t *testing.T, s *store.Store, class string, ref xapi.Ref, r record) {
	t.Helper()
	if err := s.Update(t.Context(), func(tx *store.Tx) error { tx.Put(class, ref, r); return nil }); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, s *store.Store, class string, ref xapi.Ref) {
	t.Helper()
	if err := s.Update(t.Context(), func(tx *store.Tx) error { tx.Delete(class, ref); return nil }); err != nil {
		t.Fatal(err)
	}
}

func from(t *testing.T, b *Broker, token string, subs ...string) Batch {
	t.Helper()
	batch, err := b.From(t.Context(), subs, token, 0, render)
	if err != nil {
		t.Fatal(err)
	}
	return batch
}

// brief is a batch as text: "add vdi 1, mod sr 2".
func brief(batch Batch, names map[xapi.Ref]string) string {
	var all []string
	for _, e := range batch.Events {
		all = append(all, fmt.Sprintf("%s %s %s", e.Op, e.Class, names[e.Ref]))
	}
	return strings.Join(all, ", ")
}

func TestFrom(t *testing.T) {
	b, s := setUp(t)
	a, c, gone, sr, job := xapi.NewRef(), xapi.NewRef(), xapi.NewRef(), xapi.NewRef(), xapi.NewRef()
	names := map[xapi.Ref]string{a: "a", c: "c", gone: "gone", sr: "sr", job: "job"}
	put(t, s, "SR", sr, record{})
	put(t, s, "VDI", a, record{SR: sr})
	put(t, s, "VDI", gone, record{SR: sr})
	put(t, s, "job", job, record{})

	first := from(t, b, "", "*")
	if got := brief(first, names); got != "add sr sr, add vdi a, add vdi gone" {
		t.Error("with the empty token:", got)
	}
	if c := first.Counts; len(c) != 4 || c["vdi"] != 2 || c["sr"] != 1 || c["task"] != 0 {
		t.Error("counts:", c)
	}
	if got := brief(from(t, b, first.Token, "*"), names); got != "" {
		t.Error("nothing happened, but:", got)
	}

	put(t, s, "VDI", a, record{SR: sr, N: 1})
	put(t, s, "VDI", a, record{SR: sr, N: 2})
	put(t, s, "VDI", c, record{SR: sr})
	put(t, s, "VDI", c, record{SR: sr, N: 1})
	remove(t, s, "VDI", gone)
	short := xapi.NewRef()
	put(t, s, "VDI", short, record{})
	remove(t, s, "VDI", short)
	put(t, s, "job", job, record{N: 1})

	for sub, want := range map[string]string{
		"*":                   "mod vdi a, add vdi c, mod sr sr, del vdi gone",
		"vdi":                 "mod vdi a, add vdi c, del vdi gone",
		"VDI":                 "mod vdi a, add vdi c, del vdi gone",
		"vDi/" + string(a):    "mod vdi a",
		"VDI/" + string(gone): "del vdi gone",
		"VDI/OpaqueRef:NULL":  "",
		"task":                "",
		"job":                 "",
		"vm":                  "",
		"SR":                  "mod sr sr",
	} {
		got := strings.Split(brief(from(t, b, first.Token, sub), names), ", ")
		if sub != "*" && strings.Join(got, ", ") != want || len(got) != len(strings.Split(want, ", ")) {
			t.Errorf("%s: %s, want %s", sub, got, want)
		}
	}
	batch := from(t, b, first.Token, "VDI", "SR/"+string(sr))
	if len(batch.Counts) != 2 || batch.Counts["vdi"] != 2 || batch.Counts["sr"] != 1 {
		t.Error("counts:", batch.Counts)
	}
	for _, e := range batch.Events {
		snap, ok := e.Snapshot.(snapshot)
		if (e.Op == store.Del) == ok || ok && !strings.HasSuffix(batch.Token, fmt.Sprint(":", snap.rev)) || e.ID == 0 {
			t.Errorf("%+v with token %s", e, batch.Token)
		}
	}
}

func TestTokens(t *testing.T) {
	b, s := setUp(t)
	put(t, s, "VDI", xapi.NewRef(), record{})
	for token, code := range map[string]string{
		string(xapi.NewUUID()) + ":5": xapi.EventsLost,
		s.ID() + ":0":                 xapi.EventsLost,
		s.ID() + ":99999999":          xapi.EventsLost,
		"garbage":                     xapi.EventFromTokenParseFailure,
		s.ID():                        xapi.EventFromTokenParseFailure,
		s.ID() + ":-1":                xapi.EventFromTokenParseFailure,
		s.ID() + ":+1":                xapi.EventFromTokenParseFailure,
		s.ID() + ":1x":                xapi.EventFromTokenParseFailure,
		"00000000000000000001,00000000000000000000": xapi.EventFromTokenParseFailure,
		s.ID() + ":99999999999999999999":            xapi.EventFromTokenParseFailure,
	} {
		_, err := b.From(t.Context(), []string{"*"}, token, time.Minute, render)
		if !xapi.Is(err, code) {
			t.Errorf("%s: %v, want %s", token, err, code)
		}
		e := xapi.AsError(err)
		if code == xapi.EventsLost && len(e.Params) != 0 || code != xapi.EventsLost && (len(e.Params) != 1 || e.Params[0] != token) {
			t.Errorf("%s: %v", token, e.Params)
		}
	}
}

func TestSubscriptionsThatAreNone(t *testing.T) {
	b, _ := setUp(t)
	for _, sub := range []string{"", "/", "VDI/", "/OpaqueRef:NULL", "VDI/a/b", "VDI/a", "*/x", "a b", "**", strings.Repeat("x", 99)} {
		_, err := b.From(t.Context(), []string{"VDI", sub}, "", 0, render)
		if e := xapi.AsError(err); e.Code != xapi.EventSubscriptionParseFailure || len(e.Params) != 1 || e.Params[0] != sub {
			t.Errorf("%q: %v", sub, err)
		}
	}
	if _, err := b.From(t.Context(), make([]string, maxSubscriptions+1), "", 0, render); err == nil {
		t.Error("too many subscriptions were taken")
	}
}

func TestWaiting(t *testing.T) {
	b, s := setUp(t)
	task, other := xapi.NewRef(), xapi.NewRef()
	token := b.Token()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			batch, err := b.From(t.Context(), []string{"task"}, token, time.Minute, render)
			if err != nil || len(batch.Events) != 1 || batch.Events[0].Ref != task || batch.Counts["task"] != 1 {
				t.Errorf("%+v %v", batch, err)
			}
		})
	}
	put(t, s, "VDI", other, record{})
	put(t, s, "job", other, record{})
	put(t, s, "task", task, record{})
	wg.Wait()

	batch, err := b.From(t.Context(), []string{"task"}, b.Token(), time.Millisecond, render)
	if err != nil || len(batch.Events) != 0 || batch.Token == "" || batch.Counts["task"] != 1 {
		t.Errorf("after the timeout: %+v %v", batch, err)
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	woke := make(chan error)
	go func() {
		_, err := b.From(ctx, []string{"task"}, b.Token(), time.Hour, render)
		woke <- err
	}()
	cancel(xapi.NewError(xapi.SessionInvalid, "s"))
	if err := <-woke; !xapi.Is(err, xapi.SessionInvalid) {
		t.Error("after logout:", err)
	}
	bad := errors.New("no such field")
	_, err = b.From(t.Context(), []string{"task"}, "", 0, func(*store.View, store.Item) (any, error) { return nil, bad })
	if !errors.Is(err, bad) {
		t.Error("a render error:", err)
	}
}

// TestInject is what xen-api does to get its first token (7.1).
func TestInject(t *testing.T) {
	b, s := setUp(t)
	ref := xapi.NewRef()
	put(t, s, "VDI", ref, record{})
	before := b.CurrentID()
	token, err := b.Inject(t.Context(), "VDI", ref)
	if err != nil || b.CurrentID() <= before {
		t.Fatal(token, err)
	}
	batch, err := b.From(t.Context(), []string{"vdi", "task"}, token, time.Hour, render)
	if err != nil || len(batch.Events) != 1 || batch.Events[0].Op != store.Mod || batch.Events[0].Ref != ref {
		t.Errorf("%+v %v", batch, err)
	}
	put(t, s, "job", ref, record{})
	for class, r := range map[string]xapi.Ref{"vdi": ref, "VDI": xapi.NewRef(), "job": ref, "nothing": ref} {
		_, err := b.Inject(t.Context(), class, r)
		if e := xapi.AsError(err); e.Code != xapi.HandleInvalid || e.Params[0] != class || e.Params[1] != string(r) {
			t.Errorf("%s: %v", class, err)
		}
	}
}

func TestLegacyCalls(t *testing.T) {
	b, s := setUp(t)
	session, ref := xapi.NewRef(), xapi.NewRef()
	next := func() string {
		t.Helper()
		events, err := b.Next(t.Context(), session, render)
		if err != nil {
			return xapi.AsError(err).Code
		}
		return brief(Batch{Events: events}, map[xapi.Ref]string{ref: "ref"})
	}
	if got := next(); got != xapi.SessionNotRegistered {
		t.Error("before register:", got)
	}
	if err := b.Register(session, []string{"task"}); err != nil {
		t.Fatal(err)
	}
	put(t, s, "VDI", ref, record{})
	put(t, s, "task", ref, record{})
	if got := next(); got != "add task ref" {
		t.Error(got)
	}
	if err := b.Register(session, []string{"vdi"}); err != nil {
		t.Fatal(err)
	}
	put(t, s, "VDI", ref, record{N: 1})
	if got := next(); got != "mod vdi ref" {
		t.Error(got)
	}
	if err := b.Unregister(session, []string{"VDI"}); err != nil {
		t.Fatal(err)
	}
	put(t, s, "VDI", ref, record{N: 2})
	remove(t, s, "task", ref)
	if got := next(); got != "del task ref" {
		t.Error(got)
	}
	waiting := make(chan string)
	go func() { waiting <- next() }()
	if err := b.Unregister(session, []string{"*"}); err != nil {
		t.Fatal(err)
	}
	if got := <-waiting; got != xapi.SessionNotRegistered {
		t.Error("who waited got", got)
	}
	if err := b.Register(session, []string{""}); !xapi.Is(err, xapi.EventSubscriptionParseFailure) {
		t.Error(err)
	}
}

func TestAQueueThatRunsOver(t *testing.T) {
	b, s := setUp(t)
	session := xapi.NewRef()
	if err := b.Register(session, []string{"task"}); err != nil {
		t.Fatal(err)
	}
	for range maxQueue/100 + 1 {
		err := s.Update(t.Context(), func(tx *store.Tx) error {
			for range 100 {
				tx.Put("task", xapi.NewRef(), record{})
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if _, err := b.Next(t.Context(), session, render); !xapi.Is(err, xapi.EventsLost) {
			t.Error(err)
		}
	}
	if err := b.Unregister(session, []string{"task"}); err != nil {
		t.Fatal(err)
	}
	if err := b.Register(session, []string{"task"}); err != nil {
		t.Fatal(err)
	}
	put(t, s, "task", xapi.NewRef(), record{})
	if events, err := b.Next(t.Context(), session, render); err != nil || len(events) != 1 {
		t.Error(events, err)
	}
}

func TestRegistrationsAreBounded(t *testing.T) {
	b, _ := setUp(t)
	first := xapi.NewRef()
	for n := range maxSessions + 1 {
		session := first
		if n > 0 {
			session = xapi.NewRef()
		}
		if err := b.Register(session, []string{"task"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Next(t.Context(), first, render); len(b.sessions) != maxSessions || !xapi.Is(err, xapi.SessionNotRegistered) {
		t.Error(len(b.sessions), err)
	}
}

package pool

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// joiner is a host of its own that wants to become a member, with an SR, a patch
// in it and a stampfile.
func joiner(t *testing.T) (m *rig, on, vdi, patch xapi.Ref, req JoinRequest) {
	t.Helper()
	m = newRigOf(t, xapi.NewUUID())
	on = m.sr(m.fileSpec("its own"))
	vdi, patch = m.golden(on, []byte("content of the joiner's patch"))
	req, err := m.JoinFacts()
	m.must(err)
	req.Facts = Facts{Hostname: "joiner", Address: "127.0.0.9", URL: "https://127.0.0.9:8443"}
	return m, on, vdi, patch, req
}

func (r *rig) admitted(req JoinRequest, key string) JoinAnswer {
	r.t.Helper()
	id, secret, err := r.NewJoinToken(r.t.Context())
	r.must(err)
	req.Token, req.Secret = id, secret
	a, err := r.Admit(r.t.Context(), req, []byte(key), false)
	r.must(err)
	return a
}

func TestAJoinerBringsWhatItHas(t *testing.T) {
	r := newRig(t)
	m, on, vdi, patch, req := joiner(t)
	mine := get[Patch](m, ClassPatch, patch)
	req.Stamps = []Stamp{{Patch: mine, Applied: m.Now()}}
	a := r.admitted(req, "its key")
	if a.Host != m.Self || a.Pool != r.PoolUUID || len(a.Patches) != 1 || len(a.SRs) != 0 {
		t.Errorf("%+v", a)
	}
	h := get[Host](r, ClassHost, m.Self)
	if h.UUID != m.SelfUUID || !h.hasKey([]byte("its key")) || h.URL != req.Facts.URL {
		t.Errorf("%+v", h)
	}
	if got := get[SR](r, ClassSR, on); got.UUID != get[SR](m, ClassSR, on).UUID {
		t.Errorf("the SR has another uuid: %+v", got)
	}
	if got := get[VDI](r, ClassVDI, vdi); got.UUID != get[VDI](m, ClassVDI, vdi).UUID || got.SR != on {
		t.Errorf("%+v", got)
	}
	if got := get[Patch](r, ClassPatch, patch); got.UUID != mine.UUID || got.VDI != vdi || got.PoolApplied {
		t.Errorf("%+v", got)
	}
	if refs, recs := r.hostPatches(patch); len(refs) != 1 || !recs[0].Applied || recs[0].Host != m.Self {
		t.Errorf("what it has applied: %+v", recs)
	}
	again := r.admitted(req, "its key") // the answer was lost
	if again.Host != a.Host || r.count(ClassHost) != 2 {
		t.Errorf("%+v", again)
	}
}

func TestAJoinTokenIsForOneHostOnce(t *testing.T) {
	r := newRig(t)
	_, _, _, _, req := joiner(t)
	_, _, _, _, other := joiner(t)
	ctx := t.Context()
	id, secret, err := r.NewJoinToken(ctx)
	r.must(err)
	for what, change := range map[string]func(*JoinRequest){
		"no token":     func(q *JoinRequest) { q.Token, q.Secret = "", "" },
		"wrong secret": func(q *JoinRequest) { q.Token, q.Secret = id, secret+"x" },
		"wrong token":  func(q *JoinRequest) { q.Token, q.Secret = xapi.NewUUID(), secret },
	} {
		q := req
		change(&q)
		_, err := r.Admit(ctx, q, []byte("k"), false)
		r.wantCode(what, err, xapi.SessionAuthenticationFailed)
	}
	req.Token, req.Secret = id, secret
	other.Token, other.Secret = id, secret
	_, err = r.Admit(ctx, req, []byte("k"), false)
	r.must(err)
	_, err = r.Admit(ctx, req, []byte("k"), false) // its answer was lost
	r.must(err)
	_, err = r.Admit(ctx, other, []byte("k2"), false)
	r.wantCode("a second host with one token", err, xapi.SessionAuthenticationFailed)
	_, err = r.Admit(ctx, req, []byte("k3"), true)
	r.wantCode("the same host with another key", err, xapi.OperationNotAllowed)
	id, secret, err = r.NewJoinToken(ctx)
	r.must(err)
	r.Now = func() time.Time { return time.Now().Add(TokenLife + time.Second) }
	other.Token, other.Secret = id, secret
	_, err = r.Admit(ctx, other, []byte("k2"), false)
	r.wantCode("an expired token", err, xapi.SessionAuthenticationFailed)
	if r.count(ClassHost) != 2 {
		t.Errorf("%d hosts", r.count(ClassHost))
	}
}

func TestAPatchThatBothHaveIsOne(t *testing.T) {
	r := newRig(t)
	m, _, vdi, patch, req := joiner(t)
	mine := get[Patch](m, ClassPatch, patch)
	cleaned := xapi.NewRef()
	known := mine
	known.VDI = xapi.NullRef
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		tx.Put(ClassPatch, cleaned, known)
		return nil
	}))
	a := r.admitted(req, "key")
	if len(a.Patches) != 0 || r.count(ClassPatch) != 1 {
		t.Errorf("%+v, %d patches", a.Patches, r.count(ClassPatch))
	}
	if got := get[Patch](r, ClassPatch, cleaned); got.VDI != vdi {
		t.Errorf("a cleaned patch gets the image that the new member brings: %+v", got)
	}
}

func TestAMemberTellsOfItsStorage(t *testing.T) {
	r := newRig(t)
	m, on, vdi, _, req := joiner(t)
	ctx := t.Context()
	a := r.admitted(req, "key")
	m.must(m.BecomeMember(ctx, a))
	m.must(m.BecomeMember(ctx, a)) // as after a crash
	if m.count(ClassPatch) != 0 || m.count(ClassVDI) != 1 || m.count(ClassSR) != 1 {
		t.Errorf("%d patches, %d VDIs, %d SRs", m.count(ClassPatch), m.count(ClassVDI), m.count(ClassSR))
	}
	m.restart()
	if m.PoolUUID != r.PoolUUID {
		t.Errorf("its store is of pool %s", m.PoolUUID)
	}
	before, err := m.Inventory()
	m.must(err)
	copied, err := m.VDIClone(ctx, vdi, nil)
	m.must(err)
	now, err := m.Inventory()
	m.must(err)
	news := now.Changed(before)
	if !slices.ContainsFunc(news.Put, func(x InventoryRecord) bool { return x.Ref == copied }) || len(news.Gone) != 0 {
		t.Errorf("%+v", news)
	}
	r.must(r.VDISetNameLabel(ctx, vdi, "named by the pool"))
	r.must(r.TakeInventory(ctx, m.Self, news))
	if got := get[VDI](r, ClassVDI, copied); got.SR != on {
		t.Errorf("%+v", got)
	}
	r.must(r.TakeInventory(ctx, m.Self, now))
	if got := get[VDI](r, ClassVDI, vdi); got.NameLabel != "named by the pool" {
		t.Errorf("the pool's words were lost: %q", got.NameLabel)
	}
	m.must(m.VDIDestroy(ctx, copied))
	last, err := m.Inventory()
	m.must(err)
	gone := last.Changed(now)
	if len(gone.Gone) != 1 {
		t.Errorf("%+v", gone.Gone)
	}
	r.must(r.TakeInventory(ctx, m.Self, gone))
	if r.count(ClassVDI) != 1 {
		t.Errorf("%d VDIs", r.count(ClassVDI))
	}
	r.must(r.TakeInventory(ctx, m.Self, Inventory{Full: true})) // it has lost all
	if r.count(ClassVDI) != 0 || r.count(ClassSR) != 0 || r.count(ClassPBD) != 0 {
		t.Errorf("%d VDIs, %d SRs, %d PBDs", r.count(ClassVDI), r.count(ClassSR), r.count(ClassPBD))
	}
}

// What a host says of storage that is not its own changes nothing.
func TestAMemberTellsOnlyOfItsOwn(t *testing.T) {
	r := newRig(t)
	local := r.sr(r.fileSpec("the coordinator's"))
	golden, patch := r.golden(local, []byte("golden"))
	m, _, _, _, req := joiner(t)
	r.admitted(req, "key")
	before := get[VDI](r, ClassVDI, golden)
	lie := before
	lie.Map, lie.VirtualSize = "00", 1
	link := PBD{UUID: xapi.NewUUID(), Host: r.Self, SR: local, CurrentlyAttached: false}
	inv := Inventory{Put: []InventoryRecord{
		record(t, ClassVDI, golden, lie), record(t, ClassPBD, xapi.NewRef(), link), record(t, ClassSR, local, SR{UUID: get[SR](r, ClassSR, local).UUID, PhysicalSize: 1}),
		record(t, ClassPatch, patch, Patch{}), record(t, ClassHost, r.Self, Host{}),
	}, Gone: []InventoryRecord{{Class: ClassVDI, Ref: golden}, {Class: ClassSR, Ref: local}, {Class: ClassPatch, Ref: patch}}}
	rev := r.count(ClassPBD)
	r.must(r.TakeInventory(t.Context(), m.Self, inv))
	if got := get[VDI](r, ClassVDI, golden); got.Map != before.Map || got.VirtualSize != before.VirtualSize {
		t.Errorf("%+v", got)
	}
	if r.count(ClassPBD) != rev || get[SR](r, ClassSR, local).PhysicalSize == 1 || get[Patch](r, ClassPatch, patch).UUID == "" {
		t.Error("a member has changed what is not its own")
	}
	// With a link of its own to an SR that the coordinator has plugged it has no say either.
	r.must(r.SRSetShared(t.Context(), local, true))
	own := record(t, ClassPBD, xapi.NewRef(), PBD{UUID: xapi.NewUUID(), Host: m.Self, SR: local, CurrentlyAttached: true})
	r.must(r.TakeInventory(t.Context(), m.Self, Inventory{Put: append([]InventoryRecord{own}, inv.Put...), Gone: inv.Gone}))
	if got := get[VDI](r, ClassVDI, golden); got.Map != before.Map || r.count(ClassPBD) != rev+1 {
		t.Errorf("%+v", got)
	}
}

func record(t *testing.T, class string, ref xapi.Ref, rec any) InventoryRecord {
	t.Helper()
	b, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	return InventoryRecord{Class: class, Ref: ref, Record: b}
}

func TestEject(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	m, on, vdi, patch, req := joiner(t)
	r.admitted(req, "key")
	r.wantCode("the coordinator", r.HostEject(ctx, r.Self, true), xapi.OperationNotAllowed)
	r.must(r.Store.Update(ctx, func(tx *store.Tx) error { _, err := r.beginApply(ctx, tx, patch, m.Self, ""); return err }))
	r.wantCode("a host at work", r.HostEject(ctx, m.Self, false), xapi.OtherOperationInProgress)
	r.must(r.HostEject(ctx, m.Self, true))
	for _, class := range []string{ClassSR, ClassVDI, ClassPBD, ClassHostPatch} {
		if n := r.count(class); n != 0 {
			t.Errorf("%d records of class %s are left", n, class)
		}
	}
	if r.count(ClassHost) != 1 || !get[Patch](r, ClassPatch, patch).VDI.IsNull() {
		t.Error("the host is still there, or the patch names its image")
	}
	ejected := false
	r.must(r.Store.View(func(v *store.View) error { ejected = Ejected(v, []byte("key")); return nil }))
	if !ejected {
		t.Error("its key is not known as one of an ejected host")
	}
	_, err := r.Admit(ctx, req, []byte("key"), true)
	r.wantCode("a revoked key", err, xapi.OperationNotAllowed)
	r.admitted(req, "another key")
	if got := get[VDI](r, ClassVDI, vdi); got.SR != on {
		t.Errorf("%+v", got)
	}
}

// A host whose key was revoked comes back with another one, as it was.
func TestARevokedHostComesBackWithAnotherKey(t *testing.T) {
	r := newRig(t)
	m, _, _, _, req := joiner(t)
	r.admitted(req, "key")
	ctx := t.Context()
	r.must(r.Store.Update(ctx, func(tx *store.Tx) error {
		h, err := store.Read[Host](tx, ClassHost, m.Self)
		h.Tags = []string{"a word of the pool"}
		tx.Put(ClassHost, m.Self, h)
		return err
	}))
	r.must(r.HostRevoke(ctx, m.Self))
	_, err := r.Admit(ctx, req, []byte("key"), true)
	r.wantCode("the revoked key", err, xapi.OperationNotAllowed)
	r.admitted(req, "another key")
	h := get[Host](r, ClassHost, m.Self)
	if len(h.Keys) != 1 || !h.hasKey([]byte("another key")) || len(h.Tags) != 1 || r.count(ClassHost) != 2 {
		t.Errorf("%+v", h)
	}
}

// Whoever has the database is not kept out by taking a key away.
func TestAHostWithTheDatabaseIsNotShutOutByItsKey(t *testing.T) {
	r := newRig(t)
	m, _, _, _, req := joiner(t)
	r.admitted(req, "key")
	ctx := t.Context()
	r.must(r.Store.Update(ctx, func(tx *store.Tx) error {
		h, err := store.Read[Host](tx, ClassHost, m.Self)
		h.Coordinator = true
		tx.Put(ClassHost, m.Self, h)
		return err
	}))
	r.wantCode("revoke", r.HostRevoke(ctx, m.Self), xapi.OperationNotAllowed)
	r.wantCode("eject", r.HostEject(ctx, m.Self, true), xapi.OperationNotAllowed)
	r.Connected = func(xapi.Ref) bool { return false }
	r.must(r.HostEject(ctx, m.Self, false))
}

// A patch whose image goes with a host gets another one with the same content.
func TestAnEjectedImageHasASuccessor(t *testing.T) {
	r := newRig(t)
	m, _, vdi, patch, req := joiner(t)
	r.admitted(req, "key")
	local := r.sr(r.fileSpec("local"))
	twin := xapi.NewRef()
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[VDI](tx, ClassVDI, vdi)
		rec.UUID, rec.SR = xapi.NewUUID(), local
		tx.Put(ClassVDI, twin, rec)
		return err
	}))
	if get[VDI](r, ClassVDI, vdi).Map == "" {
		t.Fatal("the golden image has no map")
	}
	r.must(r.HostEject(t.Context(), m.Self, false))
	if got := get[Patch](r, ClassPatch, patch); got.VDI != twin {
		t.Errorf("the patch names %s", got.VDI)
	}
}

func TestAssertAlone(t *testing.T) {
	r := newRig(t)
	r.must(r.AssertAlone())
	_, _, _, _, req := joiner(t)
	r.admitted(req, "key")
	r.wantCode("a pool of two", r.AssertAlone(), xapi.OperationNotAllowed)
}

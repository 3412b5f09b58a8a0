package pool

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Members that lie: what they say reaches nothing that is not theirs.

// member is a host that has joined, with an SR, a VDI and a patch of its own.
func (r *rig) member(key string) (m *rig, on, vdi, patch xapi.Ref) {
	r.t.Helper()
	m, on, vdi, patch, req := joiner(r.t.(*testing.T))
	r.admitted(req, key)
	return m, on, vdi, patch
}

func TestAMemberCannotTakeOverAnSRByALink(t *testing.T) {
	r := newRig(t)
	evil, evilSR, _, _ := r.member("evil") // its link is the older one
	victim, on, golden, patch := r.member("victim")
	ctx := t.Context()
	before := get[VDI](r, ClassVDI, golden)
	lie := before
	lie.Map, lie.VirtualSize = strings.Repeat("0", 64), 1
	links := func(h *rig) xapi.Ref {
		var refs []xapi.Ref
		r.must(r.Store.View(func(v *store.View) error { refs = v.Refs(ClassPBD, "host", string(h.Self)); return nil }))
		if len(refs) != 1 {
			t.Fatalf("%d links", len(refs))
		}
		return refs[0]
	}
	moved := get[PBD](r, ClassPBD, links(evil))
	moved.SR = on
	fresh := PBD{UUID: xapi.NewUUID(), Host: evil.Self, SR: on, CurrentlyAttached: true}
	stolen := get[PBD](r, ClassPBD, links(victim))
	stolen.Host = evil.Self
	theirs := get[PBD](r, ClassPBD, links(victim)) // the victim has unplugged its SR just now
	theirs.CurrentlyAttached = false
	r.must(r.TakeInventory(ctx, victim.Self, Inventory{Put: []InventoryRecord{record(t, ClassPBD, links(victim), theirs)}}))
	for what, link := range map[string]InventoryRecord{
		"a link moves to it":      record(t, ClassPBD, links(evil), moved),
		"a new link":              record(t, ClassPBD, xapi.NewRef(), fresh),
		"the victim's link":       record(t, ClassPBD, links(victim), stolen),
		"the victim's link's ref": record(t, ClassPBD, links(victim), fresh),
	} {
		r.must(r.TakeInventory(ctx, evil.Self, Inventory{
			Put:  []InventoryRecord{link, record(t, ClassVDI, golden, lie)},
			Gone: []InventoryRecord{{Class: ClassVDI, Ref: golden}, {Class: ClassPBD, Ref: links(victim)}, {Class: ClassSR, Ref: on}},
		}))
		if got := get[VDI](r, ClassVDI, golden); got.Map != before.Map || got.VirtualSize != before.VirtualSize {
			t.Fatalf("%s: %+v", what, got)
		}
		if get[Patch](r, ClassPatch, patch).VDI != golden || get[PBD](r, ClassPBD, links(victim)).Host != victim.Self || get[PBD](r, ClassPBD, links(evil)).SR != evilSR {
			t.Fatalf("%s: the records of another host have changed", what)
		}
	}
}

func TestAMemberCannotRenameItsRecords(t *testing.T) {
	r := newRig(t)
	m, _, vdi, _ := r.member("key")
	local := r.sr(r.fileSpec("the coordinator's"))
	golden, _ := r.golden(local, []byte("golden"))
	lie := get[VDI](r, ClassVDI, vdi)
	own := lie.UUID
	lie.UUID = get[VDI](r, ClassVDI, golden).UUID
	r.must(r.TakeInventory(t.Context(), m.Self, Inventory{Put: []InventoryRecord{record(t, ClassVDI, vdi, lie)}}))
	if got := get[VDI](r, ClassVDI, vdi).UUID; got != own {
		t.Errorf("the VDI has uuid %s now, which is another's", got)
	}
}

func TestAMemberCannotFillTheDatabase(t *testing.T) {
	r := newRig(t)
	m, on, vdi, _ := r.member("key")
	ctx := t.Context()
	like := get[VDI](r, ClassVDI, vdi)
	srs := r.count(ClassSR)
	r.must(r.TakeInventory(ctx, m.Self, Inventory{Put: []InventoryRecord{record(t, ClassSR, xapi.NewRef(), SR{UUID: xapi.NewUUID(), Shared: true})}}))
	if r.count(ClassSR) != srs {
		t.Error("an SR came that the host is not linked to")
	}
	big := like
	big.UUID, big.NameLabel = xapi.NewUUID(), strings.Repeat("x", maxSaidRecord)
	small := like
	small.UUID = xapi.NewUUID()
	vdis := r.count(ClassVDI)
	r.must(r.TakeInventory(ctx, m.Self, Inventory{Put: []InventoryRecord{record(t, ClassVDI, xapi.NewRef(), big), record(t, ClassVDI, xapi.NewRef(), small)}}))
	if _, there := r.vdiByUUID(big.UUID); there || r.count(ClassVDI) != vdis+1 {
		t.Error("a large record was taken, or kept others out")
	}
	var many Inventory
	for range maxHostVDIs {
		many.Put = append(many.Put, InventoryRecord{Class: ClassVDI, Ref: xapi.NewRef(), Record: json.RawMessage(fmt.Sprintf(`{"uuid":%q,"SR":%q}`, xapi.NewUUID(), on))})
	}
	r.wantCode("many VDIs", r.TakeInventory(ctx, m.Self, many), xapi.InvalidValue)
	many.Put = nil
	for range maxHostSRs {
		many.Put = append(many.Put, InventoryRecord{Class: ClassPBD, Ref: xapi.NewRef(), Record: json.RawMessage(fmt.Sprintf(`{"uuid":%q,"SR":%q,"host":%q}`, xapi.NewUUID(), on, m.Self))})
	}
	r.wantCode("many links", r.TakeInventory(ctx, m.Self, many), xapi.InvalidValue)
	r.wantCode("many stampfiles", r.Resync(ctx, m.Self, make([]Stamp, maxStamps+1)), xapi.InvalidValue)
	large := Stamp{Patch: Patch{UUID: xapi.NewUUID(), InfoXML: strings.Repeat("x", maxStampText+1)}}
	r.wantCode("a large stampfile", r.Resync(ctx, m.Self, []Stamp{large}), xapi.InvalidValue)
}

// A stampfile says which patch it is. A record made of it reaches no file, no
// image and no signature.
func TestAStampfileSaysNothingButWhatItIs(t *testing.T) {
	r := newRig(t)
	m, _, vdi, _ := r.member("key")
	ctx := t.Context()
	r.must(os.MkdirAll(filepath.Join(r.PatchDir, "applied"), 0o755))
	own := filepath.Join(r.PatchDir, "applied", string(xapi.NewUUID()))
	r.must(os.WriteFile(own, []byte("the coordinator's own stampfile"), 0o600))
	said := Patch{
		UUID: xapi.NewUUID(), NameLabel: "said", Filename: "applied/" + filepath.Base(own), VDI: vdi, Digest: "00", Signature: []byte("x"),
		PoolApplied: true, Unconfirmed: &Unconfirmed{}, OtherConfig: map[string]string{"a": "b"},
	}
	r.must(r.Resync(ctx, m.Self, []Stamp{{Patch: said, Applied: r.Now()}}))
	ref, rec, err := r.PatchByUUID(said.UUID)
	r.must(err)
	if rec.Filename != "" || rec.Digest != "" || rec.Signature != nil || rec.Unconfirmed != nil || !rec.VDI.IsNull() || rec.PoolApplied || rec.NameLabel != "said" {
		t.Errorf("%+v", rec)
	}
	_, _, err = r.PatchFile(said.UUID)
	r.wantCode("its file", err, xapi.CannotFindPatch)
	r.must(r.Resync(ctx, m.Self, nil))
	r.must(r.PatchDestroy(ctx, ref))
	if _, err := os.Stat(own); err != nil {
		t.Errorf("a file of the coordinator is gone: %v", err)
	}
}

// What a new member brings takes the place of nothing.
func TestAJoinerReplacesNoPatch(t *testing.T) {
	r := newRig(t)
	local := r.sr(r.fileSpec("the coordinator's"))
	golden, patch := r.golden(local, []byte("golden"))
	secret := r.filled(local, 1<<20, []byte("a disk of somebody"))
	before := get[Patch](r, ClassPatch, patch)
	_, _, vdi, own, req := joiner(t)
	mine := req.Patches[own]
	byRef, onDisk, filed := mine, mine, mine
	byRef.UUID, onDisk.UUID, filed.UUID = xapi.NewUUID(), xapi.NewUUID(), xapi.NewUUID()
	onDisk.VDI = secret
	filed.Filename, filed.Unconfirmed, filed.PoolApplied = "applied/x", &Unconfirmed{}, true
	req.Patches[patch] = byRef
	req.Patches[xapi.NewRef()], req.Patches[xapi.NewRef()] = onDisk, filed
	known := before
	known.VDI, known.InfoXML = vdi, "<other/>"
	req.Patches[xapi.NewRef()] = known
	r.admitted(req, "key")
	if got := get[Patch](r, ClassPatch, patch); got.UUID != before.UUID || got.VDI != golden || got.InfoXML != before.InfoXML {
		t.Errorf("the pool's patch is another: %+v", got)
	}
	for what, want := range map[string]xapi.UUID{"a ref that is taken": byRef.UUID, "a VDI that is not its own": onDisk.UUID, "a file": filed.UUID} {
		_, rec, err := r.PatchByUUID(want)
		r.must(err)
		if rec.VDI == secret || rec.Filename != "" || rec.Unconfirmed != nil || rec.PoolApplied {
			t.Errorf("%s: %+v", what, rec)
		}
	}
}

// A patch of which the pool has a digest keeps all that verifies it.
func TestAJoinerBringsAnImageAndNoSignature(t *testing.T) {
	r := newRig(t)
	_, _, vdi, own, req := joiner(t)
	bad := req.Patches[own]
	bad.Digest, bad.Signature, bad.Signer = "d1", []byte("nonsense"), "nobody"
	req.Patches[own] = bad
	ref := xapi.NewRef()
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		tx.Put(ClassPatch, ref, Patch{UUID: bad.UUID, Digest: "d1", Signature: []byte("good"), Signer: "us", VDI: xapi.NullRef, OtherConfig: map[string]string{}})
		return nil
	}))
	r.admitted(req, "key")
	if got := get[Patch](r, ClassPatch, ref); string(got.Signature) != "good" || got.Signer != "us" || got.VDI != vdi {
		t.Errorf("%+v", got)
	}
}

// A joiner with the SR of another host, which is not shared, is told so, and
// nothing of it comes in.
func TestAJoinerBringsNoSRThatIsAnothers(t *testing.T) {
	r := newRig(t)
	local := r.sr(r.fileSpec("the coordinator's"))
	_, on, _, _, req := joiner(t)
	for i, x := range req.Inventory.Put {
		if x.Class == ClassSR && x.Ref == on {
			req.Inventory.Put[i] = record(t, ClassSR, on, get[SR](r, ClassSR, local))
		}
	}
	_, err := r.Admit(t.Context(), req, []byte("key"), true)
	r.wantCode("its SR", err, xapi.OperationNotAllowed)
	if r.count(ClassHost) != 1 {
		t.Error("it has come in")
	}
	r.must(r.SRSetShared(t.Context(), local, true))
	a, err := r.Admit(t.Context(), req, []byte("key"), true)
	r.must(err)
	if a.SRs[on] != local {
		t.Errorf("%+v", a.SRs)
	}
}

func TestFactsAreBounded(t *testing.T) {
	r := newRig(t)
	m, _, _, _ := r.member("key")
	long := strings.Repeat("x", maxFact+1)
	many := map[string]string{}
	for i := range maxFacts + 1 {
		many[fmt.Sprint(i)] = "x"
	}
	for what, f := range map[string]Facts{
		"a long hostname":  {Hostname: long},
		"an escape":        {Hostname: "a\x1b[2J"},
		"a line feed":      {Address: "a\nlevel=error"},
		"plain HTTP":       {URL: "http://192.0.2.1"},
		"a path":           {URL: "https://192.0.2.1/x"},
		"a password":       {URL: "https://a:b@192.0.2.1"},
		"many facts":       {CPUInfo: many},
		"a long name":      {SoftwareVersion: map[string]string{long: "x"}},
		"a fact of 100 KB": {SoftwareVersion: map[string]string{"x": strings.Repeat("x", 100<<10)}},
	} {
		r.wantCode(what, r.HostHello(t.Context(), m.Self, f), xapi.InvalidValue)
	}
	r.must(r.HostHello(t.Context(), m.Self, Facts{Hostname: "a", Address: "2001:db8::1", URL: "https://[2001:db8::1]:8443"}))
}

// The word of one host takes no image from the others: it is looked at.
func TestDamageIsBelievedOfOnesOwn(t *testing.T) {
	r := newRig(t)
	local := r.sr(r.fileSpec("the coordinator's"))
	golden, _ := r.golden(local, []byte("golden"))
	m, _, vdi, _ := r.member("key")
	other, _, _, _ := r.member("other key")
	ctx := t.Context()
	r.must(r.DamageSaid(ctx, m.Self, vdi, "its own"))
	if get[VDI](r, ClassVDI, vdi).Damage != "its own" {
		t.Error("of its own image it is not believed")
	}
	r.must(r.DamageSaid(ctx, m.Self, golden, "a lie"))
	if got := get[VDI](r, ClassVDI, golden); got.Damage != "" || !got.Checked.Equal(longAgo) {
		t.Errorf("%+v", got)
	}
	scrub, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); r.Scrub(scrub, ScrubOptions{Interval: time.Hour}) }()
	r.must(r.Store.Until(ctx, func(v *store.View) (bool, error) {
		got, err := store.Get[VDI](v, ClassVDI, golden)
		return !got.Checked.Equal(longAgo) && got.Damage == "", err
	}))
	stop()
	<-done
	theirs := xapi.Ref("")
	r.must(r.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassVDI) {
			var rec VDI
			if it.Decode(&rec) == nil && it.Ref != vdi && it.Ref != golden {
				theirs = it.Ref
			}
		}
		return nil
	}))
	for range 2 {
		r.must(r.DamageSaid(ctx, m.Self, theirs, "a lie"))
	}
	jobs, _, err := r.Jobs(other.Self)
	r.must(err)
	if len(jobs) != 1 || jobs[0].Job.Call != "VDIVerify" || get[VDI](r, ClassVDI, theirs).Damage != "" {
		t.Errorf("%+v", jobs)
	}
}

func (r *rig) vdiByUUID(id xapi.UUID) (ref xapi.Ref, there bool) {
	r.must(r.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(ClassVDI, id)
		ref, there = it.Ref, ok
		return nil
	}))
	return ref, there
}

// The image that takes the place of a lost one is a good one.
func TestADamagedImageSucceedsNobody(t *testing.T) {
	r := newRig(t)
	m, _, vdi, patch := r.member("key")
	local := r.sr(r.fileSpec("local"))
	damaged, good := xapi.NewRef(), xapi.NewRef()
	for _, ref := range []xapi.Ref{damaged, good} {
		r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
			rec, err := store.Read[VDI](tx, ClassVDI, vdi)
			rec.UUID, rec.SR = xapi.NewUUID(), local
			if ref == damaged {
				rec.Damage = "bad"
			}
			tx.Put(ClassVDI, ref, rec)
			return err
		}))
	}
	r.must(r.HostEject(t.Context(), m.Self, false))
	if got := get[Patch](r, ClassPatch, patch); got.VDI != good {
		t.Errorf("the patch names %s", got.VDI)
	}
}

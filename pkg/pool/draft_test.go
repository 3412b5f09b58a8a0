package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

const draftSize = 3 << 20

// newDraft begins one that has a day to live.
func (r *rig) newDraft(on xapi.Ref) *Draft {
	r.t.Helper()
	d, err := r.NewDraft(r.t.Context(), NewVDI{SR: on, VirtualSize: draftSize, VDI: VDI{NameLabel: "drafted"}}, r.aDay())
	r.must(err)
	return d
}

func (r *rig) aDay() DraftOptions { return DraftOptions{Expires: r.Now().Add(24 * time.Hour)} }

func (r *rig) write(d *Draft, at int64, text string) {
	r.t.Helper()
	_, err := d.File().WriteAt([]byte(text), at)
	r.must(errors.Join(err, d.File().Sync()))
}

func (r *rig) reopened(id xapi.UUID) *Draft {
	r.t.Helper()
	d, err := r.OpenDraft(r.t.Context(), id)
	r.must(err)
	return d
}

func (r *rig) drafts() []DraftInfo {
	r.t.Helper()
	list, err := r.Drafts()
	r.must(err)
	return list
}

// publish makes the draft a VDI with a map and fails unless it is all there.
func (r *rig) publish(d *Draft, want string) xapi.Ref {
	r.t.Helper()
	m, err := vdi.BuildMap(r.t.Context(), d.File(), d.Size())
	r.must(err)
	ref, err := d.Publish(r.t.Context(), m, nil)
	r.must(err)
	r.complete(ref, m, want)
	return ref
}

func (r *rig) complete(ref xapi.Ref, m *vdi.Map, want string) {
	r.t.Helper()
	rec := get[VDI](r, ClassVDI, ref)
	got, err := r.VDIMap(r.t.Context(), ref)
	r.must(err)
	if rec.Map == "" || rec.Checked.IsZero() || rec.VirtualSize != draftSize || got == nil || m != nil && !got.Equal(m) {
		r.t.Errorf("published as %+v with map %v", rec, got)
		return
	}
	r.holds(ref, []byte(want))
	r.wantVerified(ref)
}

// wantVerified fails unless the image of a VDI is as its map says.
func (r *rig) wantVerified(ref xapi.Ref) {
	r.t.Helper()
	m, err := r.VDIMap(r.t.Context(), ref)
	r.must(err)
	if m == nil {
		r.t.Errorf("VDI %s has no map", ref)
		return
	}
	f, release, err := r.VDIFile(r.t.Context(), ref, sr.ReadOnly)
	r.must(err)
	defer release()
	r.must(m.Verify(r.t.Context(), f, nil))
}

// A draft goes on in the next life of the daemon where it was let go, or where
// that was killed, and becomes a VDI.
func TestADraftOutlivesTheProcess(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	d := r.newDraft(ref)
	id := d.ID()
	r.write(d, 0, "first ")
	r.must(d.SetNote(ctx, map[string]string{"offset": "6"}, r.Now().Add(time.Hour)))
	r.must(d.Close())
	r.must(d.Close())
	r.restart()
	list := r.drafts()
	if len(list) != 1 || list[0].ID != id || list[0].SR != ref || list[0].VirtualSize != draftSize || list[0].Note["offset"] != "6" {
		t.Fatalf("drafts after a restart: %+v", list)
	}
	d = r.reopened(id)
	if got := d.Note(); !maps.Equal(got, map[string]string{"offset": "6"}) || d.ID() != id || d.Size() != draftSize {
		t.Errorf("opened with note %v, id %s, size %d", got, d.ID(), d.Size())
	}
	r.write(d, 6, "second")
	r.restart() // without Close: killed
	d = r.reopened(id)
	if n := r.count(ClassVDI); n != 0 {
		t.Errorf("%d VDIs are visible", n)
	}
	if b, err := os.ReadFile(d.Path()); err != nil || !bytes.HasPrefix(b, []byte("first second")) {
		t.Errorf("the path reads %.20q, %v", b, err)
	}
	made := r.publish(d, "first second")
	if rec := get[VDI](r, ClassVDI, made); rec.NameLabel != "drafted" || rec.PhysicalUtilisation <= 0 || get[SR](r, ClassSR, ref).VirtualAllocation != draftSize {
		t.Errorf("the VDI is %+v in an SR with %d allocated", rec, get[SR](r, ClassSR, ref).VirtualAllocation)
	}
	again, err := d.Publish(ctx, nil, nil)
	r.must(errors.Join(err, d.Discard(ctx), d.Close()))
	if again != made {
		t.Errorf("a second Publish gives %s, not %s", again, made)
	}
	_, err = r.OpenDraft(ctx, id)
	r.wantCode("open of what is a VDI", err, xapi.HandleInvalid, "draft", string(id))
	r.wantTidy("at the end")
}

// drafting makes, fills and publishes a draft.
func (r *rig) drafting(on xapi.Ref) error {
	ctx := r.t.Context()
	d, err := r.NewDraft(ctx, NewVDI{SR: on, VirtualSize: draftSize, Room: 4096}, r.aDay())
	if err != nil {
		return err
	}
	defer d.Close()
	if _, err := d.File().WriteAt([]byte("content"), 0); err != nil {
		return err
	}
	m, err := vdi.BuildMap(ctx, d.File(), d.Size())
	if err != nil {
		return err
	}
	_, err = d.Publish(ctx, m, nil)
	for range 2 {
		if err != nil { // as it was, and still open
			_, err = d.Publish(ctx, m, nil)
		}
	}
	return err
}

// A draft, with its maker killed at effect 0, 1, 2 …: the next start has the
// draft, whole, or the VDI, or nothing; never a half of something.
func TestADraftKilledAtEveryEffect(t *testing.T) {
	for _, spec := range []func(*rig) SRSpec{func(r *rig) SRSpec { return r.fileSpec("f") }, func(r *rig) SRSpec { return r.memorySpec("m") }} {
		r := newRig(t)
		ref := r.sr(spec(r))
		outcomes := map[string]int{}
		for n, died := 0, true; died; n++ {
			left := n
			r.point = func(string) error {
				if left--; left == -1 {
					runtime.Goexit()
				}
				return nil
			}
			var wg sync.WaitGroup
			wg.Go(func() { r.must(r.drafting(ref)); died = false })
			wg.Wait()
			r.restart()
			outcomes[r.takeUp(fmt.Sprintf("killed at effect %d", n))]++
		}
		if outcomes["published"] == 0 || outcomes["draft"] == 0 || outcomes["lost"] == 0 {
			t.Errorf("outcomes: %v", outcomes)
		}
	}
}

// takeUp looks what a killed maker of a draft has left, finishes it, and makes
// room for the next.
func (r *rig) takeUp(when string) (outcome string) {
	r.t.Helper()
	outcome = "nothing"
	for _, info := range r.drafts() {
		d, err := r.OpenDraft(r.t.Context(), info.ID)
		if err != nil {
			r.wantCode(when, err, xapi.VDINotAvailable)
			r.wantTidy(when)
			return "lost" // the volume was not made yet
		}
		r.write(d, 0, "content")
		r.publish(d, "content")
		outcome = "draft"
	}
	r.wantTidy(when)
	r.must(r.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassVDI) {
			r.complete(it.Ref, nil, "content")
			r.must(r.VDIDestroy(r.t.Context(), it.Ref))
			if outcome == "nothing" {
				outcome = "published"
			}
		}
		return nil
	}))
	return outcome
}

// The same with effect n failing: a failed NewDraft leaves nothing, and a
// failed Publish a draft that can be published again.
func TestADraftFailingAtEveryEffect(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("f"))
	for n := 0; ; n++ {
		left, at := n, ""
		r.point = func(name string) error {
			if left--; left == -1 {
				at = name
				return fmt.Errorf("failed at %s", name)
			}
			return nil
		}
		err := r.drafting(ref)
		r.point = nil
		if at == "" {
			r.must(err)
			return
		}
		r.wantTidy(fmt.Sprintf("effect %d (%s) failed, error %v", n, at, err))
		for vdi := range r.records() {
			r.complete(vdi, nil, "content")
			r.must(r.VDIDestroy(t.Context(), vdi))
		}
	}
}

func (r *rig) records() (all map[xapi.Ref]VDI) {
	r.t.Helper()
	r.must(r.Store.View(func(v *store.View) (err error) { all, err = store.All[VDI](v, ClassVDI); return err }))
	return all
}

// What commit refuses leaves the draft as it was, and its code comes out.
func TestPublishGivesTheErrorsOfCommit(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	d := r.newDraft(ref)
	r.write(d, 0, "content")
	m, err := vdi.BuildMap(t.Context(), d.File(), d.Size())
	r.must(err)
	for range 2 {
		_, err = d.Publish(t.Context(), m, func(*store.Tx, xapi.Ref) error { return xapi.NewError(xapi.PatchAlreadyExists, "u") })
		r.wantCode("publish", err, xapi.PatchAlreadyExists, "u")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(xapi.NewError(xapi.TaskCancelled, "task"))
	_, err = d.Publish(ctx, m, nil)
	r.wantCode("publish cancelled", err, xapi.TaskCancelled)
	r.must(r.SRScan(t.Context(), ref))
	if r.count(ClassVDI) != 0 {
		t.Error("a scan took a draft for a VDI")
	}
	r.must(d.Close())
	r.restart() // under its live name
	r.publish(r.reopened(d.ID()), "content")
	r.wantTidy("at the end")
}

// A late commit of a failed Publish finds another attempt.
func TestALateCommitOfAFailedPublishIsRefused(t *testing.T) {
	r := newRig(t)
	d := r.newDraft(r.sr(r.fileSpec("sr")))
	digest, err := d.name(t.Context(), nil)
	r.must(err)
	late := &Draft{p: d.p, repo: d.repo, ref: d.ref, in: d.in, size: d.size}
	born, err := d.refuse(t.Context())
	if born || err != nil {
		t.Errorf("born %v, %v", born, err)
	}
	if err := late.record(t.Context(), digest, nil); err == nil || !strings.Contains(err.Error(), "undone meanwhile") {
		t.Errorf("late commit: %v", err)
	}
	r.must(d.Discard(t.Context()))
	r.wantTidy("after a late commit")
}

// Of many that open a draft at once one has it.
func TestADraftHasOneOpener(t *testing.T) {
	r := newRig(t)
	d := r.newDraft(r.sr(r.fileSpec("sr")))
	r.must(d.Close())
	errs := make([]error, 8)
	opened := make([]*Draft, len(errs))
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { opened[i], errs[i] = r.OpenDraft(t.Context(), d.ID()) })
	}
	wg.Wait()
	won := 0
	for i, err := range errs {
		if err == nil {
			won++
			defer opened[i].Close()
			continue
		}
		r.wantCode("a second opener", err, xapi.VDIInUse)
	}
	if won != 1 {
		t.Errorf("%d have it open", won)
	}
	r.must(d.Close()) // of one that has let go: changes nothing
	_, err := r.OpenDraft(t.Context(), d.ID())
	r.wantCode("while it is open", err, xapi.VDIInUse)
}

// Drafts go when they have expired and nobody has them open, and not before.
func TestExpiredDraftsAreSwept(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	held, loose := r.newDraft(ref), r.newDraft(ref)
	r.must(loose.Close())
	r.must(r.Sweep(ctx))
	if n := len(r.drafts()); n != 2 {
		t.Fatalf("%d drafts after a sweep", n)
	}
	late := time.Now().Add(25 * time.Hour)
	r.Pool.Now = func() time.Time { return late }
	_, err := r.OpenDraft(ctx, loose.ID())
	r.wantCode("open of an expired one", err, xapi.HandleInvalid)
	r.must(r.Sweep(ctx))
	if list := r.drafts(); len(list) != 1 || list[0].ID != held.ID() {
		t.Errorf("drafts after they expired: %+v", list)
	}
	r.must(held.SetNote(ctx, nil, late.Add(time.Hour)))
	r.must(held.Close())
	r.must(r.Sweep(ctx))
	d := r.reopened(held.ID())
	r.must(d.SetNote(ctx, nil, late))
	r.must(d.Close())
	r.must(r.Sweep(ctx))
	r.wantTidy("at the end")
}

// The SR of an open draft stays plugged; a draft on an SR that is forgotten is
// dropped, and what it had there goes when the SR comes back.
func TestDraftsAndTheirSR(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	uuid, pbd := get[SR](r, ClassSR, ref).UUID, r.pbdOf(ref)
	d := r.newDraft(ref)
	r.wantCode("unplug", r.PBDUnplug(ctx, pbd), xapi.OtherOperationInProgress)
	r.wantCode("destroy", r.SRDestroy(ctx, ref), xapi.OtherOperationInProgress)
	r.must(d.Close())
	r.wantCode("destroy of what holds a draft", r.SRDestroy(ctx, ref), xapi.SRNotEmpty)
	r.must(r.PBDUnplug(ctx, pbd))
	_, err := r.OpenDraft(ctx, d.ID())
	r.wantCode("open while unplugged", err, xapi.SRNotAttached)
	r.must(r.PBDPlug(ctx, pbd))
	d = r.reopened(d.ID())
	r.must(d.Close())
	r.must(r.PBDUnplug(ctx, pbd))
	r.must(r.SRForget(ctx, ref))
	if r.count(ClassIntent) != 0 || len(r.drafts()) != 0 {
		t.Error("a draft outlived its SR")
	}
	again, err := r.SRIntroduce(ctx, uuid, r.fileSpec("sr"))
	r.must(err)
	pbd, err = r.PBDCreate(ctx, PBD{Host: r.Self, SR: again, DeviceConfig: r.fileSpec("sr").DeviceConfig})
	r.must(errors.Join(err, r.PBDPlug(ctx, pbd)))
	r.wantTidy("when the SR is back")
}

// A draft whose volume was lost, or cut, is dropped.
func TestADraftWhoseVolumeIsLost(t *testing.T) {
	r := newRig(t)
	for what, spoil := range map[string]func(string) error{
		"gone": os.Remove,
		"cut":  func(path string) error { return os.Truncate(path, 4096) },
	} {
		ref := r.sr(r.fileSpec(what))
		d := r.newDraft(ref)
		r.must(d.Close())
		files, err := filepath.Glob(filepath.Join(r.dir, what, "part.*"))
		r.must(err)
		r.must(spoil(files[0]))
		_, err = r.OpenDraft(t.Context(), d.ID())
		r.wantCode(what, err, xapi.VDINotAvailable)
		_, err = r.OpenDraft(t.Context(), d.ID())
		r.wantCode(what+", again", err, xapi.HandleInvalid)
		r.wantTidy(what)
	}
}

// A draft begins as a clone where the SR clones, else it is refused.
func TestADraftThatBeginsAsAClone(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	clones, copies := r.sr(r.memorySpec("m")), r.sr(r.fileSpec("f"))
	base, _ := r.golden(clones, []byte("golden"))
	for size, want := range map[int64]int64{0: 1 << 20, 4096: 1 << 20, draftSize: draftSize} {
		o := r.aDay()
		o.CloneOf = base
		d, err := r.NewDraft(ctx, NewVDI{SR: clones, VirtualSize: size}, o)
		r.must(err)
		b := make([]byte, 6)
		if _, err := d.File().ReadAt(b, 0); err != nil || string(b) != "golden" || d.Size() != want {
			t.Errorf("a clone for %d bytes has %d and begins with %q, %v", size, d.Size(), b, err)
		}
		r.write(d, 0, "change")
		r.must(d.Discard(ctx))
	}
	r.holds(base, []byte("golden"))
	plain, _ := r.golden(copies, []byte("golden"))
	for _, of := range []xapi.Ref{base, plain} {
		_, err := r.NewDraft(ctx, NewVDI{SR: copies, VirtualSize: draftSize}, DraftOptions{CloneOf: of})
		r.wantCode("a clone where there are none", err, xapi.SROperationNotSupported, string(copies))
	}
	_, err := r.NewDraft(ctx, NewVDI{SR: copies}, DraftOptions{})
	r.wantCode("a draft without a size", err, xapi.InvalidValue)
	r.wantTidy("at the end")
}

// Notes are bounded.
func TestTheNoteOfADraftIsBounded(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	large := map[string]string{"key": strings.Repeat("x", maxNote)}
	_, err := r.NewDraft(t.Context(), NewVDI{SR: ref, VirtualSize: 4096}, DraftOptions{Note: large})
	r.wantCode("a large note", err, xapi.InvalidValue)
	d := r.newDraft(ref)
	r.wantCode("a large note later", d.SetNote(t.Context(), large, time.Time{}), xapi.InvalidValue)
	r.must(d.Discard(t.Context()))
	r.wantCode("a note on what is gone", d.SetNote(t.Context(), nil, time.Time{}), xapi.HandleInvalid, "draft", string(d.ID()))
	r.wantTidy("at the end")
}

// Room that is promised to one is not promised to another, and what was written
// already is not counted twice.
func TestRoomIsPromisedOnce(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.mem.Capacity = 10 << 20
	ref := r.sr(r.memorySpec("m"))
	promised := func(want int64) {
		t.Helper()
		if got, err := r.Promised(ctx, ref); err != nil || got != want {
			t.Errorf("%d bytes are promised, %v; want %d", got, err, want)
		}
	}
	n := NewVDI{SR: ref, VirtualSize: 8 << 20, Room: 6 << 20}
	promised(0)
	d, err := r.NewDraft(ctx, n, r.aDay())
	r.must(err)
	promised(6 << 20)
	_, err = r.NewDraft(ctx, n, r.aDay())
	rec := get[SR](r, ClassSR, ref)
	r.wantCode("promised twice", err, xapi.OutOfSpace, "m ("+string(rec.UUID)+")")
	if text := err.Error(); !strings.Contains(text, fmt.Sprint(6<<20)) || !strings.Contains(text, fmt.Sprint(10<<20)) {
		t.Errorf("the cause says %q: neither found nor required", text)
	}
	_, err = r.NewVDI(ctx, n)
	r.wantCode("NewVDI", err, xapi.OutOfSpace)
	if _, err := d.File().WriteAt(make([]byte, 4<<20), 0); err != nil {
		t.Fatal(err)
	}
	promised(2 << 20)
	r.must(d.Close())
	n.Room = 4 << 20
	fits, err := r.NewDraft(ctx, n, r.aDay())
	r.must(err)
	promised(6 << 20)
	r.must(fits.Discard(ctx))
	d = r.reopened(d.ID())
	r.must(d.Discard(ctx))
	promised(0)
	r.wantTidy("at the end")
}

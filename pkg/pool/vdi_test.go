package pool

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestVDIRecordsAreCompleteAndSizesAreCounted(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	vdi, err := r.VDICreate(t.Context(), VDI{SR: ref, VirtualSize: 1<<20 + 1, NameLabel: "disk"})
	r.must(err)
	rec := get[VDI](r, ClassVDI, vdi)
	if rec.VirtualSize != 1<<20+4096 || rec.Type != "user" || !rec.Managed || rec.Location != string(rec.UUID) || rec.SnapshotOf != xapi.NullRef {
		t.Errorf("record of a new VDI: %+v", rec)
	}
	if rec.OtherConfig == nil || rec.SMConfig == nil || rec.XenstoreData == nil || rec.Tags == nil || rec.SnapshotTime.IsZero() {
		t.Errorf("a field of a new VDI is null: %+v", rec)
	}
	if fi, err := os.Stat(filepath.Join(r.dir, "sr", string(rec.UUID)+".img")); err != nil || fi.Size() != rec.VirtualSize {
		t.Errorf("file of the VDI: %v, %v", fi, err)
	}
	if got := get[SR](r, ClassSR, ref); got.VirtualAllocation != rec.VirtualSize || got.PhysicalSize == 0 || got.OtherConfig == nil || got.Tags == nil {
		t.Errorf("record of the SR: %+v", got)
	}
	r.must(r.VDIResize(t.Context(), vdi, 4<<20))
	if got := get[SR](r, ClassSR, ref).VirtualAllocation; got != 4<<20 {
		t.Errorf("virtual_allocation after resize: %d", got)
	}
	r.must(r.VDIDestroy(t.Context(), vdi))
	if got := get[SR](r, ClassSR, ref).VirtualAllocation; got != 0 {
		t.Errorf("virtual_allocation after destroy: %d", got)
	}
	for _, size := range []int64{0, -1, math.MinInt64, math.MaxInt64} {
		_, err := r.VDICreate(t.Context(), VDI{SR: ref, VirtualSize: size})
		r.wantCode("create of a hopeless size", err, xapi.InvalidValue)
	}
	_, err = r.VDICreate(t.Context(), VDI{SR: ref, VirtualSize: 4096, Type: "evil"})
	r.wantCode("create of an unknown type", err, xapi.ValueNotSupported)
	_, err = r.VDICreate(t.Context(), VDI{SR: xapi.NewRef(), VirtualSize: 4096})
	r.wantCode("create in no SR", err, xapi.HandleInvalid)
	r.wantTidy("at the end")
}

// S1-22: destroying the VDI of a patch leaves a valid record that names no VDI.
func TestDestroyingTheVDIOfAPatchLeavesACleanedRecord(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	vdi, patch := r.golden(ref, []byte("golden"))
	r.must(r.VDIDestroy(t.Context(), vdi))
	if got := get[Patch](r, ClassPatch, patch); got.VDI != xapi.NullRef {
		t.Errorf("the patch names VDI %s", got.VDI)
	}
	r.wantCode("destroy again", r.VDIDestroy(t.Context(), vdi), xapi.HandleInvalid)
	r.wantTidy("after destroy")
}

// The volume cannot be destroyed: the call fails, and record and patch are as before.
func TestAVDIThatCannotBeDestroyedStaysRecorded(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.memorySpec("sr"))
	vdi, patch := r.golden(ref, []byte("golden"))
	r.point = func(name string) error {
		if name == "sr.destroy" {
			return xapi.NewError(xapi.VDIIOError, "disk")
		}
		return nil
	}
	r.wantCode("destroy on a failing disk", r.VDIDestroy(t.Context(), vdi), xapi.VDIIOError)
	r.point = nil
	if got := get[Patch](r, ClassPatch, patch); got.VDI != vdi {
		t.Errorf("the patch names VDI %s", got.VDI)
	}
	r.holds(vdi, []byte("golden"))
	r.wantTidy("after a failed destroy")
}

func TestAVDIInUseIsNeitherDestroyedNorChanged(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	vdi := r.filled(ref, 1<<20, []byte("x"))
	release, err := r.UseVDI(vdi)
	r.must(err)
	again, err := r.UseVDI(vdi)
	r.must(err)
	again()
	again()
	r.wantCode("destroy", r.VDIDestroy(ctx, vdi), xapi.VDIInUse, string(vdi), "destroy")
	r.wantCode("resize", r.VDIResize(ctx, vdi, 2<<20), xapi.VDIInUse, string(vdi), "resize")
	r.wantCode("forget", r.VDIForget(ctx, vdi), xapi.VDIInUse, string(vdi), "forget")
	_, _, err = r.VDIFile(ctx, vdi, sr.ReadWrite)
	r.wantCode("import", err, xapi.VDIInUse, string(vdi), "import")
	r.wantCode("unplug", r.PBDUnplug(ctx, r.pbdOf(ref)), xapi.OtherOperationInProgress)
	r.wantCode("destroy of the SR", r.SRDestroy(ctx, ref), xapi.OtherOperationInProgress)
	_, err = r.VDIClone(ctx, vdi, nil)
	r.must(err) // reading goes on
	release()

	f, done, err := r.VDIFile(ctx, vdi, sr.ReadWrite)
	r.must(err)
	_, err = r.UseVDI(vdi)
	r.wantCode("use while it is written", err, xapi.VDIInUse, string(vdi), "import")
	_, err = f.WriteAt([]byte("y"), 0)
	r.must(err)
	done()
	r.holds(vdi, []byte("y"))
	r.must(r.VDIDestroy(ctx, vdi))
}

// pbdOf is this host's PBD of an SR.
func (r *rig) pbdOf(ref xapi.Ref) (pbd xapi.Ref) {
	r.t.Helper()
	r.must(r.Store.View(func(v *store.View) error {
		for _, it := range v.Refs(ClassPBD, "SR", string(ref)) {
			pbd = it
		}
		return nil
	}))
	return pbd
}

// A job on any host that has yet to read the VDI keeps it, too.
func TestAnOpenJobKeepsItsVDI(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	vdi, patch := r.golden(ref, []byte("golden"))
	job := xapi.NewRef()
	set := func(state JobState) {
		r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
			tx.Put(ClassJob, job, Job{UUID: xapi.NewUUID(), Kind: JobApply, Patch: patch, Host: r.Self, VDI: vdi, State: state})
			return nil
		}))
	}
	set(JobQueued)
	r.wantCode("destroy", r.VDIDestroy(t.Context(), vdi), xapi.VDIInUse, string(vdi), "apply")
	_, err := r.VDIPoolMigrate(t.Context(), vdi, ref, nil)
	r.wantCode("migrate", err, xapi.VDIInUse, string(vdi), "apply")
	r.wantCode("unplug", r.PBDUnplug(t.Context(), r.pbdOf(ref)), xapi.OtherOperationInProgress)
	r.wantTidy("while a job is open")
	r.holds(vdi, []byte("golden"))
	set(JobDone)
	r.must(r.VDIDestroy(t.Context(), vdi))
}

func TestTheGoldenImageOfAPatchCannotBeChanged(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	vdi, _ := r.golden(ref, []byte("golden"))
	plain := r.filled(ref, 1<<20, []byte("plain"))
	r.wantCode("set_read_only", r.VDISetReadOnly(ctx, vdi, false), xapi.VDIReadonly, string(vdi))
	r.wantCode("resize", r.VDIResize(ctx, vdi, 2<<20), xapi.VDIReadonly)
	_, _, err := r.VDIForImport(ctx, string(vdi))
	r.wantCode("import", err, xapi.VDIReadonly)
	_, err = r.VDICopy(ctx, plain, "", "", vdi)
	r.wantCode("copy into", err, xapi.VDIReadonly)
	r.holds(vdi, []byte("golden"))
	r.must(r.VDISetReadOnly(ctx, plain, true))
	r.wantCode("resize of a read-only VDI", r.VDIResize(ctx, plain, 2<<20), xapi.VDIReadonly)
	r.must(r.VDISetReadOnly(ctx, plain, false))
	r.must(r.VDIResize(ctx, plain, 2<<20))
	r.wantCode("shrink", r.VDIResize(ctx, plain, 1<<20), xapi.VDITooSmall, string(plain), "2097152")

	clone, err := r.VDIClone(ctx, vdi, nil)
	r.must(err)
	if rec := get[VDI](r, ClassVDI, clone); rec.ReadOnly {
		t.Error("the clone of a golden image cannot be written to")
	}
	r.holds(clone, []byte("golden"))
}

// S1-04: VDI.copy to a second SR; also into an existing VDI.
func TestCopy(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	a, b := r.sr(r.fileSpec("a")), r.sr(r.memorySpec("b"))
	src := r.filled(a, 1<<20, []byte("content"))
	far, err := r.VDICopy(ctx, src, b, "", xapi.NullRef)
	r.must(err)
	r.holds(far, []byte("content"))
	if rec := get[VDI](r, ClassVDI, far); rec.SR != b || rec.VirtualSize != 1<<20 || rec.UUID == get[VDI](r, ClassVDI, src).UUID {
		t.Errorf("record of a copy: %+v", rec)
	}

	old := bytes.Repeat([]byte("old"), 1<<19)
	into := r.filled(b, 2<<20, old)
	got, err := r.VDICopy(ctx, src, xapi.NullRef, src, into)
	r.must(err)
	if got != into {
		t.Errorf("copy into %s gave %s", into, got)
	}
	r.holds(into, append([]byte("content"), make([]byte, 2<<20-7)...))

	small := r.filled(b, 1<<19, nil)
	_, err = r.VDICopy(ctx, src, "", "", small)
	r.wantCode("copy into a smaller VDI", err, xapi.VDITooSmall, string(small), "1048576")
	_, err = r.VDICopy(ctx, src, a, "", into)
	r.wantCode("copy into a VDI of another SR than named", err, xapi.InvalidValue)
	_, err = r.VDICopy(ctx, src, "", "", src)
	r.wantCode("copy into itself", err, xapi.VDIInUse)
	_, err = r.VDICopy(ctx, src, xapi.NewRef(), "", "")
	r.wantCode("copy to no SR", err, xapi.HandleInvalid)
	_, err = r.VDICopy(ctx, src, b, xapi.NewRef(), "")
	r.wantCode("copy with a base that is not there", err, xapi.HandleInvalid)
	_, err = r.VDICopy(ctx, xapi.NewRef(), b, "", "")
	r.wantCode("copy of nothing", err, xapi.HandleInvalid)
	r.wantTidy("at the end")
}

func TestZeros(t *testing.T) {
	for name, zero := range map[string]func(*os.File, int64) error{
		"by a hole":  func(f *os.File, _ int64) error { return zero(t.Context(), f) },
		"by writing": func(f *os.File, size int64) error { return writeZeros(t.Context(), f, size) },
	} {
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		size := int64(3<<20 + 5)
		if _, err := f.WriteAt(bytes.Repeat([]byte("x"), int(size)), 0); err != nil {
			t.Fatal(err)
		}
		if err := zero(f, size); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(f.Name())
		if err != nil || !bytes.Equal(got, make([]byte, size)) {
			t.Errorf("%s: not all is zero, %v", name, err)
		}
	}
}

// While a VDI is being destroyed it is not there for anybody else.
func TestAVDIBeingDestroyed(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.memorySpec("sr"))
	vdi, _ := r.golden(ref, []byte("golden"))
	r.point = func(name string) error {
		if name == "sr.destroy" {
			_, err := r.UseVDI(vdi)
			r.wantCode("use", err, xapi.VDINotAvailable, string(vdi))
			r.wantCode("destroy", r.VDIDestroy(t.Context(), vdi), xapi.VDINotAvailable, string(vdi))
			r.wantCode("forget", r.VDIForget(t.Context(), vdi), xapi.VDINotAvailable, string(vdi))
			r.wantCode("destroy of its SR", r.SRDestroy(t.Context(), ref), xapi.OtherOperationInProgress)
		}
		return nil
	}
	r.must(r.VDIDestroy(t.Context(), vdi))
	r.must(r.SRUpdate(t.Context(), ref))
	r.wantTidy("at the end")
}

func TestSnapshotNeedsTheFeature(t *testing.T) {
	r := newRig(t)
	r.mem.Clones = false
	plain := r.sr(r.memorySpec("plain"))
	r.mem.Clones = true
	clones := r.sr(r.memorySpec("clones"))
	_, err := r.VDISnapshot(t.Context(), r.filled(plain, 4096, nil), nil)
	r.wantCode("snapshot without the feature", err, xapi.SROperationNotSupported, string(plain))
	src := r.filled(clones, 4096, []byte("then"))
	snap, err := r.VDISnapshot(t.Context(), src, nil)
	r.must(err)
	if rec := get[VDI](r, ClassVDI, snap); !rec.IsASnapshot || rec.SnapshotOf != src || !rec.ReadOnly || rec.SnapshotTime.Equal(xapi.Epoch) {
		t.Errorf("record of a snapshot: %+v", rec)
	}
}

// A patch follows its VDI to another SR.
func TestMigrateMovesAPatchWithItsVDI(t *testing.T) {
	r := newRig(t)
	a, b := r.sr(r.fileSpec("a")), r.sr(r.memorySpec("b"))
	vdi, patch := r.golden(a, []byte("golden"))
	moved, err := r.VDIPoolMigrate(t.Context(), vdi, b, nil)
	r.must(err)
	if got := get[Patch](r, ClassPatch, patch); got.VDI != moved {
		t.Errorf("the patch names VDI %s, want %s", got.VDI, moved)
	}
	if rec := get[VDI](r, ClassVDI, moved); rec.SR != b || !rec.ReadOnly || rec.NameLabel != "patch" {
		t.Errorf("record of a migrated VDI: %+v", rec)
	}
	r.holds(moved, []byte("golden"))
	if r.count(ClassVDI) != 1 || len(r.volumes(a)) != 0 {
		t.Error("the old VDI is still there")
	}
	r.wantTidy("at the end")
}

func TestForgetLeavesTheVolumeAndScanFindsIt(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	vdi, patch := r.golden(ref, []byte("golden"))
	uuid := get[VDI](r, ClassVDI, vdi).UUID
	r.must(r.VDIForget(ctx, vdi))
	if got := get[Patch](r, ClassPatch, patch); got.VDI != xapi.NullRef {
		t.Errorf("the patch names VDI %s", got.VDI)
	}
	_, err := r.VDIIntroduce(ctx, VDIIntro{UUID: xapi.NewUUID(), VDI: VDI{SR: ref}})
	r.wantCode("introduce of nothing", err, xapi.VDILocationMissing)
	found, err := r.VDIIntroduce(ctx, VDIIntro{UUID: uuid, VDI: VDI{SR: ref, NameLabel: "again", Location: string(uuid)}})
	r.must(err)
	r.holds(found, []byte("golden"))
	_, err = r.VDIIntroduce(ctx, VDIIntro{UUID: uuid, VDI: VDI{SR: ref}})
	r.wantCode("introduce twice", err, xapi.LocationNotUnique)
	r.must(r.VDIForget(ctx, found))
	r.must(r.SRScan(ctx, ref))
	r.must(r.SRScan(ctx, ref))
	if r.count(ClassVDI) != 1 {
		t.Errorf("%d VDIs after a scan", r.count(ClassVDI))
	}
	// T16: a volume that looks like a patch is a plain VDI: no record with its digest names it.
	if got := get[Patch](r, ClassPatch, patch); got.VDI != xapi.NullRef {
		t.Errorf("a scan gave the patch VDI %s", got.VDI)
	}
	r.isPlain(ref)
}

func TestRawFilesByRefAndUUID(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	vdi := r.filled(ref, 1<<20, []byte("x"))
	uuid := get[VDI](r, ClassVDI, vdi).UUID
	f, release, err := r.VDIForImport(t.Context(), string(uuid))
	r.must(err)
	_, err = f.WriteAt(bytes.Repeat([]byte("y"), 1<<19), 0)
	r.must(err)
	release()
	if got := get[VDI](r, ClassVDI, vdi).PhysicalUtilisation; got < 1<<19 {
		t.Errorf("physical_utilisation after an import is %d", got)
	}
	f, release, err = r.VDIForExport(t.Context(), string(vdi))
	r.must(err)
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 0); err != nil || b[0] != 'y' {
		t.Errorf("export reads %q, %v", b, err)
	}
	release()
	_, _, err = r.VDIForExport(t.Context(), string(xapi.NewUUID()))
	r.wantCode("export of an unknown uuid", err, xapi.UUIDInvalid)
	_, _, err = r.VDIForExport(t.Context(), "../../etc/passwd")
	r.wantCode("export of rubbish", err, xapi.HandleInvalid)
	r.must(os.Remove(filepath.Join(r.dir, "sr", string(uuid)+".img")))
	_, _, err = r.VDIForExport(t.Context(), string(vdi))
	r.wantCode("export of a missing VDI", err, xapi.VDIMissing, string(ref), string(vdi))
	r.must(r.VDIUpdate(t.Context(), vdi))
	if !get[VDI](r, ClassVDI, vdi).Missing {
		t.Error("VDI.update did not see that the volume is missing")
	}
	r.must(r.VDIDestroy(t.Context(), vdi))
}

func TestSetters(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.memorySpec("sr"))
	vdi := r.filled(ref, 4096, nil)
	r.must(r.VDISetNameLabel(ctx, vdi, "n"))
	r.must(r.VDISetNameDescription(ctx, vdi, "d"))
	r.must(r.VDISetSharable(ctx, vdi, true))
	if rec := get[VDI](r, ClassVDI, vdi); rec.NameLabel != "n" || rec.NameDescription != "d" || !rec.Sharable {
		t.Errorf("VDI after its setters: %+v", rec)
	}
	r.must(r.SRSetNameLabel(ctx, ref, "n"))
	r.must(r.SRSetNameDescription(ctx, ref, "d"))
	r.must(r.SRSetPhysicalSize(ctx, ref, 7))
	r.must(r.SRSetShared(ctx, ref, true))
	if rec := get[SR](r, ClassSR, ref); rec.NameLabel != "n" || rec.NameDescription != "d" || rec.PhysicalSize != 7 || !rec.Shared {
		t.Errorf("SR after its setters: %+v", rec)
	}
	r.wantCode("negative size", r.SRSetPhysicalSize(ctx, ref, -1), xapi.InvalidValue)
	r.wantCode("name of nothing", r.VDISetNameLabel(ctx, xapi.NewRef(), ""), xapi.HandleInvalid)
}

// Many calls at once: every VDI ends up whole, and nothing else is left.
func TestManyVDIsAtOnce(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref, other := r.sr(r.fileSpec("a")), r.sr(r.memorySpec("b"))
	golden, _ := r.golden(ref, []byte("golden"))
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			vdi, err := r.VDIClone(ctx, golden, nil)
			if err == nil && i%3 == 0 {
				_, err = r.VDICopy(ctx, vdi, other, "", "")
			}
			if err == nil && i%2 == 0 {
				err = r.VDIDestroy(ctx, vdi)
			}
			if err == nil && i%4 == 0 {
				err = r.SRScan(ctx, ref)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r.wantTidy("at the end")
	if got := r.count(ClassVDI); got != 1+6+4 {
		t.Errorf("%d VDIs", got)
	}
	if got := get[SR](r, ClassSR, ref).VirtualAllocation; got != 7<<20 {
		t.Errorf("virtual_allocation %d, want %d", got, 7<<20)
	}
}

// isPlain fails unless the one VDI of an SR, found there beside a map that nobody
// vouches for, is a plain one that takes the map along when it goes.
func (r *rig) isPlain(on xapi.Ref) {
	r.t.Helper()
	r.must(r.Sweep(r.t.Context()))
	if n := len(r.volumes(on)); n != 2 {
		r.t.Errorf("%d volumes, want image and map", n)
	}
	var found xapi.Ref
	r.must(r.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassVDI, "SR", string(on)) {
			found = ref
		}
		return nil
	}))
	if rec := get[VDI](r, ClassVDI, found); rec.Map != "" || !rec.Checked.IsZero() {
		r.t.Errorf("the map was taken on faith: %+v", rec)
	}
	if m, err := r.VDIMap(r.t.Context(), found); m != nil || err != nil {
		r.t.Errorf("map %v, %v", m, err)
	}
	r.must(r.VDIDestroy(r.t.Context(), found))
	r.wantTidy("at the end")
}

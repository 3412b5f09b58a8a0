package pool

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestSMRecordsFollowTheDrivers(t *testing.T) {
	r := newRig(t)
	r.must(r.EnsureSM(t.Context()))
	r.must(r.EnsureSM(t.Context()))
	byType := map[string]SM{}
	r.must(r.Store.View(func(v *store.View) error {
		all, err := store.All[SM](v, ClassSM)
		for _, rec := range all {
			byType[rec.Type] = rec
		}
		return err
	}))
	rec := byType["file"]
	if len(byType) != 2 || r.count(ClassSM) != 2 || rec.UUID == "" || rec.Features["VDI_CREATE"] != 1 || len(rec.Capabilities) == 0 || rec.Configuration["location"] == "" || rec.OtherConfig == nil {
		t.Errorf("SM records: %+v", byType)
	}
	r.Drivers = r.Drivers[:1]
	r.must(r.EnsureSM(t.Context()))
	if r.count(ClassSM) != 1 {
		t.Error("the record of a driver that is gone is left")
	}
}

func TestSRCreateRefuses(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("taken"))
	for name, test := range map[string]struct {
		spec SRSpec
		code string
	}{
		"an unknown type":       {SRSpec{Host: r.Self, Type: "nfs\x00"}, xapi.SRUnknownDriver},
		"no device_config":      {SRSpec{Host: r.Self, Type: "file"}, xapi.ValueNotSupported},
		"a hostile location":    {SRSpec{Host: r.Self, Type: "file", DeviceConfig: map[string]string{"location": "/etc/x"}}, xapi.ValueNotSupported},
		"a location in an SR":   {SRSpec{Host: r.Self, Type: "file", DeviceConfig: map[string]string{"location": filepath.Join(r.dir, "taken", "x")}}, xapi.ValueNotSupported},
		"the location of an SR": {r.fileSpec("taken"), xapi.SRDeviceInUse},
		"a folder with files":   {r.fileSpec("."), xapi.ValueNotSupported},
		"a host that is not":    {SRSpec{Host: xapi.NewRef(), Type: "file"}, xapi.HandleInvalid},
		"a negative size":       {SRSpec{Host: r.Self, Type: "file", PhysicalSize: -1}, xapi.InvalidValue},
	} {
		if name == "a folder with files" {
			test.spec.DeviceConfig["location"], test.code = r.dir, xapi.SRDeviceInUse
		}
		_, err := r.SRCreate(ctx, test.spec)
		r.wantCode(name, err, test.code)
		r.wantTidy(name)
	}
	if r.count(ClassSR) != 1 || r.count(ClassPBD) != 1 {
		t.Error("a refused SR left records")
	}
	vdi := r.filled(ref, 4096, []byte("still works"))
	r.holds(vdi, []byte("still works"))
}

func TestProbeGivesXML(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	text, err := r.SRProbe(t.Context(), r.Self, map[string]string{"location": filepath.Join(r.dir, "sr")}, "file", nil)
	r.must(err)
	if !strings.HasPrefix(text, "<?xml") || !strings.Contains(text, "<UUID>"+string(get[SR](r, ClassSR, ref).UUID)+"</UUID>") {
		t.Errorf("probe says %s", text)
	}
	text, err = r.SRProbe(t.Context(), r.Self, map[string]string{"location": filepath.Join(r.dir, "nothing")}, "file", nil)
	r.must(err)
	if strings.Contains(text, "UUID") {
		t.Errorf("probe of nothing says %s", text)
	}
	_, err = r.SRProbe(t.Context(), r.Self, map[string]string{"location": "/"}, "file", nil)
	r.wantCode("probe of the root", err, xapi.ValueNotSupported)
	_, err = r.SRProbe(t.Context(), r.Self, nil, "no", nil)
	r.wantCode("probe with no driver", err, xapi.SRUnknownDriver)
}

// The way of xe: sr-forget, sr-introduce, pbd-create, pbd-plug brings back
// every VDI, and what is a patch is decided by records alone.
func TestForgetAndIntroduceAnSR(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	r.must(r.SetDefaultSR(ctx, ref))
	uuid := get[SR](r, ClassSR, ref).UUID
	vdi, patch := r.golden(ref, []byte("golden"))
	for range 45 {
		r.must(r.Store.Update(ctx, func(tx *store.Tx) error {
			tx.Put(ClassVDI, xapi.NewRef(), fullVDI(VDI{}, ref, xapi.NewUUID()))
			return nil
		}))
	}
	pbd := r.pbdOf(ref)
	r.wantCode("forget while plugged", r.SRForget(ctx, ref), xapi.SRHasPBD, string(ref))
	r.wantCode("destroy of a plugged PBD", r.PBDDestroy(ctx, pbd), xapi.OperationNotAllowed)
	r.must(r.PBDUnplug(ctx, pbd))
	r.must(r.PBDUnplug(ctx, pbd))
	r.wantCode("scan while unplugged", r.SRScan(ctx, ref), xapi.SRNotAttached, string(ref))
	_, err := r.VDIClone(ctx, vdi, nil)
	r.wantCode("clone while unplugged", err, xapi.SRNotAttached, string(ref))
	r.must(r.SRForget(ctx, ref))
	if r.count(ClassSR)+r.count(ClassPBD)+r.count(ClassVDI) != 0 {
		t.Error("a forgotten SR left records")
	}
	if _, pool, err := r.Record(); err != nil || pool.DefaultSR != xapi.NullRef {
		t.Errorf("default_SR is %s, %v", pool.DefaultSR, err)
	}
	if got := get[Patch](r, ClassPatch, patch); got.VDI != xapi.NullRef {
		t.Errorf("the patch names VDI %s", got.VDI)
	}

	spec := r.fileSpec("sr")
	again, err := r.SRIntroduce(ctx, uuid, spec)
	r.must(err)
	_, err = r.SRIntroduce(ctx, uuid, spec)
	r.wantCode("introduce twice", err, xapi.SRUUIDExists, string(uuid))
	r.wantCode("scan without a PBD", r.SRScan(ctx, again), xapi.SRHasNoPBDs, string(again))
	pbd, err = r.PBDCreate(ctx, PBD{Host: r.Self, SR: again, DeviceConfig: spec.DeviceConfig})
	r.must(err)
	_, err = r.PBDCreate(ctx, PBD{Host: r.Self, SR: again, DeviceConfig: spec.DeviceConfig})
	r.wantCode("a second PBD", err, xapi.PBDExists, string(again), string(r.Self), string(pbd))
	r.must(r.PBDPlug(ctx, pbd))
	r.must(r.PBDPlug(ctx, pbd))
	if r.count(ClassVDI) != 1 {
		t.Errorf("%d VDIs after plugging, want the one that is there", r.count(ClassVDI))
	}
	if got := get[PBD](r, ClassPBD, pbd); !got.CurrentlyAttached || len(got.Features) == 0 {
		t.Errorf("record of a plugged PBD: %+v", got)
	}
	r.isPlain(again)
}

func TestPBDsAreChecked(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	uuid := xapi.NewUUID()
	ref, err := r.SRIntroduce(ctx, uuid, r.fileSpec("never made"))
	r.must(err)
	for name, test := range map[string]struct {
		rec  PBD
		code string
	}{
		"no host":            {PBD{Host: xapi.NewRef(), SR: ref}, xapi.HandleInvalid},
		"no SR":              {PBD{Host: r.Self, SR: xapi.NewRef()}, xapi.HandleInvalid},
		"a missing location": {PBD{Host: r.Self, SR: ref}, xapi.ValueNotSupported},
		"an unknown key":     {PBD{Host: r.Self, SR: ref, DeviceConfig: map[string]string{"location": "/x", "y": "z"}}, xapi.ValueNotSupported},
	} {
		_, err := r.PBDCreate(ctx, test.rec)
		r.wantCode(name, err, test.code)
	}
	pbd, err := r.PBDCreate(ctx, PBD{Host: r.Self, SR: ref, DeviceConfig: map[string]string{"location": filepath.Join(r.dir, "never made")}})
	r.must(err)
	r.wantCode("plug of an SR that is not there", r.PBDPlug(ctx, pbd), xapi.SRBackendFailure)
	if get[PBD](r, ClassPBD, pbd).CurrentlyAttached {
		t.Error("a PBD that failed to plug says it is plugged")
	}
	r.wantCode("a device_config without location", r.PBDSetDeviceConfig(ctx, pbd, nil), xapi.ValueNotSupported)
	other := r.sr(r.fileSpec("other"))
	r.must(r.PBDSetDeviceConfig(ctx, pbd, map[string]string{"location": filepath.Join(r.dir, "other")}))
	r.wantCode("plug of another SR's place", r.PBDPlug(ctx, pbd), xapi.SRBackendFailure)
	r.wantCode("device_config of a plugged PBD", r.PBDSetDeviceConfig(ctx, r.pbdOf(other), map[string]string{"location": "/x"}), xapi.OperationNotAllowed)
	r.must(r.PBDDestroy(ctx, pbd))

	host := xapi.NewRef()
	r.must(r.Store.Update(ctx, func(tx *store.Tx) error { tx.Put(ClassHost, host, Host{UUID: xapi.NewUUID()}); return nil }))
	far, err := r.PBDCreate(ctx, PBD{Host: host, SR: other, DeviceConfig: map[string]string{"location": "/x/y"}})
	r.must(err)
	r.Connected = func(h xapi.Ref) bool { return h == r.Self }
	r.wantCode("plug on another host", r.PBDPlug(ctx, far), xapi.HostOffline, string(host))
	r.must(r.SRSetShared(ctx, other, true))
	r.wantCode("no longer shared with two PBDs", r.SRSetShared(ctx, other, false), xapi.OperationNotAllowed)
}

func TestSRDestroy(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	vdi := r.filled(ref, 4096, []byte("x"))
	r.wantCode("destroy with a VDI", r.SRDestroy(ctx, ref), xapi.SRNotEmpty)
	r.must(r.VDIForget(ctx, vdi))
	r.wantCode("destroy with a volume that nobody knows", r.SRDestroy(ctx, ref), xapi.SRNotEmpty)
	r.must(r.SRScan(ctx, ref))
	r.must(r.Store.View(func(v *store.View) error { vdi = v.List(ClassVDI)[0].Ref; return nil }))
	r.must(r.VDIDestroy(ctx, vdi))
	foreign := filepath.Join(r.dir, "sr", "notes")
	r.must(os.WriteFile(foreign, []byte("mine"), 0o600))
	r.must(r.SRDestroy(ctx, ref))
	if r.count(ClassSR)+r.count(ClassPBD)+r.count(ClassIntent) != 0 {
		t.Error("a destroyed SR left records")
	}
	if b, err := os.ReadFile(foreign); err != nil || string(b) != "mine" {
		t.Errorf("a foreign file is gone: %v", err)
	}
	r.wantCode("destroy again", r.SRDestroy(ctx, ref), xapi.HandleInvalid)
}

// S1-12: candidates as Choose sees them.
func TestCandidates(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	plain, clones := r.sr(r.fileSpec("plain")), r.sr(r.memorySpec("clones"))
	def, cs, err := r.SRCandidates(ctx)
	r.must(err)
	if def != xapi.NullRef || len(cs) != 2 || !cs[0].Plugged || cs[0].Ref != plain || cs[0].Clones || !cs[1].Clones || cs[0].Created >= cs[1].Created {
		t.Errorf("candidates: %s %+v", def, cs)
	}
	if got, err := sr.Choose("", def, cs); err != nil || got != clones {
		t.Errorf("chose %s, %v", got, err)
	}
	r.must(r.SetDefaultSR(ctx, plain))
	def, cs, err = r.SRCandidates(ctx)
	r.must(err)
	if got, err := sr.Choose("", def, cs); err != nil || got != plain {
		t.Errorf("chose %s, %v", got, err)
	}
	r.must(r.PBDUnplug(ctx, r.pbdOf(plain)))
	def, cs, err = r.SRCandidates(ctx)
	r.must(err)
	if got, err := sr.Choose("", def, cs); err != nil || got != clones {
		t.Errorf("chose %s, %v", got, err)
	}
}

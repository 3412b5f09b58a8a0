package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// far is a pool of a coordinator and one member, with an SR in a folder of its
// own on the member.
type far struct {
	*lab.Pool
	s          *lab.Session
	here, away *lab.Host
	host       string // ref of the member
	dir, sr    string
	local      string // the default SR, on the coordinator
}

func newFar(t *testing.T) *far {
	t.Helper()
	return farOf(t, nil)
}

func farOf(t *testing.T, each func(i int) lab.Options) *far {
	t.Helper()
	f := &far{Pool: lab.NewPool(t, 2, each), dir: t.TempDir()}
	f.JoinAll()
	f.here, f.away = f.Hosts[0], f.Hosts[1]
	f.s = f.here.Root()
	f.host, f.local = f.s.HostRef(f.away), defaultSR(f.s)
	f.connected(true)
	f.sr = f.create("far", f.dir).(string)
	return f
}

func (f *far) create(name, dir string) any {
	f.T.Helper()
	v, err := f.tryCreate(name, dir)
	if err != nil {
		f.T.Fatal(err)
	}
	return v
}

func (f *far) tryCreate(name, dir string) (any, error) {
	return f.s.Try("SR.create", f.host, map[string]string{"location": dir}, "0", name, "", "file", "user", false, map[string]string{})
}

func (f *far) disk(name string) (any, error) {
	return f.s.Try("VDI.create", map[string]any{
		"name_label": name, "name_description": "", "SR": f.sr, "virtual_size": "2097152", "type": "user",
		"sharable": false, "read_only": false, "other_config": map[string]string{"who": "a test"},
	})
}

// connected waits until the coordinator hears the member, or no more.
func (f *far) connected(yes bool) {
	f.T.Helper()
	until(f.T, fmt.Sprintf("the member to be connected: %v", yes), func() bool {
		for _, st := range f.s.Call("patchd.host_states").([]any) {
			if rec := st.(map[string]any); rec["ref"] == f.host {
				return rec["connected"] == fmt.Sprint(yes)
			}
		}
		return false
	})
}

// file is where the image of a VDI lies.
func (f *far) file(vdi string) string {
	f.T.Helper()
	sr := f.s.Call("VDI.get_SR", vdi).(string)
	where := f.s.Call("PBD.get_device_config", pbdOf(f.s, sr)).(map[string]any)["location"].(string)
	return filepath.Join(where, f.s.Call("VDI.get_uuid", vdi).(string)+".img")
}

// agree ends the member and checks that what its own database says of its
// storage is what the pool's says, and that nothing is unfinished there.
func (f *far) agree() {
	f.T.Helper()
	mine := map[string]map[string]lab.Record{"SR": {}, "PBD": {}, "VDI": {}}
	for class := range mine {
		for ref, rec := range f.s.All(class) {
			mine[class][ref] = rec
		}
	}
	f.away.Down()
	its := map[string]int{}
	for line := range strings.Lines(f.away.Must("store", "backup", "-")) {
		var rec struct {
			Class, Ref string
			Value      lab.Record
		}
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			f.T.Fatal(err)
		}
		if rec.Class == "intent" {
			f.T.Errorf("unfinished on the member: %s", line)
		}
		if mine[rec.Class] == nil {
			continue
		}
		its[rec.Class]++
		pool, ok := mine[rec.Class][rec.Ref]
		if !ok {
			f.T.Errorf("the pool does not know %s", line)
			continue
		}
		for _, key := range []string{"uuid", "SR", "host", "currently_attached", "virtual_size", "physical_utilisation", "virtual_allocation", "missing"} {
			had, in := rec.Value[key]
			want := pool[key]
			if n, isNumber := had.(float64); isNumber {
				had = fmt.Sprintf("%.0f", n)
			}
			if in && fmt.Sprint(had) != fmt.Sprint(want) {
				f.T.Errorf("%s of %s %s is %v on the member, %v in the pool", key, rec.Class, rec.Ref, had, want)
			}
		}
	}
	for class, recs := range mine {
		n := 0
		for _, rec := range recs {
			sr := rec["SR"]
			if class == "SR" {
				sr = rec["uuid"]
			}
			if sr != nil && f.isFar(class, rec) {
				n++
			}
		}
		if n != its[class] {
			f.T.Errorf("the pool has %d objects of class %s on the member, that has %d", n, class, its[class])
		}
	}
}

// isFar tells whether an object is of the member's storage.
func (f *far) isFar(class string, rec lab.Record) bool {
	f.T.Helper()
	switch class {
	case "PBD":
		return rec["host"] == f.host
	case "SR":
		for _, pbd := range rec["PBDs"].([]any) {
			if f.s.Call("PBD.get_host", pbd) == f.host {
				return true
			}
		}
		return false
	}
	return f.isFar("SR", f.s.Call("SR.get_record", rec["SR"]).(map[string]any))
}

// S1-28: storage of a member is worked on through the coordinator as if it were
// its own, and the records are the same on both sides.
func TestS1_28_StorageOfAnotherHost(t *testing.T) {
	t.Parallel()
	f := newFar(t)
	s := f.s
	s.Call("SR.scan", f.sr)
	v, err := f.disk("empty")
	if err != nil {
		t.Fatal(err)
	}
	disk := v.(string)
	if n := s.Call("VDI.get_virtual_size", disk); n != "2097152" || !exists(f.file(disk)) {
		t.Errorf("the disk has %v bytes; there: %v", n, exists(f.file(disk)))
	}

	p := &lab.Patch{Pad: 3 << 20}
	patch := s.MustUpload(p)
	golden := vdiOf(s, patch)
	sum := fileSum(t, f.file(golden))
	there := s.Call("VDI.copy", golden, f.sr).(string)
	back := s.Call("VDI.copy", there, f.local).(string)
	for _, vdi := range []string{there, back} {
		if fileSum(t, f.file(vdi)) != sum {
			t.Errorf("VDI %s differs", vdi)
		}
		if text := s.Wait(s.Call("Async.patchd.vdi_verify", vdi).(string)); text["status"] != "success" || text["result"] != "<value></value>" {
			t.Errorf("verify: %v %v %v", text["status"], text["result"], text["error_info"])
		}
	}
	if vdiOf(s, patch) != golden {
		t.Error("the record names a copy")
	}
	moved := s.Call("VDI.pool_migrate", golden, f.sr, map[string]string{}).(string)
	if vdiOf(s, patch) != moved || s.Call("VDI.get_SR", moved) != f.sr {
		t.Error("the image of the patch has not moved")
	}
	_, err = s.Try("VDI.get_uuid", golden)
	wantCode(t, err, xapi.HandleInvalid, "VDI", golden)
	home := s.Call("VDI.pool_migrate", moved, f.local, map[string]string{}).(string)
	if vdiOf(s, patch) != home || fileSum(t, f.file(home)) != sum {
		t.Error("the image of the patch has not come back as it was")
	}
	if out, err := s.Try("pool_patch.apply", patch, f.host); err != nil {
		t.Errorf("%v %v", out, err)
	}

	pbd := pbdOf(s, f.sr)
	s.Call("PBD.unplug", pbd)
	_, err = f.disk("nowhere")
	hasCode(t, err, xapi.SRNotAttached)
	s.Call("PBD.plug", pbd)
	s.Call("VDI.destroy", disk)
	_, err = s.Try("SR.destroy", f.sr)
	hasCode(t, err, xapi.SRNotEmpty)
	second := f.create("second", t.TempDir()).(string)
	s.Call("SR.destroy", second)

	f.agree()
	f.connected(false)
	before := map[string]int{"VDI": len(s.All("VDI")), "SR": len(s.All("SR")), "PBD": len(s.All("PBD"))}
	calls := map[string]func() (any, error){
		"SR.create":        func() (any, error) { return f.tryCreate("third", t.TempDir()) },
		"SR.scan":          func() (any, error) { return s.Try("SR.scan", f.sr) },
		"SR.destroy":       func() (any, error) { return s.Try("SR.destroy", f.sr) },
		"VDI.create":       func() (any, error) { return f.disk("fourth") },
		"VDI.copy to":      func() (any, error) { return s.Try("VDI.copy", home, f.sr) },
		"VDI.pool_migrate": func() (any, error) { return s.Try("VDI.pool_migrate", home, f.sr, map[string]string{}) },
		"VDI.clone":        func() (any, error) { return s.Try("VDI.clone", there) },
		"VDI.destroy":      func() (any, error) { return s.Try("VDI.destroy", there) },
		"VDI.resize":       func() (any, error) { return s.Try("VDI.resize", there, "8388608") },
		"PBD.unplug":       func() (any, error) { return s.Try("PBD.unplug", pbd) },
		"VDI.verify":       func() (any, error) { return s.Try("patchd.vdi_verify", there) },
	}
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		_, err := calls[name]()
		if params := hasCode(t, err, xapi.HostOffline); len(params) != 1 || params[0] != f.host {
			t.Errorf("%s: %v", name, err)
		}
	}
	f.away.Up()
	f.connected(true)
	for class, n := range before {
		if now := len(s.All(class)); now != n {
			t.Errorf("%d objects of class %s, %d before", now, class, n)
		}
	}
	s.Call("SR.scan", f.sr)
	for _, vdi := range []string{there, back} {
		s.Call("VDI.destroy", vdi)
	}
	s.Call("SR.destroy", f.sr)
	if left, _ := filepath.Glob(f.dir + "/*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	f.agree()
	f.away.Up()
	f.connected(true)
	f.Finish()
}

// A member that dies while it is asked for something leaves nothing half-made:
// what it had not begun it does when it is back, what it had begun is undone.
func TestS1_28_AMemberDiesInACall(t *testing.T) {
	t.Parallel()
	f := newFar(t)
	s := f.s
	golden := vdiOf(s, s.MustUpload(&lab.Patch{Pad: 20 << 20}))
	f.away.Pause()
	copying := s.Call("Async.VDI.copy", golden, f.sr).(string)
	making := s.Call("Async.VDI.create", map[string]any{
		"name_label": "made late", "name_description": "", "SR": f.sr, "virtual_size": "1048576", "type": "user",
		"sharable": false, "read_only": false, "other_config": map[string]string{},
	}).(string)
	f.away.Kill()
	f.away.Up()
	f.connected(true)
	for name, task := range map[string]string{"VDI.copy": copying, "VDI.create": making} {
		rec := s.Wait(task)
		t.Logf("%s ended as %v %v", name, rec["status"], rec["error_info"])
		if rec["status"] == "success" {
			continue
		}
		if info, _ := rec["error_info"].([]any); len(info) == 0 || info[0] == xapi.InternalError {
			t.Errorf("%s: %v", name, rec["error_info"])
		}
	}
	until(t, "no more images than records", func() bool {
		images, _ := filepath.Glob(f.dir + "/*.img")
		n := 0
		for _, rec := range s.All("VDI") {
			if rec["SR"] == f.sr {
				n++
			}
		}
		parts, _ := filepath.Glob(f.dir + "/*.*.*")
		return len(images) == n && len(parts) == 0
	})
	f.agree()
	f.away.Up()
	f.connected(true)
	f.Finish()
}

// A8: a member that dies at any step of a call leaves nothing half-made, on either
// side: what failed is as it was, and can be asked for again.
func TestA8_AMemberDiesAtAnyStepOfACall(t *testing.T) {
	t.Parallel()
	plan := filepath.Join(t.TempDir(), "plan")
	f := farOf(t, func(i int) lab.Options {
		if i == 0 {
			return lab.Options{}
		}
		return lab.Options{Binary: lab.FaultBinary(t), Env: []string{"PATCHD_FAULT_PLAN=" + plan}}
	})
	s := f.s
	n, r := soak(t, 6)
	golden := vdiOf(s, s.MustUpload(&lab.Patch{Pad: 5 << 20}))
	there := s.Call("VDI.copy", golden, f.sr).(string)
	second := t.TempDir()
	calls := []func() string{
		func() string { return s.Call("Async.VDI.copy", golden, f.sr).(string) },
		func() string { return s.Call("Async.VDI.clone", there).(string) },
		func() string {
			return s.Call("Async.SR.create", f.host, map[string]string{"location": second}, "0", "second", "", "file", "user", false, map[string]string{}).(string)
		},
		func() string { return s.Call("Async.VDI.copy", there, f.local).(string) },
		func() string { return s.Call("Async.VDI.pool_migrate", there, f.local, map[string]string{}).(string) },
		func() string { return s.Call("Async.VDI.destroy", there).(string) },
	}
	for i := range n {
		call, at := i%len(calls), 1+r.Intn(32)
		where := fmt.Sprintf("round %d: call %d dies at step %d", i, call, at)
		if err := os.WriteFile(plan, fmt.Appendf(nil, "die@%d", at), 0o600); err != nil {
			t.Fatal(err)
		}
		before := len(s.All("VDI")) + len(s.All("SR"))
		task := calls[call]()
		until(t, where+": the call ends or the member dies", func() bool {
			return !f.away.Running() || s.Call("task.get_status", task) != "pending"
		})
		died := !f.away.Running()
		os.Remove(plan)
		if died {
			f.away.Up()
		}
		f.connected(true)
		rec := s.Wait(task)
		t.Logf("%s: died %v, ended as %v %v", where, died, rec["status"], rec["error_info"])
		if !died && rec["status"] != "success" {
			t.Errorf("%s: %v", where, rec["error_info"])
		}
		f.whole(where)
		now := len(s.All("VDI")) + len(s.All("SR"))
		if info := fmt.Sprint(rec["error_info"]); rec["status"] != "success" && now != before && (now != before+1 || !strings.Contains(info, "look before")) {
			t.Errorf("%s: it is said to have failed as %s, and there are %d objects, %d before", where, info, now, before)
		}
		f.tidy(&there, golden, second)
	}
	f.agree()
	f.away.Up()
	f.connected(true)
	f.Finish()
}

// whole waits until the images in the member's SR are those of the records.
func (f *far) whole(where string) {
	f.T.Helper()
	var images []string
	records := map[string]bool{}
	ok := func() bool {
		clear(records)
		for ref, rec := range f.s.All("VDI") {
			if rec["SR"] == f.sr {
				records[rec["uuid"].(string)+".img"] = true
				if f.s.Call("patchd.vdi_verify", ref) != "" {
					return false
				}
			}
		}
		images, _ = filepath.Glob(f.dir + "/*.img")
		parts, _ := filepath.Glob(f.dir + "/*.*.*")
		for _, name := range images {
			if !records[filepath.Base(name)] {
				return false
			}
		}
		return len(images) == len(records) && len(parts) == 0
	}
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			all, _ := filepath.Glob(f.dir + "/*")
			f.T.Fatalf("%s: the folder holds %v, the records are %v", where, all, slices.Sorted(maps.Keys(records)))
		}
	}
}

// tidy destroys what a round has made, and makes again what it has destroyed.
func (f *far) tidy(there *string, golden, second string) {
	f.T.Helper()
	kept := false
	for ref, rec := range f.s.All("VDI") {
		switch {
		case ref == golden:
		case rec["SR"] == f.sr && !kept:
			*there, kept = ref, true
		default:
			f.s.Call("VDI.destroy", ref)
		}
	}
	if !kept {
		*there = f.s.Call("VDI.copy", golden, f.sr).(string)
	}
	for ref, rec := range f.s.All("SR") {
		if rec["name_label"] == "second" {
			f.s.Call("SR.destroy", ref)
		}
	}
	if left, _ := filepath.Glob(second + "/*"); len(left) > 0 {
		f.T.Errorf("left of an SR: %v", left)
	}
}

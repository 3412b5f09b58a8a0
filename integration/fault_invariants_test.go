package integration

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// invariants checks, on a running daemon, what must be true after every fault.
func invariants(t testing.TB, v *victim) {
	t.Helper()
	v.allEnded(t)
	v.CheckNothingLeft()
	if pids := processes("runner\x00--groups\x00" + v.GroupPrefix()); len(pids) > 0 {
		t.Errorf("runners are left: %v", pids)
	}
	if groups := v.groups(); len(groups) > 0 {
		t.Errorf("control groups are left: %v", groups)
	}
	patches, vdis, hps := v.s.All("pool_patch"), v.s.All("VDI"), v.s.All("host_patch")
	images := map[string]bool{}
	for ref, rec := range vdis {
		path := filepath.Join(v.StateDir, "sr", rec["uuid"].(string)+".img")
		images[path] = true
		images[mapBeside(path)] = true
		if !exists(path) || !exists(mapBeside(path)) || rec["missing"] == true {
			t.Errorf("VDI %s has no image, or no block map: %v", ref, rec)
		}
	}
	for _, f := range append(inSR(t, filepath.Join(v.StateDir, "sr"), "*"), v.uploads()...) {
		if !images[f] {
			t.Errorf("no VDI is %s", f)
		}
	}
	used := map[any]bool{}
	for ref, rec := range patches {
		if vdi := rec["VDI"].(string); vdi != nullRef && vdis[vdi] == nil {
			t.Errorf("patch %s names the VDI %s, which does not exist", ref, vdi)
		}
		used[rec["VDI"]] = true
	}
	for ref, rec := range vdis {
		if !used[ref] {
			t.Errorf("VDI %s belongs to no patch: %v", ref, rec)
		}
	}
	for _, k := range v.patches {
		v.checkPatch(t, k, patches, hps)
	}
	if log := v.Log(); strings.Contains(log, "panic:") || strings.Contains(log, "panicked") {
		t.Error("something panicked")
	}
}

// uploads lists the logs of resumable uploads.
func (v *victim) uploads() []string {
	logs, _ := filepath.Glob(filepath.Join(v.StateDir, "uploads", "*"))
	return logs
}

// groups lists the control groups of this host, once what is just being
// removed had its time.
func (v *victim) groups() (found []string) {
	for range 100 {
		found = nil
		for _, pattern := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
			entries, _ := filepath.Glob(pattern + v.GroupPrefix() + "/*/cgroup.procs")
			found = append(found, entries...)
		}
		if len(found) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return found
}

// allEnded waits until no task is pending, and checks that none has ended twice.
func (v *victim) allEnded(t testing.TB) {
	t.Helper()
	var pending []any
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		pending = nil
		for ref, rec := range v.s.All("task") {
			status := rec["status"]
			if status == "pending" || status == "cancelling" {
				pending = append(pending, rec)
				continue
			}
			if was, ok := v.ended[ref]; ok && was != status {
				t.Errorf("task %s was %s and is %s", ref, was, status)
			}
			v.ended[ref] = status
		}
		if len(pending) == 0 {
			return
		}
	}
	t.Errorf("tasks do not end: %v", pending)
}

func (v *victim) checkPatch(t testing.TB, k *told, patches, hps map[string]lab.Record) {
	t.Helper()
	var ref string
	for r, rec := range patches {
		if rec["uuid"] == string(k.UUID) {
			ref = r
		}
	}
	switch {
	case ref == "" && k.uploaded == yes && k.destroyed == no:
		t.Errorf("patch %s was acknowledged and is not there", k.UUID)
	case ref != "" && k.uploaded == no:
		t.Errorf("patch %s was refused and is there", k.UUID)
	case ref != "" && k.destroyed == yes:
		t.Errorf("patch %s was destroyed and is there", k.UUID)
	}
	if ref != "" {
		v.checkImage(t, k, patches[ref])
	}
	v.checkApplied(t, k, ref, hps)
}

// checkImage reads the image of a patch back.
func (v *victim) checkImage(t testing.TB, k *told, rec lab.Record) {
	t.Helper()
	if rec["VDI"] == nullRef {
		if k.cleaned == no {
			t.Errorf("patch %s has lost its VDI", k.UUID)
		}
		return
	}
	if k.cleaned == yes {
		t.Errorf("patch %s was cleaned and has a VDI", k.UUID)
	}
	path := v.imageOf(rec["VDI"].(string))
	payload, err := exec.Command("debugfs", "-R", "cat patch", path).Output()
	if sum := sha256.Sum256(payload); err != nil || hex.EncodeToString(sum[:]) != k.digest {
		t.Errorf("%s does not hold the payload of %s: %v", path, k.UUID, err)
	}
	sum, mapSum := fileSum(t, path), fileSum(t, mapBeside(path))
	if k.golden == "" {
		k.golden, k.goldenMap = sum, mapSum
		if text := verifyVDI(v.s, rec["VDI"].(string)); text != "" {
			t.Errorf("the image of %s is damaged: %s", k.UUID, text)
		}
	}
	if sum != k.golden || mapSum != k.goldenMap {
		t.Errorf("the golden image of %s, or its block map, has changed", k.UUID)
	}
}

// mapBeside is the file of the block map of an image.
func mapBeside(path string) string { return strings.TrimSuffix(path, ".img") + ".map" }

// imageOf is the file of a VDI.
func (v *victim) imageOf(vdi string) string {
	if v.where != nil {
		return v.where(vdi)
	}
	return image(v.s, vdi)
}

// checkApplied compares what was done to the host with stampfile and record.
func (v *victim) checkApplied(t testing.TB, k *told, ref string, hps map[string]lab.Record) {
	t.Helper()
	effects, stamp := lines(k.effect), exists(filepath.Join(v.PatchDir, "applied", string(k.UUID)))
	if effects > k.asked {
		t.Errorf("patch %s was applied %d times and asked for %d times", k.UUID, effects, k.asked)
	}
	state := "absent"
	for _, hp := range hps {
		if hp["pool_patch"] != ref {
			continue
		}
		switch {
		case state != "absent":
			t.Errorf("patch %s has two host_patches", k.UUID)
		case hp["applied"] == true:
			state = "applied"
		default:
			state = fmt.Sprint(hp["other_config"].(map[string]any)["patchd-state"])
		}
	}
	switch {
	case (state == "applied") != stamp:
		t.Errorf("patch %s: host_patch %s, stampfile %v", k.UUID, state, stamp)
	case !slices.Contains([]string{"absent", "applied", "unknown"}, state):
		t.Errorf("patch %s: host_patch %s", k.UUID, state)
	case state == "unknown" && !k.killed:
		t.Errorf("patch %s: its runner was not killed, and its end is unknown", k.UUID)
	case state == "applied" && effects == 0:
		t.Errorf("patch %s is said to be applied and was not", k.UUID)
	case state == "absent" && effects > 0 && !k.spoilt:
		t.Errorf("patch %s was applied and is said not to be", k.UUID)
	case k.applied == yes && state != "applied":
		t.Errorf("the apply of %s was acknowledged: host_patch %s", k.UUID, state)
	}
}

// works checks that the main job works, and has its patches looked at later,
// all at once.
func (v *victim) works(t testing.TB) {
	t.Helper()
	k := v.fresh(lab.Patch{})
	if err := v.upload(k, false); err != nil {
		t.Fatalf("upload: %v", err)
	}
	if err := v.apply(k, "pool_patch.apply"); err != nil {
		t.Fatalf("apply: %v", err)
	}
	v.old, v.patches = append(v.old, v.patches...), nil
}

// finish looks at everything once more, and at what only the database shows.
func (v *victim) finish(t testing.TB) {
	t.Helper()
	v.patches, v.old = append(v.old, v.patches...), nil
	invariants(t, v)
	v.Down()
	out, errs, code := v.CLI("store", "backup", "-")
	if code != 0 {
		t.Fatalf("backup: %s", errs)
	}
	for line := range strings.Lines(out) {
		var rec struct {
			Class string
			Value struct{ State string }
		}
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			t.Fatal(err)
		}
		ended := rec.Value.State == "done" || rec.Value.State == "stopped" || rec.Value.State == "cancelled"
		atWork := rec.Value.State == "prechecking" || rec.Value.State == "applying"
		if rec.Class == "intent" || (rec.Class == "job" || rec.Class == "run") && !ended || rec.Class == "run_host" && atWork {
			t.Errorf("left in the database: %s", line)
		}
	}
}

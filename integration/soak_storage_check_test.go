package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// path is the file of a VDI.
func (s *soaker) path(t testing.TB, rec lab.Record) string {
	t.Helper()
	for _, sr := range s.srs {
		if sr.ref == rec["SR"] {
			return filepath.Join(sr.dir, rec["uuid"].(string)+".img")
		}
	}
	t.Fatalf("VDI %v is on no SR", rec)
	return ""
}

// check holds a daemon at rest against what its clients were told.
func (s *soaker) check(t *testing.T) {
	t.Helper()
	s.allEnded(t)
	s.CheckNothingLeft()
	patches, vdis, hps := s.s.All("pool_patch"), s.s.All("VDI"), s.s.All("host_patch")
	owned := map[string]bool{}
	live := s.golds[:0:0]
	for _, k := range s.golds {
		ref := s.checkGold(t, k, patches, vdis, hps)
		if ref == "" {
			continue
		}
		k.uploaded, k.destroyed, k.away = yes, no, false
		owned[k.vdi] = true
		live = append(live, k)
	}
	s.golds = live
	s.match(t, vdis, owned)
	for ref, rec := range vdis {
		if !owned[ref] {
			t.Errorf("nobody was told of VDI %s: %v", ref, rec)
		}
	}
	s.checkVolumes(t, vdis)
	s.checkHost(t)
	if log := s.Log(); strings.Contains(log, "panic:") || strings.Contains(log, "panicked") {
		t.Error("something panicked")
	}
	s.note("the check is over")
}

// checkGold looks at one patch and gives its ref, "" when it is gone.
func (s *soaker) checkGold(t *testing.T, k *gold, patches, vdis, hps map[string]lab.Record) string {
	t.Helper()
	s.checkPatch(t, k.told, patches, hps)
	for ref, rec := range patches {
		if rec["uuid"] != string(k.UUID) {
			continue
		}
		if k.vdi, _ = rec["VDI"].(string); k.vdi == nullRef {
			k.vdi = ""
			s.s.Call("pool_patch.pool_clean", ref) // it was half destroyed
			return ""
		}
		if vdis[k.vdi] == nil {
			t.Errorf("patch %s names the VDI %s, which does not exist", k.UUID, k.vdi)
			return ""
		}
		s.checkVerified(t, vdis[k.vdi]["uuid"].(string))
		return ref
	}
	return ""
}

// checkVerified asks patchd itself.
func (s *soaker) checkVerified(t *testing.T, uuid string) {
	t.Helper()
	if _, errs, code := s.CLI("vdi", "verify", uuid); code != 0 {
		t.Errorf("vdi verify %s: %d %s", uuid, code, errs)
	}
}

// match finds the VDIs that are there for those that clients have made, and
// looks at their bytes.
func (s *soaker) match(t *testing.T, vdis map[string]lab.Record, owned map[string]bool) {
	t.Helper()
	sums := map[string]string{}
	for ref, rec := range vdis {
		if rec["missing"] == true {
			t.Errorf("VDI %s has no image: %v", ref, rec)
			continue
		}
		sums[ref] = fileSum(t, s.path(t, rec))
	}
	// First those whose ref is known, then those that nobody was told of.
	slices.SortStableFunc(s.things, func(a, b *thing) int { return strings.Compare(b.ref, a.ref) })
	live := s.things[:0:0]
	for _, it := range s.things {
		if it.ref == "" && it.made != no {
			it.ref = findImage(it, vdis, sums, owned)
		}
		rec := vdis[it.ref]
		switch {
		case rec == nil && it.made == yes && it.gone == no:
			t.Errorf("the VDI %s was acknowledged (%s) and is not there", it.ref, it.what)
		case rec != nil && it.gone == yes:
			t.Errorf("the VDI %s was destroyed (%s) and is there", it.ref, it.what)
		}
		if rec == nil {
			continue
		}
		owned[it.ref] = true
		if it.sum != "" && sums[it.ref] != it.sum {
			t.Errorf("VDI %s, %s, holds something else than it should", it.ref, it.what)
		}
		mapped := exists(mapBeside(s.path(t, rec)))
		if it.sum != "" && mapped != it.golden {
			t.Errorf("VDI %s, %s, has a map: %v", it.ref, it.what, mapped)
		}
		if mapped {
			s.checkVerified(t, rec["uuid"].(string))
		}
		it.made, it.gone, it.sum, it.golden, it.old, it.away = yes, no, sums[it.ref], mapped, true, false
		live = append(live, it)
	}
	s.things = live
}

// findImage gives the VDI that a client has made without getting to know it, or "".
func findImage(it *thing, vdis map[string]lab.Record, sums map[string]string, owned map[string]bool) string {
	for ref := range vdis {
		if !owned[ref] && sums[ref] == it.sum {
			return ref
		}
	}
	return ""
}

// checkVolumes: an SR holds the images and the maps of its VDIs and nothing
// else, and has promised their room and no other.
func (s *soaker) checkVolumes(t *testing.T, vdis map[string]lab.Record) {
	t.Helper()
	for _, sr := range s.srs {
		var promised int64
		want := map[string]bool{}
		for _, rec := range vdis {
			if rec["SR"] == sr.ref {
				want[rec["uuid"].(string)+".img"] = true
				promised += number(t, rec["virtual_size"])
			}
		}
		names, err := os.ReadDir(sr.dir)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, n := range names {
			name, isMap := strings.CutSuffix(n.Name(), ".map")
			switch {
			case strings.HasPrefix(name, ".") || name == "lost+found":
			case isMap && want[name+".img"]:
			case want[name]:
			default:
				t.Errorf("left on SR %s: %s", sr.name, n.Name())
			}
		}
		if got := number(t, s.s.Call("SR.get_virtual_allocation", sr.ref)); got != promised {
			t.Errorf("SR %s has promised %d bytes, its VDIs have %d", sr.name, got, promised)
		}
	}
}

// checkHost: loop devices and mounts are those of the SRs, no upload has left its
// log, and patchd itself finds nothing to look at.
func (s *soaker) checkHost(t *testing.T) {
	t.Helper()
	var own []string
	for _, sr := range s.srs {
		if strings.HasPrefix(sr.dir, s.StateDir+"/mnt/") && s.plugged(sr) {
			own = append(own, sr.dir)
		}
	}
	if loops := loopsOf(t, s.disks); len(loops) != len(own) {
		t.Errorf("loop devices: %v", loops)
	}
	if mounts := mountsBelow(t, s.StateDir); len(mounts) != len(own) {
		t.Errorf("mounts: %v", mounts)
	}
	for _, dir := range []string{"uploads", "jobs"} {
		if names, err := os.ReadDir(filepath.Join(s.StateDir, dir)); err != nil && !os.IsNotExist(err) || len(names) > 0 {
			t.Errorf("left in %s: %v %v", dir, names, err)
		}
	}
	var bad []string
	for range 3 { // the scrub may be about to look again
		bad = nil
		for _, f := range s.s.Call("patchd.doctor").([]any) {
			if f := f.(map[string]any); f["ok"] != "true" && f["check"] != "room" {
				bad = append(bad, f["check"].(string)+" "+f["uuid"].(string)+": "+f["text"].(string))
			}
		}
		if len(bad) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("the doctor says: %s", strings.Join(bad, "; "))
}

func (s *soaker) plugged(sr soakSR) bool {
	s.T.Helper()
	return s.s.Call("PBD.get_currently_attached", pbdOf(s.s, sr.ref)) == true
}

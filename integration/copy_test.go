package integration

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// VDI.copy of an uploaded patch to another SR, with the daemon killed in the
// middle: whether the client waited for the answer or not, the same task ends in
// success after the restart, the copy has the same bytes, and nothing else is left.
func TestB6_CopyKilledInTheMiddleGoesOn(t *testing.T) {
	t.Parallel()
	targetFS := ext4FS(t, 300*mib)
	v := newVictim(t, lab.Options{Dir: ext4FS(t, 700*mib)})
	s := v.s
	target := newSR(s, "target", targetFS)
	where := s.Call("PBD.get_device_config", pbdOf(s, target)).(map[string]any)["location"].(string)
	golden := vdiOf(s, s.MustUpload(&lab.Patch{Pad: 24 << 20}))
	want := fileSum(t, image(s, golden))
	before := len(s.All("VDI"))
	seen := map[string]bool{}
	for i, plan := range []string{
		"",                     // killed from outside, when the part is there
		"die@sr.create.done",   // the part is empty
		"die@vdi.block.done#5", // in the middle
		"die@vdi.copy.done",    // its bytes are there
		"die@sr.rename#1",      // the map is about to get its name
		"die@sr.rename.done#2", // the image has it, and no record
	} {
		method := []string{"VDI.copy", "Async.VDI.copy"}[i%2]
		v.let(plan, "")
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			s.Try(method, golden, target, nullRef, nullRef)
		}()
		if plan == "" {
			until(t, "the part volume", func() bool { return len(inSR(t, where, "part.*")) > 0 })
			v.Kill()
		}
		<-v.Exited()
		<-gone
		mark := v.mark()
		v.up()
		task := ""
		for ref, rec := range s.All("task") {
			if strings.HasSuffix(rec["name_label"].(string), "VDI.copy") && !seen[ref] {
				task, seen[ref] = ref, true
			}
		}
		if task == "" {
			t.Fatalf("%s %q: its task is gone", method, plan)
		}
		rec := s.Wait(task)
		if rec["status"] != "success" {
			t.Fatalf("%s %q: %v", method, plan, rec)
		}
		made := strings.TrimSuffix(strings.TrimPrefix(rec["result"].(string), "<value>"), "</value>")
		if fileSum(t, filepath.Join(where, s.Call("VDI.get_uuid", made).(string)+".img")) != want {
			t.Errorf("%s %q: the copy differs", method, plan)
		}
		if left := inSR(t, where, "*"); len(left) != 2 || len(s.All("VDI")) != before+1 {
			t.Errorf("%s %q: the SR holds %v", method, plan, left)
		}
		if plan == "die@vdi.copy.done" && v.count(mark, "vdi.block") > 0 {
			t.Error("what was copied was copied again")
		}
		s.Call("VDI.destroy", made)
		if left := inSR(t, where, "*"); len(left) != 0 {
			t.Errorf("%s %q: left %v", method, plan, left)
		}
	}
	v.CheckNothingLeft()
	if fileSum(t, image(s, golden)) != want {
		t.Error("the golden image has changed")
	}
}

// count tells how often a point was passed since mark.
func (v *victim) count(mark int64, point string) (n int) {
	for _, names := range v.passed(mark) {
		for _, name := range names {
			if name == point {
				n++
			}
		}
	}
	return n
}

// inSR lists the volumes in the folder of an SR that match pattern.
func inSR(t testing.TB, dir, pattern string) (found []string) {
	t.Helper()
	for _, suffix := range []string{".img", ".map"} {
		names, err := filepath.Glob(filepath.Join(dir, pattern+suffix))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, names...)
	}
	return found
}

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// stock makes patches in each of the states that file and VDI can be in.
type stock struct {
	t *testing.T
	h *lab.Host
	s *lab.Session
}

// states of a patch: what of it is still there.
var states = []string{"in a VDI", "VDI gone", "in a file", "file gone"}

// made gives a patch in the state, with its file ("" when it never had one) and
// its VDI ("" when it never had one).
func (k stock) made(state string) (patch, file, vdi string) {
	k.t.Helper()
	p := &lab.Patch{Label: state}
	if strings.Contains(state, "VDI") {
		patch = k.s.MustUpload(p)
		vdi = vdiOf(k.s, patch)
		if state == "VDI gone" {
			k.s.Call("VDI.destroy", vdi)
		}
		return patch, "", vdi
	}
	signed := filepath.Join(k.t.TempDir(), "x.patch")
	if err := os.WriteFile(signed, p.Signed(k.t), 0o600); err != nil {
		k.t.Fatal(err)
	}
	before, _ := filepath.Glob(k.h.PatchDir + "/*-*")
	if out, errs, code := k.h.CLI("patch", "import", signed); code != 0 {
		k.t.Fatalf("import: %s%s", out, errs)
	}
	after, _ := filepath.Glob(k.h.PatchDir + "/*-*")
	if len(after) != len(before)+1 {
		k.t.Fatalf("%v after %v", after, before)
	}
	for _, f := range after {
		if !strings.Contains(strings.Join(before, " "), f) {
			file = f
		}
	}
	patch = k.s.Call("pool_patch.get_by_uuid", string(p.UUID)).(string)
	if state == "file gone" {
		if err := os.Remove(file); err != nil {
			k.t.Fatal(err)
		}
	}
	return patch, file, ""
}

func (k stock) live(class, ref string) bool {
	_, err := k.s.Try(class+".get_uuid", ref)
	return err == nil
}

// A7, S1-19, S1-20, S1-21, S1-22, S1-23: the truth table of what removes what.
// Only destroy removes a record, after file and VDI.
func TestA7_S1_23_TruthTable(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	k := stock{t, h, s}
	calls := map[string]struct{ record, file, vdi bool }{ // what stays
		"clean":         {record: true, vdi: true},
		"clean_on_host": {record: true, vdi: true},
		"pool_clean":    {record: true},
		"destroy":       {},
		"VDI.destroy":   {record: true, file: true},
	}
	for call, stays := range calls {
		for _, state := range states {
			t.Run(call+" of a patch "+state, func(t *testing.T) {
				k.t = t
				patch, file, vdi := k.made(state)
				hadVDI, hadFile := state == "in a VDI", state == "in a file"
				switch call {
				case "clean_on_host":
					s.Call("pool_patch."+call, patch, s.Host())
				case "VDI.destroy":
					if hadVDI {
						s.Call(call, vdi)
					} else {
						_, err := s.Try(call, vdiOf(s, patch))
						hasCode(t, err, "HANDLE_INVALID")
					}
				default:
					s.Call("pool_patch."+call, patch)
				}
				if k.live("pool_patch", patch) != stays.record {
					t.Errorf("the record stays: %v", !stays.record)
				}
				if vdi != "" && k.live("VDI", vdi) != (hadVDI && stays.vdi) {
					t.Errorf("the VDI stays: %v", !(hadVDI && stays.vdi))
				}
				if file != "" && exists(file) != (hadFile && stays.file) {
					t.Errorf("the file stays: %v", exists(file))
				}
				if !stays.record {
					return
				}
				if want := vdi; vdiOf(s, patch) != nullRef && (!hadVDI || !stays.vdi || vdiOf(s, patch) != want) {
					t.Errorf("the VDI field is %s", vdiOf(s, patch))
				}
				s.Call("pool_patch."+strings.Replace(call, "VDI.destroy", "clean", 1), append([]any{patch}, hostOf(s, call)...)...) // once more changes nothing
				s.Call("pool_patch.destroy", patch)
				if k.live("pool_patch", patch) {
					t.Error("destroy leaves the record")
				}
			})
		}
	}
	if n := strings.Count(h.Log(), "deprecated call"); n < 3*len(states) {
		t.Errorf("the log tells %d times that a call is deprecated", n)
	}
	if left, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "*.img")); len(left) > 0 {
		t.Errorf("%v", left)
	}
}

func hostOf(s *lab.Session, call string) []any {
	if call == "clean_on_host" {
		return []any{s.Host()}
	}
	return nil
}

// S1-23: what cannot be removed keeps its record, and the error says so.
func TestA7_S1_23_DestroyThatFailsKeepsTheRecord(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	k := stock{t, h, s}
	inFile, file, _ := k.made("in a file")
	// In the place of the file something that cannot just be deleted.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(file, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Try("pool_patch.destroy", inFile); err == nil || !k.live("pool_patch", inFile) {
		t.Errorf("%v; the record stays: %v", err, k.live("pool_patch", inFile))
	}
	if err := os.RemoveAll(file); err != nil {
		t.Fatal(err)
	}
	s.Call("pool_patch.destroy", inFile)

	inVDI, _, vdi := k.made("in a VDI")
	sr, _ := s.One("SR")
	s.Call("PBD.unplug", pbdOf(s, sr))
	if _, err := s.Try("pool_patch.destroy", inVDI); err == nil || !k.live("pool_patch", inVDI) || !k.live("VDI", vdi) {
		t.Errorf("%v; the record stays: %v, the VDI: %v", err, k.live("pool_patch", inVDI), k.live("VDI", vdi))
	}
	s.Call("PBD.plug", pbdOf(s, sr))
	s.Call("pool_patch.destroy", inVDI)
	if k.live("VDI", vdi) || k.live("pool_patch", inVDI) {
		t.Error("destroy leaves something")
	}
}

// S1-08, S1-22, S1-39: a cleaned patch keeps its record, whose VDI field names
// nothing; the same upload takes its place under the same ref. While its VDI
// is there it is refused.
func TestS1_39_CleanedPatchIsUploadedAgain(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	p := &lab.Patch{Pad: 2000}
	signed := p.Signed(t)
	if a := s.Upload(signed); a.Status != 201 {
		t.Fatalf("%s", a.Body)
	}
	ref, _ := s.One("pool_patch")
	s.Call("pool_patch.add_to_other_config", ref, "mine", "kept")
	wantCode(t, uploadErr(s, signed), "PATCH_ALREADY_EXISTS", string(p.UUID))
	s.Call("VDI.destroy", vdiOf(s, ref))
	if v := vdiOf(s, ref); v != nullRef {
		t.Errorf("the VDI field is %s", v)
	}
	_, err := precheck(s, ref)
	wantCode(t, err, "CANNOT_FIND_PATCH")
	if a := s.Upload(signed); a.Status != 201 {
		t.Fatalf("%s", a.Body)
	}
	again, rec := s.One("pool_patch")
	if again != ref || rec["VDI"] == nullRef || rec["other_config"].(map[string]any)["mine"] != "kept" {
		t.Errorf("%s, then %s: %v", ref, again, rec)
	}
	if _, err := apply(s, ref); err != nil {
		t.Error(err)
	}
}

// S1-19, S1-20: on a patch in a VDI the deprecated calls change nothing.
func TestS1_20_CleanDoesNotTouchAVDI(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := s.MustUpload(&lab.Patch{})
	sum := fileSum(t, image(s, vdiOf(s, p)))
	s.Call("pool_patch.clean", p)
	s.Call("pool_patch.clean_on_host", p, s.Host())
	if got := fileSum(t, image(s, vdiOf(s, p))); got != sum {
		t.Error("the image has changed")
	}
	if _, err := apply(s, p); err != nil {
		t.Error(err)
	}
	if !strings.Contains(h.Log(), "VDI.destroy") {
		t.Error("the log does not name what to use instead")
	}
}

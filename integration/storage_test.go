package integration

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// S1-04, S1-28: where the SR of the golden image cannot clone and has no room,
// the image is copied to another SR that the host reaches; and VDI.copy makes
// the same bytes there.
func TestS1_28_AppliedByWayOfAnotherSR(t *testing.T) {
	t.Parallel()
	narrowFS, wideFS := ext4FS(t, 64*mib), ext4FS(t, 1*gib)
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	small := newSR(s, "small", narrowFS)
	wide := newSR(s, "wide", wideFS)
	first := defaultSR(s)
	s.Call("PBD.unplug", pbdOf(s, first))
	p := &lab.Patch{Pad: 20 << 20, Apply: `dev=$(df --output=source "$0" | tail -n 1); cat /sys/block/${dev#/dev/}/loop/backing_file`}
	signed := p.Signed(t)
	a, err := s.Put("/pool_patch_upload", url.Values{"sr_id": {small}}, strings.NewReader(string(signed)), int64(len(signed)))
	if err != nil || a.Status != 201 {
		t.Fatalf("%v %d %s", err, a.Status, a.Body)
	}
	ref := a.Record()["ref"].(string)
	vdi := vdiOf(s, ref)
	if s.Call("VDI.get_SR", vdi) != small {
		t.Error("it lies in another SR than was asked for")
	}
	out, err := apply(s, ref)
	if err != nil {
		t.Fatal(err)
	}
	where := s.Call("PBD.get_device_config", pbdOf(s, wide)).(map[string]any)["location"].(string)
	if !strings.Contains(out, where+"/work.") {
		t.Errorf("it ran in %s, not in %s", out, where)
	}
	if work, _ := filepath.Glob(where + "/work*"); len(work) > 0 {
		t.Errorf("left: %v", work)
	}
	twin := s.Call("VDI.copy", vdi, wide).(string)
	golden := filepath.Join(s.Call("PBD.get_device_config", pbdOf(s, small)).(map[string]any)["location"].(string), s.Call("VDI.get_uuid", vdi).(string)+".img")
	copied := filepath.Join(where, s.Call("VDI.get_uuid", twin).(string)+".img")
	if fileSum(t, golden) != fileSum(t, copied) {
		t.Error("the copy differs")
	}
	if n := allocated(t, copied); n > int64(len(signed))*11/10+2*mib {
		t.Errorf("the copy takes %d bytes", n)
	}
	// The copy is a plain disk: the patch's record still names the first.
	if vdiOf(s, ref) != vdi {
		t.Error("the record names the copy")
	}
	s.Call("VDI.destroy", twin)
}

// S1-32: too little room on every SR that the host reaches: precheck and apply
// say how much there is and how much is needed, before anything runs.
func TestS1_32_TooLittleRoom(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{Dir: ext4FS(t, 700*mib)}).Root()
	effect := filepath.Join(t.TempDir(), "effect")
	p := s.MustUpload(&lab.Patch{Extra: ` scratch-size="5000000000"`, Precheck: "echo ran >> " + effect})
	for _, call := range []func(*lab.Session, string) (string, error){precheck, apply} {
		_, err := call(s, p)
		params := hasCode(t, err, "PATCH_PRECHECK_FAILED_OUT_OF_SPACE")
		if len(params) != 3 || params[0] != p {
			t.Fatalf("%q", params)
		}
		found, required := number(t, params[1]), number(t, params[2])
		if found <= 0 || found > 700*mib || required < 5_000_000_000 {
			t.Errorf("found %d, required %d", found, required)
		}
	}
	if lines(effect) != 0 || len(s.All("host_patch")) != 0 {
		t.Error("something ran")
	}
}

// S1-10, S1-11, S1-12, S1-13: which SR an upload goes to.
func TestS1_10_to_13_ChoiceOfTheSR(t *testing.T) {
	t.Parallel()
	plainFS, cloningFS := ext4FS(t, 300*mib), xfsFS(t, 400*mib)
	h := lab.Start(t, lab.Options{Dir: ext4FS(t, 1*gib)})
	s := h.Root()
	pool, _ := s.One("pool")
	first, frec := s.One("SR")
	plain := newSR(s, "plain", plainFS)
	upload := func(query url.Values) (lab.Answer, string) {
		t.Helper()
		signed := (&lab.Patch{}).Signed(t)
		a, err := s.Put("/pool_patch_upload", query, strings.NewReader(string(signed)), int64(len(signed)))
		if err != nil {
			t.Fatal(err)
		}
		if a.Status != 201 {
			return a, ""
		}
		return a, s.Call("VDI.get_SR", a.Record()["VDI"]).(string)
	}
	lands := func(want, why string, query url.Values) {
		t.Helper()
		if a, sr := upload(query); sr != want {
			t.Errorf("%s: it went to %s: %s", why, sr, a.Body)
		}
	}
	lands(first, "no SR in the request: the default", nil) // S1-10
	s.Call("pool.set_default_SR", pool, plain)
	lands(plain, "the default", nil) // S1-11
	lands(first, "sr_id", url.Values{"sr_id": {first}})
	lands(first, "sr_uuid", url.Values{"sr_uuid": {frec["uuid"].(string)}})

	s.Call("pool.set_default_SR", pool, nullRef) // S1-13
	a, _ := upload(nil)
	params := hasCode(t, a.Err(), "DEFAULT_SR_NOT_FOUND")
	if a.Status != 409 || len(params) != 2 || params[0] != nullRef || !strings.Contains(params[1], "VDI_CLONE") {
		t.Errorf("%d %q", a.Status, params)
	}
	cloning := newSR(s, "cloning", cloningFS) // S1-12
	lands(cloning, "no default: the one that clones", nil)
	s.Call("pool.set_default_SR", pool, plain)
	s.Call("PBD.unplug", pbdOf(s, plain))
	lands(cloning, "an unplugged default: the one that clones", nil)
	a, _ = upload(url.Values{"sr_id": {plain}})
	wantCode(t, a.Err(), "SR_NOT_ATTACHED", plain)
	a, _ = upload(url.Values{"sr_id": {"OpaqueRef:nothing"}})
	wantCode(t, a.Err(), "HANDLE_INVALID", "SR", "OpaqueRef:nothing")
	for _, tricky := range []string{"../../etc", "/etc/passwd", "%00", strings.Repeat("x", 4000)} {
		if a, _ := upload(url.Values{"sr_uuid": {tricky}}); a.Err() == nil {
			t.Errorf("sr_uuid %.20q: %d %s", tricky, a.Status, a.Body)
		}
	}
	s.Call("PBD.unplug", pbdOf(s, cloning)) // neither is there
	a, _ = upload(nil)
	if params := hasCode(t, a.Err(), "DEFAULT_SR_NOT_FOUND"); len(params) != 2 || params[0] != plain {
		t.Errorf("%q", params)
	}
	task := s.Call("task.create", "upload", "").(string)
	if a, _ := upload(url.Values{"task_id": {task}}); a.Status != 200 {
		t.Errorf("with a task: %d", a.Status)
	}
	if rec := s.Wait(task); rec["error_info"].([]any)[0] != "DEFAULT_SR_NOT_FOUND" {
		t.Errorf("%v", rec)
	}
}

// S1-13: no SR at all, because it was forgotten or destroyed.
func TestS1_13_NoSRAtAll(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"SR.forget", "SR.destroy"} {
		h := lab.Start(t, lab.Options{})
		s := h.Root()
		sr := defaultSR(s)
		if end == "SR.forget" {
			s.Call("PBD.unplug", pbdOf(s, sr))
			s.Call("PBD.destroy", pbdOf(s, sr))
		}
		if _, err := s.Try(end, sr); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if params := hasCode(t, uploadErr(s, (&lab.Patch{}).Signed(t)), "DEFAULT_SR_NOT_FOUND"); len(params) != 2 {
				t.Errorf("%q", params)
			}
			h.Restart() // no new SR is made behind the admin's back
			s = h.Root()
		}
		h.Down()
	}
}

// A default SR that is full is not passed over: its admin wants to hear it.
func TestS1_12_FullDefaultIsNotPassedOver(t *testing.T) {
	t.Parallel()
	dir, cloning := ext4FS(t, 64*mib), xfsFS(t, 400*mib)
	s := lab.Start(t, lab.Options{}).Root()
	pool, _ := s.One("pool")
	full := newSR(s, "full", dir)
	newSR(s, "cloning", cloning)
	s.Call("pool.set_default_SR", pool, full)
	if err := os.WriteFile(filepath.Join(dir, "other"), make([]byte, 50<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	uuid := s.Call("SR.get_uuid", full).(string)
	wantCode(t, uploadErr(s, (&lab.Patch{Pad: 10 << 20}).Signed(t)), "OUT_OF_SPACE", fmt.Sprintf("full (%s)", uuid))
}

// S1-05, S1-06: the field is in the record, in its getter, and in the CLI.
func TestS1_05_FieldVDI(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{}
	ref := s.MustUpload(p)
	vdi, rec := s.One("VDI")
	if got := s.Call("pool_patch.get_record", ref).(map[string]any)["VDI"]; got != vdi {
		t.Errorf("the record says %v", got)
	}
	out, _, code := h.CLI("patch", "show", string(p.UUID), "--output", "json")
	if code != 0 || !strings.Contains(out, vdi) && !strings.Contains(out, rec["uuid"].(string)) {
		t.Errorf("%d %s", code, out)
	}
}

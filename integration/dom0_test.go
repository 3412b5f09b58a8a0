package integration

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// download gets a classic patch file as a member of a pool does.
func download(t testing.TB, s *lab.Session, uuid string) (int, []byte) {
	t.Helper()
	res, err := http.Get(s.H.URL + "/pool_patch_download?session_id=" + url.QueryEscape(s.Ref) + "&uuid=" + url.QueryEscape(uuid))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode == http.StatusOK && res.ContentLength != int64(len(b)) {
		t.Errorf("Content-Length %d of %d bytes", res.ContentLength, len(b))
	}
	return res.StatusCode, b
}

// S1-07, S1-30: the classic layout of an upgraded host. Files in the patch-dir
// get records whose VDI field names nothing, are served, and are applied from
// where they lie. What is no patch is left alone.
func TestS1_07_S1_30_ClassicFilesAreTakenUpAtStart(t *testing.T) {
	t.Parallel()
	h := lab.Prepare(t, lab.Options{})
	effect := filepath.Join(t.TempDir(), "effect")
	clear := &lab.Patch{Label: "clear-signed", Guidance: "restartHost", Apply: "echo clear >> " + effect}
	binary := &lab.Patch{Label: "binary", Pad: 50_000, Apply: "echo binary >> " + effect}
	files := map[string][]byte{
		"hotfix.xsupdate":                     lab.DefaultKey(t).GPG(t, clear.Payload(), "--clearsign"),
		string(xapi.NewUUID()):                binary.Signed(t),
		string(xapi.NewUUID()) + ".run":       []byte("#!/bin/sh\n"),
		"README":                              []byte("not a patch"),
		".hidden":                             binary.Signed(t),
		"hotfix of somebody else; rm -rf *\n": lab.NewKey(t, "Other <o@example.test>").Sign(t, (&lab.Patch{}).Payload()),
	}
	for name, b := range files {
		putClassic(t, h, name, b)
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(h.PatchDir, "link")); err != nil {
		t.Fatal(err)
	}
	h.Up()
	s := h.Root()
	all := s.All("pool_patch")
	if len(all) != 2 || len(s.All("VDI")) != 0 {
		t.Fatalf("%d patches, %d VDIs", len(all), len(s.All("VDI")))
	}
	for ref, rec := range all {
		signed, p := files["hotfix.xsupdate"], clear
		if rec["uuid"] == string(binary.UUID) {
			p = binary
			for name, b := range files {
				if len(name) == 36 && !strings.Contains(name, " ") {
					signed = b
				}
			}
		}
		if rec["VDI"] != nullRef || rec["name_label"] != p.Label || number(t, rec["size"]) != int64(len(signed)) {
			t.Errorf("%v", rec)
		}
		if status, b := download(t, s, string(p.UUID)); status != 200 || !bytes.Equal(b, signed) {
			t.Errorf("download: %d, %d bytes", status, len(b))
		}
		wantCode(t, uploadErr(s, p.Signed(t)), "PATCH_ALREADY_EXISTS", string(p.UUID))
		if _, err := precheck(s, ref); err != nil {
			t.Error(err)
		}
		if _, err := apply(s, ref); err != nil {
			t.Error(err)
		}
	}
	if n := lines(effect); n != 2 {
		t.Errorf("%d effects", n)
	}
	for name := range files {
		if !exists(filepath.Join(h.PatchDir, name)) {
			t.Errorf("%q is gone", name)
		}
	}
	h.Restart()
	if n := len(s.H.Root().All("pool_patch")); n != 2 {
		t.Errorf("%d patches after a restart", n)
	}
}

// S1-07: the same by `patchd patch import`; and refusals that leave nothing.
func TestS1_07_ImportByHand(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{}
	path := filepath.Join(t.TempDir(), "old.patch")
	if err := os.WriteFile(path, p.Signed(t), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := h.CLI("patch", "import", path); code != 0 {
		t.Fatalf("%d %s%s", code, out, errs)
	}
	ref, rec := s.One("pool_patch")
	if rec["VDI"] != nullRef {
		t.Errorf("%v", rec)
	}
	if _, errs, code := h.CLI("patch", "import", path); code != 1 || !strings.Contains(errs, string(p.UUID)) {
		t.Errorf("twice: %d %s", code, errs)
	}
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("no patch"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{bad, "/etc/shadow", "/dev/zero", "/", t.TempDir(), "/nowhere", "../../../etc/passwd", ""} {
		if _, errs, code := h.CLI("patch", "import", what); code != 1 && code != 2 {
			t.Errorf("import %q: %d %s", what, code, errs)
		}
	}
	if files, _ := filepath.Glob(h.PatchDir + "/*"); len(files) != 1 {
		t.Errorf("in the patch-dir: %q", files)
	}
	// Cleaned by hand: the record stays, and says so.
	files, _ := filepath.Glob(h.PatchDir + "/*-*")
	os.Remove(files[0])
	_, err := apply(s, ref)
	wantCode(t, err, "CANNOT_FIND_PATCH")
	if status, _ := download(t, s, string(p.UUID)); status != 404 {
		t.Errorf("download of a file that is gone: %d", status)
	}
	for _, uuid := range []string{"", "../../etc/passwd", "x", strings.Repeat("a", 5000)} {
		if status, b := download(t, s, uuid); status != 400 {
			t.Errorf("download %.20q: %d %.100s", uuid, status, b)
		}
	}
	if status, _ := download(t, s, string(xapi.NewUUID())); status != 404 {
		t.Errorf("download of an unknown uuid: %d", status)
	}
	if a := s.Upload(p.Signed(t)); a.Status != 201 {
		t.Errorf("upload in its place: %d %s", a.Status, a.Body)
	}
	if vdiOf(s, ref) == nullRef {
		t.Error("the record has no VDI")
	}
}

func infoXML(uuid xapi.UUID, guidance string) string {
	return (&lab.Patch{UUID: uuid, Label: "contained", Version: "1", Guidance: guidance}).XML()
}

// S1-37: the order is check, fetch, precheck, apply, record, and a look at the
// stampfiles, where a roll-up has left those of what it contains.
func TestS1_37_OrderAndRollUp(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	trace := filepath.Join(t.TempDir(), "trace")
	inner := xapi.NewUUID()
	note := func(verb string) string {
		return fmt.Sprintf(`echo "%s $PATCHD_VERB $(ls "$PATCHD_APPLIED_DIR" 2>/dev/null | wc -l)" >> %s`, verb, trace)
	}
	outer := &lab.Patch{Precheck: note("precheck"), Apply: note("apply") + `
mkdir -p "$PATCHD_APPLIED_DIR"; cat > "$PATCHD_APPLIED_DIR/` + string(inner) + `" <<'X'
` + infoXML(inner, "restartPV") + "\nX\n"}
	p := s.MustUpload(outer)
	if _, err := apply(s, p); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(trace)
	if string(b) != "precheck precheck 0\napply apply 0\n" {
		t.Errorf("the order was %q", b)
	}
	// Already applied comes before anything else.
	_, err := apply(s, p)
	wantCode(t, err, "PATCH_ALREADY_APPLIED", p)
	if n := lines(trace); n != 2 {
		t.Errorf("%d verbs ran", n)
	}
	ref := s.Call("pool_patch.get_by_uuid", string(inner)).(string)
	rec := s.Call("pool_patch.get_record", ref).(map[string]any)
	if rec["VDI"] != nullRef || rec["size"] != "0" || rec["name_label"] != "contained" || rec["pool_applied"] != true {
		t.Errorf("%v", rec)
	}
	if n := len(s.All("host_patch")); n != 2 {
		t.Errorf("%d host_patches", n)
	}
	stamp := filepath.Join(h.PatchDir, "applied", string(outer.UUID))
	st, err := os.Stat(stamp)
	if err != nil || st.Mode() != 0o440 {
		t.Errorf("%v %v", st, err)
	}
	if b, _ := os.ReadFile(stamp); !strings.Contains(string(b), string(outer.UUID)) {
		t.Errorf("the stampfile says %q", b)
	}
}

// S1-37: at start the records follow the stampfiles.
func TestS1_37_StampfilesAreTheHostsMemory(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{}
	ref := s.MustUpload(p)
	if _, err := apply(s, ref); err != nil {
		t.Fatal(err)
	}
	h.Down()
	dir := filepath.Join(h.PatchDir, "applied")
	if err := os.Remove(filepath.Join(dir, string(p.UUID))); err != nil {
		t.Fatal(err)
	}
	old, broken, other := xapi.NewUUID(), xapi.NewUUID(), xapi.NewUUID()
	when := time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)
	for name, text := range map[string]string{
		string(old): infoXML(old, "restartXAPI"), string(broken): "<info", string(other): infoXML(xapi.NewUUID(), ""), "notes.txt": "x",
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o440); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
	}
	h.Up()
	s = h.Root()
	_, hp := s.One("host_patch")
	stamped := s.Call("pool_patch.get_by_uuid", string(old)).(string)
	if hp["pool_patch"] != stamped || hp["applied"] != true || hp["timestamp_applied"] != "20200203T04:05:06Z" {
		t.Errorf("%v", hp)
	}
	if rec := s.Call("pool_patch.get_record", ref).(map[string]any); rec["pool_applied"] != false {
		t.Errorf("%v", rec)
	}
	if n := len(s.All("pool_patch")); n != 2 {
		t.Errorf("%d patches", n)
	}
	if _, err := apply(s, ref); err != nil { // the host says it does not have it
		t.Error(err)
	}
}

// S1-35: the newer guidance words are mapped to the four, in the record and by
// what a host_patch remembers; an unknown one is refused.
func TestS1_35_GuidanceWords(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	for words, want := range map[string]string{
		"": "[]", "restartHVM restartPV restartHost restartXAPI": "[restartHVM restartPV restartHost restartXAPI]",
		"RebootHost": "[restartHost]", "EvacuateHost": "[restartHost]", "RestartToolstack": "[restartXAPI]",
		"RestartDeviceModel": "[restartHVM]", "RestartVM": "[restartHVM restartPV]",
		"RebootHostOnLivePatchFailure": "[restartHost]", "RebootHostOnKernelLivePatchFailure": "[restartHost]",
		"RebootHostOnXenLivePatchFailure": "[restartHost]", "RebootHost EvacuateHost restartHost": "[restartHost]",
	} {
		ref := s.MustUpload(&lab.Patch{Guidance: words})
		if got := fmt.Sprint(s.Call("pool_patch.get_after_apply_guidance", ref)); got != want {
			t.Errorf("%s: %s, want %s", words, got, want)
		}
	}
	for _, words := range []string{"restartEverything", "RESTARTHOST", "restartHost,restartPV", "restartHost ../x"} {
		hasCode(t, uploadErr(s, (&lab.Patch{Guidance: words}).Signed(t)), "INVALID_PATCH")
	}
}

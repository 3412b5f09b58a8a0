package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// A base whose image was changed on the SR hands nothing down to what is made
// over a clone of it: its filesystem would not be of the upload.
func TestSecurity_storage_base_with_something_beside(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{Dir: xfsFS(t, gib)})
	s := h.Root()
	c := countTo(t, h)
	dir := t.TempDir()
	data := random(8 << 20)
	apply := "if [ -e helper ]; then echo trapped; else echo alone; fi"
	send := func(version string, data []byte, flags ...string) (*lab.Patch, int64, string) {
		t.Helper()
		p := &lab.Patch{Label: "revised", Version: version, Apply: apply}
		path := filepath.Join(dir, version)
		if err := os.WriteFile(path, lab.DefaultKey(t).Sign(t, append(p.Payload(), data...)), 0o600); err != nil {
			t.Fatal(err)
		}
		sent, _, _, stderr, code := c.upload(h, append(flags, path)...)
		if code != 0 {
			return p, sent, stderr
		}
		return p, sent, ""
	}
	first, _, stderr := send("1", data)
	if stderr != "" {
		t.Fatal(stderr)
	}
	golden := image(s, vdiOf(s, s.Call("pool_patch.get_by_uuid", string(first.UUID)).(string)))
	evil := filepath.Join(dir, "evil")
	if err := os.WriteFile(evil, []byte("evil"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "debugfs", "-w", "-R", "write "+evil+" helper", golden)
	copy(data[1<<20:], random(1<<16))
	second, sent, stderr := send("2", data, "--base", string(first.UUID))
	if stderr != "" || sent > 2<<20 {
		t.Fatalf("%d bytes sent, %s", sent, stderr)
	}
	fresh := image(s, vdiOf(s, s.Call("pool_patch.get_by_uuid", string(second.UUID)).(string)))
	out, err := exec.Command("debugfs", "-R", "ls -l /", fresh).CombinedOutput()
	if err != nil || strings.Contains(string(out), "helper") {
		t.Errorf("what lay beside the base lies beside the new patch: %v\n%s", err, out)
	}
	if out, stderr, code := h.CLI("patch", "apply", string(second.UUID)); code != 0 || strings.TrimSpace(out) != "alone" {
		t.Errorf("apply: %d %q %s", code, out, stderr)
	}
}

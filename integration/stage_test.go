package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// staged lists the files in the first SR of a host.
func staged(h *lab.Host) []string {
	files, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "[0-9a-f]*.*"))
	return files
}

// S1-29: a patch is moved ahead of time, and what was moved goes with it, also
// from a host that was away when the patch was cleaned or destroyed.
func TestS1_29_StagedAndCleanedOnManyHosts(t *testing.T) {
	t.Parallel()
	p := lab.NewPool(t, 3, nil)
	p.JoinAll()
	c, near, away := p.Hosts[0], p.Hosts[1], p.Hosts[2]
	s := c.Root()
	connected := func(h *lab.Host, yes bool) {
		t.Helper()
		f := &far{Pool: p, s: s, host: s.HostRef(h)}
		f.connected(yes)
	}
	connected(near, true)
	connected(away, true)
	gone := func(what string, h *lab.Host) {
		t.Helper()
		until(t, what, func() bool { return len(staged(h)) == 0 })
	}
	w := p.Work(lab.Patch{Pad: 3 << 20})
	signed := w.Signed(t)
	upload := func() string {
		t.Helper()
		if a := s.Upload(signed); a.Status != 201 {
			t.Fatalf("upload: %d %s", a.Status, a.Body)
		}
		return s.Call("pool_patch.get_by_uuid", string(w.UUID)).(string)
	}
	id := string(w.UUID)
	patch := upload()
	golden := vdiOf(s, patch)

	away.Kill()
	connected(away, false)
	out, stderr, code := c.CLI("patch", "stage", id, "--all")
	if code == 0 || !strings.Contains(stderr, away.UUID()) || strings.Contains(stderr, near.UUID()) {
		t.Errorf("stage with a host that is away: %d %s%s", code, out, stderr)
	}
	if len(staged(near)) != 2 {
		t.Errorf("the host that is there has %v", staged(near))
	}
	away.Up()
	connected(away, true)
	c.Must("patch", "stage", id, "--all")
	c.Must("patch", "stage", id, near.UUID()) // again: nothing is to do
	if len(staged(near)) != 2 || len(staged(away)) != 2 || len(imagesOf(s, s.Call("VDI.get_uuid", golden).(string))) != 3 {
		t.Errorf("staged: %v and %v", staged(near), staged(away))
	}

	// A damaged image is mended with what was staged elsewhere.
	sum := fileSum(t, image(s, golden))
	f, err := os.OpenFile(image(s, golden), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damage"), 2<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, _, code := c.CLI("vdi", "verify", s.Call("VDI.get_uuid", golden).(string)); code == 0 {
		t.Error("the damage is not seen")
	}
	c.Must("vdi", "repair", s.Call("VDI.get_uuid", golden).(string))
	if fileSum(t, image(s, golden)) != sum {
		t.Error("it was not repaired")
	}

	away.Kill()
	connected(away, false)
	for _, h := range p.Hosts {
		c.Must("patch", "clean", id, h.UUID())
	}
	c.Must("patch", "pool-clean", id)
	gone("the copy of a cleaned patch to go", near)
	if len(staged(c)) != 0 || s.Call("pool_patch.get_VDI", patch) == golden {
		t.Errorf("cleaned, and still: %v", staged(c))
	}
	if len(staged(away)) != 2 {
		t.Errorf("the host that is away has %v", staged(away))
	}
	away.Up()
	gone("the copy on the host that was away to go", away)
	connected(away, true)

	if again := upload(); again != patch {
		t.Error("uploaded again it has another ref")
	}
	c.Must("patch", "stage", id, "--all")
	away.Kill()
	connected(away, false)
	c.Must("patch", "destroy", id)
	gone("the copy of a destroyed patch to go", near)
	if n := len(s.All("pool_patch")); n != 0 || len(staged(c)) != 0 {
		t.Errorf("%d patches, %v", n, staged(c))
	}
	away.Up()
	gone("the copy on the host that was away to go", away)
	until(t, "the records to go", func() bool { return len(s.All("VDI")) == 0 })
	connected(away, true)
	p.Works = nil // the patch is gone
	p.Finish()
}

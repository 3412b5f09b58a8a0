package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// A8: a second daemon on the same state directory exits at once and names the
// first.
func TestA8_SecondDaemonNamesTheFirst(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	begun := time.Now()
	cmd := exec.Command(lab.Binary(t), "serve", "--state-dir", h.StateDir, "--patch-dir", h.PatchDir, "--listen", "127.0.0.1:0", "--tls-listen", "")
	out, err := cmd.CombinedOutput()
	if took := time.Since(begun); err == nil || took > 5*time.Second {
		t.Errorf("%v after %s", err, took)
	}
	if want := fmt.Sprintf("another patchd (process %d) uses the state directory %s", h.Pid(), h.StateDir); !strings.Contains(string(out), want) {
		t.Errorf("%s", out)
	}
	if n := strings.Count(strings.TrimSpace(string(out)), "\n"); n > 1 {
		t.Errorf("it says a lot: %s", out)
	}
	if err := h.Ready(time.Second); err != nil {
		t.Error(err)
	}
	h.Root()
}

// A8: restarts in a row, by SIGTERM and by KILL, change and leave nothing.
func TestA8_RestartsInARow(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := s.MustUpload(&lab.Patch{})
	if _, err := apply(s, p); err != nil {
		t.Fatal(err)
	}
	classes := []string{"pool_patch", "host_patch", "VDI", "PBD", "host", "pool", "SM", "message"}
	before := map[string]string{}
	for _, c := range classes {
		before[c] = fmt.Sprint(s.All(c))
	}
	for i := range 20 {
		if i%2 == 0 {
			h.Down()
		} else {
			h.Kill()
		}
		h.Up()
	}
	for _, c := range classes {
		if after := fmt.Sprint(s.All(c)); after != before[c] {
			t.Errorf("%s:\n%s\nthen\n%s", c, before[c], after)
		}
	}
	for _, line := range strings.Split(h.Log(), "\n") {
		if strings.Contains(line, "level=error") { // a slow disk is worth a warning
			t.Errorf("%s", line)
		}
	}
	s.One("SR")
}

// A8: what does not belong into the state directory neither stops the daemon
// nor is touched.
func TestA8_GarbageInTheStateDirectory(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{NoCheck: true})
	s := h.Root()
	p := &lab.Patch{}
	ref := s.MustUpload(p)
	if _, err := apply(s, ref); err != nil {
		t.Fatal(err)
	}
	h.Down()
	id := string(xapi.NewUUID())
	put := func(path, text string) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		os.Remove(path)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	state := func(names ...string) string { return filepath.Join(append([]string{h.StateDir}, names...)...) }
	stay := []string{
		put(state("jobs", "garbage"), "x"), put(state("jobs", string(xapi.NewUUID())), "a file"),
		put(state("jobs", id, "entry.json"), `{"assignment": {"ref": "Opa`),
		put(state("trusted-keys", "garbage.gpg"), "\x00\x01\x02 no key"), put(state("trusted-keys", "folder", "x"), "y"), put(state("trusted-keys", "empty"), ""),
		put(state("sr", "foreign.txt"), "mine"), put(state("sr", "deadbeef.img"), "mine"), put(state("sr", "sub", "x.img"), "mine"),
		put(state("sr", "work."+id+"."+id+"."+id+"."+id+".img"), "of another pool"),
		put(filepath.Join(h.PatchDir, "no patch"), "text"), put(filepath.Join(h.PatchDir, "applied", "README"), "text"),
		put(filepath.Join(h.PatchDir, "applied", id), "<info uuid='wrong'"),
		put(filepath.Join(h.PatchDir, "applied", string(p.UUID)), "garbage in the stampfile of a patch that is applied"),
	}
	scraps := []string{
		put(state("jobs", ".import-123"), "half a file"), put(state("jobs", string(xapi.NewUUID()), "output"), "of no job"),
		put(filepath.Join(h.PatchDir, "."+id), "half a file"), put(filepath.Join(h.PatchDir, "applied", "."+id+".4711"), "half a file"),
	}
	h.Up()
	for _, path := range stay {
		if !exists(path) {
			t.Errorf("%s is gone", path)
		}
	}
	for _, path := range scraps {
		if exists(path) {
			t.Errorf("%s is still there", path)
		}
	}
	if _, hp := s.One("host_patch"); hp["applied"] != true {
		t.Errorf("%v", hp)
	}
	if _, err := apply(s, s.MustUpload(&lab.Patch{})); err != nil {
		t.Error(err)
	}
	_, err := apply(s, ref)
	wantCode(t, err, "PATCH_ALREADY_APPLIED", ref)
	if n := len(s.All("VDI")); n != 2 {
		t.Errorf("%d VDIs", n)
	}
}

// A8: the journal entry of a job cannot be read any more: the job ends by what
// else is known, and nothing of it is left.
func TestA8_TruncatedJournal(t *testing.T) {
	t.Parallel()
	for _, killed := range []bool{false, true} {
		v := newVictim(t, lab.Options{})
		gate := filepath.Join(v.dir, "gate")
		k := v.fresh(lab.Patch{Apply: fmt.Sprintf("touch %[1]s.begun; while [ ! -e %[1]s ]; do sleep 0.02; done", gate)})
		if err := v.upload(k, false); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- v.apply(k, "pool_patch.apply") }()
		until(t, "the apply to begin", func() bool { return exists(gate + ".begun") })
		v.Kill()
		<-done
		entries, _ := filepath.Glob(filepath.Join(v.StateDir, "jobs", "*", "entry.json"))
		if len(entries) != 1 {
			t.Fatalf("%v", entries)
		}
		if err := os.Truncate(entries[0], 40); err != nil {
			t.Fatal(err)
		}
		if killed {
			k.killed = true
			v.killSome("runner")
		}
		if err := os.WriteFile(gate, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		v.up()
		v.allEnded(t)
		v.Restart() // the image is swept once the job has ended
		v.look(t, fmt.Sprintf("a truncated journal, runner killed: %v", killed))
		v.finish(t)
	}
}

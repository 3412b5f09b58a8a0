package integration

import (
	"bytes"
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

// TestSecurity_planted_image: a VDI is a patch because a record says so, never
// because of what is in it.
func TestSecurity_planted_image(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	ref := s.MustUpload(&lab.Patch{})
	golden := image(s, vdiOf(s, ref))
	sr := s.Call("VDI.get_SR", vdiOf(s, ref)).(string)
	planted := xapi.NewUUID()
	run(t, "cp", "--sparse=always", golden, filepath.Join(h.StateDir, "sr", string(planted)+".img"))
	s.Call("SR.scan", sr)
	vdi := s.Call("VDI.get_by_uuid", string(planted)).(string)
	s.Call("VDI.set_name_label", vdi, "Patch lab patch")
	s.Call("VDI.add_to_other_config", vdi, "patchd-patch-uuid", s.Call("pool_patch.get_uuid", ref))
	if n := len(s.All("pool_patch")); n != 1 {
		t.Errorf("%d patches", n)
	}
	s.Call("pool_patch.pool_clean", ref)
	if got := vdiOf(s, ref); got != nullRef {
		t.Errorf("the patch found itself another VDI: %s", got)
	}
	if _, err := apply(s, ref); err == nil {
		t.Error("a patch was applied from a planted image")
	}
	s.Call("VDI.destroy", vdi)
}

// changed runs change on the golden image of a fresh patch and applies it. It
// must be refused, and nothing of the image executed. known applies once before,
// so that the image is remembered as verified.
func changed(t *testing.T, s *lab.Session, known bool, change func(golden string)) {
	t.Helper()
	mark := filepath.Join(t.TempDir(), "mark")
	// One text is as long as the other: they differ in one letter.
	p := &lab.Patch{Apply: "echo good >> " + mark, Precheck: "echo GOOD >> " + mark}
	ref := s.MustUpload(p)
	golden := image(s, vdiOf(s, ref))
	before := 0
	if known {
		time.Sleep(1100 * time.Millisecond) // younger images are not remembered
		for range 2 {
			if _, err := precheck(s, ref); err != nil {
				t.Fatal(err)
			}
		}
		before = 2
	}
	change(golden)
	for _, f := range []func(*lab.Session, string) (string, error){precheck, apply} {
		_, err := f(s, ref)
		if !isCode(err, xapi.VDIContentChanged) && !isCode(err, xapi.InvalidPatch) && !isCode(err, xapi.VDINotAvailable) {
			t.Errorf("a changed image gave %v", err)
		}
	}
	if n := lines(mark); n != before {
		b, _ := os.ReadFile(mark)
		t.Errorf("something ran: %q", b)
	}
}

// TestSecurity_golden_changed changes images behind patchd's back.
func TestSecurity_golden_changed(t *testing.T) {
	state := xfsFS(t, 1<<30) // where images are cloned, and checks remembered
	for name, dir := range map[string]string{"where images are cloned": state, "where images are copied": t.TempDir()} {
		t.Run(name, func(t *testing.T) {
			h := lab.Start(t, lab.Options{Dir: dir})
			s := h.Root()
			debugfs := func(golden string, commands ...string) {
				for _, c := range commands {
					run(t, "debugfs", "-w", "-R", c, golden)
				}
			}
			evil := filepath.Join(t.TempDir(), "evil")
			if err := os.WriteFile(evil, []byte("#!/bin/sh\ntouch "+evil+".ran\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			for what, change := range map[string]func(golden string){
				"one letter in place": func(golden string) { poke(t, golden, "echo good", "echo evil") },
				"the time of the file set back": func(golden string) {
					st, err := os.Stat(golden)
					if err != nil {
						t.Fatal(err)
					}
					poke(t, golden, "echo good", "echo evil")
					os.Chtimes(golden, st.ModTime(), st.ModTime())
				},
				"another file":        func(golden string) { debugfs(golden, "rm patch", "write "+evil+" patch", "sif patch mode 0100755") },
				"a link to a file":    func(golden string) { debugfs(golden, "rm patch", "symlink patch "+evil) },
				"a pipe":              func(golden string) { debugfs(golden, "rm patch", "mknod patch p") },
				"a folder":            func(golden string) { debugfs(golden, "rm patch", "mkdir patch") },
				"nothing":             func(golden string) { debugfs(golden, "rm patch") },
				"a scratch to trap":   func(golden string) { debugfs(golden, "symlink scratch /etc") },
				"a file beside":       func(golden string) { debugfs(golden, "write "+evil+" helper") },
				"an empty filesystem": func(golden string) { run(t, "mkfs.ext4", "-q", "-F", golden) },
				"another image": func(golden string) {
					other := s.MustUpload(&lab.Patch{Apply: "touch " + evil + ".ran"})
					run(t, "cp", "--sparse=always", image(s, vdiOf(s, other)), golden)
				},
				"no filesystem": func(golden string) {
					run(t, "dd", "if=/dev/zero", "of="+golden, "bs=1M", "count=1", "conv=notrunc", "status=none")
				},
				"a shorter file": func(golden string) { os.Truncate(golden, 8192) },
			} {
				for _, known := range []bool{false, true} {
					if dir != state && !strings.Contains("one letter in place a link to a file a file beside no filesystem", what) {
						continue // the same as where images are cloned
					}
					if known && (dir != state || !strings.Contains("one letter in place the time of the file set back another image", what)) {
						continue
					}
					t.Run(fmt.Sprintf("%s, known %v", what, known), func(t *testing.T) { changed(t, s, known, change) })
				}
			}
			if exists(evil + ".ran") {
				t.Error("what was planted has run")
			}
		})
	}
}

// poke replaces a text in a file by one of the same length, in place.
func poke(t testing.TB, path, old, fresh string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := find(t, f, old)
	if _, err := f.WriteAt([]byte(fresh), at); err != nil {
		t.Fatal(err)
	}
}

// find gives the offset of a text that stands in a sparse file.
func find(t testing.TB, f *os.File, text string) int64 {
	t.Helper()
	out, err := exec.Command("grep", "-obUaF", text, f.Name()).Output()
	if err != nil {
		t.Fatalf("%q is not in %s: %v", text, f.Name(), err)
	}
	var at int64
	if _, err := fmt.Sscan(strings.SplitN(string(out), ":", 2)[0], &at); err != nil {
		t.Fatal(err)
	}
	return at
}

// TestSecurity_T2_toctou rewrites the golden image all the time while it is
// applied: what runs is always what was signed.
func TestSecurity_T2_toctou(t *testing.T) { toctou(t, 60) }

// TestSoakSecurity_T2_toctou is the same for longer.
func TestSoakSecurity_T2_toctou(t *testing.T) {
	if os.Getenv("PATCHD_SOAK_N") == "" {
		t.Skip("only by make soak")
	}
	toctou(t, 10_000)
}

func toctou(t *testing.T, rounds int) {
	h := lab.Start(t, lab.Options{Dir: xfsFS(t, 1<<30)})
	s := h.Root()
	mark := filepath.Join(t.TempDir(), "mark")
	ref := s.MustUpload(&lab.Patch{Precheck: "echo good >> " + mark})
	f, err := os.OpenFile(image(s, vdiOf(s, ref)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := find(t, f, "echo good")
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(i%7) * 3 * time.Millisecond):
			}
			f.WriteAt([]byte("echo evil"), at)
			time.Sleep(time.Duration(i%5) * 2 * time.Millisecond)
			f.WriteAt([]byte("echo good"), at)
		}
	}()
	good := 0
	for range rounds {
		_, err := precheck(s, ref)
		switch {
		case err == nil:
			good++
		case !isCode(err, xapi.VDIContentChanged) && !isCode(err, xapi.InvalidPatch):
			t.Errorf("precheck: %v", err)
		}
	}
	close(stop)
	<-ended
	b, _ := os.ReadFile(mark)
	if bytes.Contains(b, []byte("evil")) {
		t.Errorf("changed bytes were executed: %q", b)
	}
	t.Logf("%d of %d prechecks ran", good, rounds)
}

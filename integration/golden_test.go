package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// A13: whatever is done with a patch, its golden image stays as it was.
func TestA13_GoldenImageNeverChanges(t *testing.T) {
	t.Parallel()
	for name, fs := range map[string]func(testing.TB, int64) string{"ext4": ext4FS, "xfs": xfsFS} {
		t.Run(name, func(t *testing.T) { goldenImageNeverChanges(t, fs(t, 2*gib)) })
	}
}

func goldenImageNeverChanges(t *testing.T, dir string) {
	h := lab.Start(t, lab.Options{Dir: dir})
	s := h.Root()
	mark := filepath.Join(t.TempDir(), "mark")
	p := s.MustUpload(&lab.Patch{Pad: 100_000, Precheck: `echo tampered >> "$0"; echo x > "$PATCHD_SCRATCH/x"`,
		Apply: fmt.Sprintf(`echo tampered >> "$0"; rm -rf ./patch lost+found; dd if=/dev/urandom of=new bs=64k count=8 2>/dev/null
if [ -e %[1]s ]; then rm %[1]s; kill -9 $(cat %[1]s.pid); sleep 0.2; exit 3; fi`, mark)})
	path := image(s, vdiOf(s, p))
	golden := fileSum(t, path)
	same := func(after string) {
		t.Helper()
		if sum := fileSum(t, path); sum != golden {
			t.Fatalf("the golden image has changed after %s", after)
		}
	}
	for range 4 {
		if _, err := precheck(s, p); err != nil {
			t.Fatal(err)
		}
		same("a precheck")
		if _, err := apply(s, p); err != nil {
			t.Fatal(err)
		}
		same("an apply")
		hp, _ := s.One("host_patch")
		s.Call("host_patch.destroy", hp)
		s.Call("pool_patch.clean", p)
		same("a clean")
		os.Remove(filepath.Join(h.PatchDir, "applied", s.Call("pool_patch.get_uuid", p).(string)))

		os.WriteFile(mark+".pid", []byte(fmt.Sprint(h.Pid())), 0o600)
		os.WriteFile(mark, nil, 0o600)
		task := s.Call("Async.pool_patch.apply", p, s.Host()).(string)
		<-h.Exited()
		h.Up()
		if rec := s.Wait(task); rec["status"] != "failure" || rec["error_info"].([]any)[0] != "PATCH_APPLY_FAILED" {
			t.Errorf("%v", rec)
		}
		same("a crash")
	}
	h.Kill()
	same("kill -9")
	h.Up()
	if _, err := apply(s, p); err != nil {
		t.Error(err)
	}
	same("a restart")
	run(t, "e2fsck", "-fn", path)
}

// A13: the key was removed after the upload: refused, also when the image has
// been verified before, and until it is back.
func TestA13_RemovedKeyIsRefusedByApply(t *testing.T) {
	t.Parallel()
	for _, fs := range []func(testing.TB, int64) string{ext4FS, xfsFS} {
		h := lab.Start(t, lab.Options{Dir: fs(t, 2*gib)})
		s := h.Root()
		effect := filepath.Join(t.TempDir(), "effect")
		p := s.MustUpload(&lab.Patch{Precheck: "echo p >> " + effect, Apply: "echo a >> " + effect})
		if _, err := precheck(s, p); err != nil {
			t.Fatal(err)
		}
		h.Distrust(lab.DefaultKey(t))
		_, err := apply(s, p)
		wantCode(t, err, "INVALID_PATCH")
		_, err = precheck(s, p)
		wantCode(t, err, "INVALID_PATCH")
		wantCode(t, uploadErr(s, (&lab.Patch{}).Signed(t)), "INVALID_PATCH")
		if n := lines(effect); n != 1 {
			t.Errorf("%d lines: something ran", n)
		}
		if n := len(s.All("host_patch")); n != 0 {
			t.Errorf("%d host_patches", n)
		}
		h.Trust(lab.DefaultKey(t))
		if _, err := apply(s, p); err != nil {
			t.Error(err)
		}
		h.Down()
	}
}

// S1-01: bytes of the image that changed after the upload are found before
// anything in it runs, also when the image had been verified before.
func TestS1_01_ChangedImageIsRefused(t *testing.T) {
	t.Parallel()
	for _, fs := range []func(testing.TB, int64) string{ext4FS, xfsFS} {
		h := lab.Start(t, lab.Options{Dir: fs(t, 2*gib)})
		s := h.Root()
		effect := filepath.Join(t.TempDir(), "effect")
		p := s.MustUpload(&lab.Patch{Apply: "echo AAAA >> " + effect})
		if _, err := precheck(s, p); err != nil {
			t.Fatal(err)
		}
		path := image(s, vdiOf(s, p))
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(b, []byte("AAAA"))
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("BBBB"), int64(at)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		_, err = apply(s, p)
		if params := hasCode(t, err, "VDI_CONTENT_CHANGED"); len(params) != 2 {
			t.Errorf("%q", params)
		}
		if lines(effect) != 0 || len(s.All("host_patch")) != 0 {
			t.Error("it ran")
		}
		h.Down()
	}
}

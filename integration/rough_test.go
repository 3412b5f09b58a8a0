package integration

import (
	"context"
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
)

// A patch that claims success in its own stampfile and then fails has failed.
func TestUnruly_PatchThatStampsItselfAndFails(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := s.MustUpload(&lab.Patch{Apply: `mkdir -p "$PATCHD_APPLIED_DIR"; "$0" info > "$PATCHD_APPLIED_DIR/$PATCHD_PATCH_UUID"; exit 4`})
	_, err := apply(s, p)
	hasCode(t, err, "PATCH_APPLY_FAILED")
	if n := len(s.All("host_patch")); n != 0 {
		t.Errorf("%d host_patches", n)
	}
	h.Restart()
	if n := len(h.Root().All("host_patch")); n != 0 {
		t.Errorf("%d host_patches after a restart", n)
	}
}

// What a patch mounts, locks or hides in its image goes with it.
func TestUnruly_PatchThatMounts(t *testing.T) {
	t.Parallel()
	for _, fs := range []func(testing.TB, int64) string{ext4FS, xfsFS} {
		h := lab.Start(t, lab.Options{Dir: fs(t, 2*gib)})
		s := h.Root()
		p := s.MustUpload(&lab.Patch{Apply: `set -e
cd "$PATCHD_SCRATCH"; mkdir a b c
mount -t tmpfs none a; mount --bind / b; cd a; mount -t tmpfs none c 2>/dev/null || :
chattr +i "$0" 2>/dev/null || :
mkfifo f; mknod n c 1 3; ln -s / l
exit 0`})
		golden := fileSum(t, image(s, vdiOf(s, p)))
		if _, err := apply(s, p); err != nil {
			t.Error(err)
		}
		h.CheckNothingLeft()
		if fileSum(t, image(s, vdiOf(s, p))) != golden {
			t.Error("the golden image has changed")
		}
		s.Call("host_patch.destroy", hostPatchOf(s, p))
		s.Call("pool_patch.destroy", p)
		h.Down()
		h.CheckNothingLeft()
	}
}

func hostPatchOf(s *lab.Session, patch string) string {
	s.H.T.Helper()
	for ref, hp := range s.All("host_patch") {
		if hp["pool_patch"] == patch {
			return ref
		}
	}
	s.H.T.Fatalf("no host_patch of %s", patch)
	return ""
}

// SIGTERM ends the daemon in the middle of an apply within seconds; the runner
// goes on, and the next start tells how it ended.
func TestRestart_InTheMiddleOfAnApply(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	dir := t.TempDir()
	effect, gate := filepath.Join(dir, "effect"), filepath.Join(dir, "gate")
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf("echo once >> %s; while [ ! -e %s ]; do sleep 0.02; done; echo end", effect, gate)})
	task := s.Call("Async.pool_patch.pool_apply", p).(string)
	until(t, "the apply to begin", func() bool { return exists(effect) })
	for range 3 {
		began := time.Now()
		h.Restart()
		if d := time.Since(began); d > 15*time.Second {
			t.Errorf("a restart takes %s", d)
		}
		_, err := apply(s, p)
		hasCode(t, err, "OTHER_OPERATION_IN_PROGRESS")
	}
	os.WriteFile(gate, nil, 0o600)
	if rec := s.Wait(task); rec["status"] != "success" {
		t.Errorf("%v", rec)
	}
	if n := lines(effect); n != 1 {
		t.Errorf("applied %d times", n)
	}
	if rec := s.Call("pool_patch.get_record", p).(map[string]any); rec["pool_applied"] != true {
		t.Errorf("%v", rec)
	}
}

// A client that goes away changes nothing: what it asked for is carried out.
func TestRestart_ClientThatGoesAway(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	dir := t.TempDir()
	effect, gate := filepath.Join(dir, "effect"), filepath.Join(dir, "gate")
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf("echo once >> %s; while [ ! -e %s ]; do sleep 0.02; done", effect, gate)})
	ctx, leave := context.WithCancel(context.Background())
	body := fmt.Sprintf(`{"id":1,"method":"pool_patch.apply","params":[%q,%q,%q]}`, s.Ref, p, s.Host())
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, h.URL+"/jsonrpc", strings.NewReader(body))
	gone := make(chan error, 1)
	go func() {
		_, err := http.DefaultTransport.RoundTrip(req)
		gone <- err
	}()
	until(t, "the apply to begin", func() bool { return exists(effect) })
	leave()
	if err := <-gone; err == nil {
		t.Error("the call had an answer")
	}
	os.WriteFile(gate, nil, 0o600)
	until(t, "the patch to be applied", func() bool {
		for _, hp := range s.All("host_patch") {
			return hp["applied"] == true
		}
		return false
	})
	if n := lines(effect); n != 1 {
		t.Errorf("applied %d times", n)
	}
}

// Room that was promised before the stream began is there to its end, whoever
// fills the SR meanwhile.
func TestA6_SRFilledDuringTheStream(t *testing.T) {
	t.Parallel()
	srFS := ext4FS(t, 200*mib)
	s := lab.Start(t, lab.Options{}).Root()
	sr := newSR(s, "narrow", srFS)
	uuid := s.Call("SR.get_uuid", sr).(string)
	signed := string((&lab.Patch{Pad: 60 << 20}).Signed(t))
	for _, known := range []bool{true, false} {
		r, w := io.Pipe()
		filler := filepath.Join(srFS, "others")
		go func() {
			io.WriteString(w, signed[:30<<20])
			f, err := os.Create(filler)
			for b := make([]byte, mib); err == nil; {
				_, err = f.Write(b)
			}
			f.Sync()
			f.Close()
			io.WriteString(w, signed[30<<20:])
			w.Close()
		}()
		length := int64(-1)
		if known {
			length = int64(len(signed))
		}
		a, err := s.Put("/pool_patch_upload", url.Values{"sr_id": {sr}}, r, length)
		r.CloseWithError(io.ErrClosedPipe)
		if err != nil {
			t.Fatal(err)
		}
		if known && a.Status == 201 {
			s.Call("pool_patch.destroy", a.Record()["ref"])
		} else {
			wantCode(t, a.Err(), "OUT_OF_SPACE", fmt.Sprintf("narrow (%s)", uuid))
		}
		if n := len(s.All("VDI")) + len(s.All("pool_patch")); n != 0 {
			t.Errorf("%d objects", n)
		}
		if images, _ := filepath.Glob(srFS + "/*.img"); len(images) > 0 {
			t.Errorf("%v", images)
		}
		until(t, "the filler to end", func() bool { return os.Remove(filler) == nil || !exists(filler) })
	}
}

// An SR is not taken away under an upload; after the upload it can be.
func TestA6_SRUnpluggedDuringTheStream(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	signed := string((&lab.Patch{Pad: 1 << 20}).Signed(t))
	pbd := pbdOf(s, defaultSR(s))
	r, w := io.Pipe()
	done := make(chan lab.Answer, 1)
	go func() {
		a, err := s.Put("/pool_patch_upload", nil, r, int64(len(signed)))
		if err != nil {
			t.Error(err)
		}
		done <- a
	}()
	io.WriteString(w, signed[:1<<19])
	until(t, "the image", func() bool {
		names, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "*.img"))
		return len(names) > 0
	})
	_, unplugged := s.Try("PBD.unplug", pbd)
	_, destroyed := s.Try("SR.destroy", defaultSR(s))
	io.WriteString(w, signed[1<<19:])
	w.Close()
	a := <-done
	if (a.Status == 201) == (unplugged == nil) || destroyed == nil {
		t.Errorf("unplug: %v, destroy: %v, upload: %d %s", unplugged, destroyed, a.Status, a.Body)
	}
	if unplugged != nil {
		s.Call("PBD.unplug", pbd)
	}
	_, err := s.Put("/pool_patch_upload", nil, strings.NewReader(signed), int64(len(signed)))
	if err != nil {
		t.Error(err)
	}
}

// A classic file is applied on a host that has no SR at all.
func TestS1_30_ClassicFileWithoutAnySR(t *testing.T) {
	t.Parallel()
	h := lab.Prepare(t, lab.Options{})
	effect := filepath.Join(t.TempDir(), "effect")
	p := &lab.Patch{Apply: "head -c 100000 /dev/zero > \"$PATCHD_SCRATCH/x\"; echo once >> " + effect}
	putClassic(t, h, "old.patch", p.Signed(t))
	h.Up()
	s := h.Root()
	s.Call("PBD.unplug", pbdOf(s, defaultSR(s)))
	ref, _ := s.One("pool_patch")
	if _, err := apply(s, ref); err != nil {
		t.Error(err)
	}
	if n := lines(effect); n != 1 {
		t.Errorf("applied %d times", n)
	}
	s.Call("pool_patch.clean", ref)
	if exists(filepath.Join(h.PatchDir, "old.patch")) {
		t.Error("the file is still there")
	}
}

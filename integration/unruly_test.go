package integration

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// hasty is a host whose patches have little time.
func hasty(t testing.TB) (*lab.Host, *lab.Session) {
	t.Helper()
	h := lab.Start(t, lab.Options{Flags: []string{"--precheck-timeout", "1s", "--apply-timeout", "1s"}})
	return h, h.Root()
}

// A patch that does not end is killed with all it started, however it resists.
func TestUnruly_PatchThatHangs(t *testing.T) {
	t.Parallel()
	_, s := hasty(t)
	pids := filepath.Join(t.TempDir(), "pids")
	hang := fmt.Sprintf("trap '' TERM INT HUP; echo $$ >> %[1]s; (trap '' TERM; echo stuck; setsid sh -c 'trap \"\" TERM; echo $$ >> %[1]s; while :; do sleep 1; done') & while :; do sleep 1; done", pids)
	p := s.MustUpload(&lab.Patch{Apply: hang})
	_, err := apply(s, p)
	if params := hasCode(t, err, "PATCH_APPLY_FAILED"); len(params) != 1 || !strings.Contains(params[0], "did not end within 1s") || !strings.Contains(params[0], "stuck") {
		t.Errorf("%q", params)
	}
	p = s.MustUpload(&lab.Patch{Precheck: hang})
	_, err = precheck(s, p)
	if params := hasCode(t, err, "PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"); len(params) != 2 || params[0] != p || !strings.Contains(params[1], "did not end within 1s") {
		t.Errorf("%q", params)
	}
	allEnded(t, pids, 4)
	if n := len(s.All("host_patch")); n != 0 {
		t.Errorf("%d host_patches", n)
	}
}

// allEnded checks that the processes whose pids stand in a file are gone.
func allEnded(t *testing.T, file string, least int) {
	t.Helper()
	b, _ := os.ReadFile(file)
	pids := strings.Fields(string(b))
	if len(pids) < least {
		t.Errorf("only %d processes had begun", len(pids))
	}
	for _, pid := range pids {
		if state := processState(int(number(t, pid))); state != "" && state != "Z" {
			t.Errorf("process %s still lives (%s)", pid, state)
		}
	}
}

// What a patch leaves running is killed when it has ended well, too.
func TestUnruly_PatchThatForksAway(t *testing.T) {
	t.Parallel()
	_, s := hasty(t)
	pids := filepath.Join(t.TempDir(), "pids")
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf(
		`setsid sh -c 'trap "" TERM HUP; echo $$ >> %[1]s; (setsid sh -c "echo \$\$ >> %[1]s; exec sleep 1000") & while :; do sleep 1; done' >/dev/null 2>&1 &
while [ $(cat %[1]s 2>/dev/null | wc -l) -lt 2 ]; do sleep 0.02; done; echo ok`, pids)})
	out, err := apply(s, p)
	if err != nil || out != "ok\n" {
		t.Errorf("%q %v", out, err)
	}
	allEnded(t, pids, 2)
}

// Output without an end is taken, bounded in the answer and on the disk, and
// ends with the deadline.
func TestUnruly_PatchThatPrintsWithoutEnd(t *testing.T) {
	t.Parallel()
	h, s := hasty(t)
	for _, verb := range []string{"precheck", "apply"} {
		p := &lab.Patch{}
		call, code := apply, "PATCH_APPLY_FAILED"
		if verb == "precheck" {
			p.Precheck, call, code = "yes 'a line of it' & yes >&2", precheck, "PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"
		} else {
			p.Apply = "yes 'a line of it' & yes >&2"
		}
		most := int64(0)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				files, _ := filepath.Glob(filepath.Join(h.StateDir, "jobs", "*", "*"))
				for _, f := range files {
					if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() {
						most = max(most, st.Size())
					}
				}
			}
		}()
		_, err := call(s, s.MustUpload(p))
		<-done
		params := hasCode(t, err, code)
		if n := len(params[len(params)-1]); n > 20<<10 || n < 1000 {
			t.Errorf("%s: the error has %d bytes", verb, n)
		}
		if most > 20*mib {
			t.Errorf("%s: a file of the journal had %d bytes", verb, most)
		}
	}
}

// Exit 0 with garbage is still exit 0; what clients get is valid text.
func TestUnruly_GarbageOutput(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	garbage := `head -c 100000 /dev/urandom; printf 'a\000b\377\033[31m<&>'`
	p := s.MustUpload(&lab.Patch{Precheck: garbage, Apply: garbage})
	for _, call := range []func(*lab.Session, string) (string, error){precheck, apply} {
		out, err := call(s, p)
		if err != nil || !utf8.ValidString(out) || strings.Contains(out, "\x00") || len(out) > 64<<10 {
			t.Errorf("%v, %d bytes", err, len(out))
		}
	}
}

// The scratch room is bounded by the image: a patch that fills it fails, and
// nobody else does.
func TestUnruly_PatchThatFillsItsScratch(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := s.MustUpload(&lab.Patch{Pad: 1 << 20, Apply: `dd if=/dev/zero of="$PATCHD_SCRATCH/full" bs=1M || exit 1`})
	_, err := apply(s, p)
	if params := hasCode(t, err, "PATCH_APPLY_FAILED"); !strings.Contains(params[0], "No space left") {
		t.Errorf("%q", params)
	}
	h.CheckNothingLeft()
	if n := len(s.All("host_patch")); n != 0 {
		t.Errorf("%d host_patches", n)
	}
}

// The image is larger than what its SR has room for: the filesystem below it
// gets full while the patch writes. The apply fails, whatever the patch says,
// and the room is there again.
func TestUnruly_DiskFullWhileApplying(t *testing.T) {
	t.Parallel()
	srFS := ext4FS(t, 300*mib)
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	sr := newSR(s, "narrow", srFS)
	for _, lies := range []bool{false, true} {
		p := &lab.Patch{Apply: `dd if=/dev/zero of="$PATCHD_SCRATCH/full" bs=1M count=600 conv=fsync || exit 1`}
		if lies {
			p.Apply = `dd if=/dev/zero of="$PATCHD_SCRATCH/full" bs=1M count=600; exit 0`
		}
		a, err := s.Put("/pool_patch_upload", url.Values{"sr_id": {sr}}, strings.NewReader(string(p.Signed(t))), -1)
		if err != nil || a.Status != 201 {
			t.Fatalf("%v %s", err, a.Body)
		}
		before := used(t, srFS)
		_, err = apply(s, a.Record()["ref"].(string))
		hasCode(t, err, "PATCH_APPLY_FAILED")
		if grown := used(t, srFS) - before; grown > mib {
			t.Errorf("%d bytes are left on the SR", grown)
		}
	}
	if work, _ := filepath.Glob(srFS + "/work*"); len(work) > 0 {
		t.Errorf("left: %v", work)
	}
	if n := len(s.All("host_patch")); n != 0 {
		t.Errorf("%d host_patches", n)
	}
}

// The same where the pool database lies on that filesystem as well: it must not
// be what the patch takes down.
func TestUnruly_DiskOfTheStateFullWhileApplying(t *testing.T) {
	t.Parallel()
	dir := ext4FS(t, 800*mib)
	h := lab.Start(t, lab.Options{Dir: dir})
	s := h.Root()
	p := &lab.Patch{Apply: `dd if=/dev/zero of="$PATCHD_SCRATCH/full" bs=1M count=2000 conv=fsync || exit 1`}
	ref := s.Call("pool_patch.get_by_uuid", string(uploadChunked(t, s, p))).(string)
	before := used(t, dir)
	_, err := apply(s, ref)
	if params := hasCode(t, err, "PATCH_APPLY_FAILED"); !strings.Contains(params[0], "apply was killed") {
		t.Errorf("%q", params)
	}
	if grown := used(t, dir) - before; grown > 16*mib {
		t.Errorf("%d bytes are left", grown)
	}
	if n := len(s.All("host_patch")); n != 0 {
		t.Errorf("%d host_patches", n)
	}
	h.CheckNothingLeft()
	p.Precheck, p.UUID = p.Apply, ""
	full := s.Call("pool_patch.get_by_uuid", string(uploadChunked(t, s, p))).(string)
	_, err = precheck(s, full)
	if params := hasCode(t, err, "PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"); len(params) != 2 || !strings.Contains(params[1], "precheck was killed") {
		t.Errorf("%q", params)
	}
	h.Restart()
	if _, err := precheck(h.Root(), ref); err != nil {
		t.Error(err)
	}
}

// uploadChunked gives a patch an image of 4 GiB.
func uploadChunked(t *testing.T, s *lab.Session, p *lab.Patch) xapi.UUID {
	t.Helper()
	a, err := s.Put("/pool_patch_upload", nil, strings.NewReader(string(p.Signed(t))), -1)
	if err != nil || a.Status != 201 {
		t.Fatalf("%v %s", err, a.Body)
	}
	return p.UUID
}

// `info` runs locked down and not for long.
func TestUnruly_Info(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	for name, script := range map[string]string{"hangs": "trap '' TERM; while :; do sleep 1; done", "prints without end": "yes"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			hasCode(t, s.Upload((&lab.Patch{InfoScript: script}).Signed(t)).Err(), "INVALID_PATCH_WITH_LOG")
			if d := time.Since(began); d > 20*time.Second {
				t.Errorf("it took %s", d)
			}
		})
	}
	for name, script := range map[string]string{
		"dies": "kill -9 $$", "says nothing": ":", "prints too much": "head -c 200000 /dev/zero",
		"asks the network": "exec python3 -c 'import socket; socket.create_connection((\"" + h.IP + "\", " + strings.Split(h.URL, ":")[2] + "))'",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hasCode(t, s.Upload((&lab.Patch{InfoScript: script}).Signed(t)).Err(), "INVALID_PATCH")
		})
	}
	t.Run("tries to change the host", func(t *testing.T) {
		t.Parallel()
		target := filepath.Join(t.TempDir(), "x")
		os.Chmod(filepath.Dir(target), 0o777)
		p := &lab.Patch{}
		p.Payload()
		p.InfoScript = fmt.Sprintf("echo x > %s; echo x > ./y; kill -9 %d; cat %s/pool-secret >&2; id -u >&2\ncat <<'X'\n%s\nX", target, h.Pid(), h.StateDir, p.XML())
		if a := s.Upload(p.Signed(t)); a.Status != 201 {
			t.Errorf("%d %s", a.Status, a.Body)
		}
		if exists(target) {
			t.Error("info has written to the host")
		}
	})
}

// An upload of nothing is a probe and makes nothing; one byte is no patch.
func TestUnruly_TinyUploads(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	if a := s.Upload(nil); a.Status != 200 {
		t.Errorf("nothing: %d", a.Status)
	}
	task := s.Call("task.create", "upload", "").(string)
	if a := rawPut(t, h, "/pool_patch_upload?session_id="+s.Ref+"&task_id="+task, 0, nil); a.Status != 200 {
		t.Errorf("nothing with a task: %d", a.Status)
	}
	if rec := s.Wait(task); rec["error_info"].([]any)[0] != "INVALID_PATCH" {
		t.Errorf("%v", rec)
	}
	for _, b := range []string{"x", "\x00", "-", "\n", "\x90"} {
		wantCode(t, uploadErr(s, []byte(b)), "INVALID_PATCH")
	}
	a, err := rawRequest(h, "PUT /pool_patch_upload?session_id="+s.Ref+" HTTP/1.1\r\nHost: lab\r\nTransfer-Encoding: chunked\r\n\r\n", []byte("0\r\n\r\n"), 10*time.Second)
	if err != nil || a.Status != 422 {
		t.Errorf("chunked nothing: %v %d %s", err, a.Status, a.Body)
	}
	if n := len(s.All("pool_patch")) + len(s.All("VDI")); n != 0 {
		t.Errorf("%d objects", n)
	}
}

// Whatever could become a path is none: nothing is written or read outside.
func TestUnruly_PathTricks(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	for _, uuid := range []string{"../../../../etc/cron.d/x", "..", "", "/etc/passwd", "a/b", strings.Repeat("a", 36), "00000000-0000-0000-0000-00000000000\x00"} {
		hasCode(t, uploadErr(s, (&lab.Patch{Info: fmt.Sprintf(`<info uuid=%q version="1" name-label="x" name-description="" after-apply-guidance=""/>`, uuid)}).Signed(t)), "INVALID_PATCH")
	}
	evil := &lab.Patch{Label: "../../../etc/passwd", Version: "../../x", Extra: ` filename="../../x"`}
	if a := s.Upload(lab.DefaultKey(t).GPG(t, evil.Payload(), "--sign", "-z", "0", "--set-filename", "../../../../etc/cron.d/evil")); a.Status != 201 {
		t.Errorf("labels and the message's own name are only text: %d %s", a.Status, a.Body)
	}
	sr := defaultSR(s)
	for _, location := range []string{"../../../etc/passwd", "/etc/passwd", "..", "", "x/y.img", "../jobs"} {
		_, err := s.Try("VDI.introduce", "11111111-1111-4111-8111-111111111111", "n", "d", sr, "user", false, false, map[string]string{}, location, map[string]string{}, map[string]string{})
		if err == nil {
			t.Errorf("VDI.introduce of %q", location)
		}
	}
	for _, location := range []string{"", "relative", "/", "/etc", "/etc/../etc", "/proc/self", "/dev/shm/../../etc", h.StateDir, filepath.Join(h.StateDir, "jobs"), filepath.Join(h.StateDir, "..")} {
		_, err := s.Try("SR.create", s.Host(), map[string]string{"location": location}, "0", "n", "", "file", "user", false, map[string]string{})
		if err == nil {
			t.Errorf("SR.create in %q", location)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	os.Symlink("/etc", link)
	if _, err := s.Try("SR.create", s.Host(), map[string]string{"location": link}, "0", "n", "", "file", "user", false, map[string]string{}); err == nil {
		t.Error("SR.create through a link into /etc")
	}
	if n := len(s.All("SR")); n != 1 {
		t.Errorf("%d SRs", n)
	}
	for _, id := range []string{"../../etc/passwd", "OpaqueRef:../../x", "\x00"} {
		task := s.Call("task.create", "import", "").(string)
		if _, err := s.Put("/import_raw_vdi", url.Values{"vdi": {id}, "task_id": {task}}, strings.NewReader("x"), 1); err != nil {
			t.Error(err)
		}
		if rec := s.Wait(task); rec["error_info"].([]any)[0] != "HANDLE_INVALID" {
			t.Errorf("import_raw_vdi %q: %v", id, rec)
		}
		a, err := s.Put("/pool_patch_upload", url.Values{"task_id": {id}}, strings.NewReader("x"), 1)
		if err != nil || len(s.All("pool_patch")) != 1 {
			t.Errorf("task_id %q: %v %d", id, err, a.Status)
		}
	}
}

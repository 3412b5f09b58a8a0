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
)

// Cancel ends the patch with all its processes; the task is cancelled, and the
// host_patch is gone, so that it can be applied again.
func TestCancel_Apply(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	dir := t.TempDir()
	pids, stop := filepath.Join(dir, "pids"), filepath.Join(dir, "stop")
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf(
		`[ -e %[2]s ] && exit 0; trap '' TERM; echo $$ >> %[1]s; setsid sh -c 'trap "" TERM; echo $$ >> %[1]s; while :; do sleep 1; done' & while :; do sleep 1; done`, pids, stop)})
	for _, call := range []string{"Async.pool_patch.apply", "Async.pool_patch.pool_apply"} {
		os.Remove(pids)
		args := []any{p}
		if strings.HasSuffix(call, ".apply") {
			args = append(args, s.Host())
		}
		task := s.Call(call, args...).(string)
		until(t, "the patch to begin", func() bool { return lines(pids) == 2 })
		s.Call("task.cancel", task)
		if st := s.Call("task.get_status", task); st != "cancelling" && st != "cancelled" {
			t.Errorf("after cancel: %v", st)
		}
		rec := s.Wait(task)
		if rec["status"] != "cancelled" {
			t.Errorf("%s: %v", call, rec)
		}
		allEnded(t, pids, 2)
		if n := len(s.All("host_patch")); n != 0 {
			t.Errorf("%d host_patches", n)
		}
		s.H.CheckNothingLeft()
	}
	os.WriteFile(stop, nil, 0o600)
	if _, err := apply(s, p); err != nil {
		t.Error(err)
	}
}

// Cancel in the middle of an upload leaves nothing; the client's connection ends.
func TestCancel_Upload(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	signed := (&lab.Patch{Pad: 8 << 20}).Signed(t)
	task := s.Call("task.create", "upload", "").(string)
	body, w := io.Pipe()
	req, _ := http.NewRequest(http.MethodPut, h.URL+"/pool_patch_upload?task_id="+url.QueryEscape(task), io.MultiReader(bytes.NewReader(signed[:5<<20]), body))
	req.ContentLength = int64(len(signed))
	req.AddCookie(&http.Cookie{Name: "session_id", Value: s.Ref})
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	defer w.Close()
	until(t, "progress", func() bool {
		return s.Call("task.get_progress", task).(float64) > 0.4
	})
	s.Call("task.cancel", task)
	rec := s.Wait(task)
	if rec["status"] != "cancelled" {
		t.Errorf("%v", rec)
	}
	if n := len(s.All("pool_patch")) + len(s.All("VDI")); n != 0 {
		t.Errorf("%d objects", n)
	}
	h.CheckNothingLeft()
	if images, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "*.img")); len(images) > 0 {
		t.Errorf("%v", images)
	}
}

// What a running patch prints and how far it says it is show in its task.
func TestLive_OutputAndProgress(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	gate := filepath.Join(t.TempDir(), "gate")
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf(`echo "first line"
echo nonsense >&3; echo 7 too much >&3; echo "0.375 unpacking" >&3
while [ ! -e %[1]s ]; do sleep 0.05; done
sleep 0.3; echo "0.1 back" >&3; echo "last line"`, gate)})
	task := s.Call("Async.pool_patch.apply", p, s.Host()).(string)
	var rec map[string]any
	until(t, "progress and output", func() bool {
		rec = s.Call("task.get_record", task).(map[string]any)
		text := fmt.Sprint(rec["other_config"])
		return rec["progress"] == 0.375 && strings.Contains(text, "first line") && strings.Contains(text, "unpacking")
	})
	if rec["status"] != "pending" {
		t.Errorf("%v", rec)
	}
	os.WriteFile(gate, nil, 0o600)
	rec = s.Wait(task)
	if rec["status"] != "success" || rec["progress"] != 1.0 || !strings.Contains(rec["result"].(string), "first line\nlast line\n") {
		t.Errorf("%v", rec)
	}
}

// An apply whose runner died has an unknown end: nothing runs it again but
// being asked. The admin settles it, or applies again.
func TestUnknown_IsNeverRepeatedUnasked(t *testing.T) {
	t.Parallel()
	for _, call := range []string{"pool_patch.apply", "pool_patch.pool_apply"} {
		for _, end := range []string{"apply", "--applied", "--not-applied"} {
			t.Run(call+" then "+end, func(t *testing.T) { unknownEnd(t, call, end) })
		}
	}
}

func unknownEnd(t *testing.T, call, end string) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	effect := filepath.Join(t.TempDir(), "effect")
	patch := &lab.Patch{Apply: fmt.Sprintf("echo once >> %[1]s; [ $(cat %[1]s | wc -l) -gt 1 ] && exit 0; while :; do sleep 1; done", effect)}
	p := s.MustUpload(patch)
	args := []any{p}
	if call == "pool_patch.apply" {
		args = append(args, s.Host())
	}
	task := s.Call("Async."+call, args...).(string)
	until(t, "the patch to begin", func() bool { return lines(effect) == 1 })
	h.Kill()
	for _, pid := range processes(h.StateDir) { // the runner and its patch: a machine that lost power
		if proc, err := os.FindProcess(pid); err == nil {
			proc.Kill()
		}
	}
	h.Up()
	rec := s.Wait(task)
	if rec["status"] != "failure" || rec["error_info"].([]any)[0] != "PATCH_APPLY_FAILED" {
		t.Errorf("%v", rec)
	}
	_, hp := s.One("host_patch")
	if hp["applied"] != false || hp["other_config"].(map[string]any)["patchd-state"] != "unknown" {
		t.Errorf("%v", hp)
	}
	if n := len(s.All("message")); n == 0 {
		t.Error("no message tells of it")
	}
	h.Restart()
	time.Sleep(300 * time.Millisecond)
	if n := lines(effect); n != 1 {
		t.Fatalf("it ran %d times", n)
	}
	want := 1
	if end == "apply" {
		if _, err := apply(h.Root(), p); err != nil {
			t.Error(err)
		}
		want = 2
	} else if out, errs, code := h.CLI("patch", "settle", string(patch.UUID), hostUUID(h.Root()), end); code != 0 {
		t.Errorf("%d %s%s", code, out, errs)
	}
	if n := lines(effect); n != want {
		t.Errorf("it ran %d times", n)
	}
	applied := 0
	for _, hp := range h.Root().All("host_patch") {
		if hp["applied"] == true {
			applied++
		} else {
			t.Errorf("%v", hp)
		}
	}
	if (end != "--not-applied") != (applied == 1) {
		t.Errorf("%d applied", applied)
	}
	stamp := filepath.Join(h.PatchDir, "applied", string(patch.UUID))
	if exists(stamp) != (end != "--not-applied") {
		t.Errorf("the stampfile is there: %v", exists(stamp))
	}
}

func hostUUID(s *lab.Session) string {
	s.H.T.Helper()
	_, host := s.One("host")
	return host["uuid"].(string)
}

// A job that waits for its turn is cancelled at once and never runs; the one
// before it is not touched, and a task that has ended cannot be cancelled.
func TestCancel_WaitingJob(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	dir := t.TempDir()
	gate, ran := filepath.Join(dir, "gate"), filepath.Join(dir, "ran")
	first := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf("touch %[1]s.begun; while [ ! -e %[1]s ]; do sleep 0.02; done", gate)})
	second := s.MustUpload(&lab.Patch{Precheck: "touch " + ran, Apply: "touch " + ran})
	one := s.Call("Async.pool_patch.apply", first, s.Host()).(string)
	until(t, "the first to begin", func() bool { return exists(gate + ".begun") })
	two := s.Call("Async.pool_patch.apply", second, s.Host()).(string)
	three := s.Call("Async.pool_patch.pool_apply", second).(string)
	if rec := s.Wait(three); rec["error_info"].([]any)[0] != "OTHER_OPERATION_IN_PROGRESS" {
		t.Errorf("%v", rec)
	}
	s.Call("task.cancel", two)
	if rec := s.Wait(two); rec["status"] != "cancelled" {
		t.Errorf("%v", rec)
	}
	if rec := s.Call("task.get_record", one).(map[string]any); rec["status"] != "pending" {
		t.Errorf("%v", rec)
	}
	if n := len(s.All("host_patch")); n != 1 {
		t.Errorf("%d host_patches", n)
	}
	os.WriteFile(gate, nil, 0o600)
	if rec := s.Wait(one); rec["status"] != "success" {
		t.Errorf("%v", rec)
	}
	_, err := s.Try("task.cancel", one)
	hasCode(t, err, "OPERATION_NOT_ALLOWED")
	if exists(ran) {
		t.Error("the cancelled one has run")
	}
	if _, err := apply(s, second); err != nil || !exists(ran) {
		t.Error(err)
	}
}

// Logging out ends calls, not what they have begun.
func TestCancel_LogoutIsNoCancel(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s, other := h.Root(), h.Root()
	gate := filepath.Join(t.TempDir(), "gate")
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf("touch %[1]s.begun; while [ ! -e %[1]s ]; do sleep 0.02; done", gate)})
	task := s.Call("Async.pool_patch.apply", p, s.Host()).(string)
	until(t, "the apply to begin", func() bool { return exists(gate + ".begun") })
	s.Call("session.logout")
	_, err := s.Try("pool.get_all")
	wantCode(t, err, "SESSION_INVALID", s.Ref)
	os.WriteFile(gate, nil, 0o600)
	if rec := other.Wait(task); rec["status"] != "success" {
		t.Errorf("%v", rec)
	}
}

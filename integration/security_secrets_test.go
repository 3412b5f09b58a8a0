package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// TestSecurity_secrets looks for passwords, session refs and the pool secret
// where they must not be, after all kinds of calls by all kinds of ways in.
func TestSecurity_secrets(t *testing.T) {
	h := lab.Start(t, lab.Options{Flags: []string{"--log-level", "debug"}})
	s := h.Root()
	reader := user(h, session.ReadOnly)
	seen := filepath.Join(t.TempDir(), "seen")
	// What a patch can see of the processes around it, and of its own variables.
	look := "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done >> " + seen + " 2>/dev/null; tr '\\0' '\\n' < /proc/$PPID/environ >> " + seen + "; env >> " + seen
	ref := s.MustUpload(&lab.Patch{Apply: look})
	if _, err := apply(s, ref); err != nil {
		t.Fatal(err)
	}
	h.Login("root", "a wrong password")
	reader.Try("session.change_password", "pw of a-read-only", "the next password")
	reader.Try("session.change_password", "not the password", "another password")
	s.Call("patchd.user_passwd", "a-read-only", "a third password")
	if out, errs, code := h.CLIInput("a fourth password\n", "user", "add", "other", "--role", "read-only"); code != 0 {
		t.Logf("user add: %s %s", out, errs)
	}
	task := s.Call("Async.pool_patch.precheck", ref, s.Host()).(string)
	s.Wait(task)
	s.Try("pool_patch.apply", ref, s.Ref) // a session where another ref belongs
	s.Try("task.create", "x", "y")
	xe := "host-list\nusername=root\npassword=" + lab.Password + "\n"
	rawRequest(h, fmt.Sprintf("POST /cli HTTP/1.0\r\nContent-Length: %d\r\n\r\n", len(xe)), []byte(xe), 5e9)
	bad := "host-list\nusername=root\npassword=an xe password\n"
	rawRequest(h, fmt.Sprintf("POST /cli HTTP/1.0\r\nContent-Length: %d\r\n\r\n", len(bad)), []byte(bad), 5e9)
	for _, query := range []string{"session_id=" + s.Ref, "session_id=OpaqueRef:x", "pool_secret=a%20wrong%20secret"} {
		rawRequest(h, "GET /pool_patch_download?"+query+" HTTP/1.1\r\nHost: x\r\n\r\n", nil, 5e9)
		rawRequest(h, "PUT /nowhere?"+query+" HTTP/1.1\r\nHost: x\r\n\r\n", nil, 5e9)
	}
	secret, err := os.ReadFile(filepath.Join(h.StateDir, "pool-secret"))
	if err != nil {
		names, _ := filepath.Glob(h.StateDir + "/*")
		t.Fatalf("%v; there are %v", err, names)
	}
	words := []string{
		lab.Password, "a wrong password", "the next password", "another password", "a third password", "a fourth password", "an xe password",
		s.Ref, strings.TrimPrefix(s.Ref, "OpaqueRef:"), reader.Ref, strings.TrimSpace(string(secret)), "a wrong secret",
	}
	backup := filepath.Join(t.TempDir(), "backup")
	h.Down()
	if out, errs, code := h.CLI("store", "backup", backup); code != 0 {
		t.Logf("backup: %s %s", out, errs)
	}
	h.Up()
	s2 := h.Root()
	places := map[string][]byte{"the log": []byte(h.Log())}
	read := func(name, path string) {
		if b, err := os.ReadFile(path); err == nil {
			places[name] = b
		} else {
			t.Errorf("%s: %v", name, err)
		}
	}
	read("the backup", backup)
	read("what the patch sees", seen)
	read("the command line", fmt.Sprintf("/proc/%d/cmdline", h.Pid()))
	filepath.Walk(filepath.Join(h.StateDir, "db"), func(path string, st os.FileInfo, err error) error {
		if err == nil && st.Mode().IsRegular() {
			read("the database, "+filepath.Base(path), path)
		}
		return nil
	})
	for _, class := range []string{"task", "pool", "host", "message", "pool_patch", "host_patch", "SR", "PBD"} {
		places["records of "+class] = fmt.Append(nil, s2.All(class))
	}
	for place, text := range places {
		for _, word := range words {
			if bytes.Contains(text, []byte(word)) {
				at := bytes.Index(text, []byte(word))
				t.Errorf("%q stands in %s: %.200q", word, place, text[max(0, at-100):min(len(text), at+60)])
			}
		}
	}
	// Files that hold secrets are for root alone.
	filepath.Walk(h.StateDir, func(path string, st os.FileInfo, err error) error {
		name := filepath.Base(path)
		if err == nil && (strings.Contains(name, "secret") || strings.Contains(name, "password") || strings.HasSuffix(name, ".key") || strings.HasSuffix(name, ".pem") || name == "db" || name == "patchd.sock" || name == "jobs") && st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %o", path, st.Mode().Perm())
		}
		return nil
	})
}

// TestSecurity_audit: one line for each call that changes something, none for
// those that only look.
func TestSecurity_audit(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	reader := user(h, session.ReadOnly)
	pool, _ := s.One("pool")
	ref := s.MustUpload(&lab.Patch{})
	steps := []struct {
		method  string
		do      func()
		outcome string
	}{
		{"pool.set_name_label", func() { s.Call("pool.set_name_label", pool, "a name") }, "Success"},
		{"pool.set_name_label", func() { reader.Try("pool.set_name_label", pool, "x") }, xapi.RBACPermissionDenied},
		{"pool_patch.apply", func() { apply(s, ref) }, "Success"},
		{"pool_patch.destroy", func() { s.Try("pool_patch.destroy", ref) }, xapi.PatchIsApplied},
		{"Async.pool_patch.pool_clean", func() { s.Wait(s.Call("Async.pool_patch.pool_clean", ref).(string)) }, "Success"},
		{"session.login_with_password", func() { h.Login("root", "wrong") }, xapi.SessionAuthenticationFailed},
		{"patchd.user_passwd", func() { s.Call("patchd.user_passwd", "a-read-only", "a new password") }, "Success"},
		{"http/pool_patch_upload", func() { s.MustUpload(&lab.Patch{}) }, "Success"},
		{"http/pool_patch_upload", func() { s.Upload([]byte("no patch")) }, xapi.InvalidPatch},
		{"http/pool_patch_upload", func() { reader.Upload([]byte("no patch")) }, xapi.SessionAuthenticationFailed},
	}
	for _, step := range steps {
		from := len(h.Log())
		step.do()
		var line string
		until(t, "an audit line of "+step.method, func() bool {
			for _, l := range strings.Split(h.Log()[from:], "\n") {
				if strings.Contains(l, "msg=audit") && strings.Contains(l, "method="+step.method) {
					line = l
					return true
				}
			}
			return false
		})
		if !strings.Contains(line, "outcome="+step.outcome) || !strings.Contains(line, "user=") && step.outcome != xapi.SessionAuthenticationFailed || strings.Contains(line, "a name") {
			t.Errorf("%s: %s", step.method, line)
		}
	}
	from := len(h.Log())
	s.Call("pool.get_name_label", pool)
	s.Call("host.get_all_records")
	if strings.Contains(h.Log()[from:], "msg=audit") {
		t.Errorf("calls that only look are audited: %s", h.Log()[from:])
	}
}

// TestSecurity_T20_no_bypass: the binary that is released has no switch that
// lets anything unsigned through, and no fault injection.
func TestSecurity_T20_no_bypass(t *testing.T) {
	release, err := os.ReadFile(lab.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"skipsignature", "skip-signature", "skip_signature", "SkipSignature", "no-verify", "noverify", "PATCHD_DEBUG", "PATCHD_INSECURE", "allow-unsigned", "AllowUnsigned", "PATCHD_FAULT", "PATCHD_PINNED"} {
		if bytes.Contains(release, []byte(word)) {
			t.Errorf("the binary holds %q", word)
		}
	}
	help, err := exec.Command(lab.Binary(t), "serve", "--help").CombinedOutput()
	if err != nil || bytes.Contains(bytes.ToLower(help), []byte("pinned")) {
		t.Errorf("serve --help: %v %s", err, help)
	}
	// All that could be meant to switch something off, all at once.
	env := []string{"PATCHD_FAULT=fail:*", "PATCHD_FAULT_PLAN=*", "PATCHD_SKIP_SIGNATURE=1", "PATCHD_PINNED_SHA256=" + strings.Repeat("0", 64), "PATCHD_DEBUG=1", "PATCHD_INSECURE=1", "GODEBUG=x509sha1=1", "PATCHD_CHECK=0"}
	h := lab.Start(t, lab.Options{Env: env})
	for _, name := range []string{"skipsignature", ".skipsignature", "insecure", "trusted-keys/skipsignature"} {
		os.WriteFile(filepath.Join(h.StateDir, name), []byte("1"), 0o644)
	}
	s := h.Root()
	hasCode(t, uploadErr(s, (&lab.Patch{}).Payload()), xapi.InvalidPatch)
	mark := filepath.Join(t.TempDir(), "mark")
	if _, err := apply(s, s.MustUpload(&lab.Patch{Apply: "echo >> " + mark})); err != nil || lines(mark) != 1 {
		t.Errorf("an apply with variables of fault injection: %v", err)
	}
}

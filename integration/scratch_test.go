package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// ownRoot makes a root filesystem of the test's own, in which patchd runs by
// the wrapper it gives: only what patchd and patches write to `/` is on it.
// keep lists folders that are the same inside and outside.
func ownRoot(t *testing.T, binary string, keep ...string) (wrapper, root string) {
	t.Helper()
	root = ext4FS(t, 256*mib)
	dir := t.TempDir()
	script := "#!/bin/sh\nset -e\n[ -n \"$OWN_ROOT\" ] || OWN_ROOT=1 exec unshare -m --propagation private \"$0\" \"$@\"\n"
	for _, d := range []string{"/usr", "/etc", "/dev", "/proc", "/sys"} {
		script += bind(t, root, d)
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		if target, err := os.Readlink("/" + l); err == nil {
			if err := os.Symlink(target, filepath.Join(root, l)); err != nil {
				t.Fatal(err)
			}
		} else if exists("/" + l) {
			script += bind(t, root, "/"+l)
		}
	}
	for _, d := range append(keep, filepath.Dir(binary)) {
		script += bind(t, root, d)
	}
	for _, d := range []string{"tmp", "var/tmp", "root", "run", ".old"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script += fmt.Sprintf("cd %s\npivot_root . .old\ncd /\numount -l /.old\nexec %s \"$@\"\n", root, binary)
	wrapper = filepath.Join(dir, "patchd")
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return wrapper, root
}

func bind(t *testing.T, root, dir string) string {
	t.Helper()
	if err := os.MkdirAll(root+dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("mount --rbind %s %s\n", dir, root+dir)
}

// A5, S1-02, S1-25, S1-26, S1-29: a patch writes twice its own size into its
// scratch room and changes the host; the root filesystem grows by that change
// only. On a filesystem whose files can be cloned, and on one where they are
// copied.
func TestA5_ScratchIsNotOnTheRoot(t *testing.T) {
	t.Parallel()
	for name, fs := range map[string]func(testing.TB, int64) string{"ext4": ext4FS, "xfs": xfsFS} {
		t.Run(name, func(t *testing.T) { scratchIsNotOnTheRoot(t, fs(t, 2*gib)) })
	}
}

func scratchIsNotOnTheRoot(t *testing.T, dir string) {
	const payload = 40 << 20
	wrapper, root := ownRoot(t, lab.Binary(t), dir)
	h := lab.Start(t, lab.Options{Dir: dir, Binary: wrapper})
	s := h.Root()
	run(t, "fallocate", "-l", fmt.Sprint(free(t, root)-3*mib), filepath.Join(root, "others")) // the upload is ten times what is left
	before := used(t, root)
	p := s.MustUpload(&lab.Patch{Pad: payload, Apply: `set -e
head -c $((2 * $(stat -c %s "$0"))) /dev/zero > "$PATCHD_SCRATCH/work"
[ $(stat -c %s "$PATCHD_SCRATCH/work") -ge 83886080 ]
echo "$0"; pwd
yes patched | head -c 300000 > "$PATCHD_ROOT/patched"`})
	golden := fileSum(t, image(s, vdiOf(s, p)))
	if grown := used(t, root) - before; grown != 0 {
		t.Errorf("the upload took %d bytes of the root filesystem", grown)
	}
	out, err := apply(s, p)
	if err != nil {
		t.Fatal(err)
	}
	if where := strings.Split(out, "\n"); len(where) < 2 || where[0] != where[1]+"/patch" || !strings.HasPrefix(out, h.StateDir) {
		t.Errorf("it ran as %q", out)
	}
	file := allocated(t, filepath.Join(root, "patched"))
	if grown := used(t, root) - before; grown != file || file < 300_000 {
		t.Errorf("the root filesystem grew by %d bytes, the patched file takes %d", grown, file)
	}
	if sum := fileSum(t, image(s, vdiOf(s, p))); sum != golden {
		t.Error("the golden image has changed")
	}
	h.CheckNothingLeft()
}

// A5: a patch kills the daemon in the middle of its apply; what starts services
// on this host starts it again, and the patch ends while the new one looks on.
func TestA5_PatchRestartsPatchd(t *testing.T) {
	t.Parallel()
	for _, call := range []string{"pool_patch.apply", "pool_patch.pool_apply"} {
		for _, wait := range []string{"the daemon is back", "the patch is done"} {
			t.Run(call+" until "+wait, func(t *testing.T) { patchRestartsPatchd(t, call, wait) })
		}
	}
}

func patchRestartsPatchd(t *testing.T, call, wait string) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	dir := t.TempDir()
	effect, back, done := filepath.Join(dir, "effect"), filepath.Join(dir, "back"), filepath.Join(dir, "done")
	script := fmt.Sprintf("echo once >> %s; kill -9 %d\n", effect, h.Pid())
	if wait == "the daemon is back" {
		script += fmt.Sprintf("while [ ! -e %s ]; do sleep 0.05; done\n", back)
	}
	script += "echo survived; touch " + done
	p := s.MustUpload(&lab.Patch{Guidance: "restartXAPI", Apply: script})
	args, result := []any{p}, "<value></value>"
	if call == "pool_patch.apply" {
		args, result = append(args, s.Host()), "<value>survived\n</value>"
	}
	task := s.Call("Async."+call, args...).(string)
	<-h.Exited()
	if wait == "the patch is done" {
		until(t, "the patch to end without a daemon", func() bool { return exists(done) })
	}
	h.Up()
	if err := os.WriteFile(back, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if rec := s.Wait(task); rec["status"] != "success" || rec["result"] != result {
		t.Errorf("the task: %v", rec)
	}
	if n := lines(effect); n != 1 {
		t.Errorf("applied %d times", n)
	}
	if _, hp := s.One("host_patch"); hp["applied"] != true {
		t.Errorf("%v", hp)
	}
	if patch := s.Call("pool_patch.get_record", p).(map[string]any); patch["pool_applied"] != true {
		t.Errorf("%v", patch)
	}
	if !exists(filepath.Join(h.PatchDir, "applied", s.Call("pool_patch.get_uuid", p).(string))) {
		t.Error("no stampfile")
	}
	_, err := apply(s, p)
	wantCode(t, err, "PATCH_ALREADY_APPLIED", p)
}

// The same where nothing but the patch itself starts the daemon again: a
// daemon that finds itself among the processes of a patch leaves them.
func TestA5_PatchStartsPatchdItself(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	dir := t.TempDir()
	effect, log := filepath.Join(dir, "effect"), filepath.Join(dir, "log")
	command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", h.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Split(strings.TrimSuffix(string(command), "\x00"), "\x00")
	for i, w := range words {
		words[i] = "'" + w + "'"
	}
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf(`echo once >> %s
kill -9 %d
sleep 0.3
setsid %s > %s 2>&1 &
echo $! > %s/pid
sleep 2
echo survived`, effect, h.Pid(), strings.Join(words, " "), log, dir)})
	task := s.Call("Async.pool_patch.apply", p, s.Host()).(string)
	<-h.Exited()
	t.Cleanup(func() { endProcess(t, filepath.Join(dir, "pid")) })
	until(t, "the daemon that the patch has started", func() bool { return answers(h) })
	if rec := s.Wait(task); rec["status"] != "success" {
		b, _ := os.ReadFile(log)
		t.Errorf("the task: %v\n%s", rec, b)
	}
	if n := lines(effect); n != 1 {
		t.Errorf("applied %d times", n)
	}
	time.Sleep(500 * time.Millisecond) // what is left of the patch has been killed by now
	if _, hp := s.One("host_patch"); hp["applied"] != true {
		t.Errorf("%v", hp)
	}
	// It does its work like any other.
	if _, err := apply(s, s.MustUpload(&lab.Patch{})); err != nil {
		t.Error(err)
	}
}

// S1-26: twice its own size fits beside a patch of any size, at the smallest
// images too.
func TestS1_26_TwiceItsSizeFits(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	for _, pad := range []int{0, 500_000, 1_000_000, 1_040_000, 1_048_576, 3_000_000} {
		p := s.MustUpload(&lab.Patch{Pad: pad, Apply: `set -e
cat "$0" "$0" > "$PATCHD_SCRATCH/twice"; sync "$PATCHD_SCRATCH/twice"; [ -w . ]
cat "$0" "$0" > ./beside 2>/dev/null && echo more || :`})
		if _, err := apply(s, p); err != nil {
			t.Errorf("%d bytes: %v", pad, err)
		}
	}
}

package dom0

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// boxed is a patch in an image, to be run in a sandbox.
func boxed(t testing.TB, script string) Cmd {
	t.Helper()
	image := newImage(t, map[string]string{"patch": "#!/bin/sh\n" + script})
	return Cmd{
		Path: "/patch", Args: []string{"info"}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Sandbox: &Sandbox{Image: image}, Timeout: time.Minute, Grace: time.Second,
	}
}

func TestSandboxRunsThePatchOfTheImage(t *testing.T) {
	s := newSystem(t, Options{})
	c := boxed(t, "echo $0 $1 $A; pwd; ls /tmp/image; echo three >&3; exit 2")
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c.Env, c.ExtraFiles = append(c.Env, "A=b"), []File{f}
	r, out := run(t, s, c)
	if r != (Result{ExitCode: 2}) || out != "/tmp/image/patch info b\n/tmp/image\nlost+found\npatch\n" {
		t.Errorf("%+v %q", r, out)
	}
	if b, err := os.ReadFile(f.Name()); err != nil || string(b) != "three\n" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestSandboxHasNoRights(t *testing.T) {
	s := newSystem(t, Options{})
	_, out := run(t, s, boxed(t, "id -u; id -g; id -G; grep -E '^(Cap|NoNew)' /proc/self/status | tr -d '\\n\\t'; echo; ulimit -n; ulimit -c; umask; cat /proc/self/oom_score_adj"))
	want := "65534\n65534\n65534\nCapInh:0000000000000000CapPrm:0000000000000000CapEff:0000000000000000" +
		"CapBnd:0000000000000000CapAmb:0000000000000000NoNewPrivs:1\n256\n0\n0022\n1000\n"
	if out != want {
		t.Errorf("got %q", out)
	}
}

func TestSandboxCannotReachOut(t *testing.T) {
	secrets := t.TempDir()
	for name, mode := range map[string]os.FileMode{"world": 0o644, "root": 0o600} {
		if err := os.WriteFile(filepath.Join(secrets, name), []byte("secret"), mode); err != nil {
			t.Fatal(err)
		}
	}
	// The folder is not below /tmp, which is replaced anyway.
	state, err := os.MkdirTemp("/var/lib", "patchd-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(state)
	file, err := os.CreateTemp("/var/lib", "patchd-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file.Name())
	_, err = file.WriteString("secret")
	err = errors.Join(err, file.Chmod(0o644), file.Close(), os.Chmod(state, 0o755),
		os.WriteFile(filepath.Join(state, "visible"), []byte("secret"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	s := newSystem(t, Options{Hide: []string{state, file.Name(), "/absent/path"}})
	for name, script := range map[string]string{
		"network":          "exec 5<>/dev/tcp/127.0.0.1/" + port,
		"interfaces":       "test $(ls /sys/class/net /proc/net/dev_snmp6 2>/dev/null | wc -l) -gt 99 || ip -o addr | grep -v ' lo ' | grep .",
		"write /":          "touch /x",
		"write /etc":       "echo x >> /etc/passwd",
		"write /dev":       "touch /dev/x",
		"write /dev/shm":   "touch /dev/shm/x",
		"write /var/tmp":   "touch /var/tmp/x",
		"write image":      "touch /tmp/image/x",
		"write /proc":      "echo 0 > /proc/self/oom_score_adj",
		"write /sys":       "echo 1 > /sys/kernel/mm/ksm/run",
		"root-only file":   "cat /etc/shadow",
		"test's secrets":   "cat " + secrets + "/*",
		"hidden folder":    "cat " + state + "/visible",
		"hidden file":      "grep secret " + file.Name(),
		"/run":             "ls /run | grep .",
		"disks":            "ls /dev/vd* /dev/sd* /dev/loop* /dev/mem 2>/dev/null | grep .",
		"other processes":  "ls /proc | grep -x 1",
		"process one":      "kill -9 1 || kill -0 1",
		"mount":            "mount -t tmpfs x /tmp",
		"unmount":          "umount /run || umount /tmp/image",
		"user namespace":   "unshare -U true",
		"mount namespace":  "unshare -m true",
		"become root":      "setpriv --reuid=0 true",
		"chroot":           "chroot / true",
		"device node":      "mknod /tmp/n b 7 0",
		"big file":         "head -c 17M /dev/zero > /tmp/big",
		"more memory":      "dd if=/dev/zero of=/dev/null bs=600M count=1",
		"parent's keyring": "test -n \"$(cat /proc/keys 2>/dev/null | grep -v -e _ses -e _uid)\"",
	} {
		t.Run(name, func(t *testing.T) {
			c := boxed(t, "bash -c '"+script+"' && echo HOLE")
			if r, out := run(t, s, c); strings.Contains(out, "HOLE") || r.TimedOut {
				t.Errorf("%+v %s", r, out)
			}
		})
	}
}

func TestSandboxMayUseTmp(t *testing.T) {
	s := newSystem(t, Options{})
	r, out := run(t, s, boxed(t, "cd /tmp && echo 'echo works' > x && sh x && cat /dev/null && head -c 3 /dev/zero | wc -c && echo err > /dev/stderr"))
	if r != (Result{}) || out != "works\n3\nerr\n" {
		t.Errorf("%+v %q", r, out)
	}
}

func TestSandboxEndsHoweverThePatchBehaves(t *testing.T) {
	s := newSystem(t, Options{})
	for name, c := range map[string]struct {
		script  string
		timeout time.Duration
		want    Result
	}{
		"hangs":              {"exec sleep 1000", 300 * time.Millisecond, Result{ExitCode: -1, Signal: 15, TimedOut: true}},
		"ignores TERM":       {"trap '' TERM; while :; do sleep 0.01; done", 300 * time.Millisecond, Result{ExitCode: -1, Signal: 9, TimedOut: true}},
		"forks away":         {"setsid sleep 1000 & setsid sh -c 'setsid sleep 1000 & sleep 1000' & exit 4", 0, Result{ExitCode: 4, Straggler: true}},
		"kills itself":       {"kill -9 $$", 0, Result{ExitCode: -1, Signal: 9}},
		"crashes":            {"kill -SEGV $$", 0, Result{ExitCode: -1, Signal: 11}},
		"kills all it sees":  {"kill -9 -1; kill -9 1; exit 8", 0, Result{ExitCode: 8}},
		"leaves dead":        {"sh -c 'exit 1' & sh -c 'exit 2' & wait; exit 3", 0, Result{ExitCode: 3}},
		"fork bomb":          {"bomb() { bomb | bomb & }; bomb 2>/dev/null; sleep 1000", 500 * time.Millisecond, Result{TimedOut: true}},
		"late reader":        {"(sleep 0.05; exit 0) & exit 6", 0, Result{ExitCode: 6}},
		"exits with a queue": {"yes | head -c 300000; exit 5", 0, Result{ExitCode: 5}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := boxed(t, c.script)
			cmd.Grace = 200 * time.Millisecond
			if c.timeout > 0 {
				cmd.Timeout = c.timeout
			}
			r, _ := run(t, s, cmd)
			switch name {
			case "fork bomb": // how the shell itself ends is chance
				r = Result{TimedOut: r.TimedOut}
			}
			if r != c.want {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestSandboxOfABadImageIsAStartError(t *testing.T) {
	s := newSystem(t, Options{})
	c := boxed(t, "exit 0")
	garbage := filepath.Join(t.TempDir(), "garbage.img")
	if err := os.WriteFile(garbage, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		image, path, step string
		want              error
	}{
		"not a filesystem": {garbage, "/patch", "mount", unix.EINVAL},
		"no image":         {garbage + ".absent", "/patch", "attach", os.ErrNotExist},
		"no patch":         {c.Sandbox.Image, "/absent", "exec", os.ErrNotExist},
		"not a program":    {newImage(t, map[string]string{"patch": "xx"}), "/patch", "exec", unix.ENOEXEC},
	} {
		cmd := c
		cmd.Path, cmd.Sandbox = test.path, &Sandbox{Image: test.image}
		_, err := s.Run(t.Context(), cmd)
		var start *StartError
		if !errors.As(err, &start) || start.Step != test.step || !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSandboxesRunSideBySide(t *testing.T) {
	s := newSystem(t, Options{})
	c := boxed(t, "echo hello")
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			var out bytes.Buffer
			c := c
			c.Stdout = &out
			if r, err := s.Run(context.Background(), c); err != nil || r != (Result{}) || out.String() != "hello\n" {
				t.Errorf("%+v, %v, %q", r, err, out.String())
			}
		})
	}
	wg.Wait()
}

func TestAForkBombStarvesNoOtherSandbox(t *testing.T) {
	s := newSystem(t, Options{})
	if s.pids == nil {
		return // nothing but the limit by user then, which is for all together
	}
	bomb := boxed(t, "bomb() { bomb | bomb & }; bomb 2>/dev/null; echo up; sleep 1000")
	bomb.Grace = 0
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	up := make(chan struct{})
	bomb.Stdout = writerFunc(func(p []byte) (int, error) {
		close(up)
		return len(p), nil
	})
	ended := make(chan error)
	go func() {
		_, err := s.Run(ctx, bomb)
		ended <- err
	}()
	<-up
	for range 5 {
		r, out := run(t, s, boxed(t, "sh -c 'echo hello | cat'"))
		if r != (Result{}) || out != "hello\n" {
			t.Errorf("%+v %q", r, out)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestSandboxWithoutGroupsIsEndedByItsNamespace(t *testing.T) {
	s := newSystem(t, Options{})
	s.groups = nil
	c := boxed(t, "trap '' TERM; setsid sleep 1000 & sleep 1000")
	c.Timeout, c.Grace, c.Group = 300*time.Millisecond, 100*time.Millisecond, "ignored"
	if r, _ := run(t, s, c); !r.TimedOut {
		t.Errorf("%+v", r)
	}
}

// helperSandbox runs a sandbox until its own death.
func helperSandbox(prefix, image string) error {
	s, err := New(Options{CgroupPrefix: prefix})
	if err != nil {
		return err
	}
	_, err = s.Run(context.Background(), Cmd{
		Path: "/patch", Env: []string{"PATH=/usr/bin:/bin"}, Stdout: os.Stdout,
		Sandbox: &Sandbox{Image: image}, Group: "lifeline", Timeout: time.Hour,
	})
	return err
}

func TestSandboxDiesWithItsParent(t *testing.T) {
	s := newSystem(t, Options{})
	c := boxed(t, "trap '' TERM HUP PIPE; echo ready; while :; do sleep 0.05; done")
	parent, _ := startHelper(t, "sandbox", fmt.Sprintf("patchd-test-%d", os.Getpid()), c.Sandbox.Image)
	if alive, err := s.Alive("lifeline"); !alive || err != nil {
		t.Fatalf("%v, %v", alive, err)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.WaitEmpty(ctx, "lifeline"); err != nil {
		t.Error(err)
	}
	if err := s.Kill(t.Context(), "lifeline", 0); err != nil {
		t.Error(err)
	}
}

// helperHold mounts an image where nobody else sees it, and waits for its death.
func helperHold(image, dir string) error {
	s, err := New(Options{})
	if err != nil {
		return err
	}
	ctx := context.Background()
	dev, err := s.Attach(ctx, image, false)
	if err != nil {
		return err
	}
	if err := s.Mount(ctx, Mount{Source: dev.Path(), Target: dir, Type: "ext4"}); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "patch")); err != nil {
		return err
	}
	fmt.Println("ready", dev.Path())
	select {}
}

// kill -9 of the runner leaves neither mount nor loop device behind, and
// nobody saw its mount while it lived.
func TestPrivateMountsVanishWithTheirHolder(t *testing.T) {
	s := newSystem(t, Options{})
	image, dir := newImage(t, map[string]string{"patch": "x"}), t.TempDir()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Spawn(t.Context(), Cmd{Path: exe, Args: []string{"helper", "hold", image, dir}, Stdout: out, Stderr: out, Group: "holder", PrivateMounts: true})
	if err != nil {
		t.Fatal(err)
	}
	var dev string
	eventually(t, "the holder mounts", func() error {
		b, err := os.ReadFile(out.Name())
		if _, err := fmt.Sscanf(string(b), "ready %s\n", &dev); err != nil {
			return fmt.Errorf("said %q", b)
		}
		return err
	})
	if mounted, err := mountinfo.Mounted(dir); mounted || err != nil {
		t.Errorf("the host sees the mount: %v, %v", mounted, err)
	}
	if got := loopFlag(t, dev, "backing_file"); got != image {
		t.Errorf("%s is of %s", dev, got)
	}
	if err := s.Kill(t.Context(), "holder", 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the device vanishes", func() error { return leaks(t) })
}

func TestPrivateMountsSeeNewMountsOfTheHost(t *testing.T) {
	s := newSystem(t, Options{})
	_, out := run(t, s, Cmd{Path: "/bin/cat", Args: []string{"/proc/self/mountinfo"}, PrivateMounts: true})
	if strings.Contains(out, " shared:") {
		t.Errorf("a mount would show on the host:\n%s", out)
	}
}

// helperRemount makes a tree read-only the way old kernels need it.
func helperRemount() error {
	if err := unix.Mount("stage", stage, "tmpfs", 0, "size=64k"); err != nil {
		return err
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := remountEach(); err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if !hidden(m, mounts) && !(hasOption(m.Options, "ro") && hasOption(m.Options, "nosuid") && hasOption(m.Options, "nodev")) {
			return fmt.Errorf("%s is %s", m.Mountpoint, m.Options)
		}
	}
	fmt.Println(len(mounts) > 3)
	return nil
}

func TestReadOnlyRootOnKernelsWithoutMountSetattr(t *testing.T) {
	s := newSystem(t, Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, out := run(t, s, Cmd{Path: exe, Args: []string{"helper", "remount"}, PrivateMounts: true})
	if r != (Result{}) || out != "true\n" {
		t.Errorf("%+v %s", r, out)
	}
}

func TestTheShimIsNotACommand(t *testing.T) {
	s := newSystem(t, Options{})
	for _, arg := range []string{"3", "x", "1"} {
		c := sh("exec -a patchd-shim /proc/self/exe " + arg)
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		c.Path, c.Args = "/bin/bash", []string{"-c", "exec -a patchd-shim " + exe + " " + arg}
		r, out := run(t, s, c)
		if r.ExitCode != 2 || !strings.Contains(out, "started by patchd only") {
			t.Errorf("%s: %+v %q", arg, r, out)
		}
	}
}

func BenchmarkSandbox(b *testing.B) {
	s := newSystem(b, Options{})
	c := boxed(b, "exit 0")
	for b.Loop() {
		if _, err := s.Run(b.Context(), c); err != nil {
			b.Fatal(err)
		}
	}
}

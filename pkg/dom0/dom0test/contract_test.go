package dom0test_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/dom0/dom0test"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// script plays /bin/sh -c for the scripts of this file.
func script(ctx context.Context, p *dom0test.Process) dom0.Result {
	switch p.Args[1] {
	case "echo out; echo err >&2; exit 3":
		fmt.Fprintln(p.Stdout, "out")
		fmt.Fprintln(p.Stderr, "err")
		return dom0.Result{ExitCode: 3}
	case "exec sleep 1000":
		<-ctx.Done()
		return dom0.Result{ExitCode: -1, Signal: int(syscall.SIGTERM)}
	case "trap '' TERM; while :; do sleep 0.05; done":
		<-p.Killed
		return dom0.Result{ExitCode: -1, Signal: int(syscall.SIGKILL)}
	}
	return dom0.Result{}
}

// both runs a test on the fake and on the real thing: what holds for one must
// hold for the other.
func both(t *testing.T, f func(t *testing.T, d dom0.Dom0, dir, image string)) {
	t.Run("fake", func(t *testing.T) {
		d := dom0test.New(script)
		d.Exists = func(image string) bool {
			_, err := os.Stat(image)
			return err == nil
		}
		defer d.Close()
		f(t, d, t.TempDir(), newImage(t))
		if l := d.Leaks(); len(l) > 0 {
			t.Errorf("left behind: %v", l)
		}
	})
	t.Run("real", func(t *testing.T) {
		d, err := dom0.New(dom0.Options{CgroupPrefix: fmt.Sprintf("patchd-contract-%d", os.Getpid())})
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		f(t, d, dir, newImage(t))
		if groups, err := d.Groups(); err != nil || len(groups) > 0 {
			t.Errorf("left behind: %v, %v", groups, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

func newImage(t *testing.T) string {
	image := filepath.Join(t.TempDir(), "a.img")
	out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", image, "4M").CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	return image
}

func TestAttachMountUnmountDetach(t *testing.T) {
	both(t, func(t *testing.T, d dom0.Dom0, dir, image string) {
		dev, err := d.Attach(t.Context(), image, false)
		if err != nil {
			t.Fatal(err)
		}
		m := dom0.Mount{Source: dev.Path(), Target: dir, Type: "ext4"}
		if err := d.Mount(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if err := d.Mount(t.Context(), m); !errors.Is(err, syscall.EBUSY) {
			t.Errorf("mount on a target in use: %v", err)
		}
		if err := d.SyncFS(t.Context(), dir); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := d.Unmount(t.Context(), dir); err != nil {
				t.Errorf("unmount: %v", err)
			}
			if err := dev.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
	})
}

func TestWhatIsWrongIsRefused(t *testing.T) {
	both(t, func(t *testing.T, d dom0.Dom0, dir, image string) {
		if _, err := d.Attach(t.Context(), image+".absent", true); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("absent image: %v", err)
		}
		if err := d.Mount(t.Context(), dom0.Mount{Source: "x", Target: dir}); err == nil {
			t.Error("a mount without a type was taken")
		}
		if err := d.Unmount(t.Context(), "relative"); err == nil {
			t.Error("a relative target was taken")
		}
		if _, err := d.Run(t.Context(), dom0.Cmd{Path: "sh"}); err == nil {
			t.Error("a relative program was taken")
		}
		for _, g := range []string{"", "..", "a/b", ".x", "a b", strings.Repeat("x", 200)} {
			if _, err := d.Alive(g); err == nil {
				t.Errorf("group %q was taken", g)
			}
		}
		if _, err := d.Spawn(t.Context(), sh("exit 0", "")); err == nil {
			t.Error("spawn without a group was taken")
		}
		c := sh("exit 0", "g")
		c.Stdout = &strings.Builder{}
		if _, err := d.Spawn(t.Context(), c); err == nil {
			t.Error("spawn into a buffer was taken")
		}
	})
}

func TestACancelledContextDoesNothing(t *testing.T) {
	both(t, func(t *testing.T, d dom0.Dom0, dir, image string) {
		why := errors.New("why")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(why)
		_, attach := d.Attach(ctx, image, true)
		_, run := d.Run(ctx, sh("exit 0", "g"))
		_, spawn := d.Spawn(ctx, sh("exit 0", "g"))
		for i, err := range []error{
			attach, run, spawn, d.Unmount(ctx, dir), d.SyncFS(ctx, dir), d.Kill(ctx, "g", 0),
			d.Mount(ctx, dom0.Mount{Source: "tmpfs", Target: dir, Type: "tmpfs"}),
		} {
			if !errors.Is(err, why) {
				t.Errorf("call %d: %v", i, err)
			}
		}
	})
}

func sh(script, group string) dom0.Cmd {
	return dom0.Cmd{Path: "/bin/sh", Args: []string{"-c", script}, Env: []string{"PATH=/usr/bin:/bin"}, Group: group}
}

func TestRunGivesOutputAndExitStatus(t *testing.T) {
	both(t, func(t *testing.T, d dom0.Dom0, _, _ string) {
		var stdout, stderr strings.Builder
		c := sh("echo out; echo err >&2; exit 3", "g")
		c.Stdout, c.Stderr = &stdout, &stderr
		r, err := d.Run(t.Context(), c)
		if err != nil || r != (dom0.Result{ExitCode: 3}) {
			t.Errorf("%+v, %v", r, err)
		}
		if stdout.String() != "out\n" || stderr.String() != "err\n" {
			t.Errorf("%q, %q", stdout.String(), stderr.String())
		}
	})
}

func TestTimeoutTerminates(t *testing.T) {
	both(t, func(t *testing.T, d dom0.Dom0, _, _ string) {
		c := sh("exec sleep 1000", "g")
		c.Timeout, c.Grace = 50*time.Millisecond, time.Minute
		r, err := d.Run(t.Context(), c)
		if err != nil || r != (dom0.Result{ExitCode: -1, Signal: 15, TimedOut: true}) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

func TestWhatIgnoresTermIsKilledAfterTheGrace(t *testing.T) {
	both(t, func(t *testing.T, d dom0.Dom0, _, _ string) {
		c := sh("trap '' TERM; while :; do sleep 0.05; done", "g")
		c.Timeout, c.Grace = 300*time.Millisecond, 200*time.Millisecond
		r, err := d.Run(t.Context(), c)
		if err != nil || r != (dom0.Result{ExitCode: -1, Signal: 9, TimedOut: true}) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

func TestSpawnAliveWaitKill(t *testing.T) {
	both(t, func(t *testing.T, d dom0.Dom0, _, _ string) {
		if err := d.WaitEmpty(t.Context(), "g"); err != nil {
			t.Errorf("an absent group is empty: %v", err)
		}
		c := sh("exec sleep 1000", "g")
		if pid, err := d.Spawn(t.Context(), c); err != nil || pid <= 0 {
			t.Fatalf("%d, %v", pid, err)
		}
		if _, err := d.Spawn(t.Context(), c); !errors.Is(err, dom0.ErrGroupBusy) {
			t.Errorf("second spawn in one group: %v", err)
		}
		if alive, err := d.Alive("g"); !alive || err != nil {
			t.Errorf("alive: %v, %v", alive, err)
		}
		if groups, err := d.Groups(); err != nil || len(groups) != 1 || groups[0] != "g" {
			t.Errorf("groups: %v, %v", groups, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := d.WaitEmpty(ctx, "g"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait for a living group: %v", err)
		}
		emptied := make(chan error)
		go func() { emptied <- d.WaitEmpty(t.Context(), "g") }()
		for range 2 {
			if err := d.Kill(t.Context(), "g", time.Minute); err != nil {
				t.Errorf("kill: %v", err)
			}
		}
		if err := <-emptied; err != nil {
			t.Errorf("wait: %v", err)
		}
		if alive, err := d.Alive("g"); alive || err != nil {
			t.Errorf("alive: %v, %v", alive, err)
		}
	})
}

package dom0

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func attached(t testing.TB, s *System, image string, readOnly bool) Device {
	t.Helper()
	dev, err := s.Attach(t.Context(), image, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

func loopFlag(t *testing.T, dev, name string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/loop/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestAttachedDeviceIsWhatWasAsked(t *testing.T) {
	s := newSystem(t, Options{})
	image := newImage(t, nil)
	for _, readOnly := range []bool{true, false} {
		dev := attached(t, s, image, readOnly)
		if got := loopFlag(t, dev.Path(), "autoclear"); got != "1" {
			t.Errorf("autoclear %s", got)
		}
		if got := loopFlag(t, dev.Path(), "backing_file"); got != image {
			t.Errorf("backing file %s", got)
		}
		if got := loopFlag(t, dev.Path(), "dio"); got != "1" {
			t.Errorf("direct I/O %s", got)
		}
		f, err := os.OpenFile(dev.Path(), os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(make([]byte, 512), 0)
			f.Close()
		}
		if readOnly != (err != nil) {
			t.Errorf("read-only %v, but a write gives %v", readOnly, err)
		}
		if err := errors.Join(dev.Close(), dev.Close()); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func TestDirectIOIsOptional(t *testing.T) {
	s := newSystem(t, Options{})
	dir := t.TempDir()
	// The image lies on ext4 of 4 KiB blocks on a loop device, which is where
	// direct I/O and sector sizes meet most often.
	outer := attached(t, s, newImage(t, nil), false)
	if err := s.Mount(t.Context(), Mount{Source: outer.Path(), Target: dir, Type: "ext4"}); err != nil {
		t.Fatal(err)
	}
	defer s.Unmount(context.Background(), dir)
	inner := filepath.Join(dir, "inner.img")
	if err := os.WriteFile(inner, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev := attached(t, s, inner, false)
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAttachTakesABlockDeviceAsItIs(t *testing.T) {
	s := newSystem(t, Options{})
	loop := attached(t, s, newImage(t, nil), true)
	dev := attached(t, s, loop.Path(), true)
	if dev.Path() != loop.Path() || dev.Close() != nil {
		t.Errorf("got %s", dev.Path())
	}
	if got := loopFlag(t, loop.Path(), "autoclear"); got != "1" {
		t.Error("the device under it is gone")
	}
	if _, err := s.Attach(t.Context(), t.TempDir(), true); err == nil {
		t.Error("a folder was attached")
	}
	if _, err := s.Attach(t.Context(), "/dev/null", true); err == nil {
		t.Error("a character device was attached")
	}
}

func TestConfigureInSteps(t *testing.T) {
	s := newSystem(t, Options{})
	dev := attached(t, s, newImage(t, nil), true) // only to know that loop devices are there
	dev.Close()
	back, err := os.Open(newImage(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	info := unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_READ_ONLY}
	eventually(t, "a free device stays free", func() error {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return err
		}
		f, err := openLoop(n, true)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := configureInSteps(int(f.Fd()), back, info); err != nil {
			return err
		}
		if got := loopFlag(t, f.Name(), "autoclear"); got != "1" {
			t.Errorf("autoclear %s", got)
		}
		return nil
	})
}

// A hundred hosts on one machine attach at the same moment, from
// several processes that know nothing of each other.
func TestAHundredAttachAndMountAtOnce(t *testing.T) {
	systems := []*System{newSystem(t, Options{}), newSystem(t, Options{}), newSystem(t, Options{})}
	image := newImage(t, map[string]string{"patch": "hello"})
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			mine := filepath.Join(dir, fmt.Sprintf("%d.img", i))
			if err := writeSparse(mine, content); err != nil {
				t.Error(err)
				return
			}
			if err := useImage(systems[i%len(systems)], mine, filepath.Join(dir, fmt.Sprint(i))); err != nil {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	wg.Wait()
}

// writeSparse writes the blocks that are not zero.
func writeSparse(path string, content []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	const block = 4096
	zero := make([]byte, block)
	for at := 0; at < len(content) && err == nil; at += block {
		if b := content[at : at+block]; !bytes.Equal(b, zero) {
			_, err = f.WriteAt(b, int64(at))
		}
	}
	return errors.Join(err, f.Truncate(int64(len(content))), f.Close())
}

// useImage attaches, mounts, reads, unmounts and detaches.
func useImage(s *System, image, dir string) (err error) {
	ctx := context.Background()
	dev, err := s.Attach(ctx, image, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := s.Mount(ctx, Mount{Source: dev.Path(), Target: dir, Type: "ext4", Options: "errors=remount-ro"}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Unmount(ctx, dir)) }()
	b, err := os.ReadFile(filepath.Join(dir, "patch"))
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("read %q", b)
	}
	return err
}

func TestMountedDeviceOutlivesItsDescriptor(t *testing.T) {
	s := newSystem(t, Options{})
	dev := attached(t, s, newImage(t, map[string]string{"patch": "x"}), true)
	dir := t.TempDir()
	if err := s.Mount(t.Context(), Mount{Source: dev.Path(), Target: dir, Type: "ext4", ReadOnly: true, Options: "noload"}); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "patch")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write on a read-only mount: %v", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
		t.Errorf("flags %x lack nosuid or nodev", st.Flags)
	}
	if err := s.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
}

func TestUnmountWaitsForABusyMount(t *testing.T) {
	s := newSystem(t, Options{})
	dir := t.TempDir()
	if err := s.Mount(t.Context(), Mount{Source: "tmpfs", Target: dir, Type: "tmpfs", Options: "size=64k"}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "held"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancelled := make(chan error, 1)
	go func() { cancelled <- s.Unmount(ctx, dir) }()
	cancel()
	if err := <-cancelled; err == nil {
		t.Fatal("a busy mount was unmounted")
	}
	limit, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	err = s.Unmount(limit, dir)
	want := fmt.Sprintf("held by process %d (%s)", os.Getpid(), processName(os.Getpid()))
	if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q in it", err, want)
	}
	done := make(chan error)
	go func() { done <- s.Unmount(t.Context(), dir) }()
	f.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := errors.Join(s.Unmount(t.Context(), dir), s.Unmount(t.Context(), filepath.Join(dir, "absent"))); err != nil {
		t.Errorf("unmount of what is not mounted: %v", err)
	}
}

func TestUnmountNamesMountsBelow(t *testing.T) {
	s := newSystem(t, Options{})
	dir := t.TempDir()
	below := filepath.Join(dir, "below")
	m := Mount{Source: "tmpfs", Target: dir, Type: "tmpfs", Options: "size=64k"}
	if err := s.Mount(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	defer s.Unmount(context.Background(), dir)
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	m.Target = below
	if err := s.Mount(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	defer s.Unmount(context.Background(), below)
	if got := holders(dir); len(got) != 1 || got[0] != "the mount "+below {
		t.Errorf("%q", got)
	}
}

func TestMountRefusesALinkAndAFile(t *testing.T) {
	s := newSystem(t, Options{})
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{link, filepath.Join(dir, "absent")} {
		if err := s.Mount(t.Context(), Mount{Source: "tmpfs", Target: target, Type: "tmpfs"}); err == nil {
			t.Errorf("mounted on %s", target)
		}
	}
}

// The SR runs full below a mounted image: write succeeds, and only SyncFS tells.
func TestSyncFSTellsWhatWriteDidNot(t *testing.T) {
	s := newSystem(t, Options{})
	host, inside := t.TempDir(), t.TempDir()
	if err := s.Mount(t.Context(), Mount{Source: "tmpfs", Target: host, Type: "tmpfs", Options: "size=4m"}); err != nil {
		t.Fatal(err)
	}
	defer s.Unmount(context.Background(), host)
	image := filepath.Join(host, "a.img")
	if out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", image, "32M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dev := attached(t, s, image, false)
	if err := s.Mount(t.Context(), Mount{Source: dev.Path(), Target: inside, Type: "ext4"}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(s.Unmount(context.Background(), inside), dev.Close()); err != nil {
			t.Error(err)
		}
	}()
	if err := s.SyncFS(t.Context(), inside); err != nil {
		t.Fatalf("nothing is wrong yet: %v", err)
	}
	if err := os.WriteFile(filepath.Join(inside, "big"), make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.SyncFS(t.Context(), inside); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
}

func BenchmarkAttachMountUnmount(b *testing.B) {
	s := newSystem(b, Options{})
	image := newImage(b, map[string]string{"patch": "hello"})
	dir := filepath.Join(b.TempDir(), "mnt")
	for b.Loop() {
		if err := useImage(s, image, dir); err != nil {
			b.Fatal(err)
		}
	}
}

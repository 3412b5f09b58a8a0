package file_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/sr/srtest"
	"github.com/patchd/patchd/pkg/xapi"
)

// filesystem is one kind to run the suite on. Those that need a tool that is
// not installed, or root, are left out by filesystems().
type filesystem struct {
	name   string
	mkfs   []string // the image is appended
	size   int64
	clones bool
}

func filesystems(t *testing.T) []filesystem {
	list := []filesystem{{name: "tmpfs"}}
	for _, fs := range []filesystem{
		{name: "ext4", mkfs: []string{"mkfs.ext4", "-q", "-F"}, size: 1 << 30},
		{name: "xfs", mkfs: []string{"mkfs.xfs", "-q", "-m", "reflink=1"}, size: 1 << 30, clones: true},
		{name: "xfs without reflink", mkfs: []string{"mkfs.xfs", "-q", "-m", "reflink=0"}, size: 1 << 30},
		{name: "btrfs", mkfs: []string{"mkfs.btrfs", "-q"}, size: 1 << 30, clones: true},
	} {
		if _, err := exec.LookPath(fs.mkfs[0]); err != nil {
			t.Logf("%s is not installed: %s is left out", fs.mkfs[0], fs.name)
			continue
		}
		list = append(list, fs)
	}
	if os.Geteuid() != 0 {
		t.Log("not root: only the filesystem of the test folder is tested")
		return nil
	}
	return list
}

// mount makes and mounts fs for as long as t runs.
func (fs filesystem) mount(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if fs.mkfs == nil {
		if err := unix.Mount("patchd-test", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700"); err != nil {
			t.Fatalf("mount tmpfs: %v", err)
		}
	} else {
		image := filepath.Join(t.TempDir(), "fs.img")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, fs.size); err != nil {
			t.Fatal(err)
		}
		run(t, append(fs.mkfs, image)...)
		run(t, "mount", "-o", "loop", image, dir)
	}
	t.Cleanup(func() {
		err := unix.Unmount(dir, 0)
		for range 250 { // others hold a mount for a moment between fork and exec
			if err != unix.EBUSY {
				break
			}
			time.Sleep(20 * time.Millisecond)
			err = unix.Unmount(dir, 0)
		}
		if err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func run(t *testing.T, command ...string) {
	t.Helper()
	for try := 0; ; try++ {
		out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
		if err == nil {
			return
		}
		if command[0] != "mount" || !strings.Contains(string(out), "busy") || try == 250 {
			t.Fatalf("%q: %v\n%s", command, err, out)
		}
		time.Sleep(20 * time.Millisecond) // another process took the loop device first
	}
}

// newSR names a fresh folder below dir.
func newSR(dir string) (sr.Driver, sr.Config) {
	uuid := xapi.NewUUID()
	return &file.Driver{}, sr.Config{SR: uuid, Device: map[string]string{"location": filepath.Join(dir, string(uuid))}}
}

var hostile = []map[string]string{
	{"location": ""}, {"location": "/"}, {"location": "//"}, {"location": "sr"}, {"location": "./sr"}, {"location": "../sr"},
	{"location": "/srv/../etc/cron.d"}, {"location": "/srv//sr"}, {"location": "/srv/./sr"}, {"location": "/etc/sr"}, {"location": "/usr"},
	{"location": "/proc/self/cwd"}, {"location": "/sys/fs"}, {"location": "/dev/shm/sr"}, {"location": "/boot"}, {"location": "/lib64/sr"},
	{"location": "/srv/a\x00b"}, {"location": "/srv/a\nb"}, {"location": "/srv/\xff"}, {"location": "~/sr"}, {"location": "file:///srv/sr"},
	{"location": "/srv/" + string(make([]byte, 5000))},
}

// The suite runs on the filesystem of the test folder, and as root on one of
// every kind: S1-14 needs cloning on some, S1-04 a copy on the rest.
func TestConformance(t *testing.T) {
	t.Run("test folder", func(t *testing.T) {
		srtest.Run(t, srtest.Suite{
			New:     func(t *testing.T) (sr.Driver, sr.Config) { return newSR(t.TempDir()) },
			Hostile: hostile,
		})
	})
	for _, fs := range filesystems(t) {
		t.Run(fs.name, func(t *testing.T) {
			dir := fs.mount(t)
			srtest.Run(t, srtest.Suite{
				Quick: !fs.clones,
				New:   func(*testing.T) (sr.Driver, sr.Config) { return newSR(dir) },
				Small: func(t *testing.T) (sr.Driver, sr.Config) {
					small := filesystem{name: "small", mkfs: []string{"mkfs.ext4", "-q", "-F"}, size: 24 << 20}
					return newSR(small.mount(t))
				},
			})
			d, c := newSR(dir)
			if err := d.Create(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			r, err := d.Attach(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Detach(t.Context())
			if got := sr.Has(r.Features(), sr.VDIClone); got != fs.clones {
				t.Errorf("VDI_CLONE on %s is %v, want %v", fs.name, got, fs.clones)
			}
		})
	}
}

func BenchmarkFile(b *testing.B) {
	srtest.Bench(b, func(b *testing.B) (sr.Driver, sr.Config) { return newSR(b.TempDir()) })
}

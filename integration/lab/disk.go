package lab

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Run executes a program and fails the test when it fails.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	for try := 0; ; try++ {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err == nil {
			return string(out)
		}
		// Others take loop devices, and hold mounts between fork and exec.
		busy := (name == "mount" || name == "umount") && strings.Contains(string(out), "busy")
		if !busy || try == 250 {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Disk makes a filesystem of size bytes in a file, mounts it, and gives the
// folder. It goes with the test.
func Disk(t testing.TB, size int64, mkfs string, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	image, mnt := filepath.Join(dir, "disk.img"), filepath.Join(dir, "mnt")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close(), os.Mkdir(mnt, 0o755)); err != nil {
		t.Fatal(err)
	}
	Run(t, mkfs, append(args, image)...)
	Run(t, "mount", "-o", "loop", image, mnt)
	t.Cleanup(func() { Run(t, "umount", mnt) })
	return mnt
}

// Ext4 is a Disk whose files cannot be cloned.
func Ext4(t testing.TB, size int64) string {
	t.Helper()
	return Disk(t, size, "mkfs.ext4", "-q", "-F")
}

// XFS is a Disk whose files can be cloned.
func XFS(t testing.TB, size int64) string {
	t.Helper()
	return Disk(t, size, "mkfs.xfs", "-q", "-m", "reflink=1")
}

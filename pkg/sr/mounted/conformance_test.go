package mounted_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/btrfs"
	"github.com/patchd/patchd/pkg/sr/ext"
	"github.com/patchd/patchd/pkg/sr/mounted"
	"github.com/patchd/patchd/pkg/sr/srtest"
	"github.com/patchd/patchd/pkg/sr/xfs"
	"github.com/patchd/patchd/pkg/xapi"
)

const mib = 1 << 20

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
}

// kinds are the drivers, and what each can do.
var kinds = map[string]struct {
	kind   mounted.Kind
	size   string // of an SR to test with
	small  string // of one to be filled
	clones bool
}{
	"ext":   {ext.Kind(), "512MiB", "32MiB", false},
	"xfs":   {xfs.Kind(), "512MiB", "304MiB", true},
	"btrfs": {btrfs.Kind(), "512MiB", "256MiB", true},
}

// lab is one machine to put SRs on.
type lab struct {
	dir  string
	dom0 *dom0.System
}

// newLab gives a folder for images and mounts. Whatever is still mounted or
// attached from it when t ends is an error, and goes.
func newLab(t *testing.T) *lab {
	t.Helper()
	d, err := dom0.New(dom0.Options{CgroupPrefix: "patchd-test-" + string(xapi.NewUUID())})
	must(t, err)
	l := &lab{t.TempDir(), d}
	t.Cleanup(func() {
		for _, left := range l.left(t) {
			t.Errorf("left behind: %s", left)
		}
		for range 10 {
			for _, dir := range l.mounts(t) {
				d.Unmount(t.Context(), dir)
			}
		}
		must(t, d.Close())
	})
	return l
}

func (l *lab) mounts(t *testing.T) (dirs []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], l.dir+"/") {
			dirs = append(dirs, f[4])
		}
	}
	return dirs
}

// left lists the mounts, mount points and loop devices that belong to l.
func (l *lab) left(t *testing.T) (all []string) {
	t.Helper()
	for _, dir := range l.mounts(t) {
		all = append(all, "mount at "+dir)
	}
	points, err := filepath.Glob(l.dir + "/mnt/*")
	must(t, err)
	all = append(all, points...)
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	for _, f := range loops {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), l.dir+"/") {
			all = append(all, "loop device of "+strings.TrimSpace(string(b)))
		}
	}
	return all
}

// config names an SR in an image file that is not there yet.
func (l *lab) config(size string) sr.Config {
	uuid := xapi.NewUUID()
	return sr.Config{
		SR: uuid, Dom0: l.dom0, MountDir: filepath.Join(l.dir, "mnt"),
		Device: map[string]string{"device": filepath.Join(l.dir, string(uuid)+".disk"), "size": size},
	}
}

var hostile = []map[string]string{
	{"device": ""}, {"device": "/"}, {"device": "sr"}, {"device": "../sr"}, {"device": "/srv/../etc/x"}, {"device": "/srv//x"},
	{"device": "/etc/x"}, {"device": "/proc/self/mem"}, {"device": "/sys/x"}, {"device": "/boot/x"}, {"device": "/usr/x"},
	{"device": "/dev/null"}, {"device": "/dev/../etc/passwd"}, {"device": "/dev/no-such-device"}, {"device": "/dev"}, {"device": "/dev/"}, {"device": "/dev/fd/0"},
	{"device": "/srv/a\x00b"}, {"device": "/srv/a\nb"}, {"device": "/srv/\xff"}, {"device": "-f"}, {"device": "LABEL=x"},
	{"device": "/srv/x", "size": "-1"}, {"device": "/srv/x", "size": "0"}, {"device": "/srv/x", "size": "1"}, {"device": "/srv/x", "size": "much"},
	{"device": "/srv/x", "size": "99999999999999999999"}, {"device": "/srv/x", "size": "100EiB"}, {"device": "/dev/loop0", "size": "1GiB"},
	{"device": "/srv/" + string(make([]byte, 5000))},
}

func TestConformance(t *testing.T) {
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, l := mounted.New(k.kind), newLab(t)
			srtest.Run(t, srtest.Suite{
				New:     func(*testing.T) (sr.Driver, sr.Config) { return d, l.config(k.size) },
				Small:   func(*testing.T) (sr.Driver, sr.Config) { return d, l.config(k.small) },
				Hostile: hostile,
				Quick:   name != "xfs",
			})
		})
	}
}

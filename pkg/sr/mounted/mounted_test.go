package mounted_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/ext"
	"github.com/patchd/patchd/pkg/sr/mounted"
	"github.com/patchd/patchd/pkg/xapi"
)

// made gives an SR that was created, in an image of its own.
func (l *lab) made(t *testing.T, d *mounted.Driver) sr.Config {
	t.Helper()
	c := l.config("32MiB")
	must(t, d.Create(t.Context(), c))
	return c
}

func image(c sr.Config) string { return c.Device["device"] }
func point(c sr.Config) string { return filepath.Join(c.MountDir, string(c.SR)) }

// existing makes an image file that patchd did not make, with data at an offset.
func (l *lab) existing(t *testing.T, size int64, data string, at int64) sr.Config {
	t.Helper()
	c := l.config("")
	delete(c.Device, "size")
	f, err := os.OpenFile(image(c), os.O_CREATE|os.O_RDWR, 0o600)
	must(t, err)
	must(t, f.Truncate(size))
	_, err = f.WriteAt([]byte(data), at)
	must(t, errors.Join(err, f.Close()))
	return c
}

func wantCode(t *testing.T, what string, err error, code string, words ...string) {
	t.Helper()
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("%s: %v, want %s", what, err, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(strings.Join(e.Params, " "), w) {
			t.Errorf("%s: %q does not say %q", what, e.Params, w)
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// sum is a digest of the data of a sparse file, and of where it lies.
func sum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	h, b := sha256.New(), make([]byte, mib)
	for at := int64(0); ; {
		data, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return string(h.Sum(nil))
		}
		must(t, err)
		n, err := f.ReadAt(b, data)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		for i := 0; i < n; i += 4096 { // where a hole ends is the filesystem's business
			if block := b[i:min(n, i+4096)]; len(bytes.Trim(block, "\x00")) > 0 {
				fmt.Fprintln(h, data+int64(i))
				h.Write(block)
			}
		}
		at = data + int64(n)
	}
}

// Whatever is on a device is named, refused, and left as it is, byte for byte.
func TestADeviceThatHoldsSomethingIsRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	const size = 64 * mib
	foreign := map[string]sr.Config{
		"partition table": l.existing(t, size, "EFI PART", 512),
		"LVM":             l.existing(t, size, "LVM2 001", 536),
		"LUKS":            l.existing(t, size, "LUKS\xba\xbe", 0),
		"RAID":            l.existing(t, size, "\xfc\x4e\x2b\xa9", 4096),
		"at byte 3000000": l.existing(t, size, "?", 3000000),
		"swap":            l.existing(t, size, "SWAPSPACE2", 4086),
		// a label of a RAID at the very end, with something before it
		"data": l.existing(t, size, "\xfc\x4e\x2b\xa9", size-4096),
	}
	for label, mkfs := range map[string][]string{"the ext4": {"mkfs.ext4", "-q", "-F", "-L", "the ext4"}, "the btrfs": {"mkfs.btrfs", "-q", "-f", "-L", "the btrfs"}, "the xfs": {"mkfs.xfs", "-q", "-f", "-L", "the xfs"}} {
		c := l.existing(t, 320*mib, "", 0)
		run(t, mkfs[0], append(mkfs[1:], image(c))...)
		foreign[label] = c
	}
	for what, c := range foreign {
		before := sum(t, image(c))
		wantCode(t, what, d.Create(t.Context(), c), xapi.SRDeviceInUse, what, "wipefs")
		must(t, d.Destroy(t.Context(), c))
		if _, err := d.Attach(t.Context(), c); !xapi.Is(err, xapi.SRBackendFailure) {
			t.Errorf("%s: attached: %v", what, err)
		}
		if text, err := d.Probe(t.Context(), c); err != nil || strings.Contains(text, "UUID") {
			t.Errorf("%s: probe says %s, %v", what, text, err)
		}
		if sum(t, image(c)) != before {
			t.Errorf("%s: the device was changed", what)
		}
	}
}

// Image files that others could change, or that are none.
func TestTricksWithImageFilesAreRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	real := l.existing(t, 64*mib, "", 0)
	link := l.config("")
	must(t, os.Symlink(image(real), image(link)))
	folder := l.config("")
	must(t, os.Mkdir(image(folder), 0o700))
	pipe := l.config("")
	must(t, unix.Mkfifo(image(pipe), 0o600))
	open := l.existing(t, 64*mib, "", 0)
	must(t, os.Chmod(image(open), 0o666))
	twice := l.existing(t, 64*mib, "", 0)
	must(t, os.Link(image(twice), image(twice)+".2"))
	small := l.existing(t, mib, "", 0)
	other := l.existing(t, 64*mib, "", 0)
	other.Device["size"] = "65MiB"
	for what, c := range map[string]sr.Config{"a link": link, "a folder": folder, "a pipe": pipe, "writable by all": open, "two names": twice, "too small": small, "another size": other} {
		wantCode(t, what, d.Create(t.Context(), c), xapi.ValueNotSupported)
	}
	must(t, os.Mkdir(l.dir+"/mode", 0o777))
	must(t, os.Chmod(l.dir+"/mode", 0o777))
	c := l.config("64MiB")
	c.Device["device"] = l.dir + "/mode/x.disk"
	wantCode(t, "a folder that all can write to", d.Create(t.Context(), c), xapi.ValueNotSupported)
	must(t, os.MkdirAll(l.dir+"/home/disks", 0o755))
	must(t, os.Chown(l.dir+"/home", 12345, 0))
	c.Device["device"] = l.dir + "/home/disks/x.disk"
	wantCode(t, "a folder that somebody can put another in the place of", d.Create(t.Context(), c), xapi.ValueNotSupported)
}

// Create killed at any of its steps can be repeated, and can be taken back.
func TestAnUnfinishedSRIsRepeatedOrTakenBack(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	ctx := t.Context()
	states := map[string]func(c sr.Config){
		"mkfs never ended": func(c sr.Config) {
			b := []byte("patchd claim 1 " + string(c.SR) + " ext4 making found\n")
			f, err := os.OpenFile(image(c), os.O_RDWR, 0)
			must(t, err)
			_, err = f.WriteAt(append(b, make([]byte, 4096-len(b))...), 28*mib)
			must(t, err)
			_, err = f.WriteAt([]byte("half a filesystem"), 2*mib)
			must(t, errors.Join(err, f.Close()))
		},
		"no marker": func(c sr.Config) {
			must(t, d.Create(ctx, c))
			r, err := d.Attach(ctx, c)
			must(t, err)
			must(t, os.Remove(point(c)+"/.patchd-sr"))
			must(t, r.Detach(ctx))
		},
		"wiping never ended": func(c sr.Config) {
			must(t, d.Create(ctx, c))
			f, err := os.OpenFile(image(c), os.O_RDWR, 0)
			must(t, err)
			b := []byte("patchd claim 1 " + string(c.SR) + " ext4 making found\n")
			_, err = f.WriteAt(append(b, make([]byte, 4096-len(b))...), 28*mib)
			must(t, err)
			_, err = f.WriteAt(make([]byte, mib), 0)
			must(t, errors.Join(err, f.Close()))
		},
	}
	for what, make := range states {
		again, gone := l.existing(t, 32*mib, "", 0), l.existing(t, 32*mib, "", 0)
		make(again)
		make(gone)
		if _, err := d.Attach(ctx, again); err == nil {
			t.Errorf("%s: attached", what)
		}
		stranger := again
		stranger.SR = xapi.NewUUID()
		wantCode(t, what+": create by another", d.Create(ctx, stranger), xapi.SRDeviceInUse, string(again.SR))
		must(t, d.Create(ctx, again))
		r, err := d.Attach(ctx, again)
		must(t, err)
		must(t, r.Detach(ctx))
		must(t, d.Destroy(ctx, again))
		must(t, d.Destroy(ctx, gone))
		for _, c := range []sr.Config{again, gone} {
			c.SR = xapi.NewUUID()
			must(t, d.Create(ctx, c)) // the device can be used again
			must(t, d.Destroy(ctx, c))
			if _, err := os.Stat(image(c)); err != nil {
				t.Errorf("%s: an image file that was there before is gone: %v", what, err)
			}
		}
	}
}

// An SR with a foreign file in it is not destroyed with it.
func TestForeignFilesKeepAnSRFromBeingDestroyed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	c := l.made(t, d)
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	must(t, os.WriteFile(point(c)+"/notes.txt", []byte("mine"), 0o600))
	must(t, r.Detach(t.Context()))
	wantCode(t, "destroy", d.Destroy(t.Context(), c), xapi.SRNotEmpty)
	r, err = d.Attach(t.Context(), c)
	must(t, err)
	must(t, os.Remove(point(c)+"/notes.txt"))
	if err := d.Destroy(t.Context(), c); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("destroy of an SR that is attached: %v", err)
	}
	must(t, r.Detach(t.Context()))
	must(t, d.Destroy(t.Context(), c))
	if _, err := os.Stat(image(c)); !os.IsNotExist(err) {
		t.Errorf("the image that Create made is left: %v", err)
	}
}

// A busy SR stays attached and usable, the error names who holds it, and the
// next life of the daemon takes the mount over.
func TestABusySRStaysMountedAndIsTakenOver(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	c := l.made(t, d)
	ctx := t.Context()
	r, err := d.Attach(ctx, c)
	must(t, err)
	n := sr.Live(xapi.NewUUID())
	_, err = r.Create(ctx, n, mib)
	must(t, err)
	path, err := r.Path(ctx, n)
	must(t, err)
	dev, err := l.dom0.Attach(ctx, path, false) // as a runner has it
	must(t, err)
	defer dev.Close()
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	err = r.Detach(short)
	if !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), dev.Path()) || !strings.Contains(err.Error(), string(c.SR)) {
		t.Errorf("detach of a busy SR: %v", err)
	}
	if list, err := r.Scan(ctx); err != nil || len(list) != 1 {
		t.Errorf("a busy SR cannot be used any more: %v, %v", list, err)
	}
	next := ext.New() // another process: it knows nothing of the first
	again, err := next.Attach(ctx, c)
	must(t, err)
	if list, err := again.Scan(ctx); err != nil || len(list) != 1 {
		t.Errorf("the mount was not taken over: %v, %v", list, err)
	}
	if n := len(l.mounts(t)); n != 1 {
		t.Errorf("%d mounts", n)
	}
	must(t, dev.Close())
	// The first process is killed: its descriptor goes, but it unmounts nothing.
	short, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := r.Detach(short); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("detach while another process has it: %v", err)
	}
	short, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := again.Detach(short); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("detach while another process has it: %v", err)
	}
	_, err = r.Scan(ctx)
	must(t, err)
	both := make(chan error, 2)
	go func() { both <- r.Detach(ctx) }()
	go func() { both <- again.Detach(ctx) }()
	must(t, errors.Join(<-both, <-both))
}

// While the filesystem lives on in another mount namespace, the image does not
// get a second loop device.
func TestOneImageHasOneLoopDevice(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	c := l.made(t, d)
	ctx := t.Context()
	r, err := d.Attach(ctx, c)
	must(t, err)
	in, out, err := os.Pipe()
	must(t, err)
	runner := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "exec 3<"+point(c)+"/.patchd-sr; echo; read end")
	runner.Stdin = in
	said, err := runner.StdoutPipe()
	must(t, err)
	must(t, runner.Start())
	_, err = said.Read(make([]byte, 1))
	must(t, err)
	must(t, r.Detach(ctx))
	if len(l.mounts(t)) != 0 {
		t.Error("it is still mounted here")
	}
	if len(l.left(t)) != 1 {
		t.Errorf("the other namespace should hold the loop device: %v", l.left(t))
	}
	r, err = d.Attach(ctx, c)
	must(t, err)
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	n := 0
	for _, f := range loops {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == image(c) {
			n++
		}
	}
	if n != 1 {
		t.Errorf("the image has %d loop devices", n)
	}
	must(t, r.Detach(ctx))
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := d.Destroy(short, c); err == nil {
		t.Error("destroyed an SR that lives on elsewhere")
	}
	_, err = out.WriteString("end\n")
	must(t, errors.Join(err, out.Close(), runner.Wait(), in.Close()))
	must(t, d.Destroy(ctx, c))
}

// What else is mounted where the SR belongs gives way, unless it is in use.
func TestAForeignMountGivesWay(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	c := l.made(t, d)
	ctx := t.Context()
	must(t, os.MkdirAll(point(c), 0o700))
	must(t, l.dom0.Mount(ctx, dom0.Mount{Source: "x", Target: point(c), Type: "tmpfs"}))
	r, err := d.Attach(ctx, c)
	must(t, err)
	must(t, r.Detach(ctx))
	must(t, os.MkdirAll(point(c), 0o700))
	must(t, l.dom0.Mount(ctx, dom0.Mount{Source: "x", Target: point(c), Type: "tmpfs"}))
	f, err := os.Create(point(c) + "/held")
	must(t, err)
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := d.Attach(short, c); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("attach under a foreign mount in use: %v", err)
	}
	must(t, f.Close())
	must(t, l.dom0.Unmount(ctx, point(c)))
	must(t, os.Remove(point(c)))
	must(t, d.Destroy(ctx, c))
}

// A block device is named by a link, which is followed at every call, and is not
// touched while it is in use elsewhere.
func TestABlockDevice(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	ctx := t.Context()
	back := l.existing(t, 64*mib, "", 0)
	dev, err := l.dom0.Attach(ctx, image(back), false)
	must(t, err)
	defer dev.Close()
	link := "/dev/patchd-test-" + string(back.SR)
	must(t, os.Symlink(dev.Path(), link))
	defer os.Remove(link)
	c := back
	c.Device = map[string]string{"device": link}

	must(t, d.Create(ctx, c))
	must(t, d.Create(ctx, c))
	text, err := d.Probe(ctx, c)
	must(t, err)
	if !strings.Contains(text, string(c.SR)) || !strings.Contains(text, link) {
		t.Errorf("probe says %s", text)
	}
	r, err := d.Attach(ctx, c)
	must(t, err)
	n := sr.Live(xapi.NewUUID())
	_, err = r.Create(ctx, n, mib)
	must(t, err)
	second := c
	second.SR = xapi.NewUUID()
	wantCode(t, "a second SR on the device", d.Create(ctx, second), xapi.SRDeviceInUse, string(c.SR))
	viaImage := back
	viaImage.SR = xapi.NewUUID()
	wantCode(t, "a second SR on the image below", d.Create(ctx, viaImage), xapi.SRDeviceInUse, string(c.SR))
	must(t, r.Destroy(ctx, n))
	must(t, r.Detach(ctx))
	must(t, d.Destroy(ctx, c))

	// An empty device that somebody has taken for himself.
	held, err := os.OpenFile(dev.Path(), os.O_RDWR|unix.O_EXCL, 0)
	must(t, err)
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := d.Create(short, c); err == nil {
		t.Error("made an SR on a device that is in use")
	}
	must(t, held.Close())
	must(t, d.Create(ctx, c))
	must(t, d.Destroy(ctx, c))
	must(t, dev.Close())
}

// Without its tool a driver says which package to install, and writes nothing.
func TestAMissingToolIsNamed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	k := ext.Kind()
	k.ToolDirs = []string{l.dir}
	d := mounted.New(k)
	c := l.existing(t, 32*mib, "", 0)
	wantCode(t, "create", d.Create(t.Context(), c), xapi.SRBackendFailure, "mkfs.ext4", "e2fsprogs")

	// A tool that fails: its last words. One that hangs: it is ended.
	tool := filepath.Join(l.dir, "mkfs.ext4")
	must(t, os.WriteFile(tool, []byte("#!/bin/sh\necho a lot\necho the reason >&2\nexit 3\n"), 0o700))
	wantCode(t, "a tool that fails", d.Create(t.Context(), c), xapi.SRBackendFailure, "the reason", "3")
	must(t, os.WriteFile(tool, []byte("#!/bin/sh\nread never < "+l.dir+"/fifo\n"), 0o700))
	must(t, unix.Mkfifo(l.dir+"/fifo", 0o600))
	k.Timeout = 200 * time.Millisecond
	wantCode(t, "a tool that hangs", mounted.New(k).Create(t.Context(), c), xapi.SRBackendFailure, "killed")
	must(t, mounted.New(k).Destroy(t.Context(), c))
}

// An image file that shares its filesystem with the database cannot take the
// room that must stay free there, also when there is room inside.
func TestAnImageTakesOnlyTheRoomBelowIt(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	d := ext.New()
	c := l.made(t, d)
	asked := ""
	var outer unix.Statfs_t
	must(t, unix.Statfs(l.dir, &outer))
	c.KeepFree = func(path string) int64 { asked = path; return int64(outer.Bavail)*outer.Bsize - 4*mib }
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	st, err := r.Stat(t.Context())
	must(t, err)
	if asked != image(c) || st.Free > 4*mib+64*mib || st.PhysicalSize < 20*mib {
		t.Errorf("asked for %q, room is %+v", asked, st)
	}
	must(t, r.Detach(t.Context()))
	must(t, d.Destroy(t.Context(), c))
}

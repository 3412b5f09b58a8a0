package mounted

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/xapi"
)

// Create makes the filesystem and the SR in it. A device that holds anything, or
// is in use, is SR_DEVICE_IN_USE, and the text says what was found.
func (d *Driver) Create(ctx context.Context, c sr.Config) error {
	if err := sr.Alive(ctx); err != nil {
		return err
	}
	p, err := d.place(c)
	if err != nil {
		return err
	}
	_, release, err := d.hold(ctx, c.SR)
	if err != nil {
		return err
	}
	defer release()
	return coded(d.create(ctx, c, p), c.SR, "make the SR on %s", p.path)
}

func (d *Driver) create(ctx context.Context, c sr.Config, p place) error {
	if err := quiet(ctx, c); err != nil {
		return err
	}
	here, err := p.examine(d.kind.Type)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return sr.Untouched(err)
	}
	if err != nil {
		if p.size == 0 {
			return sr.BadConfig(keyDevice, p.given, `there is no such file: give "size" for it to be made`)
		}
		if err = p.makeImage(claim{sr: c.SR, typ: d.kind.Type, own: true}); err == nil {
			here, err = p.examine(d.kind.Type)
		}
	}
	if err != nil {
		return err
	}
	if here.sr != c.SR || !here.made {
		if err := d.usable(here, c, p); err != nil {
			return err
		}
		if err := d.format(ctx, c, p); err != nil {
			return err
		}
	}
	target, fresh, err := d.mount(ctx, c, p)
	if err != nil {
		return err
	}
	err = file.Make(target, c.SR)
	if fresh {
		err = errors.Join(err, unmount(context.WithoutCancel(ctx), c, target))
	}
	return err
}

// quiet ends a tool that an earlier life of this process may have left at work
// on the device.
func quiet(ctx context.Context, c sr.Config) error {
	if c.Dom0 == nil || !filepath.IsAbs(c.MountDir) {
		return errors.New("the driver was given no machine to work on")
	}
	err := c.Dom0.Kill(ctx, group(c.SR), 0)
	if errors.Is(err, dom0.ErrNoGroups) {
		return nil
	}
	return err
}

// group is the control group in which the tools for an SR run.
func group(uuid xapi.UUID) string { return "mkfs-" + string(uuid) }

// makeImage makes a sparse file that is claimed from the moment it has its name.
func (p place) makeImage(c claim) (err error) {
	folder, err := file.OpenFolder(keyDevice, filepath.Dir(p.path))
	if errors.Is(err, os.ErrNotExist) {
		return sr.BadConfig(keyDevice, p.given, "there is no folder "+filepath.Dir(p.path)+": make it first, or mount what belongs there")
	}
	if err != nil {
		return err
	}
	defer folder.Close()
	fd, err := unix.Openat(int(folder.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make %s: %w", p.path, err)
	}
	f := os.NewFile(uintptr(fd), p.path)
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(p.size); err != nil {
		return fmt.Errorf("make %s: %w", p.path, err)
	}
	if err := c.write(f); err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := unix.Linkat(unix.AT_FDCWD, from, int(folder.Fd()), filepath.Base(p.path), unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("name %s: %w", p.path, err)
	}
	return folder.Sync()
}

// format claims the device and makes the filesystem on it.
func (d *Driver) format(ctx context.Context, c sr.Config, p place) (err error) {
	tool, err := d.tool()
	if err != nil {
		return err
	}
	f, err := p.take(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	here, err := examine(f, d.kind.Type) // again, now that nobody else can
	if err != nil {
		return err
	}
	if err := d.usable(here, c, p); err != nil {
		return err
	}
	mine := claim{sr: c.SR, typ: d.kind.Type, own: here.own}
	if err := mine.write(f); err != nil {
		return err
	}
	if err := d.run(ctx, c, tool, d.kind.Arguments(c.SR, roomFor(here.size), p.path)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", p.path, err)
	}
	mine.made = true
	return mine.write(f)
}

// usable refuses a device that is not empty, unless it is this SR, half made.
func (d *Driver) usable(here found, c sr.Config, p place) error {
	switch {
	case here.sr == c.SR && !here.made:
	case here.sr != "" || here.claim.sr != "":
		return inUse("%s holds %s. Introduce that SR, or destroy it, or name another device", p.path, here.what)
	case here.what != "":
		return inUse("%s is not empty: it holds %s. If nothing on it is needed: `blkdiscard -f %s`, or `wipefs -a` and then zeros into its first and last 4 MiB", p.path, here.what, p.path)
	case p.size != 0 && p.size != here.size:
		return sr.BadConfig(keySize, fmt.Sprint(p.size), fmt.Sprintf("the file is there and has %d bytes: leave out %q to use it", here.size, keySize))
	}
	if here.size < d.kind.MinSize {
		return sr.BadConfig(keyDevice, p.given, fmt.Sprintf("has %d bytes; an SR of type %s needs %d at least", here.size, d.kind.Info.Type, d.kind.MinSize))
	}
	return nil
}

// tool finds the program that makes the filesystem.
func (d *Driver) tool() (string, error) {
	for _, dir := range d.kind.ToolDirs {
		path := filepath.Join(dir, d.kind.Tool)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed: it comes with the package %s (apt-get install %s)", d.kind.Tool, d.kind.Package, d.kind.Package)
}

// run runs a tool to its end. Its last words are the error.
func (d *Driver) run(ctx context.Context, c sr.Config, tool string, args []string) error {
	var out tail
	r, err := c.Dom0.Run(ctx, dom0.Cmd{
		Path: tool, Args: args, Env: []string{"PATH=" + strings.Join(d.kind.ToolDirs, ":"), "LC_ALL=C"}, Dir: "/",
		Stdout: &out, Stderr: &out, Group: group(c.SR), Timeout: d.kind.Timeout, Grace: 2 * time.Second,
	})
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", d.kind.Tool, err)
	case r.TimedOut:
		return fmt.Errorf("%s did not end within %s and was killed", d.kind.Tool, d.kind.Timeout)
	case r.Signal != 0:
		return fmt.Errorf("%s was ended by signal %d: %s", d.kind.Tool, r.Signal, out.lastLine())
	case r.ExitCode != 0:
		return fmt.Errorf("%s: %s (exit status %d)", d.kind.Tool, out.lastLine(), r.ExitCode)
	}
	return nil
}

// tail takes everything and keeps the last 4 KiB.
type tail struct{ b []byte }

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	const most = 4 << 10
	t.b = append(t.b, p[max(0, len(p)-most):]...)
	t.b = t.b[max(0, len(t.b)-most):]
	return len(p), nil
}

// lastLine is the last line with anything in it, at most 300 bytes.
func (t *tail) lastLine() string {
	lines := bytes.Split(bytes.TrimSpace(t.b), []byte("\n"))
	return strings.ToValidUTF8(fmt.Sprintf("%.300s", bytes.TrimSpace(lines[len(lines)-1])), "?")
}

package mounted

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
)

// Attach mounts the SR, or takes over its mount, and tries out what it can do.
func (d *Driver) Attach(ctx context.Context, c sr.Config) (sr.Repository, error) {
	if err := sr.Alive(ctx); err != nil {
		return nil, err
	}
	p, err := d.place(c)
	if err != nil {
		return nil, err
	}
	plug, release, err := d.hold(ctx, c.SR)
	if err != nil {
		return nil, err
	}
	defer release()
	repo, err := d.attach(ctx, c, p, plug)
	if err != nil {
		return nil, coded(err, c.SR, "attach %s", p.path)
	}
	plug.users++
	return repo, nil
}

func (d *Driver) attach(ctx context.Context, c sr.Config, p place, plug *plug) (sr.Repository, error) {
	if c.Dom0 == nil || !filepath.IsAbs(c.MountDir) {
		return nil, errors.New("the driver was given no machine to work on")
	}
	target, fresh, err := d.mount(ctx, c, p)
	if err != nil {
		return nil, err
	}
	repo, err := d.open(c, p, target)
	if dead(err) && !fresh && plug.users == 0 {
		// The mount of an earlier life, whose device went away meanwhile.
		if err := unmount(ctx, c, target); err != nil {
			return nil, err
		}
		if target, fresh, err = d.mount(ctx, c, p); err != nil {
			return nil, err
		}
		repo, err = d.open(c, p, target)
	}
	if err != nil && fresh {
		err = errors.Join(err, unmount(context.WithoutCancel(ctx), c, target))
	}
	return repo, err
}

// dead tells whether a filesystem does not answer any more.
func dead(err error) bool {
	for _, e := range []error{unix.EIO, unix.ESHUTDOWN, unix.EUCLEAN, unix.ENXIO, unix.ENODEV} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// open gives the SR in what is mounted at target.
func (d *Driver) open(c sr.Config, p place, target string) (sr.Repository, error) {
	inner := sr.Config{SR: c.SR, KeepFree: p.keepFree(c.KeepFree)}
	return file.Inside(target, inner, func(ctx context.Context) error { return d.unplug(ctx, c, target) })
}

// unplug is the end of one repository; the last one unmounts.
func (d *Driver) unplug(ctx context.Context, c sr.Config, target string) error {
	plug, release, err := d.hold(context.WithoutCancel(ctx), c.SR)
	if err != nil {
		return err
	}
	defer release()
	if plug.users == 1 {
		if err := unmount(ctx, c, target); err != nil {
			return coded(err, c.SR, "detach")
		}
	}
	plug.users--
	return nil
}

// unmount unmounts target and removes its folder.
func unmount(ctx context.Context, c sr.Config, target string) error {
	if err := c.Dom0.Unmount(ctx, target); err != nil {
		return err
	}
	err := unix.Rmdir(target)
	if err != nil && err != unix.ENOENT && err != unix.ENOTEMPTY {
		return fmt.Errorf("remove mount point %s: %w", target, err)
	}
	return nil
}

// mount mounts the SR where it belongs, unless it is there already; fresh tells
// which. Whatever else is mounted there is a leftover and goes, if nobody uses it.
func (d *Driver) mount(ctx context.Context, c sr.Config, p place) (target string, fresh bool, err error) {
	if target, err = mountPoint(c); err != nil {
		return "", false, err
	}
	here, err := p.examine(d.kind.Type)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", false, fmt.Errorf("there is no %s: is the filesystem that holds it mounted? %w", p.path, err)
	case err != nil:
		return "", false, err
	case here.sr == "" && here.what == "":
		return "", false, fmt.Errorf("there is no SR: %s is empty", p.path)
	case here.sr != c.SR:
		return "", false, fmt.Errorf("it holds %s", here.what)
	case !here.made:
		return "", false, errors.New("the SR on it is only half made")
	}
	m, err := mountAt(target)
	if err != nil {
		return "", false, err
	}
	if m != nil {
		same, err := d.same(m, p)
		if err != nil || same {
			return target, false, err
		}
		if err := c.Dom0.Unmount(ctx, target); err != nil {
			return "", false, fmt.Errorf("something else is mounted at %s: %w", target, err)
		}
	}
	if err := d.mountDevice(ctx, c, p, target); err != nil {
		unix.Rmdir(target) // it is empty, or stays
		return "", false, err
	}
	return target, true, nil
}

// mountPoint is the folder of the SR below MountDir, without links in its path.
func mountPoint(c sr.Config) (string, error) {
	if err := os.MkdirAll(c.MountDir, 0o700); err != nil {
		return "", fmt.Errorf("make the folder for mounts: %w", err)
	}
	dir, err := filepath.EvalSymlinks(c.MountDir)
	if err != nil {
		return "", fmt.Errorf("look up the folder for mounts: %w", err)
	}
	return filepath.Join(dir, string(c.SR)), nil
}

// mountAt is the topmost mount on target, or nil.
func mountAt(target string) (*mountinfo.Info, error) {
	list, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(target))
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	if len(list) == 0 {
		return nil, nil
	}
	return list[len(list)-1], nil
}

// same tells whether a mount is that of the place.
func (d *Driver) same(m *mountinfo.Info, p place) (bool, error) {
	if m.FSType != d.kind.Type {
		return false, nil
	}
	if !p.block {
		return dom0.IsLoopOf(m.Source, p.path)
	}
	want, err := os.Stat(p.path)
	if err != nil {
		return false, err
	}
	have, err := os.Stat(m.Source)
	if err != nil {
		return false, nil // a device that is gone
	}
	a, _ := want.Sys().(*syscall.Stat_t)
	b, _ := have.Sys().(*syscall.Stat_t)
	return a != nil && b != nil && a.Rdev == b.Rdev, nil
}

// mountDevice attaches and mounts.
func (d *Driver) mountDevice(ctx context.Context, c sr.Config, p place, target string) error {
	if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make mount point: %w", err)
	}
	options := d.kind.Options
	var dev dom0.Device
	var err error
	if !p.block {
		dev, err = dom0.Adopt(p.path)
		options = joinOptions(options, "discard") // what is freed inside is freed below
	}
	if dev == nil && err == nil {
		dev, err = c.Dom0.Attach(ctx, p.path, false)
	}
	if err != nil {
		return err
	}
	defer dev.Close() // the mount holds it from now on
	err = c.Dom0.Mount(ctx, dom0.Mount{Source: dev.Path(), Target: target, Type: d.kind.Type, NoExec: true, NoAtime: true, Options: options})
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("this kernel knows no %s (modprobe %s): %w", d.kind.Type, d.kind.Type, err)
	}
	return err
}

func joinOptions(a, b string) string {
	if a == "" {
		return b
	}
	return a + "," + b
}

// keepFree tells the repository how much of the room inside the filesystem cannot
// be had. A block device shares its room with nobody. An image file grows: by
// as much as is free below it, less what must stay free there.
func (p place) keepFree(below func(path string) int64) func(path string) int64 {
	if p.block {
		return below
	}
	return func(target string) int64 {
		keep := int64(0)
		if below != nil {
			keep = max(0, below(p.path))
		}
		var image unix.Stat_t
		var outer, inner unix.Statfs_t
		if unix.Stat(p.path, &image) != nil || unix.Statfs(p.path, &outer) != nil || unix.Statfs(target, &inner) != nil {
			return keep
		}
		room := max(0, freeBytes(outer)-keep)
		if growth := image.Size - image.Blocks*512; growth <= room {
			return 0
		}
		return max(0, freeBytes(inner)-room)
	}
}

func freeBytes(fs unix.Statfs_t) int64 {
	block := fs.Frsize
	if block == 0 {
		block = fs.Bsize
	}
	return int64(fs.Bavail) * block
}

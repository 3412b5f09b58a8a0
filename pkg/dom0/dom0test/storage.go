package dom0test

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/patchd/patchd/pkg/dom0"
)

// device is an attached image; it vanishes when it is neither open nor mounted.
type device struct {
	d     *Dom0
	path  string
	image string
	open  bool
}

// Attach implements dom0.Dom0. Any absolute path is an image, unless Exists
// says otherwise.
func (d *Dom0) Attach(ctx context.Context, image string, readOnly bool) (dom0.Device, error) {
	mode := "rw"
	if readOnly {
		mode = "ro"
	}
	dev := &device{d: d, image: image, open: true}
	err := d.effect(ctx, Call{"attach", image + " " + mode}, func() error {
		if d.Exists != nil && !d.Exists(image) {
			return &fs.PathError{Op: "attach", Path: image, Err: fs.ErrNotExist}
		}
		dev.path = d.freePath()
		d.devices = append(d.devices, dev)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return dev, nil
}

// freePath is the first loop device that is not taken. d.mu is held.
func (d *Dom0) freePath() string {
	for n := 0; ; n++ {
		path := fmt.Sprintf("/dev/loop%d", n)
		taken := func(dev *device) bool { return dev.path == path }
		if !slices.ContainsFunc(d.devices, taken) {
			return path
		}
	}
}

// Path implements dom0.Device.
func (v *device) Path() string { return v.path }

// Close implements dom0.Device. Also when it is told to fail the device is let
// go, as by close(2).
func (v *device) Close() error {
	d := v.d
	d.mu.Lock()
	open := v.open
	d.mu.Unlock()
	if !open {
		return nil
	}
	err := d.effect(context.Background(), Call{"detach", v.path}, func() error { return nil })
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != ErrCrashed {
		v.open = false
		d.autoclear()
	}
	return err
}

// autoclear drops the devices that nobody uses. d.mu is held.
func (d *Dom0) autoclear() {
	d.devices = slices.DeleteFunc(d.devices, func(dev *device) bool {
		mounted := func(m dom0.Mount) bool { return m.Source == dev.path }
		return !dev.open && !slices.ContainsFunc(d.mounts, mounted)
	})
}

// Mount implements dom0.Dom0.
func (d *Dom0) Mount(ctx context.Context, m dom0.Mount) error {
	if err := m.Validate(); err != nil {
		return err
	}
	var options []string
	for _, o := range []struct {
		name string
		set  bool
	}{{"ro", m.ReadOnly}, {"noexec", m.NoExec}, {"noatime", m.NoAtime}, {m.Options, m.Options != ""}} {
		if o.set {
			options = append(options, o.name)
		}
	}
	what := fmt.Sprintf("%s %s on %s", m.Type, m.Source, m.Target)
	if len(options) > 0 {
		what += " " + strings.Join(options, ",")
	}
	return d.effect(ctx, Call{"mount", what}, func() error { return d.mount(m) })
}

func (d *Dom0) mount(m dom0.Mount) error {
	used := func(o dom0.Mount) bool { return o.Target == m.Target }
	if slices.ContainsFunc(d.mounts, used) {
		return fmt.Errorf("mount on %s: %w", m.Target, syscall.EBUSY)
	}
	attached := func(dev *device) bool { return dev.path == m.Source }
	if strings.HasPrefix(m.Source, "/dev/loop") && !slices.ContainsFunc(d.devices, attached) {
		return fmt.Errorf("mount %s: %w", m.Source, syscall.ENXIO)
	}
	d.mounts = append(d.mounts, m)
	return nil
}

// Unmount implements dom0.Dom0.
func (d *Dom0) Unmount(ctx context.Context, target string) error {
	if !filepath.IsAbs(target) {
		return fmt.Errorf("unmount: %q is not absolute", target)
	}
	return d.effect(ctx, Call{"unmount", target}, func() error {
		d.mounts = slices.DeleteFunc(d.mounts, func(m dom0.Mount) bool { return m.Target == target })
		d.autoclear()
		return nil
	})
}

// SyncFS implements dom0.Dom0.
func (d *Dom0) SyncFS(ctx context.Context, path string) error {
	return d.effect(ctx, Call{"syncfs", path}, func() error { return nil })
}

// Space implements dom0.Dom0.
func (d *Dom0) Space(path string) (s dom0.Space, err error) {
	err = d.query(func() error {
		s = dom0.Space{Total: 1 << 40, Free: 1 << 40}
		if d.Room != nil {
			s, err = d.Room(path)
		}
		return err
	})
	return s, err
}

// BootID implements dom0.Dom0.
func (d *Dom0) BootID() (id string, err error) {
	err = d.query(func() error {
		id = d.Boot
		return nil
	})
	return id, err
}

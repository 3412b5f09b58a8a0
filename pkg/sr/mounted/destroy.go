package mounted

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/xapi"
)

// Destroy removes an SR that holds nothing: the device is empty then, and an
// image file that Create made is gone.
func (d *Driver) Destroy(ctx context.Context, c sr.Config) error {
	if err := sr.Alive(ctx); err != nil {
		return err
	}
	p, err := d.place(c)
	if err != nil {
		return err
	}
	plug, release, err := d.hold(ctx, c.SR)
	if err != nil {
		return err
	}
	defer release()
	return coded(d.destroy(ctx, c, p, plug), c.SR, "destroy the SR on %s", p.path)
}

func (d *Driver) destroy(ctx context.Context, c sr.Config, p place, plug *plug) error {
	if err := quiet(ctx, c); err != nil {
		return err
	}
	here, err := p.examine(d.kind.Type)
	if errors.Is(err, os.ErrNotExist) || err == nil && here.sr != c.SR {
		return nil
	}
	if err != nil {
		return err
	}
	if here.made {
		ours, err := d.emptied(ctx, c, p, plug)
		if err != nil || !ours {
			return err
		}
	}
	return p.wipe(ctx, claim{sr: c.SR, typ: d.kind.Type, own: here.own})
}

// emptied looks into the SR and leaves it unmounted. ours is false when another
// SR lies in the filesystem, which stays then.
func (d *Driver) emptied(ctx context.Context, c sr.Config, p place, plug *plug) (ours bool, err error) {
	target, fresh, err := d.mount(ctx, c, p)
	if err != nil {
		return false, err
	}
	err = file.Empty(target, c.SR)
	if err == nil && plug.users > 0 {
		return false, fmt.Errorf("it is attached: %w", unix.EBUSY)
	}
	if err == nil || fresh {
		err = errors.Join(err, unmount(context.WithoutCancel(ctx), c, target))
	}
	if xapi.Is(err, xapi.SRDeviceInUse) {
		return false, nil
	}
	return err == nil, err
}

// mirrors are where btrfs keeps its other superblocks.
var mirrors = []int64{64 * mib, 256 << 30}

// wipe makes the device empty, as examine sees it. The claim goes last: broken
// off before, it can be repeated.
func (p place) wipe(ctx context.Context, mine claim) (err error) {
	f, err := p.take(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if mine.own {
		return p.remove()
	}
	if err := mine.write(f); err != nil {
		return err
	}
	size, err := length(f)
	if err != nil {
		return err
	}
	zeros := make([]byte, edges)
	for _, at := range append([]int64{0}, mirrors...) {
		n := min(edges, roomFor(size)-at)
		if at > 0 {
			n = min(n, 4096)
		}
		if n > 0 {
			if _, err := f.WriteAt(zeros[:n], at); err != nil {
				return fmt.Errorf("wipe %s: %w", p.path, err)
			}
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("wipe %s: %w", p.path, err)
	}
	end := min(size-edges, roomFor(size))
	if _, err := f.WriteAt(make([]byte, size-end), end); err != nil {
		return fmt.Errorf("wipe %s: %w", p.path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("wipe %s: %w", p.path, err)
	}
	return nil
}

// remove removes the image file.
func (p place) remove() error {
	folder, err := file.OpenFolder(keyDevice, filepath.Dir(p.path))
	if err != nil {
		return err
	}
	defer folder.Close()
	if err := unix.Unlinkat(int(folder.Fd()), filepath.Base(p.path), 0); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove %s: %w", p.path, err)
	}
	return folder.Sync()
}

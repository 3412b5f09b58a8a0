package lvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// keyDevice is the one key of device_config.
const keyDevice = "device"

// place is where an SR is, or is to be.
type place struct {
	uuid  xapi.UUID
	group string
	given string // the device as it was named
	name  func() string
	tools tools // of the device it really is
}

// locate holds c against the rules: an absolute, clean path below /dev of
// characters that need no quoting. It looks at nothing yet.
func locate(c sr.Config) (place, error) {
	if err := sr.CheckConfig(info, c.Device); err != nil {
		return place{}, err
	}
	if !c.SR.Valid() {
		return place{}, xapi.NewError(xapi.InvalidValue, "uuid", "").Because(fmt.Errorf("%.64q is not a uuid", c.SR))
	}
	given := c.Device[keyDevice]
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/-_.:+=@", r)
	}
	switch {
	case !strings.HasPrefix(given, "/dev/"):
		return place{}, sr.BadConfig(keyDevice, given, "the device must be named by its path in /dev")
	case given != filepath.Clean(given):
		return place{}, sr.BadConfig(keyDevice, given, "the path must be written without empty, '.' or '..' parts")
	case strings.ContainsFunc(given, func(r rune) bool { return !plain(r) }):
		return place{}, sr.BadConfig(keyDevice, given, "the path may hold letters, digits and - _ . : + = @ only")
	}
	return place{uuid: c.SR, group: groupName(c.SR), given: given, name: c.Name, tools: tools{dom0: c.Dom0}}, nil
}

// resolve finds the block device behind the name. An absent one is os.ErrNotExist.
func (p *place) resolve() error {
	path, err := filepath.EvalSymlinks(p.given)
	if err != nil {
		return fmt.Errorf("find device %s: %w", p.given, err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("find device %s: %w", p.given, err)
	}
	if fi.Mode()&os.ModeDevice == 0 || fi.Mode()&os.ModeCharDevice != 0 {
		return sr.BadConfig(keyDevice, p.given, "is not a block device")
	}
	p.tools.device = path
	return nil
}

// holding is what is on a device.
type holding struct {
	physical string // the uuid of its physical volume, or ""
	group    string // the volume group it belongs to, or ""
	extent   int64  // bytes; 0 without a group
}

// look asks what is on the device.
func (p place) look(ctx context.Context) (holding, error) {
	rows, err := p.tools.report(ctx, "pvs", "pv_name,pv_uuid,vg_name,vg_extent_size")
	if err != nil {
		return holding{}, err
	}
	if len(rows) == 0 {
		return holding{}, nil
	}
	h := holding{physical: rows[0]["pv_uuid"], group: rows[0]["vg_name"]}
	if h.group != "" {
		h.extent, err = rows[0].number("vg_extent_size")
	}
	return h, err
}

// assertBlank refuses a device that is in use or that holds anything. Code: SR_DEVICE_IN_USE.
func (p place) assertBlank(ctx context.Context) error {
	fd, err := unix.Open(p.tools.device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return p.inUse("it is mounted, or part of another device")
	}
	if err != nil {
		return fmt.Errorf("open device %s: %w", p.tools.device, err)
	}
	unix.Close(fd)
	path, err := find("blkid", "util-linux")
	if err != nil {
		return err
	}
	out, err := p.tools.run(ctx, path, []string{"-p", "-o", "export", p.tools.device}, true)
	var refused *failure
	switch {
	case errors.As(err, &refused) && refused.status == 2:
		return nil // nothing was found
	case errors.As(err, &refused) && refused.status == 8:
		return p.inUse("it holds more than one thing")
	case err != nil:
		return err
	}
	return p.inUse("it holds: " + strings.Join(strings.Fields(string(out)), " "))
}

func (p place) inUse(why string) error {
	return xapi.NewError(xapi.SRDeviceInUse, fmt.Sprintf("%s: %s. If nobody needs that: `wipefs -a %[1]s`", p.given, why))
}

// extentFor is the size of an extent on a device of that many bytes with
// sectors of that size: LVM counts extents in 32 bits.
func extentFor(size, sector int64) int64 {
	extent := max(sector, 512)
	for size/extent >= 1<<32-1<<20 {
		extent *= 2
	}
	return extent
}

// chunkFor is how much is given at once, in bytes: 64 KiB, more on a device
// so large that the pool's metadata could not address it.
func chunkFor(size int64) int64 {
	chunk := int64(64 << 10)
	for size/chunk >= 1<<27 {
		chunk *= 2
	}
	return chunk
}

// measure gives the size of a block device and of its sectors, in bytes.
func measure(path string) (size, sector int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	if size, err = f.Seek(0, 2); err != nil {
		return 0, 0, fmt.Errorf("measure %s: %w", path, err)
	}
	n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	if err != nil {
		return 0, 0, fmt.Errorf("measure %s: %w", path, err)
	}
	return size, int64(n), nil
}

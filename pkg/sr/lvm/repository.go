package lvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// repository is an attached volume group. What runs a command of lvm2 holds the
// turn; opening a volume does not, unless its device is missing.
type repository struct {
	place
	turn     *turn
	extent   int64 // bytes
	chunk    int64 // what the pool gives at once, bytes
	keepFree func(string) int64
	closed   flag
}

var _ sr.Repository = (*repository)(nil)

// enter begins a call about volumes.
func (r *repository) enter(ctx context.Context, names ...sr.Name) (leave func(), err error) {
	if err := sr.Sound(ctx, names...); err != nil {
		return nil, err
	}
	leave, err = r.turn.take(ctx)
	if err != nil {
		return nil, err
	}
	if r.closed.is() {
		leave()
		return nil, xapi.NewError(xapi.SRNotAttached, string(r.uuid))
	}
	return leave, nil
}

// Features are those of every thin pool.
func (r *repository) Features() []sr.Feature { return slices.Clone(info.Features) }

func (r *repository) lv(n sr.Name) string { return r.group + "/" + logicalName(n) }

// Stat asks the pool. When its metadata is nearly full, nothing is free.
func (r *repository) Stat(ctx context.Context) (sr.Stat, error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return sr.Stat{}, err
	}
	defer leave()
	r.emptyTrash(ctx)
	s, err := r.room(ctx)
	return s, r.coded(ctx, err, "measure")
}

func (r *repository) room(ctx context.Context) (sr.Stat, error) {
	p, err := r.poolStatus(ctx)
	if err != nil {
		return sr.Stat{}, err
	}
	s := sr.Stat{PhysicalSize: p.totalData * r.chunk, PhysicalUtilisation: p.usedData * r.chunk}
	s.Free = s.PhysicalSize - s.PhysicalUtilisation
	if p.totalMeta-p.usedMeta < max(16, p.totalMeta/50) {
		s.Free = 0
	}
	if r.keepFree != nil {
		// A path that lies on no filesystem: nothing else shares the pool.
		s.Free -= min(s.Free, max(0, r.keepFree(node(r.group, poolName)+"/volumes")))
	}
	return s, nil
}

// poolStatus asks device-mapper, which knows of every block. LVM lets the pool
// sleep while it has no volume.
func (r *repository) poolStatus(ctx context.Context) (poolStatus, error) {
	for awake := false; ; awake = true {
		out, err := r.tools.dmsetup(ctx, "status", "--target", "thin-pool")
		if err != nil {
			return poolStatus{}, err
		}
		line, found := poolLine(string(out), mapperName(r.group, poolName))
		if found || awake {
			return parsePool(line)
		}
		if _, err := r.tools.lvm(ctx, "lvchange", "--activate", "y", r.group+"/"+poolName); err != nil {
			return poolStatus{}, err
		}
	}
}

func (r *repository) hasRoom(ctx context.Context) error {
	s, err := r.room(ctx)
	if err == nil && s.Free <= 0 {
		err = xapi.NewError(xapi.OutOfSpace, fmt.Sprintf("%s (%s)", r.given, r.uuid))
	}
	return err
}

// Scan lists the thin volumes with names of ours. What one takes counts blocks
// that it shares with others.
func (r *repository) Scan(ctx context.Context) ([]sr.Volume, error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	r.emptyTrash(ctx)
	rows, err := r.volumes(ctx)
	if err != nil {
		return nil, r.coded(ctx, err, "scan")
	}
	mapped, err := r.mapped(ctx)
	if err != nil {
		return nil, r.coded(ctx, err, "scan")
	}
	volumes := []sr.Volume{}
	for _, row := range rows {
		n, ours := volumeName(row["lv_name"])
		if !ours || row["segtype"] != "thin" {
			continue
		}
		size, err := row.number("lv_size")
		if err != nil {
			return nil, r.coded(ctx, err, "scan")
		}
		volumes = append(volumes, sr.Volume{Name: n, VirtualSize: size, PhysicalUtilisation: mapped[mapperName(r.group, row["lv_name"])]})
	}
	slices.SortFunc(volumes, func(a, b sr.Volume) int { return cmp.Compare(a.Name.String(), b.Name.String()) })
	return volumes, nil
}

// mapped tells what the active thin devices have blocks for; args name one.
func (r *repository) mapped(ctx context.Context, args ...string) (map[string]int64, error) {
	out, err := r.tools.dmsetup(ctx, append([]string{"status", "--target", "thin"}, args...)...)
	return parseThins(string(out)), err
}

var _ sr.Inspector = (*repository)(nil)

// Strangers names the volumes of the group that are not ours.
func (r *repository) Strangers(ctx context.Context, limit int) ([]string, int, error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer leave()
	rows, err := r.volumes(ctx)
	if err != nil {
		return nil, 0, r.coded(ctx, err, "scan")
	}
	var names []string
	for _, row := range rows {
		_, ours := volumeName(row["lv_name"])
		if lv := row["lv_name"]; lv != poolName && !isTrash(lv) && !(ours && row["segtype"] == "thin") {
			names = append(names, lv)
		}
	}
	slices.Sort(names)
	return names[:min(limit, len(names))], len(names), nil
}

// checkSize refuses what cannot be the exact size of a volume.
func (r *repository) checkSize(size int64) error {
	if size > 0 && size%r.extent == 0 {
		return nil
	}
	e := xapi.NewError(xapi.InvalidValue, "virtual_size", strconv.FormatInt(size, 10))
	return e.Because(fmt.Errorf("it must be a multiple of %d", r.extent))
}

// Create makes a thin volume.
func (r *repository) Create(ctx context.Context, n sr.Name, size int64) (sr.Volume, error) {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return sr.Volume{}, err
	}
	defer leave()
	if err := r.checkSize(size); err != nil {
		return sr.Volume{}, err
	}
	if err = r.hasRoom(ctx); err == nil {
		_, err = r.tools.lvm(ctx, "lvcreate", "--yes", "--type", "thin", "--thinpool", poolName, "--virtualsize", bytesArg(size),
			"--setactivationskip", "n", "--name", logicalName(n), r.group)
	}
	if err != nil {
		return sr.Volume{}, r.explain(ctx, err, "create", n, sr.Name{})
	}
	return sr.Volume{Name: n, VirtualSize: size}, nil
}

// Clone makes a thin snapshot that can be written.
func (r *repository) Clone(ctx context.Context, src, dst sr.Name) (sr.Volume, error) {
	leave, err := r.enter(ctx, src, dst)
	if err != nil {
		return sr.Volume{}, err
	}
	defer leave()
	if err = r.hasRoom(ctx); err == nil {
		_, err = r.tools.lvm(ctx, "lvcreate", "--yes", "--snapshot", "--setactivationskip", "n", "--name", logicalName(dst), r.lv(src))
	}
	if err != nil {
		return sr.Volume{}, r.explain(ctx, err, "clone", dst, src)
	}
	name := mapperName(r.group, logicalName(dst))
	mapped, err := r.mapped(ctx, name)
	var size int64
	if err == nil {
		size, err = r.length(dst)
	}
	if err != nil {
		return sr.Volume{}, r.coded(ctx, err, "clone in")
	}
	return sr.Volume{Name: dst, VirtualSize: size, PhysicalUtilisation: mapped[name]}, nil
}

// explain finds out why a command about volume n refused: n is there already,
// from (when it is a name) is not, or the storage failed.
func (r *repository) explain(ctx context.Context, cause error, verb string, n, from sr.Name) error {
	var refused *failure
	if !errors.As(cause, &refused) {
		return r.coded(ctx, cause, verb+" a volume of")
	}
	have, err := r.list(context.WithoutCancel(ctx))
	switch {
	case err != nil:
		return r.coded(ctx, errors.Join(cause, err), verb+" a volume of")
	case from != sr.Name{} && !have[logicalName(from)]:
		return xapi.NewError(xapi.VDINotAvailable, from.String()).Because(cause)
	case have[logicalName(n)]:
		return fmt.Errorf("%s volume %s: %w: %w", verb, n, os.ErrExist, cause)
	case strings.Contains(refused.text, "insufficient free space"):
		return xapi.NewError(xapi.OutOfSpace, fmt.Sprintf("%s (%s)", r.given, r.uuid)).Because(cause)
	}
	return r.coded(ctx, cause, verb+" a volume of")
}

// list is the set of logical volumes in the group.
func (r *repository) list(ctx context.Context) (map[string]bool, error) {
	rows, err := r.volumes(ctx)
	have := map[string]bool{}
	for _, row := range rows {
		have[row["lv_name"]] = true
	}
	return have, err
}

// Open opens the device of a volume.
func (r *repository) Open(ctx context.Context, n sr.Name, m sr.Mode) (*os.File, error) {
	if err := r.ready(ctx, n); err != nil {
		return nil, err
	}
	flags := unix.O_RDONLY
	if m == sr.ReadWrite {
		flags = unix.O_RDWR
	}
	f, err := os.OpenFile(node(r.group, logicalName(n)), flags|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return nil, xapi.NewError(xapi.VDINotAvailable, n.String()).Because(err)
	}
	if err != nil {
		return nil, r.coded(ctx, err, "open a volume of")
	}
	return f, nil
}

// Path is the path of the device.
func (r *repository) Path(ctx context.Context, n sr.Name) (string, error) {
	if err := r.ready(ctx, n); err != nil {
		return "", err
	}
	return node(r.group, logicalName(n)), nil
}

// ready sees to it that the device of a volume is there.
func (r *repository) ready(ctx context.Context, n sr.Name) error {
	if err := sr.Sound(ctx, n); err != nil {
		return err
	}
	if r.closed.is() {
		return xapi.NewError(xapi.SRNotAttached, string(r.uuid))
	}
	if isBlock(node(r.group, logicalName(n))) {
		return nil
	}
	leave, err := r.enter(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	return r.activate(ctx, n)
}

// activate makes the device of a volume whose creation, or renaming, was
// broken off before that step.
func (r *repository) activate(ctx context.Context, n sr.Name) error {
	if isBlock(node(r.group, logicalName(n))) {
		return nil
	}
	have, err := r.list(ctx)
	if err != nil {
		return r.coded(ctx, err, "find a volume of")
	}
	if !have[logicalName(n)] {
		return xapi.NewError(xapi.VDINotAvailable, n.String())
	}
	_, err = r.tools.lvm(ctx, "lvchange", "--activate", "y", "--ignoreactivationskip", r.lv(n))
	if err == nil {
		_, err = r.tools.lvm(ctx, "lvchange", "--refresh", r.lv(n))
	}
	if err == nil && !isBlock(node(r.group, logicalName(n))) {
		err = fmt.Errorf("volume %s has no device %s", n, node(r.group, logicalName(n)))
	}
	return r.coded(ctx, err, "activate a volume of")
}

func isBlock(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0
}

// length is the size of a volume, which is that of its device.
func (r *repository) length(n sr.Name) (int64, error) {
	f, err := os.Open(node(r.group, logicalName(n)))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// Resize lengthens the volume.
func (r *repository) Resize(ctx context.Context, n sr.Name, size int64) error {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	if err := r.activate(ctx, n); err != nil {
		return err
	}
	before, err := r.length(n)
	if err != nil {
		return r.coded(ctx, err, "resize a volume of")
	}
	if size < before {
		return xapi.NewError(xapi.InvalidValue, "virtual_size", strconv.FormatInt(size, 10))
	}
	if err := r.checkSize(size); err != nil || size == before {
		return err
	}
	_, err = r.tools.lvm(ctx, "lvextend", "--size", bytesArg(size), r.lv(n))
	return r.coded(ctx, err, "resize a volume of")
}

// Rename gives the volume another name, in one step of the group's metadata.
func (r *repository) Rename(ctx context.Context, from, to sr.Name) error {
	leave, err := r.enter(ctx, from, to)
	if err != nil {
		return err
	}
	defer leave()
	if from == to {
		return r.activate(ctx, from)
	}
	_, err = r.tools.lvm(ctx, "lvrename", r.group, logicalName(from), logicalName(to))
	if err == nil {
		return nil
	}
	have, lerr := r.list(context.WithoutCancel(ctx))
	if lerr == nil && !have[logicalName(from)] && have[logicalName(to)] {
		return nil // it was renamed before
	}
	return r.explain(ctx, errors.Join(err, lerr), "rename", to, from)
}

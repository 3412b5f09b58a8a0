// Package memory is a storage driver for tests: it keeps each volume in a
// memory file (memfd), which has a real descriptor, holes, and a path that a
// loop device can be made of. Volumes live as long as their Driver value: an SR
// can be detached and attached again, as by a restart, but not by another process.
package memory

import (
	"cmp"
	"context"
	"encoding/xml"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// Driver keeps SRs in memory. Fields are set before the first use.
type Driver struct {
	// Clones makes every SR have VDI_CLONE. Cloning copies what is allocated.
	Clones bool
	// Capacity is the size of one SR in bytes; 0 is 1 TiB. What is written
	// through an open volume is counted, and hinders the next Create.
	Capacity int64

	mu  sync.Mutex
	srs map[xapi.UUID]*store
}

var _ sr.Driver = (*Driver)(nil)

// store is the content of one SR.
type store struct {
	mu      sync.Mutex
	volumes map[sr.Name]*os.File
}

// Info describes the driver.
func (d *Driver) Info() sr.Info {
	return sr.Info{
		Type: "memory", Label: "Memory", Description: "Disk images in memory, for tests", Vendor: "patchd",
		Copyright: "The patchd authors", Version: "1.0",
		Config:   map[string]string{"tag": "any text (required)"},
		Required: []string{"tag"},
		Features: []sr.Feature{sr.VDICreate, sr.VDIDelete, sr.VDIResize, sr.VDIIntro, sr.SRProbe, sr.SRUpdate},
		Shared:   true,
	}
}

// Probe lists all SRs in memory.
func (d *Driver) Probe(ctx context.Context, c sr.Config) (string, error) {
	if err := cmp.Or(sr.Alive(ctx), sr.CheckConfig(d.Info(), c.Device)); err != nil {
		return "", err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var text strings.Builder
	text.WriteString(xml.Header + "<SRlist>")
	for uuid := range d.srs {
		fmt.Fprintf(&text, "<SR><UUID>%s</UUID></SR>", uuid)
	}
	text.WriteString("</SRlist>")
	return text.String(), nil
}

// Create makes an empty SR.
func (d *Driver) Create(ctx context.Context, c sr.Config) error {
	if err := cmp.Or(sr.Alive(ctx), sr.CheckConfig(d.Info(), c.Device)); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.srs == nil {
		d.srs = map[xapi.UUID]*store{}
	}
	if d.srs[c.SR] == nil {
		d.srs[c.SR] = &store{volumes: map[sr.Name]*os.File{}}
	}
	return nil
}

// Attach gives the SR that Create made.
func (d *Driver) Attach(ctx context.Context, c sr.Config) (sr.Repository, error) {
	if err := cmp.Or(sr.Alive(ctx), sr.CheckConfig(d.Info(), c.Device)); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.srs[c.SR]
	if s == nil {
		return nil, sr.BackendFailure("there is no SR %s in memory", c.SR)
	}
	r := &repository{uuid: c.SR, store: s, features: d.Info().Features, capacity: cmp.Or(d.Capacity, 1<<40), keepFree: c.KeepFree}
	if d.Clones {
		r.features = append(r.features, sr.VDIClone, sr.VDISnapshot)
	}
	return r, nil
}

// Destroy forgets an empty SR.
func (d *Driver) Destroy(ctx context.Context, c sr.Config) error {
	if err := cmp.Or(sr.Alive(ctx), sr.CheckConfig(d.Info(), c.Device)); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.srs[c.SR]
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.volumes) > 0 {
		return xapi.NewError(xapi.SRNotEmpty)
	}
	delete(d.srs, c.SR)
	return nil
}

// repository is an attached SR. The lock of its store guards detached, too.
type repository struct {
	*store
	uuid     xapi.UUID
	features []sr.Feature
	capacity int64
	keepFree func(string) int64
	detached bool
}

var _ sr.Repository = (*repository)(nil)

// enter begins a call; leave ends it.
func (r *repository) enter(ctx context.Context, names ...sr.Name) (leave func(), err error) {
	if err := sr.Sound(ctx, names...); err != nil {
		return nil, err
	}
	r.mu.Lock()
	if r.detached {
		r.mu.Unlock()
		return nil, xapi.NewError(xapi.SRNotAttached, string(r.uuid))
	}
	return r.mu.Unlock, nil
}

// find gives the memory file of a volume.
func (r *repository) find(n sr.Name) (*os.File, error) {
	f := r.volumes[n]
	if f == nil {
		return nil, xapi.NewError(xapi.VDINotAvailable, n.String())
	}
	return f, nil
}

func describe(n sr.Name, f *os.File) (sr.Volume, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return sr.Volume{}, fmt.Errorf("stat volume %s: %w", n, err)
	}
	return sr.Volume{Name: n, VirtualSize: st.Size, PhysicalUtilisation: st.Blocks * 512}, nil
}

// Features are those of the driver, and VDI_CLONE where it was told to clone.
func (r *repository) Features() []sr.Feature { return slices.Clone(r.features) }

// Stat counts what the volumes hold.
func (r *repository) Stat(ctx context.Context) (sr.Stat, error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return sr.Stat{}, err
	}
	defer leave()
	return r.room()
}

func (r *repository) room() (sr.Stat, error) {
	s := sr.Stat{PhysicalSize: r.capacity}
	for n, f := range r.volumes {
		v, err := describe(n, f)
		if err != nil {
			return s, err
		}
		s.PhysicalUtilisation += v.PhysicalUtilisation
	}
	s.Free = max(0, s.PhysicalSize-s.PhysicalUtilisation)
	if r.keepFree != nil {
		s.Free -= min(s.Free, max(0, r.keepFree("")))
	}
	return s, nil
}

// Scan lists all volumes.
func (r *repository) Scan(ctx context.Context) ([]sr.Volume, error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	list := []sr.Volume{}
	for n, f := range r.volumes {
		v, err := describe(n, f)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	slices.SortFunc(list, func(a, b sr.Volume) int { return cmp.Compare(a.Name.String(), b.Name.String()) })
	return list, nil
}

// Create makes a volume.
func (r *repository) Create(ctx context.Context, n sr.Name, size int64) (sr.Volume, error) {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return sr.Volume{}, err
	}
	defer leave()
	return r.create(n, size)
}

func (r *repository) create(n sr.Name, size int64) (sr.Volume, error) {
	if size <= 0 {
		return sr.Volume{}, xapi.NewError(xapi.InvalidValue, "virtual_size", strconv.FormatInt(size, 10))
	}
	if r.volumes[n] != nil {
		return sr.Volume{}, sr.BackendFailure("create volume %s: %w", n, os.ErrExist)
	}
	s, err := r.room()
	if err != nil {
		return sr.Volume{}, err
	}
	if s.Free <= 0 {
		return sr.Volume{}, xapi.NewError(xapi.OutOfSpace, "memory ("+string(r.uuid)+")")
	}
	fd, err := unix.MemfdCreate(string(n.Kind)+"."+string(n.VDI), unix.MFD_CLOEXEC)
	if err != nil {
		return sr.Volume{}, sr.BackendFailure("create volume %s: %w", n, err)
	}
	f := os.NewFile(uintptr(fd), n.String())
	if err := f.Truncate(size); err != nil {
		f.Close()
		return sr.Volume{}, sr.BackendFailure("create volume %s: %w", n, err)
	}
	r.volumes[n] = f
	return describe(n, f)
}

// Open opens the memory file once more.
func (r *repository) Open(ctx context.Context, n sr.Name, m sr.Mode) (*os.File, error) {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return nil, err
	}
	defer leave()
	f, err := r.find(n)
	if err != nil {
		return nil, err
	}
	flags := os.O_RDONLY
	if m == sr.ReadWrite {
		flags = os.O_RDWR
	}
	opened, err := os.OpenFile(path(f), flags, 0)
	if err != nil {
		return nil, sr.BackendFailure("open volume %s: %w", n, err)
	}
	return opened, nil
}

func path(f *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }

// Path is the path of the memory file, for as long as this process lives.
func (r *repository) Path(ctx context.Context, n sr.Name) (string, error) {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return "", err
	}
	defer leave()
	f, err := r.find(n)
	if err != nil {
		return "", err
	}
	return path(f), nil
}

// Clone copies what is allocated.
func (r *repository) Clone(ctx context.Context, src, dst sr.Name) (sr.Volume, error) {
	leave, err := r.enter(ctx, src, dst)
	if err != nil {
		return sr.Volume{}, err
	}
	defer leave()
	if !sr.Has(r.features, sr.VDIClone) {
		return sr.Volume{}, xapi.NewError(xapi.SROperationNotSupported, string(r.uuid))
	}
	from, err := r.find(src)
	if err != nil {
		return sr.Volume{}, err
	}
	v, err := describe(src, from)
	if err != nil {
		return sr.Volume{}, err
	}
	if _, err := r.create(dst, v.VirtualSize); err != nil {
		return sr.Volume{}, err
	}
	if err := copyData(r.volumes[dst], from, v.VirtualSize); err != nil {
		r.volumes[dst].Close()
		delete(r.volumes, dst)
		return sr.Volume{}, sr.BackendFailure("clone volume %s: %w", src, err)
	}
	return describe(dst, r.volumes[dst])
}

// copyData copies the data of from, hole by hole, at offsets.
func copyData(to, from *os.File, size int64) error {
	buf := make([]byte, 256<<10)
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(from.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(int(from.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for at = data; at < hole; {
			n, err := from.ReadAt(buf[:min(int64(len(buf)), hole-at)], at)
			if err != nil {
				return err
			}
			if _, err := to.WriteAt(buf[:n], at); err != nil {
				return err
			}
			at += int64(n)
		}
	}
	return nil
}

// Resize lengthens the memory file.
func (r *repository) Resize(ctx context.Context, n sr.Name, size int64) error {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	f, err := r.find(n)
	if err != nil {
		return err
	}
	v, err := describe(n, f)
	if err != nil {
		return err
	}
	if size < v.VirtualSize || size == math.MaxInt64 {
		return xapi.NewError(xapi.InvalidValue, "virtual_size", strconv.FormatInt(size, 10))
	}
	if err := f.Truncate(size); err != nil {
		return sr.BackendFailure("resize volume %s: %w", n, err)
	}
	return nil
}

// Rename gives a volume another name.
func (r *repository) Rename(ctx context.Context, from, to sr.Name) error {
	leave, err := r.enter(ctx, from, to)
	if err != nil {
		return err
	}
	defer leave()
	f, there := r.volumes[from], r.volumes[to]
	switch {
	case f == nil && there == nil:
		return xapi.NewError(xapi.VDINotAvailable, from.String())
	case f == nil, from == to:
		return nil
	case there != nil:
		return sr.BackendFailure("rename volume %s to %s: %w", from, to, os.ErrExist)
	}
	r.volumes[to] = f
	delete(r.volumes, from)
	return nil
}

// Destroy lets go of the memory; open descriptors keep it.
func (r *repository) Destroy(ctx context.Context, n sr.Name) error {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	if f := r.volumes[n]; f != nil {
		f.Close()
		delete(r.volumes, n)
	}
	return nil
}

// Detach ends this attachment.
func (r *repository) Detach(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.detached = true
	return nil
}

package lvm

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

var info = sr.Info{
	Type:        "lvm",
	Label:       "LVM thin",
	Description: "Disk images as thin logical volumes on one block device of this host; clones by snapshot",
	Vendor:      "patchd",
	Copyright:   "The patchd authors",
	Version:     "1.0",
	Config:      map[string]string{keyDevice: "path of a block device in /dev that holds nothing (required)"},
	Required:    []string{keyDevice},
	Features:    []sr.Feature{sr.VDIClone, sr.VDISnapshot, sr.VDICreate, sr.VDIDelete, sr.VDIResize, sr.VDIIntro, sr.SRProbe, sr.SRUpdate},
}

// Driver keeps VDIs as thin logical volumes. It knows who has an SR attached
// in this process: use one value for all. Its zero value is ready.
type Driver struct {
	mu    sync.Mutex
	turns map[xapi.UUID]*turn
}

var _ sr.Driver = (*Driver)(nil)

// Info describes the driver.
func (*Driver) Info() sr.Info { return info }

// turn is the right to work on one SR, and how many repositories it has here.
type turn struct {
	c     chan struct{} // full while somebody works
	users int           // guarded by c
	trash bool          // something destroyed may still be there; guarded by c
}

// take waits for the turn on an SR.
func (d *Driver) take(ctx context.Context, uuid xapi.UUID) (t *turn, release func(), err error) {
	d.mu.Lock()
	if d.turns == nil {
		d.turns = map[xapi.UUID]*turn{}
	}
	t = d.turns[uuid]
	if t == nil {
		t = &turn{c: make(chan struct{}, 1)}
		d.turns[uuid] = t
	}
	d.mu.Unlock()
	release, err = t.take(ctx)
	return t, release, err
}

func (t *turn) take(ctx context.Context) (release func(), err error) {
	select {
	case t.c <- struct{}{}:
		return func() { <-t.c }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// begin checks c, waits for the turn and finds the device.
func (d *Driver) begin(ctx context.Context, c sr.Config) (p place, t *turn, release func(), err error) {
	if err := sr.Alive(ctx); err != nil {
		return p, nil, nil, err
	}
	if p, err = locate(c); err != nil {
		return p, nil, nil, err
	}
	if t, release, err = d.take(ctx, c.SR); err != nil {
		return p, nil, nil, err
	}
	if err = p.resolve(); err != nil {
		release()
		return p, nil, nil, err
	}
	return p, t, release, nil
}

type probeResult struct {
	XMLName xml.Name   `xml:"SRlist"`
	SRs     []probedSR `xml:"SR"`
}

type probedSR struct {
	UUID   string `xml:"UUID"`
	Device string `xml:"Device"`
	Group  string `xml:"VolumeGroup"`
	Size   int64  `xml:"PhysicalSize"`
}

// Probe lists the SR on the device, if there is one.
func (d *Driver) Probe(ctx context.Context, c sr.Config) (string, error) {
	if c.SR == "" {
		c.SR = xapi.NewUUID() // one can look at a device without knowing whose it is
	}
	p, _, release, err := d.begin(ctx, c)
	if err != nil {
		return "", p.coded(ctx, err, "probe")
	}
	defer release()
	h, err := p.look(ctx)
	if err != nil {
		return "", p.coded(ctx, err, "probe")
	}
	var result probeResult
	if uuid, ours := srOfGroup(h.group); ours {
		size, _, err := measure(p.tools.device)
		if err != nil {
			return "", p.coded(ctx, err, "probe")
		}
		result.SRs = append(result.SRs, probedSR{string(uuid), p.given, h.group, size})
	}
	text, err := xml.Marshal(result)
	if err != nil {
		return "", fmt.Errorf("write probe result: %w", err)
	}
	return xml.Header + string(text), nil
}

// srOfGroup is the SR whose volume group has that name.
func srOfGroup(group string) (xapi.UUID, bool) {
	h, found := strings.CutPrefix(group, groupPrefix)
	if !found || len(h) != 32 {
		return "", false
	}
	uuid := xapi.UUID(h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:])
	return uuid, uuid.Valid() && groupName(uuid) == group
}

// Create makes physical volume, group and pool on a device that holds nothing.
// One that was broken off goes on where it was.
func (d *Driver) Create(ctx context.Context, c sr.Config) error {
	p, _, release, err := d.begin(ctx, c)
	if err != nil {
		return p.coded(ctx, err, "create")
	}
	defer release()
	return p.coded(ctx, p.create(ctx), "create")
}

func (p place) create(ctx context.Context) error {
	size, sector, err := measure(p.tools.device)
	if err != nil {
		return err
	}
	h, err := p.look(ctx)
	if err != nil {
		return err
	}
	switch {
	case h.group == p.group:
	case h.group != "":
		return p.inUse("it belongs to the volume group " + h.group)
	case h.physical != "" && h.physical != physicalUUID(p.uuid):
		return p.inUse("it is a physical volume of LVM")
	case h.physical == "":
		if err := p.assertBlank(ctx); err != nil {
			return err
		}
		metadata := min(max(size/64, 1<<20), 16<<20)
		_, err := p.tools.lvm(ctx, "pvcreate", "--yes", "--norestorefile", "--uuid", physicalUUID(p.uuid),
			"--metadatasize", bytesArg(metadata), p.tools.device)
		if err != nil {
			return err
		}
	}
	if h.group == "" {
		extent := extentFor(size, sector)
		if _, err := p.tools.lvm(ctx, "vgcreate", "--yes", "--physicalextentsize", bytesArg(extent), p.group, p.tools.device); err != nil {
			return err
		}
	}
	return p.ensurePool(ctx, size)
}

// ensurePool makes the thin pool of all the room there is. What a broken off
// attempt left of one goes first.
func (p place) ensurePool(ctx context.Context, size int64) error {
	rows, err := p.volumes(ctx)
	if err != nil {
		return err
	}
	for _, r := range rows {
		if r["lv_name"] == poolName && r["segtype"] == "thin-pool" {
			return nil
		}
	}
	for _, r := range rows {
		if _, err := p.tools.lvm(ctx, "lvremove", "--yes", "--force", p.group+"/"+r["lv_name"]); err != nil {
			return err
		}
	}
	_, err = p.tools.lvm(ctx, "lvcreate", "--yes", "--thin", "--extents", "100%FREE", "--chunksize", bytesArg(chunkFor(size)),
		"--zero", "y", "--errorwhenfull", "y", "--discards", "passdown", "--name", poolName, p.group)
	return err
}

// volumes lists the visible logical volumes of the group.
func (p place) volumes(ctx context.Context) ([]row, error) {
	return p.tools.report(ctx, "lvs", "lv_name,lv_size,segtype,chunk_size,lv_device_open", p.group)
}

// Attach activates the volumes.
func (d *Driver) Attach(ctx context.Context, c sr.Config) (sr.Repository, error) {
	p, t, release, err := d.begin(ctx, c)
	if err != nil {
		return nil, p.coded(ctx, err, "attach")
	}
	defer release()
	r, err := p.attach(ctx, c, t)
	if err != nil {
		return nil, p.coded(ctx, err, "attach")
	}
	t.users++
	return r, nil
}

func (p place) attach(ctx context.Context, c sr.Config, t *turn) (*repository, error) {
	h, err := p.look(ctx)
	if err != nil {
		return nil, err
	}
	if h.group != p.group {
		return nil, fmt.Errorf("the device does not hold this SR: its volume group is %q, not %q", h.group, p.group)
	}
	rows, err := p.volumes(ctx)
	if err != nil {
		return nil, err
	}
	r := &repository{place: p, turn: t, extent: h.extent, keepFree: c.KeepFree}
	for _, row := range rows {
		if row["lv_name"] == poolName && row["segtype"] == "thin-pool" {
			if r.chunk, err = row.number("chunk_size"); err != nil {
				return nil, err
			}
		}
		t.trash = t.trash || isTrash(row["lv_name"])
	}
	if r.chunk == 0 {
		return nil, fmt.Errorf("the volume group %s has no thin pool: the SR was never finished", p.group)
	}
	if _, err := p.tools.lvm(ctx, "vgchange", "--activate", "y", "--ignoreactivationskip", p.group); err != nil {
		return nil, err
	}
	r.emptyTrash(ctx)
	return r, nil
}

// Destroy takes the group and the label off the device when no volume is in it.
func (d *Driver) Destroy(ctx context.Context, c sr.Config) error {
	p, _, release, err := d.begin(ctx, c)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return p.coded(ctx, err, "destroy")
	}
	defer release()
	return p.coded(ctx, p.destroy(ctx), "destroy")
}

func (p place) destroy(ctx context.Context) error {
	h, err := p.look(ctx)
	if err != nil {
		return err
	}
	if h.group == p.group {
		rows, err := p.volumes(ctx)
		if err != nil {
			return err
		}
		for _, r := range rows {
			lv := r["lv_name"]
			if lv != poolName && !isTrash(lv) {
				return xapi.NewError(xapi.SRNotEmpty).Because(fmt.Errorf("volume group %s holds %s", p.group, lv))
			}
		}
		if _, err := p.tools.lvm(ctx, "vgremove", "--yes", "--force", "--force", p.group); err != nil {
			return err
		}
	}
	if h.group == p.group || h.group == "" && h.physical == physicalUUID(p.uuid) {
		_, err := p.tools.lvm(ctx, "pvremove", "--yes", "--force", "--force", p.tools.device)
		return err
	}
	return nil
}

// coded gives err a code where it has none, and the SR and its device in its text.
func (p place) coded(ctx context.Context, err error, verb string) error {
	var known *xapi.Error
	if cause := sr.Alive(ctx); err == nil || errors.As(err, &known) || cause != nil && errors.Is(err, cause) {
		return err
	}
	label := ""
	if p.name != nil {
		label = p.name()
	}
	what := fmt.Sprintf("%s SR %q (%s, lvm on %s)", verb, label, p.uuid, p.given)
	if sr.NoSpace(err) {
		return xapi.NewError(xapi.OutOfSpace, what).Because(err)
	}
	return sr.BackendFailure("%s: %w", what, err)
}

func bytesArg(n int64) string { return strconv.FormatInt(n, 10) + "b" }

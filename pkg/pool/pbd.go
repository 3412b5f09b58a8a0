package pool

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"path/filepath"
	"strings"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// PBDCreate links a host to an SR, unplugged. Codes: HANDLE_INVALID,
// PBD_EXISTS [SR ref, host ref, PBD ref], SR_UNKNOWN_DRIVER,
// VALUE_NOT_SUPPORTED for a device_config that the driver does not know.
func (p *Pool) PBDCreate(ctx context.Context, rec PBD) (xapi.Ref, error) {
	rec.UUID, rec.CurrentlyAttached, rec.Features = xapi.NewUUID(), false, nil
	rec.DeviceConfig, rec.OtherConfig = notNil(rec.DeviceConfig), notNil(rec.OtherConfig)
	ref := xapi.NewRef()
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		if !tx.Has(ClassHost, rec.Host) {
			return xapi.NewError(xapi.HandleInvalid, ClassHost, string(rec.Host))
		}
		if err := p.checkDevice(tx, rec); err != nil {
			return err
		}
		for _, other := range tx.Refs(ClassPBD, "SR", string(rec.SR)) {
			have, err := store.Read[PBD](tx, ClassPBD, other)
			if err != nil {
				return err
			}
			if have.Host == rec.Host {
				return xapi.NewError(xapi.PBDExists, string(rec.SR), string(rec.Host), string(other))
			}
		}
		tx.Put(ClassPBD, ref, rec)
		return nil
	})
	if err != nil {
		return "", err
	}
	return ref, nil
}

// checkDevice holds a device_config against the driver of its SR.
func (p *Pool) checkDevice(tx *store.Tx, rec PBD) error {
	of, err := store.Read[SR](tx, ClassSR, rec.SR)
	if err != nil {
		return err
	}
	d, err := p.driver(of.Type)
	if err != nil {
		return err
	}
	return p.checkConfig(d, rec.DeviceConfig)
}

// checkConfig holds a device_config against its driver, and keeps SRs out of
// the folders that patchd has for itself. Code: VALUE_NOT_SUPPORTED.
func (p *Pool) checkConfig(d sr.Driver, device map[string]string) error {
	if err := sr.CheckConfig(d.Info(), device); err != nil {
		return err
	}
	for key, value := range device {
		if !filepath.IsAbs(value) {
			continue
		}
		path := realPath(value)
		for _, own := range p.OwnDirs {
			if real := realPath(own); path == real || strings.HasPrefix(path, real+"/") {
				return sr.BadConfig(key, value, "lies in "+own+", which is a folder of patchd's own")
			}
		}
	}
	return nil
}

// realPath follows the symbolic links in what there is of an absolute path.
func realPath(path string) string {
	path = filepath.Clean(path)
	if real, err := filepath.EvalSymlinks(path); err == nil || path == "/" {
		return cmp.Or(real, path)
	}
	return filepath.Join(realPath(filepath.Dir(path)), filepath.Base(path))
}

// PBDDestroy removes an unplugged link. Codes: HANDLE_INVALID,
// OPERATION_NOT_ALLOWED while it is plugged.
func (p *Pool) PBDDestroy(ctx context.Context, ref xapi.Ref) error {
	if err := p.tellLink(ctx, ref, "PBDDestroy", ref); err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if _, err := readUnplugged(tx, ref); err != nil {
			return err
		}
		tx.Delete(ClassPBD, ref)
		return nil
	})
}

func readUnplugged(tx *store.Tx, ref xapi.Ref) (PBD, error) {
	rec, err := store.Read[PBD](tx, ClassPBD, ref)
	if err == nil && rec.CurrentlyAttached {
		err = xapi.NewError(xapi.OperationNotAllowed, "the PBD is plugged: unplug it first")
	}
	return rec, err
}

// PBDSetDeviceConfig changes where an unplugged PBD finds its SR. Codes:
// HANDLE_INVALID, OPERATION_NOT_ALLOWED while it is plugged, VALUE_NOT_SUPPORTED.
func (p *Pool) PBDSetDeviceConfig(ctx context.Context, ref xapi.Ref, value map[string]string) error {
	if err := p.tellLink(ctx, ref, "PBDSetDeviceConfig", deviceCall{ref, value}); err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := readUnplugged(tx, ref)
		if err != nil {
			return err
		}
		rec.DeviceConfig = notNil(value)
		if err := p.checkDevice(tx, rec); err != nil {
			return err
		}
		tx.Put(ClassPBD, ref, rec)
		return nil
	})
}

// PBDPlug attaches an SR to its host and scans it. One that is plugged stays
// so. Codes: HANDLE_INVALID, HOST_OFFLINE [host ref] for another host than
// this, SR_UNKNOWN_DRIVER, SR_BACKEND_FAILURE, VALUE_NOT_SUPPORTED,
// OTHER_OPERATION_IN_PROGRESS ["SR", SR ref].
func (p *Pool) PBDPlug(ctx context.Context, ref xapi.Ref) error {
	rec, of, err := p.pbd(ref)
	if err != nil {
		return err
	}
	if rec.Host != p.Self {
		_, err := p.callOn(ctx, rec.Host, "PBDPlug", plugCall{ref, rec, rec.SR, of})
		return err
	}
	if p.storage.repository(rec.SR) != nil && rec.CurrentlyAttached && rec.Host == p.Self {
		return nil
	}
	if err := p.plug(ctx, ref); err != nil {
		return err
	}
	return p.SRScan(ctx, rec.SR)
}

func (p *Pool) pbd(ref xapi.Ref) (rec PBD, of SR, err error) {
	err = p.Store.View(func(v *store.View) error {
		if rec, err = store.Get[PBD](v, ClassPBD, ref); err != nil {
			return err
		}
		of, err = store.Get[SR](v, ClassSR, rec.SR)
		return err
	})
	return rec, of, err
}

// plug attaches and writes that down.
func (p *Pool) plug(ctx context.Context, ref xapi.Ref) (err error) {
	rec, of, err := p.pbd(ref)
	if err != nil {
		return err
	}
	if rec.Host != p.Self {
		return xapi.NewError(xapi.HostOffline, string(rec.Host))
	}
	release, err := p.holdSR(rec.SR, "plug")
	if err != nil {
		return err
	}
	defer release()
	repo := p.storage.repository(rec.SR)
	if repo == nil {
		if repo, err = p.attach(ctx, of.Type, p.config(of.UUID, rec.DeviceConfig, of.SMConfig)); err != nil {
			return err
		}
	}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		now, err := store.Read[PBD](tx, ClassPBD, ref)
		if err != nil {
			return err
		}
		now.CurrentlyAttached = true
		now.offer(repo)
		delete(now.OtherConfig, keyPlugFailed)
		tx.Put(ClassPBD, ref, now)
		return nil
	})
	if err != nil {
		p.storage.setRepository(rec.SR, nil)
		return errors.Join(err, repo.Detach(context.WithoutCancel(ctx)))
	}
	p.storage.setRepository(rec.SR, repo)
	return nil
}

func (p *Pool) attach(ctx context.Context, typ string, c sr.Config) (sr.Repository, error) {
	d, err := p.driver(typ)
	if err != nil {
		return nil, err
	}
	return d.Attach(ctx, c)
}

// keyFeatures in PBD.other_config shows what was tried out when the SR was
// plugged: capability strings, joined by spaces.
const keyFeatures = "patchd-features"

// offer writes down what an attached SR can do; nil: it is not attached.
func (rec *PBD) offer(repo sr.Repository) {
	rec.Features = nil
	rec.OtherConfig = notNil(maps.Clone(rec.OtherConfig))
	delete(rec.OtherConfig, keyFeatures)
	if repo == nil {
		return
	}
	rec.Features = []string{}
	for _, f := range repo.Features() {
		rec.Features = append(rec.Features, string(f))
	}
	rec.OtherConfig[keyFeatures] = strings.Join(rec.Features, " ")
}

// PBDUnplug detaches an SR from its host. One that is not plugged stays so.
// Codes: HANDLE_INVALID, HOST_OFFLINE [host ref] for another host than this,
// OTHER_OPERATION_IN_PROGRESS ["SR", SR ref] while a VDI in it is in use or a
// job works in it, SR_BACKEND_FAILURE when something else keeps it busy: then it
// stays plugged.
func (p *Pool) PBDUnplug(ctx context.Context, ref xapi.Ref) error {
	rec, of, err := p.pbd(ref)
	if err != nil {
		return err
	}
	if rec.Host != p.Self && rec.CurrentlyAttached {
		_, err := p.callOn(ctx, rec.Host, "PBDUnplug", ref)
		return err
	}
	release, err := p.holdSR(rec.SR, "unplug")
	if err != nil {
		return err
	}
	defer release()
	repo := p.storage.repository(rec.SR)
	if repo != nil {
		if err := p.assertIdle(ctx, rec.SR, repo); err != nil {
			return err
		}
		if err := p.detach(ctx, rec.SR, repo); err != nil {
			return err
		}
	}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		now, err := store.Read[PBD](tx, ClassPBD, ref)
		if err != nil {
			return err
		}
		now.CurrentlyAttached = false
		now.offer(nil)
		delete(now.OtherConfig, keyPlugFailed)
		tx.Put(ClassPBD, ref, now)
		return nil
	})
	if err == nil || repo == nil {
		return err
	}
	ctx, cancel := after(ctx)
	defer cancel()
	repo, undo := p.attach(ctx, of.Type, p.config(of.UUID, rec.DeviceConfig, of.SMConfig))
	if undo == nil {
		p.storage.setRepository(rec.SR, repo)
	}
	return joinUndo(err, undo)
}

// detach lets go of an SR. One that is in use stays attached.
func (p *Pool) detach(ctx context.Context, ref xapi.Ref, repo sr.Repository) error {
	p.storage.setRepository(ref, nil)
	err := repo.Detach(ctx)
	if err != nil {
		p.storage.setRepository(ref, repo)
	}
	return err
}

// assertIdle refuses while a job of this host works in an SR, or reads a VDI
// in it. Code: OTHER_OPERATION_IN_PROGRESS ["SR", SR ref, text].
func (p *Pool) assertIdle(ctx context.Context, ref xapi.Ref, repo sr.Repository) error {
	volumes, err := repo.Scan(ctx)
	if err != nil {
		return err
	}
	busy := xapi.NewError(xapi.OtherOperationInProgress, ClassSR, string(ref), "a job works in the SR")
	for _, v := range volumes {
		if o := v.Name.Owner; v.Name.Kind != sr.KindLive && o.Host == p.SelfUUID && p.JobAlive(o.Job) {
			return busy
		}
	}
	return p.Store.View(func(v *store.View) error {
		for _, jobRef := range v.Refs(ClassJob, "host", string(p.Self)) {
			job, err := store.Get[Job](v, ClassJob, jobRef)
			if err != nil {
				return err
			}
			rec, err := store.Get[VDI](v, ClassVDI, job.VDI)
			if (err == nil && rec.SR == ref || job.SR == ref) && job.State != JobDone {
				return busy
			}
		}
		return nil
	})
}

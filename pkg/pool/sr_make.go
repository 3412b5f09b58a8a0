package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// SRCreate makes an SR on this host, plugs it, and writes both records in one
// transaction; any failure takes it back. Codes: HANDLE_INVALID,
// HOST_OFFLINE [host ref] for another host than this, SR_UNKNOWN_DRIVER [type],
// VALUE_NOT_SUPPORTED for device_config, SR_DEVICE_IN_USE when something else
// is there, SR_BACKEND_FAILURE, OPERATION_NOT_ALLOWED, INVALID_VALUE.
func (p *Pool) SRCreate(ctx context.Context, s SRSpec) (xapi.Ref, error) {
	if err := p.checkSpec(s); err != nil {
		return "", err
	}
	if yes, err := p.isOther(s.Host); err != nil {
		return "", err
	} else if yes {
		return p.makeOn(ctx, s.Host, "SRCreate", s)
	}
	d, err := p.driver(s.Type)
	if err != nil {
		return "", err
	}
	if err := p.checkConfig(d, s.DeviceConfig); err != nil {
		return "", err
	}
	ref, uuid := xapi.NewRef(), xapi.NewUUID()
	intentRef, in := p.newIntent(Intent{
		Kind: IntentMakeSR, SR: ref, SRUUID: uuid, Type: s.Type, Device: notNil(s.DeviceConfig), SMConfig: notNil(s.SMConfig),
	})
	defer p.storage.begin(in.UUID)()
	err = p.Store.Update(ctx, func(tx *store.Tx) error { tx.Put(ClassIntent, intentRef, in); return nil })
	var repo sr.Repository
	if err == nil {
		repo, err = p.makeSR(ctx, d, intentRef, in, s)
	}
	if err == nil {
		p.storage.setRepository(ref, repo)
		return ref, nil
	}
	return p.failSRCreate(ctx, intentRef, in, repo, err)
}

// makeSR makes and attaches the SR and writes its records. It gives the
// repository also when the records could not be written.
func (p *Pool) makeSR(ctx context.Context, d sr.Driver, intentRef xapi.Ref, in Intent, s SRSpec) (sr.Repository, error) {
	c := p.config(in.SRUUID, in.Device, in.SMConfig)
	if err := d.Create(ctx, c); err != nil {
		return nil, err
	}
	repo, err := d.Attach(ctx, c)
	if err != nil {
		return nil, err
	}
	stat, err := repo.Stat(ctx)
	if err != nil {
		return repo, err
	}
	rec := s.record(in.SRUUID)
	rec.PhysicalSize, rec.PhysicalUtilisation = stat.PhysicalSize, stat.PhysicalUtilisation
	pbdRef, pbd := xapi.NewRef(), PBD{
		UUID: xapi.NewUUID(), Host: p.Self, SR: in.SR, DeviceConfig: in.Device,
		CurrentlyAttached: true, OtherConfig: map[string]string{},
	}
	pbd.offer(repo)
	return repo, p.Store.Update(ctx, func(tx *store.Tx) error {
		now, err := store.Read[Intent](tx, ClassIntent, intentRef)
		if err != nil {
			return err
		}
		if now.Undo {
			return fmt.Errorf("SR %s was undone meanwhile", in.SRUUID)
		}
		tx.Put(ClassSR, in.SR, rec)
		tx.Put(ClassPBD, pbdRef, pbd)
		tx.Delete(ClassIntent, intentRef)
		return nil
	})
}

// failSRCreate takes back a creation that has failed, unless it turns out that
// it has not.
func (p *Pool) failSRCreate(ctx context.Context, intentRef xapi.Ref, in Intent, repo sr.Repository, cause error) (xapi.Ref, error) {
	ctx, cancel := after(ctx)
	defer cancel()
	if err := p.Store.Sync(ctx); err != nil {
		return "", joinUndo(cause, err)
	}
	made := false
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		made = tx.Has(ClassSR, in.SR)
		if tx.Has(ClassIntent, intentRef) {
			in.Undo = true
			tx.Put(ClassIntent, intentRef, in)
		}
		return nil
	})
	if err == nil && made && repo != nil {
		p.storage.setRepository(in.SR, repo)
		return in.SR, nil
	}
	if repo != nil {
		err = errors.Join(err, repo.Detach(ctx))
	}
	switch {
	case err != nil:
	case errors.Is(cause, sr.ErrUntouched):
		err = p.Store.Update(ctx, func(tx *store.Tx) error { tx.Delete(ClassIntent, intentRef); return nil })
	default:
		err = p.unmakeSR(ctx, intentRef, in)
	}
	return "", joinUndo(cause, err)
}

// unmakeSR removes from disk what an unfinished SRCreate made there. A place
// that could never have been an SR holds nothing of ours.
func (p *Pool) unmakeSR(ctx context.Context, intentRef xapi.Ref, in Intent) error {
	d, err := p.driver(in.Type)
	if err != nil {
		return err
	}
	err = destroySR(ctx, d, p.config(in.SRUUID, in.Device, in.SMConfig))
	if err != nil && !xapi.Is(err, xapi.ValueNotSupported) {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error { tx.Delete(ClassIntent, intentRef); return nil })
}

// destroySR removes an SR from disk and tries once more when it fails: an
// answer may have been lost.
func destroySR(ctx context.Context, d sr.Driver, c sr.Config) error {
	err := d.Destroy(ctx, c)
	if err == nil || xapi.Is(err, xapi.SRNotEmpty) {
		return err
	}
	return d.Destroy(ctx, c)
}

// SRDestroy removes an SR that holds nothing, from disk, and its records. It
// may be plugged on this host. Codes: HANDLE_INVALID, SR_NOT_EMPTY, SR_HAS_NO_PBDS
// when nothing says where it is, SR_HAS_PBD [SR ref] when another host has it
// plugged, OTHER_OPERATION_IN_PROGRESS ["SR", ref].
func (p *Pool) SRDestroy(ctx context.Context, ref xapi.Ref) error {
	if host, yes := p.onlyElsewhere(ref); yes {
		_, err := p.callOn(ctx, host, "SRDestroy", ref)
		return err
	}
	release, err := p.holdSR(ref, opDestroy)
	if err != nil {
		return err
	}
	defer release()
	rec, err := p.sr(ref)
	if err != nil {
		return err
	}
	pbd, err := p.ownPBD(ref)
	if err != nil {
		return err
	}
	repo := p.storage.repository(ref)
	if repo != nil {
		if err := p.dropStrayMaps(ctx, ref, repo); err != nil {
			return err
		}
		if err := assertEmpty(ctx, repo); err != nil {
			return err
		}
	}
	intentRef, in := p.newIntent(Intent{
		Kind: IntentRemoveSR, SR: ref, SRUUID: rec.UUID, Type: rec.Type, Device: pbd.DeviceConfig, SMConfig: rec.SMConfig,
	})
	defer p.storage.begin(in.UUID)()
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		if err := assertUnplugged(tx, ref, p.Self); err != nil {
			return err
		}
		if len(tx.Refs(ClassVDI, "SR", string(ref))) > 0 {
			return xapi.NewError(xapi.SRNotEmpty)
		}
		tx.Put(ClassIntent, intentRef, in)
		return nil
	})
	if err != nil && !p.dropped(ctx, intentRef) {
		return err
	}
	return p.removeSR(ctx, intentRef, in, repo)
}

// ownPBD is this host's PBD of an SR. Code: SR_HAS_NO_PBDS [SR ref].
func (p *Pool) ownPBD(ref xapi.Ref) (rec PBD, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, pbd := range v.Refs(ClassPBD, "SR", string(ref)) {
			if rec, err = store.Get[PBD](v, ClassPBD, pbd); err != nil || rec.Host == p.Self {
				return err
			}
		}
		return xapi.NewError(xapi.SRHasNoPBDs, string(ref))
	})
	return rec, err
}

// dropStrayMaps destroys what is left in an SR that has nothing but block maps
// that no VDI has: of no use to anybody, for the digest of a map is in a record.
func (p *Pool) dropStrayMaps(ctx context.Context, ref xapi.Ref, repo sr.Repository) error {
	volumes, err := repo.Scan(ctx)
	if err != nil {
		return err
	}
	k, err := p.known(ref)
	if err != nil {
		return err
	}
	other := func(v sr.Volume) bool { return v.Name.Kind != sr.KindMap || k.has(v.Name.VDI) }
	if slices.ContainsFunc(volumes, other) {
		return nil
	}
	for _, v := range volumes {
		if err := destroyVolume(ctx, repo, v.Name); err != nil {
			return err
		}
	}
	return nil
}

func assertEmpty(ctx context.Context, repo sr.Repository) error {
	volumes, err := repo.Scan(ctx)
	if err == nil && len(volumes) > 0 {
		err = xapi.NewError(xapi.SRNotEmpty).Because(fmt.Errorf("it holds volume %s", volumes[0].Name))
	}
	return err
}

// removeSR is the part of SRDestroy that a cancel does not stop. When the SR
// cannot be removed from disk it is as it was before.
func (p *Pool) removeSR(ctx context.Context, intentRef xapi.Ref, in Intent, repo sr.Repository) error {
	ctx, cancel := after(ctx)
	defer cancel()
	if repo != nil {
		if err := p.detach(ctx, in.SR, repo); err != nil { // somebody uses it: it stays
			return joinUndo(err, p.Store.Update(ctx, func(tx *store.Tx) error { tx.Delete(ClassIntent, intentRef); return nil }))
		}
	}
	refused, err := p.finishRemoveSR(ctx, intentRef, in)
	if err != nil && refused == nil && p.gone(ctx, in.SR) {
		return nil // the answer of the last transaction was lost
	}
	if err = errors.Join(refused, err); err == nil || repo == nil {
		return err
	}
	repo, undo := p.attach(ctx, in.Type, p.config(in.SRUUID, in.Device, in.SMConfig))
	if undo == nil {
		p.storage.setRepository(in.SR, repo)
	}
	return joinUndo(err, undo)
}

func (p *Pool) gone(ctx context.Context, ref xapi.Ref) bool {
	if p.Store.Sync(ctx) != nil {
		return false
	}
	_, err := p.sr(ref)
	return xapi.Is(err, xapi.HandleInvalid)
}

// finishRemoveSR removes an SR from disk and then its records. One that cannot
// be removed, because it turns out to hold something or its storage fails,
// stays, and so does its record; refused says why.
func (p *Pool) finishRemoveSR(ctx context.Context, intentRef xapi.Ref, in Intent) (refused, err error) {
	d, err := p.driver(in.Type)
	if err != nil {
		return nil, err
	}
	refused = destroySR(ctx, d, p.config(in.SRUUID, in.Device, in.SMConfig))
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		tx.Delete(ClassIntent, intentRef)
		if refused != nil || !tx.Has(ClassSR, in.SR) {
			return nil
		}
		return dropSR(tx, in.SR)
	})
	return refused, err
}

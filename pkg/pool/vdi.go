package pool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// sizeUnit is what sizes that clients ask for are rounded up to, in bytes: what
// every loop device can show to its last byte.
const sizeUnit = 4096

// vdiTypes are the values of VDI.type.
var vdiTypes = []string{
	"system", "user", "ephemeral", "suspend", "crashdump", "ha_statefile", "metadata", "redo_log", "rrd", "pvs_cache", "cbt_metadata",
}

// fullVDI is given as the record of a VDI that exists, with nothing missing.
func fullVDI(given VDI, sr xapi.Ref, uuid xapi.UUID) VDI {
	given.UUID, given.SR, given.Location = uuid, sr, string(uuid)
	given.Managed, given.Missing = true, false
	given.SnapshotOf = given.SnapshotOf.OrNull()
	if given.Type == "" {
		given.Type = "user"
	}
	if given.SnapshotTime.IsZero() {
		given.SnapshotTime = xapi.Epoch
	}
	given.OtherConfig, given.XenstoreData, given.SMConfig = notNil(given.OtherConfig), notNil(given.XenstoreData), notNil(given.SMConfig)
	given.Tags = notNilSet(given.Tags)
	return given
}

// checkSize rounds a size up. Code: INVALID_VALUE [field, value].
func checkSize(size int64) (int64, error) {
	if size <= 0 || size > math.MaxInt64-sizeUnit {
		return 0, xapi.NewError(xapi.InvalidValue, "virtual_size", strconv.FormatInt(size, 10))
	}
	return (size + sizeUnit - 1) / sizeUnit * sizeUnit, nil
}

func checkType(typ string) error {
	if typ != "" && !slices.Contains(vdiTypes, typ) {
		return xapi.NewError(xapi.ValueNotSupported, "type", fmt.Sprintf("%.64s", typ), "not a type of VDI")
	}
	return nil
}

// VDICreate makes an empty VDI of rec.VirtualSize bytes, rounded up to 4 KiB.
// Codes: INVALID_VALUE, VALUE_NOT_SUPPORTED, and those of NewVDI.
func (p *Pool) VDICreate(ctx context.Context, rec VDI) (xapi.Ref, error) {
	size, err := checkSize(rec.VirtualSize)
	if err != nil {
		return "", err
	}
	if err := checkType(rec.Type); err != nil {
		return "", err
	}
	rec.IsASnapshot, rec.SnapshotOf, rec.SnapshotTime = false, xapi.NullRef, xapi.Epoch
	if host, yes := p.elsewhere(rec.SR); yes {
		return p.makeOn(ctx, host, "VDICreate", rec)
	}
	return p.NewVDI(ctx, NewVDI{SR: rec.SR, VDI: rec, VirtualSize: size, Commit: settling(task.FromContext(ctx).Ref(), nil)})
}

// VDIDestroy destroys a VDI. A patch in it stays as a record that names no VDI.
// The records change first, then the volume goes; when the volume cannot be
// destroyed the records come back. Codes: HANDLE_INVALID, SR_NOT_ATTACHED,
// VDI_IN_USE [VDI ref, operation], VDI_NOT_AVAILABLE while another call
// destroys it.
func (p *Pool) VDIDestroy(ctx context.Context, ref xapi.Ref) error {
	if host, yes := p.vdiElsewhere(ref); yes {
		return p.destroyOn(ctx, host, ref)
	}
	rec, repo, release, err := p.holdVDI(ref, opDestroy)
	if err != nil {
		return err
	}
	defer release()
	intentRef, in := p.newIntent(Intent{Kind: IntentDestroy, SR: rec.SR, VDI: rec.UUID, Ref: ref})
	defer p.storage.begin(in.UUID)()
	err = p.Store.Update(ctx, func(tx *store.Tx) error { return p.dropVDI(tx, intentRef, in, xapi.NullRef) })
	if err != nil && !p.dropped(ctx, intentRef) {
		return err
	}
	if err := p.finishDestroy(ctx, repo, intentRef); err != nil {
		return err
	}
	p.forgetDamage(ctx, rec)
	return nil
}

// dropped tells whether a transaction whose answer was lost has taken place.
func (p *Pool) dropped(ctx context.Context, intent xapi.Ref) (yes bool) {
	ctx, cancel := after(ctx)
	defer cancel()
	if p.Store.Sync(ctx) != nil {
		return false
	}
	err := p.Store.View(func(v *store.View) error {
		_, yes = v.Get(ClassIntent, intent)
		return nil
	})
	return err == nil && yes
}

// dropVDI takes the record of a VDI away, inside a transaction, and leaves an
// intent with what is needed to put it back. Patches in it go to successor.
func (p *Pool) dropVDI(tx *store.Tx, intentRef xapi.Ref, in Intent, successor xapi.Ref) error {
	var rec VDI
	if err := tx.Get(ClassVDI, in.Ref, &rec); err != nil {
		return err
	}
	if err := p.assertUnused(tx, in.Ref); err != nil {
		return err
	}
	in.Record = &rec
	for _, ref := range tx.Refs(ClassPatch, "VDI", string(in.Ref)) {
		patch, err := store.Read[Patch](tx, ClassPatch, ref)
		if err != nil {
			return err
		}
		patch.VDI = successor.OrNull()
		tx.Put(ClassPatch, ref, patch)
		in.Patches = append(in.Patches, ref)
	}
	tx.Delete(ClassVDI, in.Ref)
	tx.Put(ClassIntent, intentRef, in)
	return allocate(tx, rec.SR, -rec.VirtualSize)
}

// allocate adds bytes, or takes them, to what an SR has promised to VDIs.
func allocate(tx *store.Tx, ref xapi.Ref, bytes int64) error {
	if !tx.Has(ClassSR, ref) {
		return nil
	}
	rec, err := store.Read[SR](tx, ClassSR, ref)
	if err != nil {
		return err
	}
	rec.VirtualAllocation = max(0, rec.VirtualAllocation+bytes)
	tx.Put(ClassSR, ref, rec)
	return nil
}

// finishDestroy destroys the volume of a VDI whose record is gone. From here
// on a cancel changes nothing.
func (p *Pool) finishDestroy(ctx context.Context, repo sr.Repository, intentRef xapi.Ref) error {
	ctx, cancel := after(ctx)
	defer cancel()
	var in Intent
	err := p.Store.View(func(v *store.View) (err error) {
		in, err = store.Get[Intent](v, ClassIntent, intentRef)
		return err
	})
	if err != nil {
		return err
	}
	live := sr.Live(in.VDI)
	if err := destroyVDI(ctx, repo, live); err != nil {
		if _, gone := repo.Path(ctx, live); xapi.Is(gone, xapi.VDINotAvailable) {
			return joinUndo(err, nil)
		}
		return joinUndo(err, p.restoreVDI(ctx, intentRef))
	}
	if err := p.closeIntent(ctx, repo, intentRef, in); err != nil {
		// Record and volume are gone, which is what was asked for.
		p.Log.WithError(err).WithField("VDI", in.VDI).Warn("the intent of a destroyed VDI could not be closed; the next sweep or start does it")
	}
	return nil
}

// restoreVDI puts back the record that dropVDI took away.
func (p *Pool) restoreVDI(ctx context.Context, intentRef xapi.Ref) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		in, err := store.Read[Intent](tx, ClassIntent, intentRef)
		if err != nil {
			return err
		}
		tx.Put(ClassVDI, in.Ref, in.Record)
		tx.Delete(ClassIntent, intentRef)
		for _, ref := range in.Patches {
			patch, err := store.Read[Patch](tx, ClassPatch, ref)
			if xapi.Is(err, xapi.HandleInvalid) || (err == nil && !patch.VDI.IsNull()) {
				continue // gone, or uploaded again meanwhile
			}
			if err != nil {
				return err
			}
			patch.VDI = in.Ref
			tx.Put(ClassPatch, ref, patch)
		}
		return allocate(tx, in.SR, in.Record.VirtualSize)
	})
}

// VDIForget takes the record of a VDI away and leaves its volume; SR.scan
// introduces it again. A patch in it names no VDI any more. Codes:
// HANDLE_INVALID, VDI_IN_USE, VDI_NOT_AVAILABLE.
func (p *Pool) VDIForget(ctx context.Context, ref xapi.Ref) error {
	if host, yes := p.vdiElsewhere(ref); yes {
		_, err := p.callOn(ctx, host, "VDIForget", ref)
		return err
	}
	release, holder, ok := p.storage.hold(ref, "forget")
	if !ok {
		return vdiBusy(ref, holder, "forget")
	}
	defer release()
	_, in := p.newIntent(Intent{Ref: ref})
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		scratch := xapi.NewRef()
		if err := p.dropVDI(tx, scratch, in, xapi.NullRef); err != nil {
			return err
		}
		tx.Delete(ClassIntent, scratch)
		return nil
	})
}

// VDIUpdate reads size and presence of a VDI from its SR. Codes: those of UseVDI.
func (p *Pool) VDIUpdate(ctx context.Context, ref xapi.Ref) error {
	if host, yes := p.vdiElsewhere(ref); yes {
		_, err := p.callOn(ctx, host, "VDIUpdate", ref)
		return err
	}
	rec, repo, release, err := p.useVDI(ref)
	if err != nil {
		return err
	}
	defer release()
	f, err := repo.Open(ctx, sr.Live(rec.UUID), sr.ReadOnly)
	if xapi.Is(err, xapi.VDINotAvailable) {
		return p.changeVDI(ctx, ref, func(rec *VDI) { rec.Missing = true })
	}
	if err != nil {
		return err
	}
	defer f.Close()
	used, err := sr.Taken(ctx, repo, sr.Live(rec.UUID), f)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("measure VDI %s: %w", rec.UUID, err)
	}
	err = p.changeVDI(ctx, ref, func(rec *VDI) {
		rec.Missing, rec.PhysicalUtilisation, rec.VirtualSize = false, used, size
	})
	return errors.Join(err, p.refreshSizes(ctx, rec.SR, repo))
}

// changeVDI changes one record. Code: HANDLE_INVALID.
func (p *Pool) changeVDI(ctx context.Context, ref xapi.Ref, f func(*VDI)) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[VDI](tx, ClassVDI, ref)
		if err != nil {
			return err
		}
		f(&rec)
		tx.Put(ClassVDI, ref, rec)
		return nil
	})
}

// VDISetNameLabel names a VDI. Code: HANDLE_INVALID.
func (p *Pool) VDISetNameLabel(ctx context.Context, ref xapi.Ref, value string) error {
	return p.changeVDI(ctx, ref, func(rec *VDI) { rec.NameLabel = value })
}

// VDISetNameDescription describes a VDI. Code: HANDLE_INVALID.
func (p *Pool) VDISetNameDescription(ctx context.Context, ref xapi.Ref, value string) error {
	return p.changeVDI(ctx, ref, func(rec *VDI) { rec.NameDescription = value })
}

// VDISetSharable sets the flag, which nothing here looks at. Code: HANDLE_INVALID.
func (p *Pool) VDISetSharable(ctx context.Context, ref xapi.Ref, value bool) error {
	return p.changeVDI(ctx, ref, func(rec *VDI) { rec.Sharable = value })
}

// VDISetReadOnly protects a VDI, or no more. Codes: HANDLE_INVALID,
// VDI_READONLY for the golden image of a patch, which stays read-only.
func (p *Pool) VDISetReadOnly(ctx context.Context, ref xapi.Ref, value bool) error {
	golden, err := p.isGolden(ref)
	if err != nil {
		return err
	}
	if golden && !value {
		return xapi.NewError(xapi.VDIReadonly, string(ref))
	}
	return p.changeVDI(ctx, ref, func(rec *VDI) { rec.ReadOnly = value })
}

// VDIIntro is a VDI that lies in an SR already. The volume is found by UUID,
// which is its location too.
type VDIIntro struct {
	UUID xapi.UUID
	VDI  VDI
}

// VDIIntroduce makes the record of a volume that an SR holds. Codes:
// HANDLE_INVALID, SR_NOT_ATTACHED, VALUE_NOT_SUPPORTED, VDI_LOCATION_MISSING
// [SR ref, location], LOCATION_NOT_UNIQUE [SR ref, location] when there is a
// record already.
func (p *Pool) VDIIntroduce(ctx context.Context, in VDIIntro) (xapi.Ref, error) {
	if err := checkType(in.VDI.Type); err != nil {
		return "", err
	}
	if host, yes := p.elsewhere(in.VDI.SR); yes {
		return p.makeOn(ctx, host, "VDIIntroduce", in)
	}
	repo, release, err := p.useSR(in.VDI.SR)
	if err != nil {
		return "", err
	}
	defer release()
	missing := xapi.NewError(xapi.VDILocationMissing, string(in.VDI.SR), string(in.UUID))
	if !in.UUID.Valid() || (in.VDI.Location != "" && in.VDI.Location != string(in.UUID)) {
		return "", missing
	}
	volumes, err := repo.Scan(ctx)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(volumes, func(v sr.Volume) bool { return v.Name == sr.Live(in.UUID) })
	if i < 0 {
		return "", missing
	}
	ref := xapi.NewRef()
	rec := fullVDI(in.VDI, in.VDI.SR, in.UUID)
	rec.VirtualSize, rec.PhysicalUtilisation = volumes[i].VirtualSize, volumes[i].PhysicalUtilisation
	// A map that lies there is not taken on faith: its digest was in a record that is gone.
	rec.Map, rec.Damage, rec.Checked = "", "", time.Time{}
	err = p.Store.Update(ctx, func(tx *store.Tx) error { return introduce(tx, ref, rec) })
	return ref, err
}

// introduce puts the record of a volume that nobody has a record or an intent of.
func introduce(tx *store.Tx, ref xapi.Ref, rec VDI) error {
	_, known := tx.ByUUID(ClassVDI, rec.UUID)
	for _, it := range tx.List(ClassIntent) {
		var in Intent
		if err := it.Decode(&in); err != nil {
			return err
		}
		known = known || in.VDI == rec.UUID
	}
	if known {
		return xapi.NewError(xapi.LocationNotUnique, string(rec.SR), rec.Location)
	}
	tx.Put(ClassVDI, ref, rec)
	return allocate(tx, rec.SR, rec.VirtualSize)
}

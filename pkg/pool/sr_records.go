package pool

import (
	"context"
	"strconv"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// EnsureSM makes the SM records say what the drivers say. Records of types
// that no driver has any more go.
func (p *Pool) EnsureSM(ctx context.Context) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		have := map[string]xapi.Ref{}
		recs := map[string]SM{}
		for _, it := range tx.List(ClassSM) {
			var rec SM
			if err := it.Decode(&rec); err != nil {
				return err
			}
			have[rec.Type], recs[rec.Type] = it.Ref, rec
		}
		for _, d := range p.Drivers {
			info := d.Info()
			rec, ref := recs[info.Type], have[info.Type]
			delete(have, info.Type)
			if ref == "" {
				rec.UUID, ref = xapi.NewUUID(), xapi.NewRef()
			}
			rec.NameLabel, rec.NameDescription, rec.Type = info.Label, info.Description, info.Type
			rec.Vendor, rec.Copyright, rec.Version, rec.RequiredAPIVersion = info.Vendor, info.Copyright, info.Version, "1.0"
			rec.Configuration, rec.OtherConfig = notNil(info.Config), notNil(rec.OtherConfig)
			rec.Capabilities, rec.Features = []string{}, map[string]int64{}
			for _, f := range info.Features {
				rec.Capabilities = append(rec.Capabilities, string(f))
				rec.Features[string(f)] = 1
			}
			tx.Put(ClassSM, ref, rec)
		}
		for _, ref := range have {
			tx.Delete(ClassSM, ref)
		}
		return nil
	})
}

// SRSpec says what SR to make or introduce.
type SRSpec struct {
	Host            xapi.Ref // that makes it and plugs it; not for SRIntroduce
	DeviceConfig    map[string]string
	PhysicalSize    int64 // bytes; a hint that drivers may ignore
	NameLabel       string
	NameDescription string
	Type            string
	ContentType     string
	Shared          bool
	SMConfig        map[string]string
}

func (s SRSpec) record(uuid xapi.UUID) SR {
	return SR{
		UUID: uuid, NameLabel: s.NameLabel, NameDescription: s.NameDescription, Type: s.Type, ContentType: s.ContentType,
		Shared: s.Shared, PhysicalSize: max(0, s.PhysicalSize), OtherConfig: map[string]string{}, Tags: []string{}, SMConfig: notNil(s.SMConfig),
	}
}

// checkSpec refuses what no driver could do.
func (p *Pool) checkSpec(s SRSpec) error {
	d, err := p.driver(s.Type)
	if err != nil {
		return err
	}
	if s.Shared && !d.Info().Shared {
		return xapi.NewError(xapi.OperationNotAllowed, "an SR of type "+s.Type+" cannot be shared")
	}
	if s.PhysicalSize < 0 {
		return xapi.NewError(xapi.InvalidValue, "physical_size", strconv.FormatInt(s.PhysicalSize, 10))
	}
	return nil
}

// SRIntroduce makes the record of an SR that exists; a PBD makes it usable.
// Codes: SR_UUID_EXISTS [uuid], UUID_INVALID, SR_UNKNOWN_DRIVER [type],
// OPERATION_NOT_ALLOWED.
func (p *Pool) SRIntroduce(ctx context.Context, uuid xapi.UUID, s SRSpec) (xapi.Ref, error) {
	uuid, err := xapi.ParseUUID(string(uuid))
	if err != nil {
		return "", xapi.NewError(xapi.UUIDInvalid, ClassSR, "").Because(err)
	}
	if err := p.checkSpec(s); err != nil {
		return "", err
	}
	ref := xapi.NewRef()
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		if _, known := tx.ByUUID(ClassSR, uuid); known {
			return xapi.NewError(xapi.SRUUIDExists, string(uuid))
		}
		tx.Put(ClassSR, ref, s.record(uuid))
		return nil
	})
	if err != nil {
		return "", err
	}
	return ref, nil
}

// SRForget removes the records of an SR that is plugged nowhere, with its PBDs
// and VDIs, and leaves what is on disk. Patches in it name no VDI any more, and
// drafts in it are dropped.
// Codes: HANDLE_INVALID, SR_HAS_PBD [SR ref] while it is plugged, VDI_IN_USE.
func (p *Pool) SRForget(ctx context.Context, ref xapi.Ref) error {
	if err := p.forgetElsewhere(ctx, ref); err != nil {
		return err
	}
	release, err := p.holdSR(ref, "forget")
	if err != nil {
		return err
	}
	defer release()
	for {
		more := false
		err := p.Store.Update(ctx, func(tx *store.Tx) error {
			if err := assertUnplugged(tx, ref, ""); err != nil {
				return err
			}
			vdis := tx.Refs(ClassVDI, "SR", string(ref))
			more = len(vdis) > forgetBatch
			for _, vdi := range vdis[:min(len(vdis), forgetBatch)] {
				if err := p.forgetVDI(tx, vdi); err != nil {
					return err
				}
			}
			if more {
				return nil
			}
			return dropSR(tx, ref)
		})
		if err != nil {
			return err
		}
		if !more {
			break
		}
	}
	if err := p.dropOrphanIntents(ctx); err != nil {
		p.Log.WithError(err).WithField("SR", ref).Warn("what was in the making in a forgotten SR is still on record; the next sweep or start drops it")
	}
	return nil
}

// forgetBatch is how many VDIs of a forgotten SR one transaction removes: each
// may bring a patch, a snapshot and a job with it.
const forgetBatch = 20

// forgetVDI removes the record of a VDI, inside a transaction.
func (p *Pool) forgetVDI(tx *store.Tx, vdi xapi.Ref) error {
	scratch := xapi.NewRef()
	_, in := p.newIntent(Intent{Ref: vdi})
	if err := p.dropVDI(tx, scratch, in, xapi.NullRef); err != nil {
		return err
	}
	tx.Delete(ClassIntent, scratch)
	return nil
}

// assertUnplugged refuses while any PBD but that of host except is plugged.
// Codes: HANDLE_INVALID, SR_HAS_PBD [SR ref].
func assertUnplugged(tx *store.Tx, ref, except xapi.Ref) error {
	if !tx.Has(ClassSR, ref) {
		return xapi.NewError(xapi.HandleInvalid, ClassSR, string(ref))
	}
	for _, pbd := range tx.Refs(ClassPBD, "SR", string(ref)) {
		rec, err := store.Read[PBD](tx, ClassPBD, pbd)
		if err != nil {
			return err
		}
		if rec.CurrentlyAttached && rec.Host != except {
			return xapi.NewError(xapi.SRHasPBD, string(ref))
		}
	}
	return nil
}

// dropSR removes an SR without VDIs and all that names it: its PBDs, and the
// pool's and hosts' choice of it.
func dropSR(tx *store.Tx, ref xapi.Ref) error {
	for _, pbd := range tx.Refs(ClassPBD, "SR", string(ref)) {
		tx.Delete(ClassPBD, pbd)
	}
	for _, it := range tx.List(ClassPool) {
		var rec PoolRecord
		if err := it.Decode(&rec); err != nil {
			return err
		}
		if clearRefs(ref, &rec.DefaultSR, &rec.SuspendImageSR, &rec.CrashDumpSR) {
			tx.Put(ClassPool, it.Ref, rec)
		}
	}
	for _, it := range tx.List(ClassHost) {
		var rec Host
		if err := it.Decode(&rec); err != nil {
			return err
		}
		if clearRefs(ref, &rec.SuspendImageSR, &rec.CrashDumpSR) {
			tx.Put(ClassHost, it.Ref, rec)
		}
	}
	tx.Delete(ClassSR, ref)
	return nil
}

func clearRefs(gone xapi.Ref, fields ...*xapi.Ref) (any bool) {
	for _, f := range fields {
		if *f == gone {
			*f, any = xapi.NullRef, true
		}
	}
	return any
}

// SRProbe describes in XML what a device_config points to. Codes:
// HANDLE_INVALID, HOST_OFFLINE [host ref] for another host than this,
// SR_UNKNOWN_DRIVER, VALUE_NOT_SUPPORTED, SR_BACKEND_FAILURE.
func (p *Pool) SRProbe(ctx context.Context, host xapi.Ref, deviceConfig map[string]string, typ string, smConfig map[string]string) (string, error) {
	if yes, err := p.isOther(host); err != nil {
		return "", err
	} else if yes {
		return p.callOn(ctx, host, "SRProbe", probeCall{typ, deviceConfig, smConfig})
	}
	d, err := p.driver(typ)
	if err != nil {
		return "", err
	}
	return d.Probe(ctx, p.config("", deviceConfig, smConfig))
}

// isOther tells whether a host is another one than this. Code: HANDLE_INVALID.
func (p *Pool) isOther(host xapi.Ref) (bool, error) {
	if host == p.Self {
		return false, nil
	}
	return true, p.Store.View(func(v *store.View) error {
		_, err := store.Get[Host](v, ClassHost, host)
		return err
	})
}

func (p *Pool) changeSR(ctx context.Context, ref xapi.Ref, f func(*store.Tx, *SR) error) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[SR](tx, ClassSR, ref)
		if err == nil {
			err = f(tx, &rec)
		}
		if err != nil {
			return err
		}
		tx.Put(ClassSR, ref, rec)
		return nil
	})
}

// SRSetNameLabel names an SR. Code: HANDLE_INVALID.
func (p *Pool) SRSetNameLabel(ctx context.Context, ref xapi.Ref, value string) error {
	return p.changeSR(ctx, ref, func(_ *store.Tx, rec *SR) error { rec.NameLabel = value; return nil })
}

// SRSetNameDescription describes an SR. Code: HANDLE_INVALID.
func (p *Pool) SRSetNameDescription(ctx context.Context, ref xapi.Ref, value string) error {
	return p.changeSR(ctx, ref, func(_ *store.Tx, rec *SR) error { rec.NameDescription = value; return nil })
}

// SRSetPhysicalSize sets the size in bytes, until the SR is looked at again.
// Codes: HANDLE_INVALID, INVALID_VALUE.
func (p *Pool) SRSetPhysicalSize(ctx context.Context, ref xapi.Ref, value int64) error {
	if value < 0 {
		return xapi.NewError(xapi.InvalidValue, "physical_size", strconv.FormatInt(value, 10))
	}
	return p.changeSR(ctx, ref, func(_ *store.Tx, rec *SR) error { rec.PhysicalSize = value; return nil })
}

// SRSetShared tells whether many hosts may plug the SR. Codes: HANDLE_INVALID,
// OPERATION_NOT_ALLOWED when its driver cannot share, or several hosts have a
// PBD of an SR that is to be shared no more.
func (p *Pool) SRSetShared(ctx context.Context, ref xapi.Ref, value bool) error {
	return p.changeSR(ctx, ref, func(tx *store.Tx, rec *SR) error {
		if value {
			if err := p.checkSpec(SRSpec{Type: rec.Type, Shared: true}); err != nil {
				return err
			}
		} else if len(tx.Refs(ClassPBD, "SR", string(ref))) > 1 {
			return xapi.NewError(xapi.OperationNotAllowed, "several hosts have a PBD of this SR: destroy them first")
		}
		rec.Shared = value
		return nil
	})
}

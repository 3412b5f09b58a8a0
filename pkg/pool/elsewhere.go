package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// makeOn has a host make something and gives its ref. Codes: those of the method
// and of callOn.
func (p *Pool) makeOn(ctx context.Context, host xapi.Ref, name string, args any) (xapi.Ref, error) {
	text, err := p.callOn(ctx, host, name, args)
	if err == nil && !xapi.Ref(text).Valid() {
		err = xapi.Internal("host %s answers %q to %s, which is no ref", p.hostName(host), text, name)
	}
	return xapi.Ref(text), err
}

// destroyOn has a host destroy a VDI. Patches in it name none any more, also not
// another one with the same map. Code: VDI_IN_USE while a job reads it.
func (p *Pool) destroyOn(ctx context.Context, host, ref xapi.Ref) error {
	if !p.there(host) {
		return xapi.NewError(xapi.HostOffline, string(host))
	}
	patches, err := p.parted(ctx, ref)
	if err != nil {
		return err
	}
	if _, err = p.callOn(ctx, host, "VDIDestroy", ref); err != nil {
		return joinUndo(err, p.reunite(ctx, ref, patches))
	}
	return nil
}

// parted takes a VDI that is to be destroyed out of the records of its patches.
func (p *Pool) parted(ctx context.Context, ref xapi.Ref) (patches []xapi.Ref, err error) {
	err = p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		patches, err = p.partIn(tx, ref)
		return err
	})
	return patches, err
}

// partIn is parted inside a transaction.
func (p *Pool) partIn(tx *store.Tx, ref xapi.Ref) (patches []xapi.Ref, err error) {
	if err := p.assertUnused(tx, ref); err != nil {
		return nil, err
	}
	for _, patch := range tx.Refs(ClassPatch, "VDI", string(ref)) {
		rec, err := store.Read[Patch](tx, ClassPatch, patch)
		if err != nil {
			return nil, err
		}
		rec.VDI = xapi.NullRef
		tx.Put(ClassPatch, patch, rec)
		patches = append(patches, patch)
	}
	return patches, nil
}

// destroyGolden destroys the image of a patch. A host that is away keeps that as a
// job, and no patch names the image any more. Codes: those of VDIDestroy but
// HOST_OFFLINE.
func (p *Pool) destroyGolden(ctx context.Context, ref xapi.Ref) error {
	err := p.VDIDestroy(ctx, ref)
	host, yes := p.vdiElsewhere(ref)
	if !yes || !xapi.Is(err, xapi.HostOffline) {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if _, err := p.partIn(tx, ref); err != nil {
			return err
		}
		return p.leaveIn(ctx, tx, host, "VDIDestroy", ref)
	})
}

// reunite undoes parted, for a VDI that is still there.
func (p *Pool) reunite(ctx context.Context, ref xapi.Ref, patches []xapi.Ref) error {
	ctx, cancel := after(ctx)
	defer cancel()
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if !tx.Has(ClassVDI, ref) {
			return nil
		}
		for _, patch := range patches {
			rec, err := store.Read[Patch](tx, ClassPatch, patch)
			if xapi.Is(err, xapi.HandleInvalid) || err == nil && !rec.VDI.IsNull() {
				continue
			}
			if err != nil {
				return err
			}
			rec.VDI = ref
			tx.Put(ClassPatch, patch, rec)
		}
		return nil
	})
}

// verifyOn has a host look at an image, and records what it has found here too.
func (p *Pool) verifyOn(ctx context.Context, host, ref xapi.Ref) (report VerifyReport, err error) {
	rec, err := p.vdi(ref)
	if err != nil {
		return report, err
	}
	text, err := p.callOn(ctx, host, "VDIVerify", ref)
	if err != nil {
		return report, err
	}
	if err := json.Unmarshal([]byte(text), &report); err != nil || report.VDI != ref {
		return report, xapi.Internal("host %s answers nonsense to VDIVerify: %w", p.hostName(host), errors.Join(err, errors.New("not the report asked for")))
	}
	return report, p.noteReport(ctx, rec, report, "")
}

// onlyElsewhere tells whether an SR is linked to one other host only, and to which.
func (p *Pool) onlyElsewhere(ref xapi.Ref) (host xapi.Ref, yes bool) {
	err := p.Store.View(func(v *store.View) error {
		links := v.Refs(ClassPBD, "SR", string(ref))
		if len(links) != 1 {
			return nil
		}
		pbd, err := store.Get[PBD](v, ClassPBD, links[0])
		host, yes = pbd.Host, err == nil && pbd.Host != p.Self && p.storage.repository(ref) == nil
		return err
	})
	return host, yes && err == nil
}

// forgetElsewhere has the other hosts that are linked to an SR forget it, too. One
// that has the pool database has nothing of its own to forget.
func (p *Pool) forgetElsewhere(ctx context.Context, ref xapi.Ref) error {
	var hosts []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		for _, link := range v.Refs(ClassPBD, "SR", string(ref)) {
			pbd, err := store.Get[PBD](v, ClassPBD, link)
			if err != nil {
				return err
			}
			if pbd.CurrentlyAttached {
				return xapi.NewError(xapi.SRHasPBD, string(ref))
			}
			if p.ownStore(v, pbd.Host) {
				hosts = append(hosts, pbd.Host)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, host := range hosts {
		if _, err := p.callOn(ctx, host, "SRForget", ref); err != nil {
			return err
		}
	}
	return nil
}

// ownStore tells whether a host keeps a store of its own.
func (p *Pool) ownStore(v *store.View, host xapi.Ref) bool {
	rec, err := store.Get[Host](v, ClassHost, host)
	return err == nil && host != p.Self && !rec.Coordinator
}

// tellLink has the host of an unplugged PBD do to its own record what is about to
// be done to that of the pool.
func (p *Pool) tellLink(ctx context.Context, ref xapi.Ref, name string, args any) error {
	rec, _, err := p.pbd(ref)
	if err != nil || rec.CurrentlyAttached {
		return nil // whoever asked learns of it
	}
	var tell bool
	err = p.Store.View(func(v *store.View) error { tell = p.ownStore(v, rec.Host); return nil })
	if err != nil || !tell {
		return err
	}
	_, err = p.callOn(ctx, rec.Host, name, args)
	return err
}

// takeLink puts the records of an SR and its PBD that this host does not have.
func (p *Pool) takeLink(ctx context.Context, a plugCall) error {
	if a.PBD.Host != p.Self || a.PBD.SR != a.SRRef || !a.Ref.Valid() || !a.SRRef.Valid() {
		return xapi.NewError(xapi.InvalidValue, ClassPBD, string(a.Ref))
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if !tx.Has(ClassSR, a.SRRef) {
			a.SR.VirtualAllocation = 0
			tx.Put(ClassSR, a.SRRef, a.SR)
		}
		if tx.Has(ClassPBD, a.Ref) {
			return nil
		}
		a.PBD.CurrentlyAttached, a.PBD.Features = false, nil
		tx.Put(ClassPBD, a.Ref, a.PBD)
		return nil
	})
}

// copyElsewhere is VDICopy where another host has a part in it. done tells that it
// was. Where both ends lie on one host that one copies; else the blocks go from host
// to host, which takes a block map: a source without one gets one first, and loses
// it when it is written to. A copy that is overtaken by a writer fails.
func (p *Pool) copyElsewhere(ctx context.Context, c copyCall) (made xapi.Ref, done bool, err error) {
	rec, err := p.vdi(c.VDI)
	if err != nil {
		return "", false, err
	}
	dst := c.SR
	if !c.Into.IsNull() {
		into, err := p.vdi(c.Into)
		if err != nil {
			return "", false, err
		}
		dst = into.SR
	}
	from, err := p.hostWith(rec.SR)
	if err != nil {
		return "", false, err
	}
	to, err := p.hostWith(dst)
	if err != nil {
		return "", false, err
	}
	switch {
	case from == "" || to == "" || from == p.Self && to == p.Self:
		return "", false, nil
	case from == to:
		made, err = p.makeOn(ctx, from, "VDICopy", c)
	case !c.Into.IsNull():
		err = xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("the content of VDI %s lies on another host: copy it to a new VDI", rec.UUID))
	default:
		made, err = p.sendTo(ctx, to, c.VDI, dst, copied(rec))
	}
	return made, true, err
}

// sendTo makes a VDI in an SR of a host, with the content of one that lies on
// another and the record rec.
func (p *Pool) sendTo(ctx context.Context, to, ref, dst xapi.Ref, rec VDI) (xapi.Ref, error) {
	digest, err := p.VDIMakeMap(ctx, ref)
	if err != nil {
		return "", err
	}
	rec.Damage, rec.OtherConfig = "", withoutReplica(rec.OtherConfig)
	spec := StageSpec{Map: digest, Room: rec.PhysicalUtilisation, SR: dst, VDI: rec}
	if to == p.Self {
		return p.Stage(ctx, spec)
	}
	return p.makeOn(ctx, to, callStage, spec)
}

// withoutReplica is an other_config of a VDI that is no replica.
func withoutReplica(config map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range config {
		if k != KeyReplica && k != KeyStaged {
			out[k] = v
		}
	}
	return out
}

// migrateElsewhere is VDIPoolMigrate where another host has a part in it: a copy,
// then the records of patches, then the end of the old one. Cut off in between it
// leaves both.
func (p *Pool) migrateElsewhere(ctx context.Context, ref, dst xapi.Ref) (xapi.Ref, error) {
	rec, err := p.vdi(ref)
	if err != nil {
		return "", err
	}
	to, err := p.hostWith(dst)
	if err != nil {
		return "", err
	}
	if to == "" {
		return "", p.whyNotAttached(dst, xapi.NewError(xapi.SRNotAttached, string(dst)))
	}
	moved, err := p.sendTo(ctx, to, ref, dst, rec)
	if err != nil {
		return "", err
	}
	if err := p.succeed(ctx, ref, moved); err != nil {
		return "", joinUndo(err, p.VDIDestroy(context.WithoutCancel(ctx), moved))
	}
	if err := p.VDIDestroy(task.Detached(context.WithoutCancel(ctx)), ref); err != nil {
		p.Log.WithError(err).WithField("VDI", rec.UUID).Error("the old image of a migrated VDI could not be destroyed: destroy it by hand")
	}
	return moved, nil
}

// succeed puts one VDI in the place of another in the records of patches. Code:
// VDI_IN_USE while a job reads the old one.
func (p *Pool) succeed(ctx context.Context, old, now xapi.Ref) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if err := p.assertUnused(tx, old); err != nil {
			return err
		}
		if !tx.Has(ClassVDI, now) {
			return xapi.NewError(xapi.HandleInvalid, ClassVDI, string(now))
		}
		for _, ref := range tx.Refs(ClassPatch, "VDI", string(old)) {
			patch, err := store.Read[Patch](tx, ClassPatch, ref)
			if err != nil {
				return err
			}
			patch.VDI = now
			tx.Put(ClassPatch, ref, patch)
		}
		return nil
	})
}

// VDIMakeMap makes sure that a VDI has a block map and gives its digest. It reads
// the whole image when there is none; the map goes again when the VDI is written
// to. Codes: those of UseVDI, VDI_IN_USE [VDI ref, "map"], VDI_MISSING.
func (p *Pool) VDIMakeMap(ctx context.Context, ref xapi.Ref) (digest string, err error) {
	rec, err := p.vdi(ref)
	if err != nil || rec.Map != "" {
		return rec.Map, err
	}
	if host, yes := p.vdiElsewhere(ref); yes {
		return p.callOn(ctx, host, "VDIMakeMap", ref)
	}
	rec, repo, release, err := p.holdVDI(ref, "map")
	if err != nil {
		return "", err
	}
	defer release()
	if rec.Map != "" {
		return rec.Map, nil
	}
	f, err := p.openLive(ctx, repo, ref, rec, sr.ReadOnly)
	if err != nil {
		return "", err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return "", fmt.Errorf("measure VDI %s: %w", rec.UUID, err)
	}
	m, err := vdi.BuildMap(ctx, f, size)
	if err != nil {
		return "", fmt.Errorf("read VDI %s: %w", rec.UUID, err)
	}
	if err := p.replaceMap(ctx, look{ref, rec, repo}, m); err != nil {
		return "", err
	}
	digest = m.Digest()
	return digest, p.changeVDI(ctx, ref, func(rec *VDI) { rec.Map, rec.Damage, rec.Checked = digest, "", p.Now().UTC() })
}

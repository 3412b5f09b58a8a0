package pool

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// inventoryClasses are what lies on a host's storage, in the order in which
// records refer to each other.
var inventoryClasses = []string{ClassSR, ClassPBD, ClassVDI}

// Inventory gives what this host has on its storage, as its own store has it: the
// links of this host, their SRs and the VDIs in those.
func (p *Pool) Inventory() (inv Inventory, err error) {
	inv.Full = true
	err = p.Store.View(func(v *store.View) error {
		srs := map[xapi.Ref]bool{}
		put := func(class string, ref xapi.Ref) {
			if it, ok := v.Get(class, ref); ok {
				inv.Put = append(inv.Put, InventoryRecord{Class: class, Ref: ref, Record: it.Raw})
			}
		}
		links := v.Refs(ClassPBD, "host", string(p.Self))
		for _, link := range links {
			rec, err := store.Get[PBD](v, ClassPBD, link)
			if err != nil {
				return err
			}
			if !srs[rec.SR] {
				srs[rec.SR] = true
				put(ClassSR, rec.SR)
			}
		}
		for _, link := range links {
			put(ClassPBD, link)
		}
		for sr := range srs {
			for _, vdi := range v.Refs(ClassVDI, "SR", string(sr)) {
				put(ClassVDI, vdi)
			}
		}
		return nil
	})
	return inv, err
}

// Changed gives the part of now that a receiver who has acked lacks.
func (inv Inventory) Changed(acked Inventory) Inventory {
	old := map[recordKey]json.RawMessage{}
	for _, r := range acked.Put {
		old[recordKey{r.Class, r.Ref}] = r.Record
	}
	out := Inventory{}
	for _, r := range inv.Put {
		key := recordKey{r.Class, r.Ref}
		if had, ok := old[key]; !ok || !bytes.Equal(had, r.Record) {
			out.Put = append(out.Put, r)
		}
		delete(old, key)
	}
	for _, r := range slices.Backward(acked.Put) { // VDIs before their SR
		if _, gone := old[recordKey{r.Class, r.Ref}]; gone {
			out.Gone = append(out.Gone, InventoryRecord{Class: r.Class, Ref: r.Ref})
		}
	}
	return out
}

// maxInventory bounds how many records one host may have.
const maxInventory = 100000

// TakeInventory takes over what a host says of its storage. What belongs to
// others is passed over: a host tells of its own links, of the SRs that it works
// on and of the VDIs in those. A link to an SR of others counts where that is shared,
// and none moves to another SR. Facts are taken from the host, words (names,
// tags, other_config but for patchd's own keys) stay the pool's. Codes:
// HANDLE_INVALID, INVALID_VALUE.
func (p *Pool) TakeInventory(ctx context.Context, host xapi.Ref, inv Inventory) error {
	if len(inv.Put)+len(inv.Gone) > maxInventory {
		return xapi.NewError(xapi.InvalidValue, "inventory", fmt.Sprintf("more than %d records", maxInventory))
	}
	inv = p.withoutLarge(host, inv)
	if err := p.mayAdd(host, inv); err != nil {
		return err
	}
	linked, err := p.linkedSRs(host)
	if err != nil {
		return err
	}
	links := inv.linkedBy(host)
	if inv.Full {
		gone, err := p.notListed(host, inv)
		if err != nil {
			return err
		}
		inv.Gone = gone
	}
	for _, class := range inventoryClasses {
		var part []InventoryRecord
		for _, r := range inv.Put {
			if r.Class == class && len(r.Record) > 0 && (class != ClassSR || linked[r.Ref] || links[r.Ref]) {
				part = append(part, r)
			}
		}
		if err := p.inBatches(ctx, part, func(tx *store.Tx, r InventoryRecord) error { return p.takeRecord(tx, host, r) }); err != nil {
			return err
		}
	}
	for _, class := range []string{ClassVDI, ClassPBD, ClassSR} {
		for _, r := range inv.Gone {
			if r.Class != class || class == ClassSR && !linked[r.Ref] {
				continue
			}
			if err := p.Store.Update(ctx, func(tx *store.Tx) error { return p.dropRecord(tx, host, r) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// linkedSRs are the SRs that a host is linked to.
func (p *Pool) linkedSRs(host xapi.Ref) (srs map[xapi.Ref]bool, err error) {
	srs = map[xapi.Ref]bool{}
	err = p.Store.View(func(v *store.View) error {
		for _, link := range v.Refs(ClassPBD, "host", string(host)) {
			rec, err := store.Get[PBD](v, ClassPBD, link)
			if err != nil {
				return err
			}
			srs[rec.SR] = true
		}
		return nil
	})
	return srs, err
}

// inBatches leaves out what the pool has as it is: a host that connects again
// says all it has, and mostly that is no news.
func (p *Pool) inBatches(ctx context.Context, list []InventoryRecord, f func(*store.Tx, InventoryRecord) error) error {
	news := list[:0:0]
	err := p.Store.View(func(v *store.View) error {
		for _, r := range list {
			if it, ok := v.Get(r.Class, r.Ref); !ok || !bytes.Equal(it.Raw, r.Record) {
				news = append(news, r)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for part := range slices.Chunk(news, batchSize/4) {
		err := p.Store.Update(ctx, func(tx *store.Tx) error {
			for _, r := range part {
				if !r.Ref.Valid() {
					return xapi.NewError(xapi.InvalidValue, "ref", fmt.Sprintf("%.64q", r.Ref))
				}
				if err := f(tx, r); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *Pool) takeRecord(tx *store.Tx, host xapi.Ref, r InventoryRecord) error {
	var err error
	switch r.Class {
	case ClassSR:
		err = p.takeSR(tx, host, r)
	case ClassPBD:
		err = p.takePBD(tx, host, r)
	case ClassVDI:
		err = p.takeVDI(tx, host, r)
	}
	if err != nil {
		return fmt.Errorf("take %s %s of host %s: %w", r.Class, r.Ref, host, err)
	}
	return nil
}

func decodeRecord[T any](r InventoryRecord) (rec T, err error) {
	if err = json.Unmarshal(r.Record, &rec); err != nil {
		err = xapi.NewError(xapi.InvalidValue, r.Class, string(r.Ref)).Because(err)
	}
	return rec, err
}

// worksOn tells whether a host is the one whose word counts about an SR: it has
// it plugged, and neither does a host with the database nor one that was first.
// An SR that only it is linked to is its own also when it is not plugged.
func (p *Pool) worksOn(tx *store.Tx, host, sr xapi.Ref) (bool, error) {
	if p.storage.repository(sr) != nil && host != p.Self {
		return false, nil
	}
	mine := false
	for _, ref := range tx.Refs(ClassPBD, "SR", string(sr)) {
		rec, err := store.Read[PBD](tx, ClassPBD, ref)
		if err != nil {
			return false, err
		}
		if rec.Host == host {
			mine = true
			continue
		}
		of, err := store.Read[Host](tx, ClassHost, rec.Host)
		if err != nil && !xapi.Is(err, xapi.HandleInvalid) {
			return false, err
		}
		if rec.CurrentlyAttached && (of.Coordinator || !mine) {
			return false, nil
		}
	}
	return mine, nil
}

func (p *Pool) takeSR(tx *store.Tx, host xapi.Ref, r InventoryRecord) error {
	now, err := decodeRecord[SR](r)
	if err != nil {
		return err
	}
	old, err := store.Read[SR](tx, ClassSR, r.Ref)
	if xapi.Is(err, xapi.HandleInvalid) {
		if _, known := tx.ByUUID(ClassSR, now.UUID); known || !now.UUID.Valid() {
			return nil // introduced meanwhile under another ref: the host learns of that when it joins
		}
		now.OtherConfig, now.SMConfig, now.Tags = notNil(now.OtherConfig), notNil(now.SMConfig), notNilSet(now.Tags)
		tx.Put(ClassSR, r.Ref, now)
		return nil
	}
	if err != nil {
		return err
	}
	if ok, err := p.worksOn(tx, host, r.Ref); err != nil || !ok {
		return err
	}
	old.PhysicalSize, old.PhysicalUtilisation, old.VirtualAllocation = now.PhysicalSize, now.PhysicalUtilisation, now.VirtualAllocation
	old.SMConfig = notNil(now.SMConfig)
	tx.Put(ClassSR, r.Ref, old)
	return nil
}

func (p *Pool) takePBD(tx *store.Tx, host xapi.Ref, r InventoryRecord) error {
	now, err := decodeRecord[PBD](r)
	if err != nil {
		return err
	}
	if now.Host != host || !tx.Has(ClassSR, now.SR) {
		return nil
	}
	now.DeviceConfig, now.OtherConfig = notNil(now.DeviceConfig), notNil(now.OtherConfig)
	old, err := store.Read[PBD](tx, ClassPBD, r.Ref)
	switch {
	case xapi.Is(err, xapi.HandleInvalid):
		if _, known := tx.ByUUID(ClassPBD, now.UUID); known || !now.UUID.Valid() {
			return nil
		}
		if ok, err := mayLink(tx, host, now.SR); err != nil || !ok {
			return err
		}
	case err != nil:
		return err
	case old.Host != host || old.SR != now.SR || old.UUID != now.UUID:
		return nil
	}
	tx.Put(ClassPBD, r.Ref, now)
	return nil
}

func (p *Pool) takeVDI(tx *store.Tx, host xapi.Ref, r InventoryRecord) error {
	now, err := decodeRecord[VDI](r)
	if err != nil {
		return err
	}
	if ok, err := p.worksOn(tx, host, now.SR); err != nil || !ok {
		return err
	}
	old, err := store.Read[VDI](tx, ClassVDI, r.Ref)
	if xapi.Is(err, xapi.HandleInvalid) {
		if _, known := tx.ByUUID(ClassVDI, now.UUID); known || !now.UUID.Valid() {
			return nil
		}
		now.OtherConfig, now.XenstoreData, now.SMConfig, now.Tags = notNil(now.OtherConfig), notNil(now.XenstoreData), notNil(now.SMConfig), notNilSet(now.Tags)
		tx.Put(ClassVDI, r.Ref, now)
		return nil
	}
	if err != nil {
		return err
	}
	if ok, err := p.worksOn(tx, host, old.SR); err != nil || !ok {
		return err // it lies elsewhere
	}
	if old.Map != "" && now.Map != old.Map && len(tx.Refs(ClassPatch, "VDI", string(r.Ref))) > 0 {
		now.Map = old.Map // what a patch is was decided when it was uploaded
	}
	now.UUID = old.UUID
	now.NameLabel, now.NameDescription, now.Tags = old.NameLabel, old.NameDescription, old.Tags
	now.OtherConfig = mergeConfig(old.OtherConfig, now.OtherConfig)
	now.XenstoreData, now.SMConfig = notNil(now.XenstoreData), notNil(now.SMConfig)
	tx.Put(ClassVDI, r.Ref, now)
	return nil
}

// ownKey begins the keys of other_config that patchd writes.
const ownKey = "patchd-"

// mergeConfig keeps the words of the pool and takes patchd's own keys of the host.
func mergeConfig(pool, host map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range pool {
		if !strings.HasPrefix(k, ownKey) {
			out[k] = v
		}
	}
	for k, v := range host {
		if strings.HasPrefix(k, ownKey) {
			out[k] = v
		}
	}
	return out
}

// notListed are the records that a full inventory does not have and should.
func (p *Pool) notListed(host xapi.Ref, inv Inventory) (gone []InventoryRecord, err error) {
	there := map[xapi.Ref]bool{}
	for _, r := range inv.Put {
		there[r.Ref] = true
	}
	err = p.Store.View(func(v *store.View) error {
		for _, link := range v.Refs(ClassPBD, "host", string(host)) {
			rec, err := store.Get[PBD](v, ClassPBD, link)
			if err != nil {
				return err
			}
			if !there[link] && !rec.CurrentlyAttached {
				continue // it was made here, and the host is told when it is plugged
			}
			for _, vdi := range v.Refs(ClassVDI, "SR", string(rec.SR)) {
				if !there[vdi] {
					gone = append(gone, InventoryRecord{Class: ClassVDI, Ref: vdi})
				}
			}
			if !there[link] {
				gone = append(gone, InventoryRecord{Class: ClassPBD, Ref: link}, InventoryRecord{Class: ClassSR, Ref: rec.SR})
			}
		}
		return nil
	})
	return gone, err
}

// dropRecord takes over that a host has something no more.
func (p *Pool) dropRecord(tx *store.Tx, host xapi.Ref, r InventoryRecord) error {
	switch r.Class {
	case ClassVDI:
		rec, err := store.Read[VDI](tx, ClassVDI, r.Ref)
		if xapi.Is(err, xapi.HandleInvalid) {
			return nil
		}
		if err != nil {
			return err
		}
		if ok, err := p.worksOn(tx, host, rec.SR); err != nil || !ok {
			return err
		}
		return forgetImage(tx, r.Ref)
	case ClassPBD:
		rec, err := store.Read[PBD](tx, ClassPBD, r.Ref)
		if xapi.Is(err, xapi.HandleInvalid) || err == nil && rec.Host != host {
			return nil
		}
		if err != nil {
			return err
		}
		tx.Delete(ClassPBD, r.Ref)
	case ClassSR:
		if len(tx.Refs(ClassPBD, "SR", string(r.Ref))) > 0 || len(tx.Refs(ClassVDI, "SR", string(r.Ref))) > 0 || p.storage.repository(r.Ref) != nil {
			return nil
		}
		tx.Delete(ClassSR, r.Ref)
	}
	return nil
}

// recordKey names a record of an inventory.
type recordKey struct {
	class string
	ref   xapi.Ref
}

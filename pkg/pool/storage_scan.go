package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// scanBatch is how many VDIs one transaction of a scan changes.
const scanBatch = 40

// SRScan compares the records of an SR with what it holds: live volumes that no
// record names are introduced as plain VDIs, VDIs without a volume are marked
// as missing, sizes are read again. Working data is left alone. Codes:
// HANDLE_INVALID, SR_HAS_NO_PBDS, SR_NOT_ATTACHED, OTHER_OPERATION_IN_PROGRESS.
func (p *Pool) SRScan(ctx context.Context, ref xapi.Ref) error {
	if host, yes := p.elsewhere(ref); yes {
		_, err := p.callOn(ctx, host, "SRScan", ref)
		return err
	}
	repo, release, err := p.useSR(ref)
	if err != nil {
		return err
	}
	defer release()
	if err := p.repairSR(ctx, ref, repo); err != nil {
		return err
	}
	return p.compare(ctx, ref, repo, true)
}

// SRUpdate reads the sizes of an SR again. Codes: those of SRScan.
func (p *Pool) SRUpdate(ctx context.Context, ref xapi.Ref) error {
	if host, yes := p.elsewhere(ref); yes {
		_, err := p.callOn(ctx, host, "SRUpdate", ref)
		return err
	}
	repo, release, err := p.useSR(ref)
	if err != nil {
		return err
	}
	defer release()
	return p.refreshSizes(ctx, ref, repo)
}

// known is what the records say at one moment.
type known struct {
	all     map[xapi.UUID]xapi.Ref // every VDI of the pool
	here    map[xapi.Ref]VDI       // those of one SR
	intents map[xapi.UUID]bool     // VDIs that come or go just now
}

func (p *Pool) known(ref xapi.Ref) (k known, err error) {
	k = known{map[xapi.UUID]xapi.Ref{}, map[xapi.Ref]VDI{}, map[xapi.UUID]bool{}}
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassVDI) {
			var rec VDI
			if err := it.Decode(&rec); err != nil {
				return err
			}
			k.all[rec.UUID] = it.Ref
			if rec.SR == ref {
				k.here[it.Ref] = rec
			}
		}
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			k.intents[in.VDI] = true
		}
		return nil
	})
	return k, err
}

// has tells whether the records account for a volume.
func (k known) has(id xapi.UUID) bool { return k.all[id] != "" || k.intents[id] }

// compare is the scan of an attached SR.
//
// VDIs come and go meanwhile, also by other hosts. A volume is a stranger only
// if no record and no intent named it before it was listed, none does
// afterwards, and it is still there then: whatever is ours has one of them for
// all its life, and a VDI's uuid never comes back.
func (p *Pool) compare(ctx context.Context, ref xapi.Ref, repo sr.Repository, introduceStrangers bool) error {
	before, err := p.known(ref)
	if err != nil {
		return err
	}
	volumes, err := repo.Scan(ctx)
	if err != nil {
		return err
	}
	live := map[xapi.UUID]sr.Volume{}
	for _, v := range volumes {
		if v.Name.Kind == sr.KindLive {
			live[v.Name.VDI] = v
		}
	}
	if err := p.updateVDIs(ctx, before.here, live); err != nil {
		return err
	}
	if introduceStrangers {
		if err := p.introduceStrangers(ctx, ref, repo, before, live); err != nil {
			return err
		}
	}
	return p.refreshSizes(ctx, ref, repo)
}

// updateVDIs writes what the volumes say into the records that were there
// before the volumes were listed.
func (p *Pool) updateVDIs(ctx context.Context, recs map[xapi.Ref]VDI, live map[xapi.UUID]sr.Volume) error {
	changed := slices.Sorted(maps.Keys(recs))
	changed = slices.DeleteFunc(changed, func(ref xapi.Ref) bool {
		rec := recs[ref]
		return !observe(&rec, live)
	})
	for batch := range slices.Chunk(changed, scanBatch) {
		err := p.Store.Update(ctx, func(tx *store.Tx) error {
			for _, ref := range batch {
				rec, err := store.Read[VDI](tx, ClassVDI, ref)
				if xapi.Is(err, xapi.HandleInvalid) {
					continue
				}
				if err != nil {
					return err
				}
				if observe(&rec, live) {
					tx.Put(ClassVDI, ref, rec)
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

// observe writes into rec what was seen of its volume, and tells whether that was news.
func observe(rec *VDI, live map[xapi.UUID]sr.Volume) bool {
	v, there := live[rec.UUID]
	if !there {
		news := !rec.Missing
		rec.Missing = true
		return news
	}
	news := rec.Missing || rec.VirtualSize != v.VirtualSize || rec.PhysicalUtilisation != v.PhysicalUtilisation
	rec.Missing, rec.VirtualSize, rec.PhysicalUtilisation = false, v.VirtualSize, v.PhysicalUtilisation
	return news
}

func (p *Pool) introduceStrangers(ctx context.Context, ref xapi.Ref, repo sr.Repository, before known, live map[xapi.UUID]sr.Volume) error {
	if err := p.Store.Sync(ctx); err != nil {
		return err
	}
	now, err := p.known(ref)
	if err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(live)) {
		if before.has(id) || now.has(id) {
			continue
		}
		if _, err := repo.Path(ctx, sr.Live(id)); xapi.Is(err, xapi.VDINotAvailable) {
			continue
		} else if err != nil {
			return err
		}
		rec := fullVDI(VDI{NameDescription: "found by SR.scan"}, ref, id)
		rec.VirtualSize, rec.PhysicalUtilisation = live[id].VirtualSize, live[id].PhysicalUtilisation
		err := p.Store.Update(ctx, func(tx *store.Tx) error { return introduce(tx, xapi.NewRef(), rec) })
		if err != nil && !xapi.Is(err, xapi.LocationNotUnique) {
			return err
		}
	}
	return nil
}

// refreshSizes writes the room of an SR, and what it has promised to its VDIs.
func (p *Pool) refreshSizes(ctx context.Context, ref xapi.Ref, repo sr.Repository) error {
	stat, err := repo.Stat(ctx)
	if err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		var promised int64
		for _, it := range tx.List(ClassVDI) {
			var rec VDI
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if rec.SR == ref {
				promised += rec.VirtualSize
			}
		}
		rec, err := store.Read[SR](tx, ClassSR, ref)
		if err != nil {
			return err
		}
		rec.PhysicalSize, rec.PhysicalUtilisation, rec.VirtualAllocation = stat.PhysicalSize, stat.PhysicalUtilisation, promised
		tx.Put(ClassSR, ref, rec)
		return nil
	})
}

// repairSR finishes what was begun on this host in an attached SR and that
// nobody looks after any more, and destroys the working data of dead jobs.
func (p *Pool) repairSR(ctx context.Context, ref xapi.Ref, repo sr.Repository) error {
	intents, err := p.deadIntents()
	if err != nil {
		return err
	}
	var errs []error
	for intentRef, in := range intents {
		if in.SR == ref && in.hasVolumes() {
			errs = append(errs, p.undoIntent(ctx, repo, intentRef, in))
		}
	}
	errs = append(errs, p.sweepSR(ctx, repo))
	return errors.Join(errs...)
}

// deadIntents lists the intents of this host that no call of this process looks
// after and that nobody will go on with.
func (p *Pool) deadIntents() (map[xapi.Ref]Intent, error) {
	dead := map[xapi.Ref]Intent{}
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			if in.Host == p.Self && !p.storage.isActive(in.UUID) && !p.kept(v, in) {
				dead[it.Ref] = in
			}
		}
		return nil
	})
	return dead, err
}

// kept tells whether an intent waits for somebody who goes on with it.
func (p *Pool) kept(v *store.View, in Intent) bool {
	if in.Undo {
		return false
	}
	switch in.Kind {
	case IntentDraft:
		return p.Now().Before(in.Expires)
	case IntentCopy:
		rec, err := store.Get[task.Record](v, task.Class, in.Task)
		return err == nil && rec.Status == task.Pending
	}
	return false
}

// undoIntent destroys the volumes of an intent, if it is still there and nobody
// has taken it up meanwhile: then no record names them.
func (p *Pool) undoIntent(ctx context.Context, repo sr.Repository, ref xapi.Ref, in Intent) error {
	end, ours := p.storage.claim(in.UUID)
	if !ours {
		return nil
	}
	defer end()
	open := false
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		if open = tx.Has(ClassIntent, ref); !open {
			return nil
		}
		now, err := store.Read[Intent](tx, ClassIntent, ref)
		if err != nil {
			return err
		}
		if open = now.Undo || now.Kind != IntentDraft || !p.Now().Before(now.Expires); open {
			now.Undo = true
			tx.Put(ClassIntent, ref, now)
		}
		return nil
	})
	if err == nil && open {
		err = p.undoVolumes(ctx, repo, ref, in)
	}
	if err != nil {
		return fmt.Errorf("undo %s of VDI %s: %w", in.Kind, in.VDI, err)
	}
	return nil
}

// sweepSR destroys part and work volumes that carry this pool and this host,
// and whose job is dead. Nothing else is touched.
func (p *Pool) sweepSR(ctx context.Context, repo sr.Repository) error {
	volumes, err := repo.Scan(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range volumes {
		o := v.Name.Owner
		if v.Name.Kind == sr.KindLive || o.Pool != p.PoolUUID || o.Host != p.SelfUUID || p.ownerAlive(o.Job) {
			continue
		}
		errs = append(errs, repo.Destroy(ctx, v.Name))
	}
	return errors.Join(errs...)
}

// ownerAlive tells whether working data of that job or intent is in use.
func (p *Pool) ownerAlive(id xapi.UUID) bool {
	if p.storage.isActive(id) || p.JobAlive(id) {
		return true
	}
	found := true // when the store cannot tell, nothing is destroyed
	err := p.Store.View(func(v *store.View) error {
		_, found = v.ByUUID(ClassIntent, id)
		return nil
	})
	return err != nil || found
}

// sweepTime bounds the sweep of one SR.
const sweepTime = 10 * time.Minute

// Sweep removes, in every SR that is plugged here, what carries our own intent
// and nobody needs any more: working data of dead jobs, drafts that have
// expired, copies that nobody waits for, and what could not be undone when it
// failed. Everything else stays. The SRs are swept side by side, so that one
// that does not answer keeps nobody from the others.
func (p *Pool) Sweep(ctx context.Context) error {
	repos := p.storage.attached()
	errs := make([]error, len(repos)+1)
	var wg sync.WaitGroup
	for i, ref := range slices.Sorted(maps.Keys(repos)) {
		wg.Go(func() { errs[i] = p.sweepOne(ctx, ref) })
	}
	errs[len(repos)] = p.dropOrphanIntents(ctx)
	wg.Wait()
	return errors.Join(errs...)
}

func (p *Pool) sweepOne(ctx context.Context, ref xapi.Ref) error {
	ctx, cancel := context.WithTimeout(ctx, sweepTime)
	defer cancel()
	repo, release, err := p.useSR(ref)
	if err != nil {
		return nil // just being unplugged
	}
	defer release()
	if err := p.repairSR(ctx, ref, repo); err != nil {
		return fmt.Errorf("sweep SR %s: %w", ref, err)
	}
	return nil
}

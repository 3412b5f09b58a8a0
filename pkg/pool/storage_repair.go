package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// RepairStorage makes storage and records agree, at the start of a host: SRs
// that were being made or removed are removed, those that were plugged are
// plugged again, what was begun is undone, working data of dead jobs goes,
// sizes are read and VDIs without a volume are marked as missing. Foreign files
// stay where they are.
//
// An SR that cannot be plugged or repaired keeps nobody from the rest of the
// pool, and the SRs are dealt with side by side: that is logged, there is a
// message, and it is tried again: see ReplugFailed and Sweep. Drafts that have not expired
// and copies whose task waits for them are kept; see OpenDraft and ResumeCopies.
func (p *Pool) RepairStorage(ctx context.Context) error {
	if err := p.finishSRs(ctx); err != nil {
		return err
	}
	plugs, err := p.plugsToRepeat()
	if err != nil {
		return err
	}
	errs := make([]error, len(plugs))
	var wg sync.WaitGroup
	for i, ref := range plugs {
		wg.Go(func() { errs[i] = p.replug(ctx, ref) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	repos := p.storage.attached()
	errs = make([]error, len(repos))
	for i, ref := range slices.Sorted(maps.Keys(repos)) {
		wg.Go(func() { errs[i] = p.repairPlugged(ctx, ref, repos[ref]) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return p.dropOrphanIntents(ctx)
}

// repairPlugged repairs one SR and reads its sizes. What fails there is told to
// the admin; the error is that of telling.
func (p *Pool) repairPlugged(ctx context.Context, ref xapi.Ref, repo sr.Repository) error {
	err := p.repairSR(ctx, ref, repo)
	if err == nil {
		err = p.compare(ctx, ref, repo, false)
	}
	if err != nil && ctx.Err() == nil {
		err = p.reportSR(ctx, ref, MessageCleanupFailed, err)
	}
	return err
}

// reportSR tells the admin what is wrong with an SR.
func (p *Pool) reportSR(ctx context.Context, ref xapi.Ref, message string, cause error) error {
	rec, err := p.sr(ref)
	if err != nil {
		return errors.Join(cause, err)
	}
	p.Log.WithError(cause).WithField("SR", rec.UUID).Error("an SR could not be plugged or repaired; it is tried again")
	_, err = p.MessageCreate(ctx, message, 2, "SR", rec.UUID, brief(cause))
	return err
}

func brief(err error) string { return strings.ToValidUTF8(fmt.Sprintf("%.1000s", err.Error()), "") }

// finishSRs removes the SRs that were being made or removed.
func (p *Pool) finishSRs(ctx context.Context) error {
	intents, err := p.deadIntents()
	if err != nil {
		return err
	}
	for ref, in := range intents {
		var failed error
		switch in.Kind {
		case IntentMakeSR:
			failed = p.unmakeSR(ctx, ref, in)
		case IntentRemoveSR:
			var err error
			failed, err = p.finishRemoveSR(ctx, ref, in)
			failed = errors.Join(failed, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if failed != nil {
			p.Log.WithError(failed).WithField("SR", in.SRUUID).WithField("intent", in.Kind).Error("an SR that was being made or removed could not be removed from disk")
		}
	}
	return nil
}

// plugsToRepeat lists the PBDs of this host that were plugged, or that could
// not be plugged at the last start.
func (p *Pool) plugsToRepeat() (refs []xapi.Ref, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassPBD, "host", string(p.Self)) {
			rec, err := store.Get[PBD](v, ClassPBD, ref)
			if err != nil {
				return err
			}
			if rec.CurrentlyAttached || rec.OtherConfig[keyPlugFailed] != "" {
				refs = append(refs, ref)
			}
		}
		return nil
	})
	return refs, err
}

// keyPlugFailed in PBD.other_config tells why the SR could not be plugged at start.
const keyPlugFailed = "patchd-plug-failed"

// MessagePlugFailed is the notice about such an SR.
const MessagePlugFailed = "PBD_PLUG_FAILED_ON_SERVER_START"

func (p *Pool) replug(ctx context.Context, ref xapi.Ref) error {
	cause := p.plug(ctx, ref)
	if cause == nil || ctx.Err() != nil {
		return cause
	}
	text := brief(cause)
	var rec PBD
	news := false
	err := p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		if rec, err = store.Read[PBD](tx, ClassPBD, ref); err != nil {
			return err
		}
		news = rec.OtherConfig[keyPlugFailed] != text
		rec.CurrentlyAttached = false
		rec.offer(nil)
		rec.OtherConfig[keyPlugFailed] = text
		tx.Put(ClassPBD, ref, rec)
		return nil
	})
	if err != nil || !news {
		return err
	}
	return p.reportSR(ctx, rec.SR, MessagePlugFailed, cause)
}

// dropOrphanIntents deletes the intents about SRs that no record knows any
// more: their volumes are swept when the SR is introduced again.
func (p *Pool) dropOrphanIntents(ctx context.Context) error {
	intents, err := p.forgottenIntents()
	if err != nil {
		return err
	}
	for ref := range intents {
		err := p.Store.Update(ctx, func(tx *store.Tx) error {
			tx.Delete(ClassIntent, ref)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// forgottenIntents lists the intents of this host about volumes in an SR that
// has no record any more; an SR never comes back under the same ref.
func (p *Pool) forgottenIntents() (map[xapi.Ref]Intent, error) {
	forgotten := map[xapi.Ref]Intent{}
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			_, there := v.Get(ClassSR, in.SR)
			if !there && in.hasVolumes() && in.Host == p.Self && !p.storage.isActive(in.UUID) {
				forgotten[it.Ref] = in
			}
		}
		return nil
	})
	return forgotten, err
}

// detachPatience is how long an SR that is in use is tried to let go of at the
// stop of the daemon.
const detachPatience = time.Second

// DetachStorage lets go of every SR without changing a record: the next start
// plugs them again. An SR that a running patch uses stays as it is, mounted too,
// and the next start finds it so.
func (p *Pool) DetachStorage(ctx context.Context) error {
	var errs []error
	for ref, repo := range p.storage.attached() {
		limit, cancel := context.WithTimeout(ctx, detachPatience)
		err := repo.Detach(limit)
		cancel()
		p.storage.setRepository(ref, nil)
		switch {
		case errors.Is(err, syscall.EBUSY):
			p.Log.WithError(err).WithField("SR", ref).Warn("an SR is in use and stays mounted; the next start takes it over")
		case err != nil:
			errs = append(errs, fmt.Errorf("detach SR %s: %w", ref, err))
		}
	}
	return errors.Join(errs...)
}

package pool

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// revokedKeep is how long a revoked key is remembered: longer than anything that
// was issued for it lasts, and long enough for an ejected host to be told.
const revokedKeep = 30 * 24 * time.Hour

func pinOf(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// revoked tells whether a key was taken from a host.
func (r PoolRecord) revoked(spki []byte, now time.Time) bool {
	pin := pinOf(spki)
	return slices.ContainsFunc(r.Revoked, func(k RevokedKey) bool { return k.Pin == pin && now.Before(k.Until) })
}

// revoke writes down keys, and forgets those that are old.
func (p *Pool) revoke(tx *store.Tx, h Host, keys []HostKey, ejected bool) error {
	pools := tx.List(ClassPool)
	if len(pools) == 0 {
		return fmt.Errorf("the store holds no pool record")
	}
	var rec PoolRecord
	if err := pools[0].Decode(&rec); err != nil {
		return err
	}
	now := p.Now().UTC()
	rec.Revoked = slices.DeleteFunc(rec.Revoked, func(k RevokedKey) bool { return now.After(k.Until) })
	for _, k := range keys {
		rec.Revoked = append(rec.Revoked, RevokedKey{Pin: pinOf(k.SPKI), Host: h.UUID, Ejected: ejected, Until: now.Add(revokedKeep)})
	}
	tx.Put(ClassPool, pools[0].Ref, rec)
	return nil
}

// HostRevoke takes all keys from a host: from then on nobody in the pool lets it
// in, until it has joined again with another. Codes: HANDLE_INVALID,
// OPERATION_NOT_ALLOWED for this host and for one that has the database.
func (p *Pool) HostRevoke(ctx context.Context, host xapi.Ref) error {
	if host == p.Self {
		return xapi.NewError(xapi.OperationNotAllowed, "this is the coordinator: rotate its key instead")
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, host)
		if err != nil {
			return err
		}
		if rec.Coordinator {
			return hasDatabase(rec)
		}
		if err := p.revoke(tx, rec, rec.Keys, false); err != nil {
			return err
		}
		rec.Keys = nil
		tx.Put(ClassHost, host, rec)
		return nil
	})
}

// hasDatabase is why a host that may lead cannot be shut out by its key.
func hasDatabase(h Host) error {
	return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf(
		"host %s (%s) has the pool's database and needs no key: stop patchd there, take its credentials for the database away, then eject it", h.NameLabel, h.UUID))
}

// Ejected tells whether a key belonged to a host that was ejected.
func Ejected(v *store.View, spki []byte) bool {
	pin := pinOf(spki)
	for _, it := range v.List(ClassPool) {
		var rec PoolRecord
		if it.Decode(&rec) == nil && slices.ContainsFunc(rec.Revoked, func(k RevokedKey) bool { return k.Pin == pin && k.Ejected }) {
			return true
		}
	}
	return false
}

// HostEject takes a host out of the pool: its keys are refused from this moment,
// then its storage and its patches leave the records. The host itself becomes a
// pool of its own when it learns of that; it keeps its storage and its
// stampfiles. A patch whose image goes with it gets another image with the same
// content, where there is one. force also ejects a host at work, and ends its
// jobs. A call that was cut off is finished by the next one, or by the next
// start. Codes: HANDLE_INVALID, OPERATION_NOT_ALLOWED for the
// coordinator and for a host with the database that is still there,
// OTHER_OPERATION_IN_PROGRESS ["host", ref, text] while it has work to do.
func (p *Pool) HostEject(ctx context.Context, host xapi.Ref, force bool) error {
	if host == p.Self {
		return xapi.NewError(xapi.OperationNotAllowed, "the coordinator cannot be ejected: eject the other hosts from it, or let another coordinator lead")
	}
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, host)
		if err != nil {
			return err
		}
		if rec.Coordinator && (p.Connected == nil || p.Connected(host)) {
			return hasDatabase(rec)
		}
		if !force {
			if err := p.assertIdleHost(tx, host, rec); err != nil {
				return err
			}
		}
		if err := p.revoke(tx, rec, rec.Keys, true); err != nil {
			return err
		}
		rec.Keys, rec.Leaving, rec.Coordinator = nil, true, false
		tx.Put(ClassHost, host, rec)
		return nil
	})
	if err != nil {
		return err
	}
	return p.finishEject(ctx, host)
}

// assertIdleHost refuses while a host has jobs.
func (p *Pool) assertIdleHost(tx *store.Tx, host xapi.Ref, rec Host) error {
	for _, ref := range tx.Refs(ClassJob, "host", string(host)) {
		job, err := store.Read[Job](tx, ClassJob, ref)
		if err != nil {
			return err
		}
		if job.State != JobDone {
			return xapi.NewError(xapi.OtherOperationInProgress, ClassHost, string(host),
				fmt.Sprintf("it has work to do (%s), which may be cancelled, or left behind with --force", job.Kind))
		}
	}
	return nil
}

// FinishEjects finishes what HostEject had begun when the coordinator died.
func (p *Pool) FinishEjects(ctx context.Context) error {
	var leaving []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassHost) {
			var h Host
			if err := it.Decode(&h); err != nil {
				return err
			}
			if h.Leaving {
				leaving = append(leaving, it.Ref)
			}
		}
		return nil
	})
	for _, ref := range leaving {
		if err == nil {
			err = p.finishEject(ctx, ref)
		}
	}
	return err
}

// finishEject removes the records of a host that is leaving, step by step; the
// host's own goes last.
func (p *Pool) finishEject(ctx context.Context, host xapi.Ref) error {
	if err := p.endJobs(ctx, host); err != nil {
		return err
	}
	if err := p.dropStorageOf(ctx, host); err != nil {
		return err
	}
	var held []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		held = v.Refs(ClassHostPatch, "host", string(host))
		return nil
	})
	if err != nil {
		return err
	}
	err = batches(ctx, p.Store, held, func(tx *store.Tx, ref xapi.Ref) error {
		tx.Delete(ClassHostPatch, ref)
		return nil
	})
	if err != nil {
		return err
	}
	var name Host
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, host)
		if xapi.Is(err, xapi.HandleInvalid) {
			return nil
		}
		name = rec
		tx.Delete(ClassHost, host)
		return err
	})
	if err != nil {
		return err
	}
	p.Log.WithField("host", name.UUID).WithField("name", name.NameLabel).Info("a host was ejected from the pool")
	return p.SettlePoolApplied(ctx)
}

// endJobs ends the open jobs of a host that will not report any more.
func (p *Pool) endJobs(ctx context.Context, host xapi.Ref) error {
	jobs, _, err := p.Jobs(host)
	for _, j := range jobs {
		if err == nil {
			err = p.JobFinish(ctx, j.Ref, Outcome{
				Err: xapi.NewError(xapi.HostOffline, string(host)), Attempt: j.Job.Attempt,
				Unknown: j.Job.Kind == JobApply && j.Job.State == JobClaimed,
			})
		}
	}
	return err
}

// dropStorageOf removes the links of a host, and the SRs that nobody else is
// linked to with the VDIs in them.
func (p *Pool) dropStorageOf(ctx context.Context, host xapi.Ref) error {
	var links []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		links = v.Refs(ClassPBD, "host", string(host))
		return nil
	})
	if err != nil {
		return err
	}
	for _, link := range links {
		rec, _, err := p.pbd(link)
		if err != nil && !xapi.Is(err, xapi.HandleInvalid) {
			return err
		}
		if err := p.dropLink(ctx, link, rec.SR); err != nil {
			return err
		}
	}
	return nil
}

// dropLink removes one link, and its SR with it when it was the last. The link
// goes at the end: what is cut off before is begun again.
func (p *Pool) dropLink(ctx context.Context, link, sr xapi.Ref) error {
	var images []xapi.Ref
	last := false
	err := p.Store.View(func(v *store.View) error {
		last = len(v.Refs(ClassPBD, "SR", string(sr))) <= 1
		if last {
			images = v.Refs(ClassVDI, "SR", string(sr))
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, vdi := range images {
		if err := p.Store.Update(ctx, func(tx *store.Tx) error { return forgetImage(tx, vdi) }); err != nil {
			return err
		}
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		tx.Delete(ClassPBD, link)
		if !last || len(tx.Refs(ClassPBD, "SR", string(sr))) > 0 {
			return nil
		}
		tx.Delete(ClassSR, sr)
		for _, it := range tx.List(ClassPool) {
			var rec PoolRecord
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if rec.DefaultSR == sr {
				rec.DefaultSR = xapi.NullRef
				tx.Put(ClassPool, it.Ref, rec)
			}
		}
		return nil
	})
}

// forgetImage takes the record of a VDI away that the pool reaches no more. A
// patch in it gets another image with the same content, or none.
func forgetImage(tx *store.Tx, ref xapi.Ref) error {
	rec, err := store.Read[VDI](tx, ClassVDI, ref)
	if xapi.Is(err, xapi.HandleInvalid) {
		return nil
	}
	if err != nil {
		return err
	}
	successor := xapi.NullRef
	if rec.Map != "" {
		if successor, err = successorOf(tx, ref, rec.Map); err != nil {
			return err
		}
	}
	for _, patch := range tx.Refs(ClassPatch, "VDI", string(ref)) {
		of, err := store.Read[Patch](tx, ClassPatch, patch)
		if err != nil {
			return err
		}
		of.VDI = successor
		tx.Put(ClassPatch, patch, of)
	}
	tx.Delete(ClassVDI, ref)
	return nil
}

// successorOf is another VDI with a map, one that is known to be good where there is
// one; else none.
func successorOf(tx *store.Tx, ref xapi.Ref, digest string) (xapi.Ref, error) {
	for _, other := range tx.Refs(ClassVDI, "_map", digest) {
		rec, err := store.Read[VDI](tx, ClassVDI, other)
		if err != nil {
			return "", err
		}
		if other != ref && !rec.Missing && rec.Damage == "" {
			return other, nil
		}
	}
	return xapi.NullRef, nil
}

// batchSize is how many records one transaction of batches changes.
const batchSize = 40

// batches runs f on each of refs, some at a time in one transaction.
func batches(ctx context.Context, s *store.Store, refs []xapi.Ref, f func(tx *store.Tx, ref xapi.Ref) error) error {
	for part := range slices.Chunk(refs, batchSize) {
		err := s.Update(ctx, func(tx *store.Tx) error {
			for _, ref := range part {
				if err := f(tx, ref); err != nil {
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

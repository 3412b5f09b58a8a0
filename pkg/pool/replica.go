package pool

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// The keys of VDI.other_config by which a replica is known: a VDI with the same
// block map as a golden image, made on a host that did not reach that.
const (
	KeyReplica = "patchd-replica" // uuid of the golden image
	KeyStaged  = "patchd-staged"  // "true": an admin has asked for it, and it stays
)

// Replica is a VDI on the storage of this host that has a certain block map:
// the golden image itself or another one that is as good.
type Replica struct {
	Ref xapi.Ref
	VDI VDI
}

// Replicas lists the VDIs with a block map of that digest in the SRs plugged
// here, oldest first. Those that are missing or damaged are left out.
func (p *Pool) Replicas(digest string) (list []Replica, err error) {
	if digest == "" {
		return nil, nil
	}
	err = p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassVDI, "_map", digest) {
			rec, err := store.Get[VDI](v, ClassVDI, ref)
			if err != nil {
				return err
			}
			if !rec.Missing && rec.Damage == "" && p.storage.repository(rec.SR) != nil {
				list = append(list, Replica{ref, rec})
			}
		}
		return nil
	})
	return list, err
}

// maxShown bounds the images of one map that are opened at once.
const maxShown = 3

// OpenImages opens, for other hosts to read, the images of that map in the SRs
// plugged here. They give way: whoever wants such a VDI for himself waits only
// until they are closed, and Gone tells when he does. One that cannot be opened
// is passed over; the last error is given when none can.
func (p *Pool) OpenImages(ctx context.Context, digest string) (list []vdi.Stored, err error) {
	replicas, err := p.Replicas(digest)
	if err != nil {
		return nil, err
	}
	var last error
	for _, r := range replicas {
		if len(list) == maxShown {
			break
		}
		s, ok, err := p.show(ctx, r.Ref, digest)
		if ok {
			list = append(list, s)
		}
		last = errors.Join(err, last)
	}
	if len(list) == 0 {
		return nil, last
	}
	return list, nil
}

// show opens one image. ok is false when it is not to be had now.
func (p *Pool) show(ctx context.Context, ref xapi.Ref, digest string) (s vdi.Stored, ok bool, err error) {
	l, within, end, ok := p.glanceVDI(context.WithoutCancel(ctx), ref)
	if !ok {
		return s, false, nil
	}
	if l.rec.Map != digest {
		end()
		return s, false, nil
	}
	m, err := sr.ReadMap(within, l.repo, l.rec.UUID, digest)
	if err == nil {
		s.File, err = l.repo.Open(within, sr.Live(l.rec.UUID), sr.ReadOnly)
	}
	if err != nil {
		end()
		return s, false, err
	}
	s.Map, s.Gone = m, within.Done()
	s.Close = func() { s.File.Close(); end() }
	s.Damaged = func(block int64) {
		text := (&vdi.DamageError{Blocks: []int64{block}, Total: 1}).Error()
		if err := p.VDIDamaged(context.WithoutCancel(ctx), ref, text); err != nil {
			p.Log.WithError(err).WithField("VDI", l.rec.UUID).Warn("the damage of an image could not be recorded")
		}
	}
	return s, true, nil
}

// replicasOf lists the replicas of a golden image all over the pool.
func (p *Pool) replicasOf(golden xapi.UUID) (list map[xapi.Ref]VDI, err error) {
	all, err := p.allReplicas()
	for ref, rec := range all {
		if rec.OtherConfig[KeyReplica] != string(golden) {
			delete(all, ref)
		}
	}
	return all, err
}

// allReplicas lists the replicas of the pool.
func (p *Pool) allReplicas() (list map[xapi.Ref]VDI, err error) {
	list = map[xapi.Ref]VDI{}
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassVDI) {
			var rec VDI
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if rec.Map != "" && rec.OtherConfig[KeyReplica] != "" && len(v.Refs(ClassPatch, "VDI", string(it.Ref))) == 0 {
				list[it.Ref] = rec
			}
		}
		return nil
	})
	return list, err
}

// CollectReplicas destroys the replicas that nobody needs any more: those whose
// golden image is gone or no patch's, those that are damaged, and, unless an admin
// has staged them, those of a patch that every host has. One that a job may read
// stays until it has ended, and one on a host that is away until that is back. It
// is the coordinator's to call: only the pool database knows the patches.
func (p *Pool) CollectReplicas(ctx context.Context) error {
	all, err := p.allReplicas()
	if err != nil {
		return err
	}
	var errs []error
	for ref, rec := range all {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		ends, err := p.replicaEnds(rec)
		if err == nil && ends {
			err = p.dropReplica(ctx, ref, rec, false)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// replicaEnds tells whether a replica is of no use any more.
func (p *Pool) replicaEnds(rec VDI) (ends bool, err error) {
	err = p.Store.View(func(v *store.View) error {
		if busy, err := mapInUse(v, rec.Map); busy || err != nil {
			return err
		}
		it, there := v.ByUUID(ClassVDI, xapi.UUID(rec.OtherConfig[KeyReplica]))
		if !there || rec.Damage != "" {
			ends = true
			return nil
		}
		patches := v.Refs(ClassPatch, "VDI", string(it.Ref))
		ends = len(patches) == 0
		for _, ref := range patches {
			patch, err := store.Get[Patch](v, ClassPatch, ref)
			if err != nil {
				return err
			}
			ends = ends || patch.PoolApplied && rec.OtherConfig[KeyStaged] == ""
		}
		return nil
	})
	return ends, err
}

// mapInUse tells whether an open job reads an image of that map, or makes one.
func mapInUse(v *store.View, digest string) (bool, error) {
	for _, it := range v.List(ClassJob) {
		var job Job
		if err := it.Decode(&job); err != nil {
			return false, err
		}
		if job.State != JobDone && mapOfJob(v, job) == digest {
			return true, nil
		}
	}
	return false, nil
}

// mapOfJob is the block map of the image that a job reads or fetches, "" when it
// does neither.
func mapOfJob(v *store.View, job Job) string {
	if job.Kind == JobCall {
		return cmp.Or(mapOfCall(job), mapOfRepair(v, job))
	}
	patch, err := store.Get[Patch](v, ClassPatch, job.Patch)
	if err != nil {
		return ""
	}
	golden, err := store.Get[VDI](v, ClassVDI, patch.VDI)
	if err != nil {
		return ""
	}
	return golden.Map
}

// mapOfRepair is the map of the image that a call repairs, or "".
func mapOfRepair(v *store.View, job Job) string {
	var ref xapi.Ref
	if job.Call != callRepair || json.Unmarshal(job.Args, &ref) != nil {
		return ""
	}
	rec, err := store.Get[VDI](v, ClassVDI, ref)
	if err != nil {
		return ""
	}
	return rec.Map
}

// dropReplica destroys a replica where it lies. Another host has that as a job,
// whose end is waited for with wait and while the host is there.
func (p *Pool) dropReplica(ctx context.Context, ref xapi.Ref, rec VDI, wait bool) error {
	host, yes := p.elsewhere(rec.SR)
	if !yes {
		err := p.VDIDestroy(ctx, ref)
		if xapi.Is(err, xapi.HandleInvalid) || xapi.Is(err, xapi.SRNotAttached) || xapi.Is(err, xapi.SRHasNoPBDs) {
			return nil // it is gone, or to be collected once the SR is back
		}
		return err
	}
	if wait && p.there(host) {
		err := p.VDIDestroy(ctx, ref)
		if !xapi.Is(err, xapi.HostOffline) {
			return err
		}
	}
	return p.leaveCall(ctx, host, "VDIDestroy", ref)
}

// there tells whether a host can do something now.
func (p *Pool) there(host xapi.Ref) bool {
	return host == p.Self || p.Connected == nil || p.Connected(host)
}

// removeReplicas destroys the replicas of a golden image that is gone, or goes.
func (p *Pool) removeReplicas(ctx context.Context, golden xapi.UUID) error {
	if golden == "" {
		return nil
	}
	list, err := p.replicasOf(golden)
	if err != nil {
		return err
	}
	var errs []error
	for ref, rec := range list {
		errs = append(errs, p.dropReplica(ctx, ref, rec, true))
	}
	errs = slices.DeleteFunc(errs, func(err error) bool { return xapi.Is(err, xapi.HandleInvalid) })
	return errors.Join(errs...)
}

package pool

import (
	"context"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// A member keeps its own store, of what lies on its storage only: this is how the
// store of a pool of one host becomes that, and how it becomes a pool again.

// AssertAlone refuses to give up a pool that is more than one idle host. Codes:
// OPERATION_NOT_ALLOWED, OTHER_OPERATION_IN_PROGRESS.
func (p *Pool) AssertAlone() error {
	return p.Store.View(func(v *store.View) error {
		if n := v.Count(ClassHost); n > 1 {
			return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("this host is the coordinator of a pool of %d hosts: eject the others first", n))
		}
		for _, it := range v.List(ClassJob) {
			var job Job
			if err := it.Decode(&job); err != nil {
				return err
			}
			if job.State != JobDone {
				return xapi.NewError(xapi.OtherOperationInProgress, ClassHost, string(p.Self), "a patch is at work on this host: wait for it or cancel it")
			}
		}
		if n := v.Count(ClassIntent); n > 0 {
			return xapi.NewError(xapi.OtherOperationInProgress, ClassHost, string(p.Self),
				"disk images are being made or removed, or an upload is unfinished: wait, cancel it, or let it expire")
		}
		return nil
	})
}

// JoinFacts gives what this host brings into another pool. Facts, stampfiles and
// credentials are the caller's to add.
func (p *Pool) JoinFacts() (req JoinRequest, err error) {
	if req.Inventory, err = p.Inventory(); err != nil {
		return req, err
	}
	req.Ref, req.Patches = p.Self, map[xapi.Ref]Patch{}
	err = p.Store.View(func(v *store.View) (err error) {
		if req.Host, err = store.Get[Host](v, ClassHost, p.Self); err != nil {
			return err
		}
		req.Patches, err = store.All[Patch](v, ClassPatch)
		return err
	})
	return req, err
}

// memberForgets are the classes of which a member keeps nothing.
var memberForgets = []string{
	ClassPatch, ClassHostPatch, ClassJob, ClassRun, ClassRunHost, ClassMessage, ClassJoinToken, task.Class, session.Class, session.ClassUser,
}

// BecomeMember makes the store of a pool of one host that of a member of the pool
// that a is the answer of. It may be repeated after a crash at any step.
// No other method may be under way: PoolUUID changes.
func (p *Pool) BecomeMember(ctx context.Context, a JoinAnswer) error {
	for _, class := range memberForgets {
		if err := p.forgetClass(ctx, class); err != nil {
			return err
		}
	}
	for old, now := range a.SRs {
		if err := p.renameSR(ctx, old, now); err != nil {
			return fmt.Errorf("take the pool's ref of SR %s: %w", old, err)
		}
	}
	return p.belongTo(ctx, a.Pool, a.PoolName)
}

// LeavePool makes the store of a member that of a pool of one host again, with a
// name of its own for that pool. No other method may be under way.
func (p *Pool) LeavePool(ctx context.Context) error {
	return p.belongTo(ctx, xapi.NewUUID(), "")
}

func (p *Pool) belongTo(ctx context.Context, pool xapi.UUID, name string) error {
	ref, _, err := p.Record()
	if err != nil {
		return err
	}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[PoolRecord](tx, ClassPool, ref)
		if err != nil {
			return err
		}
		rec.UUID, rec.NameLabel, rec.Revoked, rec.Master = pool, name, nil, p.Self
		tx.Put(ClassPool, ref, rec)
		host, err := store.Read[Host](tx, ClassHost, p.Self)
		if err != nil {
			return err
		}
		host.Away, host.Leaving = time.Time{}, false
		tx.Put(ClassHost, p.Self, host)
		return nil
	})
	if err == nil {
		p.PoolUUID = pool
	}
	return err
}

func (p *Pool) forgetClass(ctx context.Context, class string) error {
	var refs []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(class) {
			refs = append(refs, it.Ref)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return batches(ctx, p.Store, refs, func(tx *store.Tx, ref xapi.Ref) error {
		tx.Delete(class, ref)
		return nil
	})
}

// renameSR gives an SR the ref that the pool has it under. The VDIs in it are the
// pool's to know.
func (p *Pool) renameSR(ctx context.Context, old, now xapi.Ref) error {
	var images []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		images = v.Refs(ClassVDI, "SR", string(old))
		return nil
	})
	if err != nil {
		return err
	}
	err = batches(ctx, p.Store, images, func(tx *store.Tx, ref xapi.Ref) error {
		tx.Delete(ClassVDI, ref)
		return nil
	})
	if err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[SR](tx, ClassSR, old)
		if xapi.Is(err, xapi.HandleInvalid) {
			return nil // done before
		}
		if err != nil {
			return err
		}
		tx.Put(ClassSR, now, rec)
		tx.Delete(ClassSR, old)
		for _, link := range tx.Refs(ClassPBD, "SR", string(old)) {
			pbd, err := store.Read[PBD](tx, ClassPBD, link)
			if err != nil {
				return err
			}
			pbd.SR = now
			tx.Put(ClassPBD, link, pbd)
		}
		for _, it := range tx.List(ClassPool) {
			var pool PoolRecord
			if err := it.Decode(&pool); err != nil {
				return err
			}
			if pool.DefaultSR == old {
				pool.DefaultSR = now
				tx.Put(ClassPool, it.Ref, pool)
			}
		}
		return nil
	})
}

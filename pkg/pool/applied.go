package pool

import (
	"context"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// pool_patch.pool_applied follows from the host_patches: true when every host has
// the patch. A transaction cannot look at those of thousands of hosts, so it is
// settled right after one that changed something about it.

// settlePoolApplied makes pool_applied of a patch what the records say. What changes
// meanwhile is looked at again: whoever commits last settles last.
func (p *Pool) settlePoolApplied(ctx context.Context, patch xapi.Ref) error {
	for {
		settled, all := false, false
		err := p.Store.View(func(v *store.View) (err error) {
			rec, err := store.Get[Patch](v, ClassPatch, patch)
			if xapi.Is(err, xapi.HandleInvalid) {
				settled = true
				return nil
			}
			if err != nil {
				return err
			}
			all, err = poolApplied(v, patch)
			settled = rec.PoolApplied == all
			return err
		})
		if err != nil || settled {
			return err
		}
		err = p.Store.Update(ctx, func(tx *store.Tx) error {
			rec, err := store.Read[Patch](tx, ClassPatch, patch)
			if xapi.Is(err, xapi.HandleInvalid) {
				return nil
			}
			if err != nil {
				return err
			}
			rec.PoolApplied = all
			tx.Put(ClassPatch, patch, rec)
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// SettlePoolApplied makes pool_applied of every patch what the records say: what a
// start owes that comes after a crash, and what follows when a host joins or leaves.
func (p *Pool) SettlePoolApplied(ctx context.Context) error {
	var patches []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassPatch) {
			patches = append(patches, it.Ref)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, patch := range patches {
		if err := p.settlePoolApplied(ctx, patch); err != nil {
			return err
		}
	}
	return nil
}

// poolApplied tells whether every host has the patch. It decodes host_patches only
// when there are enough of them, the newest first: those of applies under way.
func poolApplied(v *store.View, patch xapi.Ref) (bool, error) {
	refs := v.Refs(ClassHostPatch, "pool_patch", string(patch))
	spare := len(refs) - v.Count(ClassHost)
	if spare < 0 {
		return false, nil
	}
	have := make(map[xapi.Ref]bool, len(refs))
	for i := len(refs) - 1; i >= 0; i-- {
		hp, err := store.Get[HostPatch](v, ClassHostPatch, refs[i])
		if err != nil {
			return false, err
		}
		if hp.Applied {
			have[hp.Host] = true
		} else if spare--; spare < 0 {
			return false, nil
		}
	}
	for _, it := range v.List(ClassHost) {
		if !have[it.Ref] {
			return false, nil
		}
	}
	return true, nil
}

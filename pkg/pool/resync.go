package pool

import (
	"context"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Stamp is one stampfile of a host: its own memory that it has a patch.
type Stamp struct {
	Patch   Patch // identity and guidance, as the stampfile's content says
	Applied time.Time
	// Garbled: the file is there, and what is in it makes no sense. It adds
	// nothing to the records, and takes nothing away.
	Garbled bool
}

// Resync makes the records say what the host's stampfiles say: a stamp without
// a patch record makes one without file and VDI, a stamp without host_patch
// makes one with the stamp's time, a host_patch that claims to be applied and
// has no stamp goes. An apply in progress is left alone: its job decides.
//
// It is given all stamps of the host. Of a patch that is not known only what its
// stampfile says is taken. Code: INVALID_VALUE.
func (p *Pool) Resync(ctx context.Context, host xapi.Ref, stamps []Stamp) error {
	if len(stamps) > maxStamps {
		return xapi.NewError(xapi.InvalidValue, "stampfiles", fmt.Sprintf("more than %d", maxStamps))
	}
	seen := map[xapi.UUID]bool{}
	for _, s := range stamps {
		seen[s.Patch.UUID] = true
		if s.Garbled {
			continue
		}
		said, err := s.said()
		if err != nil {
			return err
		}
		s.Patch = said
		if err := p.resyncStamp(ctx, host, s); err != nil {
			return err
		}
	}
	return p.dropUnstamped(ctx, host, seen)
}

func (p *Pool) resyncStamp(ctx context.Context, host xapi.Ref, s Stamp) error {
	var patch xapi.Ref
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		var known bool
		patch, known = tx.ByUUID(ClassPatch, s.Patch.UUID)
		if !known {
			patch = xapi.NewRef()
			tx.Put(ClassPatch, patch, s.Patch)
		}
		if have := hostPatchesOf(tx, patch, host); len(have) > 0 {
			var hp HostPatch
			if err := tx.Get(ClassHostPatch, have[0], &hp); err != nil {
				return err
			}
			if !hp.Applied && hp.OtherConfig[KeyState] == StateUnknown {
				delete(hp.OtherConfig, KeyState)
				hp.Applied, hp.TimestampApplied = true, s.Applied
				tx.Put(ClassHostPatch, have[0], hp)
			}
			return nil
		}
		hp := xapi.NewRef()
		tx.Put(ClassHostPatch, hp, HostPatch{
			UUID: xapi.NewUUID(), Host: host, PoolPatch: patch, Applied: true, TimestampApplied: s.Applied,
			OtherConfig: map[string]string{KeyGuidance: guidanceText(s.Patch.AfterApplyGuidance)},
		})
		return nil
	})
	if err != nil {
		return err
	}
	return p.settlePoolApplied(ctx, patch)
}

// dropUnstamped drops the host_patches that claim to be applied and have no
// stampfile, one by one: a transaction that looks at all of them would grow
// beyond what the database takes.
func (p *Pool) dropUnstamped(ctx context.Context, host xapi.Ref, seen map[xapi.UUID]bool) error {
	var doomed []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassHostPatch, "host", string(host)) {
			hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
			if err != nil {
				return err
			}
			patch, err := store.Get[Patch](v, ClassPatch, hp.PoolPatch)
			if err != nil && !xapi.Is(err, xapi.HandleInvalid) {
				return err
			}
			if hp.Applied && !seen[patch.UUID] {
				doomed = append(doomed, ref)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, ref := range doomed {
		if err := p.dropHostPatch(ctx, ref); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pool) dropHostPatch(ctx context.Context, ref xapi.Ref) error {
	var patch xapi.Ref
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		hp, err := store.Read[HostPatch](tx, ClassHostPatch, ref)
		if xapi.Is(err, xapi.HandleInvalid) || err == nil && !hp.Applied {
			return nil
		}
		if err != nil {
			return err
		}
		tx.Delete(ClassHostPatch, ref)
		patch = hp.PoolPatch
		return nil
	})
	if err != nil || patch == "" {
		return err
	}
	return p.settlePoolApplied(ctx, patch)
}

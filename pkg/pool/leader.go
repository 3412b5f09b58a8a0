package pool

import (
	"context"
	"fmt"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Lead makes this host the pool's master in the record of the pool. It is called
// once this host was elected.
func (p *Pool) Lead(ctx context.Context) error {
	ref, _, err := p.Record()
	if err != nil {
		return err
	}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[PoolRecord](tx, ClassPool, ref)
		if err != nil || rec.Master == p.Self {
			return err
		}
		rec.Master = p.Self
		tx.Put(ClassPool, ref, rec)
		return nil
	})
	if err != nil {
		return fmt.Errorf("become the pool's master: %w", err)
	}
	return nil
}

// HostByUUID finds a host. Code: UUID_INVALID ["host", uuid].
func (p *Pool) HostByUUID(uuid xapi.UUID) (ref xapi.Ref, rec Host, err error) {
	err = p.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(ClassHost, uuid)
		if !ok {
			return xapi.NewError(xapi.UUIDInvalid, ClassHost, string(uuid))
		}
		ref = it.Ref
		return it.Decode(&rec)
	})
	return ref, rec, err
}

// EnsureFirstSR gives a host that has just come its first SR, made as spec says
// but for Host. A start that was cut off goes on where it was.
func (p *Pool) EnsureFirstSR(ctx context.Context, spec SRSpec) error {
	_, host, err := p.HostByUUID(p.SelfUUID)
	if err != nil || !host.Bare {
		return err
	}
	if made, err := p.ownSR(); err != nil {
		return err
	} else if made.IsNull() {
		spec.Host = p.Self
		if _, err := p.SRCreate(ctx, spec); err != nil {
			return fmt.Errorf("make the first SR: %w", err)
		}
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, p.Self)
		if err != nil {
			return err
		}
		rec.Bare = false
		tx.Put(ClassHost, p.Self, rec)
		return nil
	})
}

// ownSR is the oldest SR that this host has a PBD of, or "".
func (p *Pool) ownSR() (ref xapi.Ref, err error) {
	err = p.Store.View(func(v *store.View) error {
		links := v.Refs(ClassPBD, "host", string(p.Self))
		if len(links) == 0 {
			return nil
		}
		rec, err := store.Get[PBD](v, ClassPBD, links[0])
		ref = rec.SR
		return err
	})
	return ref, err
}

// EnsureDefaultSR makes this host's first SR the default of a pool whose first
// start is not done yet. One without any SR stays without.
func (p *Pool) EnsureDefaultSR(ctx context.Context) error {
	_, rec, err := p.Record()
	if err != nil || !rec.DefaultSR.IsNull() || rec.OtherConfig[keyReady] != "" {
		return err
	}
	first, err := p.ownSR()
	if err != nil || first.IsNull() {
		return err
	}
	return p.SetDefaultSR(ctx, first)
}

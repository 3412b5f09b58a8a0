package pool

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// keyAlign in host.other_config tells that the pool is to apply to the host what
// other hosts have, until it is done.
const keyAlign = "patchd-align"

// MessageAlignFailed is the notice that a new member could not be put at the
// pool's level.
const MessageAlignFailed = "PATCHD_ALIGN_FAILED"

// Aligning lists the hosts that are to be put at the pool's level.
func (p *Pool) Aligning() (hosts []xapi.Ref, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassHost) {
			var h Host
			if err := it.Decode(&h); err != nil {
				return err
			}
			if h.OtherConfig[keyAlign] != "" {
				hosts = append(hosts, it.Ref)
			}
		}
		return nil
	})
	return hosts, err
}

// Align applies to a host, one after another, what other hosts have and it has
// not, in the order in which the pool got it. It stops at the first failure and
// leaves a message. What it has begun goes on after a restart. Codes: those of
// PatchApply.
func (p *Pool) Align(ctx context.Context, host xapi.Ref) error {
	lacks, err := p.lacking(host)
	if err != nil {
		return err
	}
	for _, patch := range lacks {
		_, err = p.PatchApply(Resuming(ctx), patch, host)
		if xapi.Is(err, xapi.PatchAlreadyApplied) {
			err = nil
		}
		if err != nil {
			break
		}
	}
	if ctx.Err() != nil {
		return err // the next start goes on
	}
	if err != nil {
		err = p.alignFailed(ctx, host, err)
	}
	done := p.Store.Update(context.WithoutCancel(ctx), func(tx *store.Tx) error {
		h, err := store.Read[Host](tx, ClassHost, host)
		if err != nil {
			return err
		}
		delete(h.OtherConfig, keyAlign)
		tx.Put(ClassHost, host, h)
		return nil
	})
	if err == nil {
		err = done
	}
	return err
}

func (p *Pool) alignFailed(ctx context.Context, host xapi.Ref, cause error) error {
	var h Host
	err := p.Store.View(func(v *store.View) (err error) {
		h, err = store.Get[Host](v, ClassHost, host)
		return err
	})
	if err != nil {
		return cause
	}
	body := fmt.Sprintf("host %s (%s) could not be put at the pool's level: %s", h.NameLabel, h.UUID, brief(cause))
	if _, err := p.MessageCreate(context.WithoutCancel(ctx), MessageAlignFailed, 2, "Host", h.UUID, body); err != nil {
		p.Log.WithError(err).Error("no message could be left")
	}
	return cause
}

// lacking lists the patches that other hosts have and this one has not, the one
// that was applied first by any of them first.
func (p *Pool) lacking(host xapi.Ref) ([]xapi.Ref, error) {
	first := map[xapi.Ref]time.Time{}
	has := map[xapi.Ref]bool{}
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassHostPatch) {
			var hp HostPatch
			if err := it.Decode(&hp); err != nil {
				return err
			}
			switch at, known := first[hp.PoolPatch]; {
			case !hp.Applied:
			case hp.Host == host:
				has[hp.PoolPatch] = true
			case !known || hp.TimestampApplied.Before(at):
				first[hp.PoolPatch] = hp.TimestampApplied
			}
		}
		return nil
	})
	var out []xapi.Ref
	for patch := range first {
		if !has[patch] {
			out = append(out, patch)
		}
	}
	slices.SortFunc(out, func(a, b xapi.Ref) int { return first[a].Compare(first[b]) })
	return out, err
}

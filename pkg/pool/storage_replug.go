package pool

import (
	"context"
	"errors"
	"sync"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// ReplugFailed tries the SRs again that could not be plugged when this host
// started, because their server was away for one, and repairs those that now
// can, as RepairStorage does. An SR that still cannot keeps its reason; there is
// another message only when that reason is another one.
func (p *Pool) ReplugFailed(ctx context.Context) error {
	failed, err := p.failedPlugs()
	if err != nil {
		return err
	}
	errs := make([]error, len(failed))
	var wg sync.WaitGroup
	for i, plug := range failed {
		wg.Go(func() { errs[i] = p.plugAgain(ctx, plug.pbd, plug.sr) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (p *Pool) plugAgain(ctx context.Context, pbd, of xapi.Ref) error {
	if err := p.replug(ctx, pbd); err != nil {
		return err
	}
	repo := p.storage.repository(of)
	if repo == nil {
		return nil
	}
	p.Log.WithField("SR", of).Info("an SR that could not be plugged at the start is plugged")
	return p.repairPlugged(ctx, of, repo)
}

type failedPlug struct{ pbd, sr xapi.Ref }

// failedPlugs lists the PBDs of this host that RepairStorage could not plug.
func (p *Pool) failedPlugs() (failed []failedPlug, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassPBD, "host", string(p.Self)) {
			rec, err := store.Get[PBD](v, ClassPBD, ref)
			if err != nil {
				return err
			}
			if !rec.CurrentlyAttached && rec.OtherConfig[keyPlugFailed] != "" {
				failed = append(failed, failedPlug{ref, rec.SR})
			}
		}
		return nil
	})
	return failed, err
}

package pool

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// writeMap makes a volume with an encoded block map in it, durably.
func writeMap(ctx context.Context, repo sr.Repository, n sr.Name, m *vdi.Map) error {
	size, err := checkSize(m.EncodedSize())
	if err != nil {
		return err
	}
	if _, err := repo.Create(ctx, n, size); err != nil {
		return err
	}
	f, err := repo.Open(ctx, n, sr.ReadWrite)
	if err != nil {
		return err
	}
	if err = m.Encode(io.NewOffsetWriter(f, 0)); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// VDIMap reads the block map of a VDI, held against the digest in its record;
// nil when it has none. Codes: those of readVDI, VDI_CONTENT_CHANGED [VDI ref,
// text] when the map is gone or damaged.
func (p *Pool) VDIMap(ctx context.Context, ref xapi.Ref) (*vdi.Map, error) {
	s, release, err := p.readVDI(ref)
	if err != nil {
		return nil, err
	}
	defer release()
	return s.mapOf(ctx)
}

// dropMap makes a VDI that its caller holds one that may be written to: its
// record claims no map any more, then the map goes. Code: VDI_READONLY [VDI
// ref] for the image of a patch.
func (p *Pool) dropMap(ctx context.Context, ref xapi.Ref, rec VDI, repo sr.Repository) error {
	if rec.Map == "" {
		return nil
	}
	intentRef, in := p.newIntent(Intent{Kind: IntentDropMap, SR: rec.SR, VDI: rec.UUID, Ref: ref})
	defer p.storage.begin(in.UUID)()
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		now, err := store.Read[VDI](tx, ClassVDI, ref)
		if err != nil {
			return err
		}
		if len(tx.Refs(ClassPatch, "VDI", string(ref))) > 0 {
			return xapi.NewError(xapi.VDIReadonly, string(ref))
		}
		now.Map, now.Damage, now.Checked = "", "", time.Time{}
		tx.Put(ClassVDI, ref, now)
		tx.Put(ClassIntent, intentRef, in)
		return nil
	})
	if err != nil && !p.dropped(ctx, intentRef) {
		return err
	}
	if err := p.discard(ctx, repo, intentRef, in); err != nil {
		p.Log.WithError(err).WithField("VDI", rec.UUID).Warn("the block map of a VDI that is to be written to could not be destroyed; the next sweep or start does it")
	}
	return nil
}

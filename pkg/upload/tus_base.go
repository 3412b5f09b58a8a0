package upload

import (
	"context"
	"os"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// base is the payload that a delta refers to, in use until it is released.
type base struct {
	*vdi.Payload
	vdi xapi.Ref
}

// patchByUUID finds a patch that has a VDI. Codes: UUID_INVALID,
// CANNOT_FIND_PATCH for one that was cleaned.
func (h *Handler) patchByUUID(uuid xapi.UUID) (rec pool.Patch, image pool.VDI, err error) {
	err = h.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(pool.ClassPatch, uuid)
		if !ok {
			return xapi.NewError(xapi.UUIDInvalid, pool.ClassPatch, string(uuid))
		}
		if err := it.Decode(&rec); err != nil {
			return err
		}
		if rec.VDI.IsNull() {
			return xapi.NewError(xapi.CannotFindPatch)
		}
		image, err = store.Get[pool.VDI](v, pool.ClassVDI, rec.VDI)
		return err
	})
	return rec, image, err
}

// openBase opens the payload of a patch. Codes: those of patchByUUID and
// Pool.VDIForExport.
func (h *Handler) openBase(ctx context.Context, uuid xapi.UUID) (base, func(), error) {
	rec, _, err := h.patchByUUID(uuid)
	if err != nil {
		return base{}, nil, err
	}
	f, release, err := h.Pool.VDIForExport(ctx, string(rec.VDI))
	if err != nil {
		return base{}, nil, err
	}
	p, err := vdi.OpenPayload(f)
	if err != nil {
		release()
		return base{}, nil, err
	}
	return base{p, rec.VDI}, release, nil
}

// planBase makes sure that the base of a delta is there, and decides whether
// the image can begin as a clone of it: then only what is new is written. It
// chooses the SR of the base when none was asked for.
func (h *Handler) planBase(ctx context.Context, p *plan, requested string) error {
	rec, image, err := h.patchByUUID(p.Base)
	if err != nil {
		return err
	}
	if requested == "" {
		if _, _, err := h.findSR(ctx, image.SR); err == nil {
			p.SR = image.SR
		}
	}
	f, release, err := h.Pool.VDIForExport(ctx, string(rec.VDI))
	if err != nil {
		return err
	}
	defer release()
	p.Over, err = h.clones(ctx, p, rec, image, f)
	return err
}

// clones tells whether an upload can go over a clone of the image in f: it lies
// on the SR of the upload, which clones, is as large as a fresh one would be, and
// around the payload what its block map says.
func (h *Handler) clones(ctx context.Context, p *plan, rec pool.Patch, image pool.VDI, f *os.File) (bool, error) {
	if p.Payload <= 0 || image.SR != p.SR || image.VirtualSize < vdi.Size(p.Size) {
		return false, nil
	}
	_, repo, err := h.findSR(ctx, p.SR)
	if err != nil || !sr.Has(repo.Features(), sr.VDIClone) {
		return false, err
	}
	fits, err := vdi.Fits(f, image.VirtualSize, p.Payload)
	if err != nil || !fits {
		return false, err
	}
	// The filesystem around the payload is taken over as it is.
	m, err := h.Pool.VDIMap(ctx, rec.VDI)
	if err == nil && m != nil {
		err = m.VerifyAround(ctx, f)
	}
	if err != nil {
		h.Log.WithError(err).WithField("VDI", image.UUID).Warn("nothing is made over the image of a base that is not what its block map says")
	}
	return err == nil && m != nil, sr.Alive(ctx)
}

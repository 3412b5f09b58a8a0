package pool

import (
	"context"
	"os"
	"sync"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// assertMutable refuses to change what is in a VDI that holds a patch or is
// read-only. Code: VDI_READONLY [VDI ref].
func (p *Pool) assertMutable(ref xapi.Ref, rec VDI) error {
	golden, err := p.isGolden(ref)
	if err == nil && (golden || rec.ReadOnly) {
		err = xapi.NewError(xapi.VDIReadonly, string(ref))
	}
	return err
}

// isGolden tells whether a patch lies in the VDI: because its record says so.
func (p *Pool) isGolden(ref xapi.Ref) (golden bool, err error) {
	err = p.Store.View(func(v *store.View) error {
		golden = len(v.Refs(ClassPatch, "VDI", string(ref))) > 0
		return nil
	})
	return golden, err
}

// VDIFile opens the content of a VDI for a raw export (sr.ReadOnly) or import
// (sr.ReadWrite) and marks it in use; release closes the file. What is read may be
// another VDI with the same block map, see readVDI. A VDI that is opened for writing
// has no block map any more. After an import VDIUpdate should be called. Codes: those of readVDI, VDI_IN_USE [VDI ref,
// "import"] when somebody else uses a VDI that is to be written, VDI_READONLY.
func (p *Pool) VDIFile(ctx context.Context, ref xapi.Ref, mode sr.Mode) (*os.File, func(), error) {
	if mode == sr.ReadWrite {
		return p.fileToWrite(ctx, ref)
	}
	s, release, err := p.readVDI(ref)
	if err != nil {
		return nil, nil, err
	}
	f, err := p.openLive(ctx, s.repo, s.ref, s.rec, mode)
	if err != nil {
		release()
		return nil, nil, err
	}
	return f, func() { f.Close(); release() }, nil
}

func (p *Pool) fileToWrite(ctx context.Context, ref xapi.Ref) (*os.File, func(), error) {
	rec, repo, release, err := p.holdVDI(ref, "import")
	if err != nil {
		return nil, nil, err
	}
	if err = p.assertMutable(ref, rec); err == nil {
		err = p.dropMap(ctx, ref, rec, repo)
	}
	var f *os.File
	if err == nil {
		f, err = p.openLive(ctx, repo, ref, rec, sr.ReadWrite)
	}
	if err != nil {
		release()
		return nil, nil, err
	}
	return f, func() { f.Close(); release() }, nil
}

// openLive opens the volume of a VDI. Code: VDI_MISSING [SR ref, VDI ref].
func (p *Pool) openLive(ctx context.Context, repo sr.Repository, ref xapi.Ref, rec VDI, mode sr.Mode) (*os.File, error) {
	f, err := repo.Open(ctx, sr.Live(rec.UUID), mode)
	if xapi.Is(err, xapi.VDINotAvailable) {
		return nil, xapi.NewError(xapi.VDIMissing, string(rec.SR), string(ref)).Because(err)
	}
	return f, err
}

// VDIForExport is VDIFile for reading, of a VDI named by ref or uuid. Codes:
// those of VDIFile, UUID_INVALID.
func (p *Pool) VDIForExport(ctx context.Context, refOrUUID string) (*os.File, func(), error) {
	ref, err := p.findVDI(refOrUUID)
	if err != nil {
		return nil, nil, err
	}
	return p.VDIFile(ctx, ref, sr.ReadOnly)
}

// VDIForImport is VDIFile for writing, of a VDI named by ref or uuid; its
// release also reads the sizes again. Codes: those of VDIFile, UUID_INVALID.
func (p *Pool) VDIForImport(ctx context.Context, refOrUUID string) (*os.File, func(), error) {
	ref, err := p.findVDI(refOrUUID)
	if err != nil {
		return nil, nil, err
	}
	f, release, err := p.VDIFile(ctx, ref, sr.ReadWrite)
	if err != nil {
		return nil, nil, err
	}
	return f, sync.OnceFunc(func() {
		release()
		ctx, cancel := after(ctx)
		defer cancel()
		if err := p.VDIUpdate(ctx, ref); err != nil {
			p.Log.WithError(err).WithField("VDI", ref).Warn("the sizes of an imported VDI could not be read; the next scan does it")
		}
	}), nil
}

// findVDI finds a VDI by ref or uuid. Codes: HANDLE_INVALID, UUID_INVALID.
func (p *Pool) findVDI(refOrUUID string) (xapi.Ref, error) {
	uuid, err := xapi.ParseUUID(refOrUUID)
	if err != nil {
		_, err := p.vdi(xapi.Ref(refOrUUID))
		return xapi.Ref(refOrUUID), err
	}
	var ref xapi.Ref
	err = p.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(ClassVDI, uuid)
		if !ok {
			return xapi.NewError(xapi.UUIDInvalid, ClassVDI, string(uuid))
		}
		ref = it.Ref
		return nil
	})
	return ref, err
}

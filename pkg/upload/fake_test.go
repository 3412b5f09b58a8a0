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

// fakePool is a pool of one SR without an intent journal.
type fakePool struct {
	store   *store.Store
	sr      xapi.Ref
	uuid    xapi.UUID
	repo    sr.Repository
	plugged bool
	file    string // a classic file, of any patch
	mapped  bool   // VDIs have a block map
}

var _ Pool = (*fakePool)(nil)

func (p *fakePool) SRCandidates(context.Context) (xapi.Ref, []sr.Candidate, error) {
	return p.sr, []sr.Candidate{{Ref: p.sr, UUID: p.uuid, Name: "Local", Plugged: p.plugged}}, nil
}

func (p *fakePool) Repository(xapi.Ref) (sr.Repository, error) { return p.repo, nil }

func (p *fakePool) Promised(context.Context, xapi.Ref) (int64, error) { return 0, nil }

func (p *fakePool) NewVDI(ctx context.Context, n pool.NewVDI) (ref xapi.Ref, err error) {
	var undo xapi.Undo
	defer func() { err = undo.Close(ctx, err) }()
	uuid := xapi.NewUUID()
	part := sr.Part(sr.Owner{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Job: xapi.NewUUID()}, uuid)
	if _, err := p.repo.Create(ctx, part, n.VirtualSize); err != nil {
		return "", err
	}
	undo.Push("destroy part", func(ctx context.Context) error { return p.repo.Destroy(ctx, part) })
	f, err := p.repo.Open(ctx, part, sr.ReadWrite)
	if err != nil {
		return "", err
	}
	defer f.Close()
	path, err := p.repo.Path(ctx, part)
	if err != nil {
		return "", err
	}
	if err := n.Fill(ctx, f, path); err != nil {
		return "", err
	}
	if err := p.repo.Rename(ctx, part, sr.Live(uuid)); err != nil {
		return "", err
	}
	undo.Push("destroy VDI", func(ctx context.Context) error { return p.repo.Destroy(ctx, sr.Live(uuid)) })
	ref = xapi.NewRef()
	rec := n.VDI
	rec.UUID, rec.SR, rec.VirtualSize = uuid, n.SR, n.VirtualSize
	return ref, p.store.Update(ctx, func(tx *store.Tx) error {
		tx.Put(pool.ClassVDI, ref, rec)
		return n.Commit(tx, ref)
	})
}

func (p *fakePool) IntroducePatch(tx *store.Tx, rec pool.Patch) (xapi.Ref, error) {
	if _, ok := tx.ByUUID(pool.ClassPatch, rec.UUID); ok {
		return "", xapi.NewError(xapi.PatchAlreadyExists, string(rec.UUID))
	}
	ref := xapi.NewRef()
	tx.Put(pool.ClassPatch, ref, rec)
	return ref, nil
}

func (p *fakePool) PatchFile(xapi.UUID) (*os.File, int64, error) {
	f, err := os.Open(p.file)
	if err != nil {
		return nil, 0, xapi.NewError(xapi.CannotFindPatch).Because(err)
	}
	st, err := f.Stat()
	return f, st.Size(), err
}

func (p *fakePool) open(ctx context.Context, id string, m sr.Mode) (*os.File, func(), error) {
	var rec pool.VDI
	err := p.store.View(func(v *store.View) (err error) {
		rec, err = store.Get[pool.VDI](v, pool.ClassVDI, xapi.Ref(id))
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	f, err := p.repo.Open(ctx, sr.Live(rec.UUID), m)
	if err != nil {
		return nil, nil, err
	}
	return f, func() { f.Close() }, nil
}

func (p *fakePool) VDIForImport(ctx context.Context, id string) (*os.File, func(), error) {
	return p.open(ctx, id, sr.ReadWrite)
}

func (p *fakePool) VDIForExport(ctx context.Context, id string) (*os.File, func(), error) {
	return p.open(ctx, id, sr.ReadOnly)
}

// VDIMap reads a VDI's content where its record has a map.
func (p *fakePool) VDIMap(ctx context.Context, ref xapi.Ref) (*vdi.Map, error) {
	f, release, err := p.open(ctx, string(ref), sr.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer release()
	if !p.mapped {
		return nil, nil
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return vdi.BuildMap(ctx, f, st.Size())
}

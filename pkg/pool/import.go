package pool

import (
	"context"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// LocalHost is what the pool asks of the agent on its own host that is not a
// job: to look at classic files, and to keep stampfiles.
type LocalHost interface {
	Place(path string) (name string, err error)
	Unplace(path, name string) error
	Inspect(ctx context.Context, name string) (Patch, error)
	Files() ([]string, error)
	Settle(patch Patch, applied bool) error
	ResyncStamps(ctx context.Context) error
}

// PatchImport makes a record for a classic patch file: one that lies in the
// patch-dir, or that is copied there from path. The patch is applied from the
// file; its VDI field names nothing. Codes: INVALID_PATCH*,
// PATCH_ALREADY_EXISTS [uuid].
func (p *Pool) PatchImport(ctx context.Context, path string) (xapi.Ref, error) {
	name, err := p.Local.Place(path)
	if err != nil {
		return "", xapi.NewError(xapi.InvalidValue, "path", path).Because(err)
	}
	ref, err := p.importFile(ctx, name)
	if err != nil {
		if uerr := p.Local.Unplace(path, name); uerr != nil {
			p.Log.WithError(uerr).WithField("file", name).Error("the file that could not be imported could not be removed")
		}
		return "", err
	}
	return ref, nil
}

func (p *Pool) importFile(ctx context.Context, name string) (ref xapi.Ref, err error) {
	rec, err := p.Local.Inspect(ctx, name)
	if err != nil {
		return "", err
	}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		ref, err = p.IntroducePatch(tx, rec)
		return err
	})
	return ref, err
}

// ImportPatchDir makes records for the files of the patch-dir that no record
// names: the classic layout of an upgraded host. What cannot be imported is
// logged and left where it is.
func (p *Pool) ImportPatchDir(ctx context.Context) error {
	names, err := p.Local.Files()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassPatch) {
			var rec Patch
			if err := it.Decode(&rec); err != nil {
				return err
			}
			known[rec.Filename] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range names {
		if known[name] {
			continue
		}
		log := p.Log.WithField("file", name)
		if _, err := p.importFile(ctx, name); err != nil {
			log.WithError(err).Warn("a file in the patch-dir is not imported")
			continue
		}
		log.Info("a classic patch file was imported")
	}
	return nil
}

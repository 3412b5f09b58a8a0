package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// IntroducePatch writes the record of a new patch inside the caller's
// transaction and gives its ref. A patch of that uuid whose file or VDI is
// still there is PATCH_ALREADY_EXISTS [uuid]; one that was cleaned gets the new
// file or VDI in its place and keeps its ref, its host_patches and its
// other_config.
func (p *Pool) IntroducePatch(tx *store.Tx, rec Patch) (xapi.Ref, error) {
	ref := xapi.NewRef()
	if rec.OtherConfig == nil {
		rec.OtherConfig = map[string]string{}
	}
	rec.VDI = rec.VDI.OrNull()
	if known, ok := tx.ByUUID(ClassPatch, rec.UUID); ok {
		old, err := store.Read[Patch](tx, ClassPatch, known)
		if err != nil {
			return "", err
		}
		here, err := p.sourcesOf(tx, old)
		if err != nil {
			return "", err
		}
		if here.any() {
			return "", xapi.NewError(xapi.PatchAlreadyExists, string(rec.UUID))
		}
		ref, rec.OtherConfig, rec.PoolApplied = known, old.OtherConfig, old.PoolApplied
	}
	tx.Put(ClassPatch, ref, rec)
	return ref, nil
}

// sources says where the bytes of a patch still are.
type sources struct{ file, vdi bool }

func (s sources) any() bool { return s.file || s.vdi }

func (p *Pool) sourcesOf(tx *store.Tx, rec Patch) (s sources, err error) {
	s.vdi = !rec.VDI.IsNull() && tx.Has(ClassVDI, rec.VDI)
	s.file, err = p.fileExists(rec.Filename)
	return s, err
}

// fileExists tells whether the patch-dir of this host holds name.
func (p *Pool) fileExists(name string) (bool, error) {
	if name == "" {
		return false, nil
	}
	dir, err := os.OpenRoot(p.PatchDir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dir.Close()
	_, err = dir.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// removeFile deletes name from this host's patch-dir; an absent one is fine.
func (p *Pool) removeFile(name string) error {
	if name == "" {
		return nil
	}
	dir, err := os.OpenRoot(p.PatchDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := fault.Point("pool.file.remove"); err != nil {
		return err
	}
	if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fault.Point("pool.file.remove.done")
}

// AssertWorksWith refuses a host that has no open job about a patch. Code:
// OPERATION_NOT_ALLOWED.
func (p *Pool) AssertWorksWith(host xapi.Ref, patch xapi.UUID) error {
	return p.Store.View(func(v *store.View) error {
		it, _ := v.ByUUID(ClassPatch, patch)
		for _, ref := range v.Refs(ClassJob, "host", string(host)) {
			job, err := store.Get[Job](v, ClassJob, ref)
			if err != nil {
				return err
			}
			if job.State != JobDone && job.Patch == it.Ref && it.Ref != "" {
				return nil
			}
		}
		return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("no job of this host is about patch %.64q", patch))
	})
}

// PatchFile opens the classic file of a patch, as it was signed, and tells its
// size in bytes. Codes: UUID_INVALID, CANNOT_FIND_PATCH when the patch has no
// file or it is gone.
func (p *Pool) PatchFile(uuid xapi.UUID) (*os.File, int64, error) {
	_, rec, err := p.PatchByUUID(uuid)
	if err != nil {
		return nil, 0, err
	}
	if rec.Filename == "" {
		return nil, 0, xapi.NewError(xapi.CannotFindPatch)
	}
	dir, err := os.OpenRoot(p.PatchDir)
	if err != nil {
		return nil, 0, xapi.NewError(xapi.CannotFindPatch).Because(err)
	}
	defer dir.Close()
	f, err := dir.OpenFile(rec.Filename, os.O_RDONLY|syscall.O_NONBLOCK, 0) // it may have become a pipe
	if err != nil {
		return nil, 0, xapi.NewError(xapi.CannotFindPatch).Because(err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", rec.Filename)
	}
	if err != nil {
		f.Close()
		return nil, 0, xapi.NewError(xapi.CannotFindPatch).Because(err)
	}
	return f, st.Size(), nil
}

// FetchPatch is PatchFile for an agent, which may be far away.
func (p *Pool) FetchPatch(_ context.Context, uuid xapi.UUID) (io.ReadCloser, int64, error) {
	f, size, err := p.PatchFile(uuid)
	if err != nil {
		return nil, 0, err
	}
	return f, size, nil
}

// PatchByUUID finds a patch. Code: UUID_INVALID ["pool_patch", uuid].
func (p *Pool) PatchByUUID(uuid xapi.UUID) (ref xapi.Ref, rec Patch, err error) {
	err = p.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(ClassPatch, uuid)
		if !ok {
			return xapi.NewError(xapi.UUIDInvalid, ClassPatch, string(uuid))
		}
		ref = it.Ref
		return it.Decode(&rec)
	})
	return ref, rec, err
}

func (p *Pool) patch(ref xapi.Ref) (rec Patch, err error) {
	err = p.Store.View(func(v *store.View) error {
		rec, err = store.Get[Patch](v, ClassPatch, ref)
		return err
	})
	return rec, err
}

// deprecated logs that a call is kept only for old clients. does is what it does.
func (p *Pool) deprecated(call, does string, rec Patch) {
	p.Log.WithField("call", call).WithField("patch", rec.UUID).
		Warn("deprecated call: it " + does + "; use VDI.destroy on the patch's VDI")
}

// PatchClean deletes the file of the patch from the coordinator's patch-dir.
// It does not touch a VDI: for a patch in a VDI it does nothing. Deprecated.
// Codes: HANDLE_INVALID.
func (p *Pool) PatchClean(ctx context.Context, patch xapi.Ref) error {
	rec, err := p.patch(patch)
	if err != nil {
		return err
	}
	p.deprecated("pool_patch.clean", "only removes files from dom0", rec)
	if err := p.removeFile(rec.Filename); err != nil {
		p.Log.WithError(err).WithField("patch", rec.UUID).Warn("the patch file could not be removed")
	}
	return p.touch(ctx, ClassPatch, patch)
}

// PatchCleanOnHost deletes the file of the patch from the patch-dir of one
// host. Deprecated as PatchClean is. Codes: HANDLE_INVALID.
func (p *Pool) PatchCleanOnHost(ctx context.Context, patch, host xapi.Ref) error {
	rec, err := p.patch(patch)
	if err != nil {
		return err
	}
	err = p.Store.View(func(v *store.View) error {
		_, err := store.Get[Host](v, ClassHost, host)
		return err
	})
	if err != nil {
		return err
	}
	p.deprecated("pool_patch.clean_on_host", "only removes files from dom0", rec)
	if host != p.Self {
		return nil // only the coordinator keeps classic files
	}
	if err := p.removeFile(rec.Filename); err != nil {
		p.Log.WithError(err).WithField("patch", rec.UUID).Warn("the patch file could not be removed")
	}
	return p.touch(ctx, ClassPatch, patch)
}

// PatchPoolClean removes the file of the patch everywhere and destroys its
// VDI and its replicas; a host that is away does so when it is back. The record stays, with a VDI field that names nothing. Deprecated: use
// VDI.destroy. Codes: HANDLE_INVALID, VDI_IN_USE.
func (p *Pool) PatchPoolClean(ctx context.Context, patch xapi.Ref) error {
	rec, err := p.patch(patch)
	if err != nil {
		return err
	}
	p.deprecated("pool_patch.pool_clean", "removes files from dom0 and destroys the VDI", rec)
	return p.removeSources(ctx, patch, rec)
}

func (p *Pool) removeSources(ctx context.Context, patch xapi.Ref, rec Patch) error {
	if err := p.removeFile(rec.Filename); err != nil {
		return xapi.Internal("remove the file of patch %s (%s): %w", rec.NameLabel, rec.UUID, err)
	}
	if !rec.VDI.IsNull() {
		golden, _ := p.vdi(rec.VDI) // without a record it has no replicas that are known
		err := p.destroyGolden(ctx, rec.VDI)
		if err != nil && !xapi.Is(err, xapi.HandleInvalid) {
			return err
		}
		if err := p.removeReplicas(ctx, golden.UUID); err != nil {
			return fmt.Errorf("destroy the replicas of patch %s (%s): %w", rec.NameLabel, rec.UUID, err)
		}
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		var rec Patch
		if err := tx.Get(ClassPatch, patch, &rec); err != nil {
			return err
		}
		if !rec.VDI.IsNull() && tx.Has(ClassVDI, rec.VDI) {
			return nil // a new upload took the place meanwhile
		}
		rec.Filename, rec.VDI = "", xapi.NullRef
		tx.Put(ClassPatch, patch, rec)
		return nil
	})
}

// PatchDestroy removes file and VDI of the patch and then, when both are gone,
// its record: no other call ever deletes one. Codes: HANDLE_INVALID,
// PATCH_IS_APPLIED while any host has it or is getting it, VDI_IN_USE.
func (p *Pool) PatchDestroy(ctx context.Context, patch xapi.Ref) error {
	rec, err := p.patch(patch)
	if err != nil {
		return err
	}
	if err := p.Store.Update(ctx, func(tx *store.Tx) error { return p.assertUnapplied(tx, patch) }); err != nil {
		return err
	}
	if err := p.removeSources(ctx, patch, rec); err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if err := p.assertUnapplied(tx, patch); err != nil {
			return err
		}
		var rec Patch
		if err := tx.Get(ClassPatch, patch, &rec); err != nil {
			return err
		}
		here, err := p.sourcesOf(tx, rec)
		if err != nil {
			return err
		}
		if here.any() {
			return xapi.NewError(xapi.OtherOperationInProgress, "Pool_patch", string(patch),
				"the patch was uploaded again while it was being destroyed")
		}
		tx.Delete(ClassPatch, patch)
		return nil
	})
}

func (p *Pool) assertUnapplied(tx *store.Tx, patch xapi.Ref) error {
	if len(tx.Refs(ClassHostPatch, "pool_patch", string(patch))) > 0 {
		return xapi.NewError(xapi.PatchIsApplied)
	}
	// A job never opens again, so one that was done a moment ago is done.
	for _, ref := range tx.Refs(ClassJob, "patch", string(patch)) {
		var job Job
		if tx.Peek(ClassJob, ref, &job) == nil && job.State != JobDone {
			return xapi.NewError(xapi.OtherOperationInProgress, "Pool_patch", string(patch),
				"a "+string(job.Kind)+" of the patch is running")
		}
	}
	for _, it := range tx.List(ClassRun) {
		var run Run
		if err := it.Decode(&run); err != nil {
			return err
		}
		if run.Patch == patch && !run.State.Ended() {
			return xapi.NewError(xapi.OtherOperationInProgress, "Pool_patch", string(patch),
				fmt.Sprintf("run %s of the patch is %s", run.UUID, run.State))
		}
	}
	return nil
}

// HostPatchDestroy deletes only the record that a host has a patch. Codes:
// HANDLE_INVALID, OTHER_OPERATION_IN_PROGRESS while its apply runs.
func (p *Pool) HostPatchDestroy(ctx context.Context, ref xapi.Ref) error {
	var hp HostPatch
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		hp = HostPatch{}
		if err := tx.Get(ClassHostPatch, ref, &hp); err != nil {
			return err
		}
		if !hp.Applied && hp.OtherConfig[KeyState] != StateUnknown {
			return p.inProgress(tx, hp.PoolPatch, hp.Host)
		}
		tx.Delete(ClassHostPatch, ref)
		return nil
	})
	if err != nil {
		return err
	}
	return p.settlePoolApplied(ctx, hp.PoolPatch)
}

func (p *Pool) touch(ctx context.Context, class string, ref xapi.Ref) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if tx.Has(class, ref) {
			tx.Touch(class, ref)
		}
		return nil
	})
}

package pool

import (
	"context"
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// VDIClone makes a VDI with the same content in the same SR: in constant time
// where the SR has VDI_CLONE, else by a full copy, as VDI.clone always has
// done. The clone can be written to, also when the source cannot. driverParams
// are ignored. Codes: those of UseVDI and NewVDI, VDI_MISSING.
func (p *Pool) VDIClone(ctx context.Context, ref xapi.Ref, driverParams map[string]string) (xapi.Ref, error) {
	if host, yes := p.vdiElsewhere(ref); yes {
		return p.makeOn(ctx, host, "VDIClone", ref)
	}
	rec, repo, release, err := p.useVDI(ref)
	if err != nil {
		return "", err
	}
	defer release()
	return p.copyTo(ctx, source{ref, rec, repo}, rec.SR, copied(rec), nil)
}

// VDISnapshot is VDIClone with a read-only result that remembers its source
// and the time. Codes: those of VDIClone, SR_OPERATION_NOT_SUPPORTED [SR ref]
// where the SR has no VDI_SNAPSHOT.
func (p *Pool) VDISnapshot(ctx context.Context, ref xapi.Ref, driverParams map[string]string) (xapi.Ref, error) {
	if host, yes := p.vdiElsewhere(ref); yes {
		return p.makeOn(ctx, host, "VDISnapshot", ref)
	}
	rec, repo, release, err := p.useVDI(ref)
	if err != nil {
		return "", err
	}
	defer release()
	if !sr.Has(repo.Features(), sr.VDISnapshot) {
		return "", xapi.NewError(xapi.SROperationNotSupported, string(rec.SR))
	}
	made := copied(rec)
	made.IsASnapshot, made.SnapshotOf, made.SnapshotTime, made.ReadOnly = true, ref, p.Now().UTC(), true
	return p.copyTo(ctx, source{ref, rec, repo}, rec.SR, made, nil)
}

// VDICopy copies a VDI into another SR, or the same, and gives the new VDI; or,
// when into names a VDI, replaces the content of that one, and gives it back.
// base is a hint which blocks differ: it must exist and is otherwise ignored,
// for everything is copied. Codes: those of readVDI and NewVDI, VDI_MISSING,
// VDI_TOO_SMALL [into, bytes needed], VDI_READONLY [into], VDI_IN_USE [into, "copy"].
func (p *Pool) VDICopy(ctx context.Context, ref, dst, base, into xapi.Ref) (xapi.Ref, error) {
	if made, done, err := p.copyElsewhere(ctx, copyCall{ref, dst, base, into}); done || err != nil {
		return made, err
	}
	s, release, err := p.readVDI(ref)
	if err != nil {
		return "", err
	}
	defer release()
	rec, err := p.vdi(ref)
	if err != nil {
		return "", err
	}
	if !base.IsNull() {
		if _, err := p.vdi(base); err != nil {
			return "", err
		}
	}
	if into.IsNull() {
		return p.copyTo(ctx, s, dst, copied(rec), nil)
	}
	return into, p.copyInto(ctx, s, dst, into)
}

// VDIPoolMigrate moves a VDI to another SR and gives its new ref: it is copied,
// then takes the place of the old one, also in the record of a patch, and the
// old one is destroyed. options are ignored. Codes: those of VDICopy and
// VDIDestroy.
func (p *Pool) VDIPoolMigrate(ctx context.Context, ref, dst xapi.Ref, options map[string]string) (xapi.Ref, error) {
	if _, yes := p.vdiElsewhere(ref); yes {
		return p.migrateElsewhere(ctx, ref, dst)
	}
	if _, yes := p.elsewhere(dst); yes {
		return p.migrateElsewhere(ctx, ref, dst)
	}
	rec, repo, release, err := p.holdVDI(ref, "pool_migrate")
	if err != nil {
		return "", err
	}
	defer release()
	intentRef, in := p.newIntent(Intent{Kind: IntentDestroy, SR: rec.SR, VDI: rec.UUID, Ref: ref})
	defer p.storage.begin(in.UUID)()
	moved, err := p.copyTo(ctx, source{ref, rec, repo}, dst, rec, func(tx *store.Tx, successor xapi.Ref) error {
		return p.dropVDI(tx, intentRef, in, successor)
	})
	if err != nil {
		return "", err
	}
	if err := p.discard(ctx, repo, intentRef, in); err != nil {
		p.Log.WithError(err).WithField("VDI", rec.UUID).Error("the old image of a migrated VDI could not be destroyed; it is tried again at the next scan or start")
	}
	return moved, nil
}

// discard destroys the volume of an intent whose record has a successor.
func (p *Pool) discard(ctx context.Context, repo sr.Repository, intentRef xapi.Ref, in Intent) error {
	ctx, cancel := after(ctx)
	defer cancel()
	return p.undoVolumes(ctx, repo, intentRef, in)
}

// copied is the record of a copy of rec, which is no replica, whatever rec is.
func copied(rec VDI) VDI {
	rec.Damage, rec.OtherConfig = "", withoutReplica(rec.OtherConfig)
	rec.ReadOnly, rec.IsASnapshot, rec.SnapshotOf, rec.SnapshotTime = false, false, xapi.NullRef, xapi.Epoch
	return rec
}

// sizeOf is the true length of the source.
func (p *Pool) sizeOf(ctx context.Context, s source) (int64, error) {
	size, _, err := p.measure(ctx, s)
	return size, err
}

// progressOf reports to the task of ctx.
func progressOf(ctx context.Context) func(done, total int64) {
	t := task.FromContext(ctx)
	return func(done, total int64) {
		if total > 0 {
			t.Progress(float64(done) / float64(total))
		}
	}
}

// copyInto replaces the content of an existing VDI.
func (p *Pool) copyInto(ctx context.Context, s source, dst, into xapi.Ref) error {
	rec, repo, release, err := p.holdVDI(into, "copy")
	if err != nil {
		return err
	}
	defer release()
	if !dst.IsNull() && dst != rec.SR {
		return xapi.NewError(xapi.InvalidValue, "sr", string(dst))
	}
	if err := p.assertMutable(into, rec); err != nil {
		return err
	}
	size, err := p.sizeOf(ctx, s)
	if err != nil {
		return err
	}
	m, err := s.mapOf(ctx)
	if err != nil {
		return err
	}
	from, err := p.openLive(ctx, s.repo, s.ref, s.rec, sr.ReadOnly)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := p.openLive(ctx, repo, into, rec, sr.ReadWrite)
	if err != nil {
		return err
	}
	defer to.Close()
	if have, err := to.Seek(0, 2); err != nil || have < size {
		return errors.Join(xapi.NewError(xapi.VDITooSmall, string(into), strconv.FormatInt(size, 10)), err)
	}
	if err = p.dropMap(ctx, into, rec, repo); err == nil {
		err = replace(ctx, to, from, m)
	}
	if err != nil {
		return p.inSR(rec.SR, damaged(s.ref, err))
	}
	used, err := sr.Taken(ctx, repo, sr.Live(rec.UUID), to)
	if err != nil {
		return err
	}
	err = p.changeVDI(ctx, into, func(rec *VDI) { rec.PhysicalUtilisation = used })
	return errors.Join(err, p.refreshSizes(ctx, rec.SR, repo))
}

// replace makes the bytes of from, which m describes when it is not nil, those of to.
func replace(ctx context.Context, to, from *os.File, m *vdi.Map) error {
	if m != nil { // not while copying: to may be longer than the map
		if err := m.Verify(ctx, from, nil); err != nil {
			return err
		}
	}
	if err := zero(ctx, to); err != nil {
		return err
	}
	if err := vdi.Copy(ctx, to, from, progressOf(ctx)); err != nil {
		return err
	}
	return to.Sync()
}

// zero makes all of f read as zeros: by one hole, else by writing.
func zero(ctx context.Context, f *os.File) error {
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	return writeZeros(ctx, f, size)
}

func writeZeros(ctx context.Context, f *os.File, size int64) error {
	block := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(block)) {
		if err := sr.Alive(ctx); err != nil {
			return err
		}
		if _, err := f.WriteAt(block[:min(int64(len(block)), size-at)], at); err != nil {
			return err
		}
	}
	return nil
}

// VDIResize makes a VDI larger; the new size is rounded up to 4 KiB. Codes:
// those of UseVDI, INVALID_VALUE, VDI_TOO_SMALL [VDI ref, size now], VDI_READONLY,
// VDI_IN_USE [VDI ref, "resize"], VDI_MISSING.
func (p *Pool) VDIResize(ctx context.Context, ref xapi.Ref, size int64) error {
	size, err := checkSize(size)
	if err != nil {
		return err
	}
	if host, yes := p.vdiElsewhere(ref); yes {
		_, err := p.callOn(ctx, host, "VDIResize", resizeCall{ref, size})
		return err
	}
	rec, repo, release, err := p.holdVDI(ref, "resize")
	if err != nil {
		return err
	}
	defer release()
	if err := p.assertMutable(ref, rec); err != nil {
		return err
	}
	now, err := p.sizeOf(ctx, source{ref, rec, repo})
	if err != nil {
		return err
	}
	if size < now && size < rec.VirtualSize {
		return xapi.NewError(xapi.VDITooSmall, string(ref), strconv.FormatInt(now, 10))
	}
	if err := p.dropMap(ctx, ref, rec, repo); err != nil {
		return err
	}
	// A crash after this line leaves a record that is too small; the next
	// scan or start reads the size again.
	size = max(size, now)
	if err := repo.Resize(ctx, sr.Live(rec.UUID), size); err != nil {
		return p.inSR(rec.SR, err)
	}
	after, cancel := after(ctx)
	defer cancel()
	return p.Store.Update(after, func(tx *store.Tx) error {
		rec, err := store.Read[VDI](tx, ClassVDI, ref)
		if err != nil {
			return err
		}
		grown := size - rec.VirtualSize
		rec.VirtualSize = size
		tx.Put(ClassVDI, ref, rec)
		return allocate(tx, rec.SR, grown)
	})
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// NewVDI says how to make a VDI.
type NewVDI struct {
	SR xapi.Ref
	// VDI is the record to be; uuid, SR, sizes, location and the flags that
	// follow from what it is are filled in.
	VDI         VDI
	VirtualSize int64 // bytes
	// Room is how many bytes the SR must have to spare before anything is made,
	// beside what it has promised to others; they are promised to this VDI for
	// as long as it is in the making.
	Room int64
	// Fill writes the content into f, which lies at path and reads as zeros;
	// it does not close it. Nil: all zeros.
	Fill func(ctx context.Context, f *os.File, path string) error
	// Map gives, after Fill, the block map of what was written, which is kept
	// beside the image; the VDI is then not to be written to any more. Nil: none is kept.
	Map func() *vdi.Map
	// Commit adds to the transaction that makes the VDI visible. Nil: nothing.
	Commit func(tx *store.Tx, vdi xapi.Ref) error
}

// NewVDI makes a VDI: filled, synced and named on the SR, then, in one
// transaction, a record together with what Commit adds. Until then nothing is
// visible; any failure, also of Commit, also a cancel, takes all of it back.
// It is a Draft that never outlives its call. Codes: those of Fill and Commit,
// HANDLE_INVALID, SR_HAS_NO_PBDS, SR_NOT_ATTACHED,
// OTHER_OPERATION_IN_PROGRESS, OUT_OF_SPACE ["SR name (uuid)"].
func (p *Pool) NewVDI(ctx context.Context, n NewVDI) (xapi.Ref, error) {
	d, err := p.begin(ctx, n, Intent{Kind: IntentCreate})
	if err != nil {
		return "", err
	}
	return d.bear(ctx, n.Commit, func(ctx context.Context) (*vdi.Map, error) {
		if err := d.create(ctx); err != nil || n.Fill == nil {
			return nil, err
		}
		if err := d.open(ctx); err != nil {
			return nil, err
		}
		if err := n.Fill(ctx, d.file, d.path); err != nil || n.Map == nil {
			return nil, err
		}
		return n.Map(), nil
	})
}

// begin writes the intent of a VDI to be and makes sure that there is room.
func (p *Pool) begin(ctx context.Context, n NewVDI, in Intent) (*Draft, error) {
	repo, release, err := p.useSR(n.SR)
	if err != nil {
		return nil, err
	}
	rec := n.VDI
	in.SR, in.VDI, in.Ref, in.Record, in.Size, in.Room = n.SR, xapi.NewUUID(), xapi.NewRef(), &rec, n.VirtualSize, max(0, n.Room)
	ref, in := p.newIntent(in)
	end, _ := p.storage.claim(in.UUID)
	d := &Draft{p: p, repo: repo, ref: ref, in: in, release: release, end: end}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		if !tx.Has(ClassSR, n.SR) {
			return xapi.NewError(xapi.HandleInvalid, ClassSR, string(n.SR))
		}
		tx.Put(ClassIntent, ref, in)
		return nil
	})
	if err == nil {
		err = p.assertRoom(ctx, repo, ref, in)
	}
	if err != nil {
		defer d.letGo()
		_, uerr := d.unmake(ctx)
		return nil, joinUndo(p.inSR(n.SR, err), uerr)
	}
	return d, nil
}

// bear fills the draft and makes it a VDI; when that fails nothing is left but,
// of work that goes on after a restart, what is needed for that.
func (d *Draft) bear(ctx context.Context, commit func(*store.Tx, xapi.Ref) error, fill func(context.Context) (*vdi.Map, error)) (xapi.Ref, error) {
	defer d.letGo()
	m, err := fill(ctx)
	if err == nil {
		_, err = d.Publish(ctx, m, commit)
	}
	if err == nil {
		return d.in.Ref, nil
	}
	err = d.p.inSR(d.in.SR, err)
	if d.in.Kind == IntentCopy && errors.Is(context.Cause(ctx), task.ErrStopping) {
		return "", err
	}
	d.shut() // storage may refuse to destroy what is open
	born, uerr := d.unmake(ctx)
	if born {
		return d.in.Ref, nil // the commit had happened, only its answer was lost
	}
	return "", joinUndo(err, uerr)
}

// create makes the part volume.
func (d *Draft) create(ctx context.Context) error {
	v, err := d.repo.Create(ctx, d.p.part(d.in), d.in.Size)
	d.size = v.VirtualSize
	return err
}

// open opens the part volume for writing.
func (d *Draft) open(ctx context.Context) (err error) {
	part := d.p.part(d.in)
	if d.path, err = d.repo.Path(ctx, part); err != nil {
		return err
	}
	d.file, err = d.repo.Open(ctx, part, sr.ReadWrite)
	return err
}

// flush makes durable what was written into the part volume. Its length must
// not have changed.
func (d *Draft) flush() error {
	if d.file == nil {
		return nil
	}
	err := d.file.Sync()
	if errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("the file of VDI %s was closed before it was published: %w", d.in.VDI, err)
	}
	if err != nil {
		return err
	}
	end, err := d.file.Seek(0, 2)
	if err == nil && end != d.size {
		err = fmt.Errorf("the volume has %d bytes after it was filled, not %d", end, d.size)
	}
	return err
}

// name writes the map, and gives map and image the names they have for good.
func (d *Draft) name(ctx context.Context, m *vdi.Map) (digest string, err error) {
	part, live := d.p.part(d.in), sr.Live(d.in.VDI)
	if d.in.Attempt > 0 {
		if err := unname(ctx, d.repo, part, live); err != nil {
			return "", err
		}
	}
	if m != nil {
		if err := writeMap(ctx, d.repo, part.Map(), m); err != nil {
			return "", fmt.Errorf("write the block map of VDI %s: %w", d.in.VDI, err)
		}
		digest = m.Digest()
		if err := d.repo.Rename(ctx, part.Map(), live.Map()); err != nil {
			return "", err
		}
	}
	return digest, d.repo.Rename(ctx, part, live)
}

// unname takes back what name did before it was interrupted: nobody knows the
// volume under its live name yet.
func unname(ctx context.Context, repo sr.Repository, part, live sr.Name) error {
	_, err := repo.Path(ctx, part)
	if xapi.Is(err, xapi.VDINotAvailable) {
		if _, err = repo.Path(ctx, live); err == nil {
			err = repo.Rename(ctx, live, part)
		}
	}
	return errors.Join(err, destroyVolume(ctx, repo, part.Map()), destroyVolume(ctx, repo, live.Map()))
}

// record is the transaction that makes the VDI visible.
func (d *Draft) record(ctx context.Context, digest string, commit func(*store.Tx, xapi.Ref) error) error {
	used, err := volumeSize(ctx, d.repo, sr.Live(d.in.VDI))
	if err != nil {
		return err
	}
	stat, err := d.repo.Stat(ctx)
	if err != nil {
		return err
	}
	rec := fullVDI(*d.in.Record, d.in.SR, d.in.VDI)
	rec.VirtualSize, rec.PhysicalUtilisation = d.size, used
	rec.Map = digest
	switch {
	case digest == "":
		rec.Damage, rec.Checked = "", time.Time{}
	case !d.shares:
		rec.Damage, rec.Checked = "", d.p.Now().UTC()
	}
	return d.p.Store.Update(ctx, func(tx *store.Tx) error {
		now, err := store.Read[Intent](tx, ClassIntent, d.ref)
		if err != nil {
			return err
		}
		if now.Undo || now.Attempt != d.in.Attempt {
			return fmt.Errorf("VDI %s was undone meanwhile", d.in.VDI)
		}
		tx.Put(ClassVDI, d.in.Ref, rec)
		tx.Delete(ClassIntent, d.ref)
		if err := putSizes(tx, d.in.SR, stat, rec.VirtualSize); err != nil || commit == nil {
			return err
		}
		return commit(tx, d.in.Ref)
	})
}

// refuse makes sure that a failed transaction does not come true late. born
// tells that it has come true before.
func (d *Draft) refuse(ctx context.Context) (born bool, err error) {
	_, born, err = d.change(ctx, func(in *Intent) { in.Attempt++ })
	return born, err
}

// unmake takes back whatever was done. born tells that there is nothing to
// take back: the VDI is there.
func (d *Draft) unmake(ctx context.Context) (born bool, err error) {
	ctx, cancel := after(ctx)
	defer cancel()
	begun, born, err := d.change(ctx, func(in *Intent) { in.Undo = true })
	if err != nil || born || !begun {
		return born, err
	}
	return false, d.p.undoVolumes(ctx, d.repo, d.ref, d.in)
}

// change changes the intent, whose last transaction may have been lost. begun
// tells that it was there, born that it is not and the VDI is.
func (d *Draft) change(ctx context.Context, f func(*Intent)) (begun, born bool, err error) {
	ctx, cancel := after(ctx)
	defer cancel()
	if err := d.p.Store.Sync(ctx); err != nil {
		return false, false, err
	}
	var in Intent
	err = d.p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		if begun, born = tx.Has(ClassIntent, d.ref), false; !begun {
			born = tx.Has(ClassVDI, d.in.Ref)
			return nil
		}
		if in, err = store.Read[Intent](tx, ClassIntent, d.ref); err != nil {
			return err
		}
		f(&in)
		tx.Put(ClassIntent, d.ref, in)
		return nil
	})
	if err == nil && begun {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.in = in
	}
	return begun, born, err
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// IntentKind says what was about to happen.
type IntentKind string

// The kinds of an intent. The comment says what repair does with one that
// nobody looks after.
const (
	IntentCreate   IntentKind = "create"    // a VDI: its volume is destroyed
	IntentDestroy  IntentKind = "destroy"   // a VDI whose record is gone: its volume is destroyed
	IntentMakeSR   IntentKind = "make-sr"   // an SR: it is removed from disk
	IntentRemoveSR IntentKind = "remove-sr" // an SR: it is removed from disk, then its records
)

// Intent is written before something is done that no transaction covers, and
// deleted by the transaction that makes it true (class intent, never on the
// wire). Its uuid stands as the job in the names of part volumes.
type Intent struct {
	UUID    xapi.UUID  `json:"uuid"`
	Kind    IntentKind `json:"kind"`
	Host    xapi.Ref   `json:"host"` // that does it, and undoes it
	SR      xapi.Ref   `json:"SR"`
	VDI     xapi.UUID  `json:"VDI,omitempty"`
	Created time.Time  `json:"created"`
	// Undo tells that the operation has failed: a late commit must not make
	// it true any more.
	Undo bool `json:"undo,omitempty"`

	// The record that IntentDestroy took away, to put it back when the volume
	// cannot be destroyed.
	Record  *VDI       `json:"record,omitempty"`
	Ref     xapi.Ref   `json:"ref,omitempty"`
	Patches []xapi.Ref `json:"patches,omitempty"`

	// The SR of IntentMakeSR and IntentRemoveSR.
	SRUUID   xapi.UUID         `json:"sr_uuid,omitempty"`
	Type     string            `json:"type,omitempty"`
	Device   map[string]string `json:"device_config,omitempty"`
	SMConfig map[string]string `json:"sm_config,omitempty"`
}

// undoTime bounds what goes on after a call has failed or was cancelled.
const undoTime = 60 * time.Second

// after gives the context of what must be finished although ctx may have ended.
func after(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}

func (p *Pool) newIntent(in Intent) (xapi.Ref, Intent) {
	in.UUID, in.Host, in.Created = xapi.NewUUID(), p.Self, p.Now()
	return xapi.NewRef(), in
}

// NewVDI says how to make a VDI.
type NewVDI struct {
	SR xapi.Ref
	// VDI is the record to be; uuid, SR, sizes, location and the flags that
	// follow from what it is are filled in.
	VDI         VDI
	VirtualSize int64 // bytes
	// Room is how many bytes must be free in the SR before anything is made.
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
// Codes: those of Fill and Commit, HANDLE_INVALID, SR_HAS_NO_PBDS,
// SR_NOT_ATTACHED, OTHER_OPERATION_IN_PROGRESS, OUT_OF_SPACE ["SR name (uuid)"].
func (p *Pool) NewVDI(ctx context.Context, n NewVDI) (xapi.Ref, error) {
	return p.newVDI(ctx, n, func(ctx context.Context, repo sr.Repository, part sr.Name) error {
		if err := enoughRoom(ctx, repo, n.Room); err != nil {
			return err
		}
		if _, err := repo.Create(ctx, part, n.VirtualSize); err != nil || n.Fill == nil {
			return err
		}
		return fill(ctx, repo, part, n)
	})
}

func enoughRoom(ctx context.Context, repo sr.Repository, need int64) error {
	if need <= 0 {
		return nil
	}
	stat, err := repo.Stat(ctx)
	if err == nil && stat.Free < need {
		err = xapi.NewError(xapi.OutOfSpace, "").Because(fmt.Errorf("%d bytes are needed, %d are free", need, stat.Free))
	}
	return err
}

func fill(ctx context.Context, repo sr.Repository, part sr.Name, n NewVDI) error {
	path, err := repo.Path(ctx, part)
	if err != nil {
		return err
	}
	f, err := repo.Open(ctx, part, sr.ReadWrite)
	if err != nil {
		return err
	}
	if err = n.Fill(ctx, f, path); err == nil {
		err = f.Sync()
	}
	var end int64
	if err == nil {
		end, err = f.Seek(0, 2)
	}
	if cerr := f.Close(); cerr != nil && !errors.Is(cerr, os.ErrClosed) {
		err = errors.Join(err, cerr)
	}
	if err == nil && end != n.VirtualSize {
		err = fmt.Errorf("the volume has %d bytes after it was filled, not %d", end, n.VirtualSize)
	}
	return err
}

// newVDI is NewVDI with the part volume made by make.
func (p *Pool) newVDI(ctx context.Context, n NewVDI, make func(context.Context, sr.Repository, sr.Name) error) (xapi.Ref, error) {
	repo, release, err := p.useSR(n.SR)
	if err != nil {
		return "", err
	}
	defer release()
	b := birth{
		NewVDI: n, repo: repo, ref: xapi.NewRef(), uuid: xapi.NewUUID(),
	}
	b.intentRef, b.intent = p.newIntent(Intent{Kind: IntentCreate, SR: n.SR, VDI: b.uuid})
	defer p.storage.begin(b.intent.UUID)()
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		if !tx.Has(ClassSR, n.SR) {
			return xapi.NewError(xapi.HandleInvalid, ClassSR, string(n.SR))
		}
		tx.Put(ClassIntent, b.intentRef, b.intent)
		return nil
	})
	if err == nil {
		err = p.bear(ctx, b, make)
	}
	if err == nil {
		return b.ref, nil
	}
	born, uerr := p.unmake(ctx, b)
	if born {
		return b.ref, nil // the commit had happened, only its answer was lost
	}
	return "", joinUndo(p.inSR(n.SR, err), uerr)
}

// birth is a VDI on its way.
type birth struct {
	NewVDI
	repo      sr.Repository
	ref       xapi.Ref
	uuid      xapi.UUID
	intentRef xapi.Ref
	intent    Intent
}

// part names the volume of an intent before it is live.
func (p *Pool) part(in Intent) sr.Name {
	return sr.Part(sr.Owner{Pool: p.PoolUUID, Host: p.SelfUUID, Job: in.UUID}, in.VDI)
}

func (p *Pool) bear(ctx context.Context, b birth, make func(context.Context, sr.Repository, sr.Name) error) error {
	part, live := p.part(b.intent), sr.Live(b.uuid)
	if err := make(ctx, b.repo, part); err != nil {
		return err
	}
	digest, err := keepMap(ctx, b, part)
	if err != nil {
		return err
	}
	if err := b.repo.Rename(ctx, part, live); err != nil {
		return err
	}
	used, err := volumeSize(ctx, b.repo, live)
	if err != nil {
		return err
	}
	stat, err := b.repo.Stat(ctx)
	if err != nil {
		return err
	}
	rec := fullVDI(b.VDI, b.SR, b.uuid)
	rec.VirtualSize, rec.PhysicalUtilisation = b.VirtualSize, used
	rec.Map, rec.Damage, rec.Checked = digest, "", time.Time{}
	if digest != "" {
		rec.Checked = p.Now().UTC()
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		var in Intent
		if err := tx.Get(ClassIntent, b.intentRef, &in); err != nil {
			return err
		}
		if in.Undo {
			return fmt.Errorf("VDI %s was undone meanwhile", b.uuid)
		}
		tx.Put(ClassVDI, b.ref, rec)
		tx.Delete(ClassIntent, b.intentRef)
		if err := putSizes(tx, b.SR, stat, rec.VirtualSize); err != nil {
			return err
		}
		if b.Commit == nil {
			return nil
		}
		return b.Commit(tx, b.ref)
	})
}

// volumeSize is what a volume takes on the storage, in bytes.
func volumeSize(ctx context.Context, repo sr.Repository, n sr.Name) (int64, error) {
	f, err := repo.Open(ctx, n, sr.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return allocated(f)
}

// unmake takes back what bear did. born tells that there is nothing to take
// back: the VDI is there.
func (p *Pool) unmake(ctx context.Context, b birth) (born bool, err error) {
	ctx, cancel := after(ctx)
	defer cancel()
	if err := p.Store.Sync(ctx); err != nil {
		return false, err
	}
	begun := false
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		born, begun = false, tx.Has(ClassIntent, b.intentRef)
		if !begun {
			born = tx.Has(ClassVDI, b.ref)
			return nil
		}
		in := b.intent
		in.Undo = true
		tx.Put(ClassIntent, b.intentRef, in)
		return nil
	})
	if err != nil || born || !begun {
		return born, err
	}
	return false, p.undoVolumes(ctx, b.repo, b.intentRef, b.intent)
}

// undoVolumes destroys what an intent may have made or was to destroy, and
// then the intent.
func (p *Pool) undoVolumes(ctx context.Context, repo sr.Repository, ref xapi.Ref, in Intent) error {
	err := errors.Join(destroyVDI(ctx, repo, p.part(in)), destroyVDI(ctx, repo, sr.Live(in.VDI)))
	if err != nil {
		return err
	}
	return p.closeIntent(ctx, repo, ref, in)
}

// destroyVolume destroys a volume and tries once more when it fails: an answer
// may have been lost, and what is left over is a burden.
func destroyVolume(ctx context.Context, repo sr.Repository, n sr.Name) error {
	if err := repo.Destroy(ctx, n); err == nil {
		return nil
	}
	return repo.Destroy(ctx, n)
}

// destroyVDI destroys an image and the map beside it.
func destroyVDI(ctx context.Context, repo sr.Repository, n sr.Name) error {
	return errors.Join(destroyVolume(ctx, repo, n), destroyVolume(ctx, repo, n.Map()))
}

// closeIntent deletes an intent that is done with.
func (p *Pool) closeIntent(ctx context.Context, repo sr.Repository, ref xapi.Ref, in Intent) error {
	stat, err := repo.Stat(ctx)
	if err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		tx.Delete(ClassIntent, ref)
		return putSizes(tx, in.SR, stat, 0)
	})
}

// joinUndo puts what failed while undoing behind err; its code stays the first.
func joinUndo(err, undo error) error {
	if undo == nil {
		return err
	}
	return errors.Join(err, fmt.Errorf("undo, to be repeated at the next start: %w", undo))
}

// putSizes writes the room of an SR into its record, with allocated more bytes
// promised to VDIs. An SR that is gone is fine.
func putSizes(tx *store.Tx, ref xapi.Ref, s sr.Stat, allocated int64) error {
	if !tx.Has(ClassSR, ref) {
		return nil
	}
	var rec SR
	if err := tx.Get(ClassSR, ref, &rec); err != nil {
		return err
	}
	rec.PhysicalSize, rec.PhysicalUtilisation = s.PhysicalSize, s.PhysicalUtilisation
	rec.VirtualAllocation = max(0, rec.VirtualAllocation+allocated)
	tx.Put(ClassSR, ref, rec)
	return nil
}

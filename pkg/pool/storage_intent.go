package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// IntentKind says what was about to happen.
type IntentKind string

// The kinds of an intent. The comment says what repair does with one that
// nobody looks after.
const (
	IntentCreate   IntentKind = "create"    // a VDI: its volume is destroyed
	IntentDraft    IntentKind = "draft"     // a Draft: its volume is destroyed, once it has expired
	IntentCopy     IntentKind = "copy"      // a VDI.copy: goes on while its task is pending, else as create
	IntentDestroy  IntentKind = "destroy"   // a VDI whose record is gone: its volume is destroyed
	IntentDropMap  IntentKind = "drop-map"  // a VDI whose record claims no block map any more: the map is destroyed
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

	// Ref is the VDI that goes, or that is to be. Record is its record: the one
	// that IntentDestroy took away, to put it back when the volume cannot be
	// destroyed, or the one that is given to a VDI in the making.
	Record  *VDI       `json:"record,omitempty"`
	Ref     xapi.Ref   `json:"ref,omitempty"`
	Patches []xapi.Ref `json:"patches,omitempty"`

	// Of a VDI in the making.
	Size    int64             `json:"virtual_size,omitempty"` // bytes
	Room    int64             `json:"room,omitempty"`         // bytes it was promised on the SR, those it takes already included
	Expires time.Time         `json:"expires,omitzero"`       // of a draft: after it nobody needs it
	Note    map[string]string `json:"note,omitempty"`         // of a draft: what its owner must know to go on
	Attempt int64             `json:"attempt,omitempty"`      // counts the failed ones: a late commit of one is refused
	Source  xapi.Ref          `json:"source,omitempty"`       // of a copy: the VDI that is read
	Clone   bool              `json:"clone,omitempty"`        // of a draft: it began with blocks of another VDI
	Task    xapi.Ref          `json:"task,omitempty"`         // of a copy: that goes on with it after a crash

	// The SR of IntentMakeSR and IntentRemoveSR.
	SRUUID   xapi.UUID         `json:"sr_uuid,omitempty"`
	Type     string            `json:"type,omitempty"`
	Device   map[string]string `json:"device_config,omitempty"`
	SMConfig map[string]string `json:"sm_config,omitempty"`
}

// makes tells whether the intent is about a VDI in the making.
func (in Intent) makes() bool {
	return in.Kind == IntentCreate || in.Kind == IntentDraft || in.Kind == IntentCopy
}

// hasVolumes tells whether undoing the intent takes the SR that it names.
func (in Intent) hasVolumes() bool {
	return in.makes() || in.Kind == IntentDestroy || in.Kind == IntentDropMap
}

// claim takes an intent over; ok is false when somebody looks after it already.
func (s *Storage) claim(intent xapi.UUID) (end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active[intent] {
		return func() {}, false
	}
	if s.active == nil {
		s.active = map[xapi.UUID]bool{}
	}
	s.active[intent] = true
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.active, intent)
	}), true
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

// part names the volume of an intent of this host before it is live.
func (p *Pool) part(in Intent) sr.Name {
	return sr.Part(sr.Owner{Pool: p.PoolUUID, Host: p.SelfUUID, Job: in.UUID}, in.VDI)
}

// volumeSize is what a volume takes on the storage, in bytes.
func volumeSize(ctx context.Context, repo sr.Repository, n sr.Name) (int64, error) {
	f, err := repo.Open(ctx, n, sr.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return sr.Taken(ctx, repo, n, f)
}

// undoVolumes destroys what an intent may have made or was to destroy, and
// then the intent.
func (p *Pool) undoVolumes(ctx context.Context, repo sr.Repository, ref xapi.Ref, in Intent) error {
	var err error
	if in.Kind == IntentDropMap {
		err = destroyVolume(ctx, repo, sr.Live(in.VDI).Map())
	} else {
		err = errors.Join(destroyVDI(ctx, repo, p.part(in)), destroyVDI(ctx, repo, sr.Live(in.VDI)))
	}
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

// destroyVDI destroys an image and then the map beside it: an image that cannot
// be destroyed keeps its map.
func destroyVDI(ctx context.Context, repo sr.Repository, n sr.Name) error {
	if err := destroyVolume(ctx, repo, n); err != nil {
		return err
	}
	return destroyVolume(ctx, repo, n.Map())
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

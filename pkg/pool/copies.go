package pool

import (
	"context"
	"errors"
	"fmt"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// A copy of a VDI that has a block map is verified as it is made, gets a map of
// its own, and is durable: its intent names source and task, and after a restart
// it goes on where it was for as long as that task is pending. What the map
// tells of the part that is there need not be copied again.

// source is a VDI that is read, in use by the caller.
type source struct {
	ref  xapi.Ref
	rec  VDI
	repo sr.Repository
}

// mapOf reads the block map of a source, nil when it has none. Code:
// VDI_CONTENT_CHANGED [VDI ref, text].
func (s source) mapOf(ctx context.Context) (*vdi.Map, error) {
	if s.rec.Map == "" {
		return nil, nil
	}
	m, err := sr.ReadMap(ctx, s.repo, s.rec.UUID, s.rec.Map)
	if err != nil && sr.Alive(ctx) == nil {
		err = contentChanged(s.ref, "its block map is gone or damaged").Because(err)
	}
	return m, err
}

func contentChanged(ref xapi.Ref, text string) *xapi.Error {
	return xapi.NewError(xapi.VDIContentChanged, string(ref), text)
}

// damaged gives err, of reading VDI ref, the code VDI_CONTENT_CHANGED when it
// tells of damage.
func damaged(ref xapi.Ref, err error) error {
	var damage *vdi.DamageError
	if errors.As(err, &damage) {
		return contentChanged(ref, damage.Error()).Because(err)
	}
	return err
}

// copyTo makes a VDI in SR dst with the content of s and the record rec.
func (p *Pool) copyTo(ctx context.Context, s source, dst xapi.Ref, rec VDI, commit func(*store.Tx, xapi.Ref) error) (xapi.Ref, error) {
	size, taken, err := p.measure(ctx, s)
	if err != nil {
		return "", err
	}
	m, err := s.mapOf(ctx)
	if err != nil {
		return "", err
	}
	if m != nil {
		size = m.Size // not the length of a volume that was rounded up
		taken = min(taken, int64(len(m.Blocks))*vdi.MapBlock)
	}
	n, in := NewVDI{SR: dst, VDI: rec, VirtualSize: size}, Intent{Kind: IntentCreate}
	shares := dst == s.rec.SR && sr.Has(s.repo.Features(), sr.VDIClone)
	of := task.FromContext(ctx).Ref()
	if !shares {
		n.Room = taken
	}
	if !shares && m != nil && commit == nil && !of.IsNull() {
		in = Intent{Kind: IntentCopy, Source: s.ref, Task: of}
	}
	d, err := p.begin(ctx, n, in)
	if err != nil {
		return "", err
	}
	d.shares = shares
	return d.bear(ctx, settling(of, commit), func(ctx context.Context) (*vdi.Map, error) { return m, d.copy(ctx, s, m) })
}

// measure gives the true length of a source and what it takes, in bytes.
func (p *Pool) measure(ctx context.Context, s source) (size, taken int64, err error) {
	f, err := p.openLive(ctx, s.repo, s.ref, s.rec, sr.ReadOnly)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	if size, err = f.Seek(0, 2); err != nil {
		return 0, 0, fmt.Errorf("measure VDI %s: %w", s.rec.UUID, err)
	}
	taken, err = sr.Taken(ctx, s.repo, sr.Live(s.rec.UUID), f)
	return size, taken, err
}

// settling lets the transaction that makes a copy true tell its task: a task
// that a crash cuts off just then is no failure.
func settling(of xapi.Ref, commit func(*store.Tx, xapi.Ref) error) func(*store.Tx, xapi.Ref) error {
	return func(tx *store.Tx, made xapi.Ref) error {
		if commit != nil {
			if err := commit(tx, made); err != nil {
				return err
			}
		}
		return task.Settle(tx, of, string(made))
	}
}

// copy makes the part volume with the content of s, which m describes. A clone
// is not read: the map says what it has to be, as it does of the source.
func (d *Draft) copy(ctx context.Context, s source, m *vdi.Map) error {
	part := d.p.part(d.in)
	if d.shares {
		m = nil
	}
	err := sr.CopyVerified(ctx, d.repo, part, s.repo, sr.Live(s.rec.UUID), m, d.in.Kind == IntentCopy, progressOf(ctx))
	if err != nil {
		return damaged(s.ref, err)
	}
	if d.size, err = volumeLength(ctx, d.repo, part); err == nil && d.size < d.in.Size {
		err = fmt.Errorf("the copy of VDI %s has %d bytes, not %d", s.rec.UUID, d.size, d.in.Size)
	}
	return err
}

// OwnsTask tells whether a task is that of a copy that goes on after a restart,
// so that the repair of tasks leaves it alone.
func (p *Pool) OwnsTask(ref xapi.Ref) bool {
	copies, err := p.openCopies()
	if err != nil {
		return true // who cannot tell ends no task
	}
	for _, in := range copies {
		if in.Task == ref {
			return true
		}
	}
	return false
}

// openCopies lists the copies of this host whose task waits for them.
func (p *Pool) openCopies() (copies map[xapi.Ref]Intent, err error) {
	copies = map[xapi.Ref]Intent{}
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			if in.Kind == IntentCopy && in.Host == p.Self && p.kept(v, in) {
				copies[it.Ref] = in
			}
		}
		return nil
	})
	return copies, err
}

// ResumeCopies goes on with the copies that an earlier process has left, at the
// start of a host and after RepairStorage, which has undone those that nobody
// waits for. run drives the task with work, whose text is the ref of the copy.
func (p *Pool) ResumeCopies(ctx context.Context, run func(task xapi.Ref, work func(context.Context) (string, error)) error) error {
	copies, err := p.openCopies()
	if err != nil {
		return err
	}
	for ref, in := range copies {
		end, ours := p.storage.claim(in.UUID)
		if !ours {
			continue
		}
		// From here on no sweep takes it for dead, also when the task ends.
		err := run(in.Task, func(ctx context.Context) (string, error) {
			made, err := p.goOn(ctx, ref, in, end)
			return string(made), err
		})
		if err != nil {
			end()
			return err
		}
	}
	return nil
}

// goOn takes up a copy where it was cut off, and undoes it when that fails.
func (p *Pool) goOn(ctx context.Context, ref xapi.Ref, in Intent, end func()) (xapi.Ref, error) {
	defer end()
	rec, from, release, err := p.useVDI(in.Source)
	if err != nil {
		return "", p.giveUp(ctx, ref, in, err)
	}
	defer release()
	s := source{in.Source, rec, from}
	repo, releaseSR, err := p.useSR(in.SR)
	if err != nil {
		return "", p.giveUp(ctx, ref, in, err)
	}
	d := &Draft{p: p, repo: repo, ref: ref, in: in, release: releaseSR, end: end}
	return d.bear(ctx, settling(in.Task, nil), func(ctx context.Context) (*vdi.Map, error) {
		m, err := s.mapOf(ctx)
		if err == nil && m == nil {
			err = contentChanged(s.ref, "it has been written to since the copy was begun")
		}
		if err != nil {
			return nil, err
		}
		if err := unname(ctx, repo, p.part(in), sr.Live(in.VDI)); err != nil && !xapi.Is(err, xapi.VDINotAvailable) {
			return nil, err
		}
		return m, d.copy(ctx, s, m)
	})
}

// giveUp marks a copy that cannot go on, for the sweeper to undo.
func (p *Pool) giveUp(ctx context.Context, ref xapi.Ref, in Intent, cause error) error {
	ctx, cancel := after(ctx)
	defer cancel()
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		if tx.Has(ClassIntent, ref) {
			in.Undo = true
			tx.Put(ClassIntent, ref, in)
		}
		return nil
	})
	return errors.Join(cause, err)
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// An upload must survive the host that took it. So where other hosts can lead,
// its patch is unconfirmed at first: the bytes are whole, the records are there,
// and nothing may be done with them until enough hosts have the image, or see it
// on an SR that they share. The record says so, and whoever leads next goes on.

// Unconfirmed is what the record of a patch keeps until its upload is confirmed.
type Unconfirmed struct {
	Task  xapi.Ref  `json:"task,omitempty"` // of the upload
	Since time.Time `json:"since"`
}

// assertConfirmed refuses to work with a patch whose upload may still be undone.
func (rec Patch) assertConfirmed(ref xapi.Ref) error {
	if rec.Unconfirmed == nil {
		return nil
	}
	return xapi.NewError(xapi.OtherOperationInProgress, "Pool_patch", string(ref),
		"the upload is not confirmed: too few hosts have the patch yet")
}

// PatchConfirmed tells whether the upload of a patch is confirmed. Codes:
// HANDLE_INVALID, OTHER_OPERATION_IN_PROGRESS ["Pool_patch", patch, text].
func (p *Pool) PatchConfirmed(patch xapi.Ref) error {
	rec, err := p.patch(patch)
	if err != nil {
		return err
	}
	return rec.assertConfirmed(patch)
}

// UnconfirmedPatches lists the patches whose upload is not confirmed, and the
// task of each.
func (p *Pool) UnconfirmedPatches() (tasks map[xapi.Ref]xapi.Ref, err error) {
	tasks = map[xapi.Ref]xapi.Ref{}
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassPatch) {
			var rec Patch
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if rec.Unconfirmed != nil {
				tasks[it.Ref] = rec.Unconfirmed.Task
			}
		}
		return nil
	})
	return tasks, err
}

// Confirm sees to it that p.Copies hosts have the image of an unconfirmed patch,
// or all that are there, and then confirms the upload. When that fails, or is
// cancelled, the upload is undone; when this process is told to stop, it stays
// for whoever leads next. Codes: OPERATION_NOT_ALLOWED [text],
// HANDLE_INVALID when the patch was destroyed meanwhile, TASK_CANCELLED.
func (p *Pool) Confirm(ctx context.Context, patch xapi.Ref) error {
	rec, err := p.patch(patch)
	if err != nil || rec.Unconfirmed == nil {
		return err
	}
	note, err := p.spread(ctx, patch, rec)
	if err == nil {
		if note != "" {
			p.Log.WithField("patch", rec.UUID).Warn(note)
			task.FromContext(ctx).Output(note)
		}
		err = p.confirm(ctx, patch)
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil && !xapi.Is(context.Cause(ctx), xapi.TaskCancelled) {
		return err
	}
	end, cancel := after(ctx)
	defer cancel()
	return joinUndo(err, p.undoUpload(end, patch, rec))
}

// confirm writes that the upload is confirmed. A restart before its task has
// ended is no failure of it then.
func (p *Pool) confirm(ctx context.Context, patch xapi.Ref) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Patch](tx, ClassPatch, patch)
		if err != nil || rec.Unconfirmed == nil {
			return err
		}
		of := rec.Unconfirmed.Task
		rec.Unconfirmed = nil
		tx.Put(ClassPatch, patch, rec)
		return task.Settle(tx, of, string(patch))
	})
}

// spread brings the image of a patch to as many hosts as must have it. note
// tells why fewer do where no more can. A host that is not connected just now
// and not known to be away is waited for: it may be about to come to a new leader.
func (p *Pool) spread(ctx context.Context, patch xapi.Ref, rec Patch) (note string, err error) {
	limit, cancel := context.WithTimeout(ctx, p.CopiesTimeout)
	defer cancel()
	var refused []error
	for tried := map[xapi.Ref]bool{}; ; {
		c, err := p.copiesOf(rec)
		if err != nil {
			return "", err
		}
		want := min(p.Copies, len(c.have)+len(c.ready)+len(c.expected))
		if len(c.have) >= want {
			return fewer(len(c.have), p.Copies, "no other host is there"), nil
		}
		if p.StageOn == nil {
			return fewer(len(c.have), p.Copies, "no other host can be asked to take it"), nil
		}
		i := slices.IndexFunc(c.ready, func(h xapi.Ref) bool { return !tried[h] })
		if limit.Err() != nil || i < 0 && len(c.expected) == 0 {
			return "", tooFew(len(c.have), want, refused)
		}
		if i < 0 {
			pause(limit, expectEvery)
		} else {
			tried[c.ready[i]] = true
			if err := p.StageOn(limit, patch, c.ready[i]); err != nil {
				p.Log.WithError(err).WithField("host", p.hostName(c.ready[i])).Warn("a host does not take the image of an upload")
				refused = append(refused, fmt.Errorf("%s: %w", p.hostName(c.ready[i]), err))
			}
		}
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
	}
}

// expectEvery is how often it is looked whether a host that is expected is there.
const expectEvery = 200 * time.Millisecond

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// fewer says that an upload is confirmed with fewer copies than it should have.
func fewer(have, want int, why string) string {
	if have >= want {
		return ""
	}
	return fmt.Sprintf("the image is on %d of %d hosts: %s", have, want, why)
}

func tooFew(have, want int, why []error) error {
	text := fmt.Sprintf("%d hosts must have the image before the upload is confirmed, and only %d could get it in time", want, have)
	cause := errors.Join(why...)
	if cause != nil {
		text += ": " + brief(cause)
	}
	return xapi.NewError(xapi.OperationNotAllowed, text).Because(cause)
}

// copies are the hosts as one upload sees them: those that have an image equal
// to that of the patch in an SR that they have plugged, and of the others those
// that can be asked to take it, and those that may come. The ones that may lead
// are first, each group in database order.
type copies struct {
	have            map[xapi.Ref]bool
	ready, expected []xapi.Ref
}

func (p *Pool) copiesOf(rec Patch) (c copies, err error) {
	c.have = map[xapi.Ref]bool{}
	var members []xapi.Ref
	err = p.Store.View(func(v *store.View) error {
		golden, err := store.Get[VDI](v, ClassVDI, rec.VDI)
		if err != nil {
			return err
		}
		images := []xapi.Ref{rec.VDI}
		if golden.Map != "" {
			images = v.Refs(ClassVDI, "_map", golden.Map)
		}
		for _, ref := range images {
			if err := hostsWithVDI(v, ref, c.have); err != nil {
				return err
			}
		}
		for _, it := range v.List(ClassHost) {
			var h Host
			if err := it.Decode(&h); err != nil {
				return err
			}
			here := it.Ref == p.Self || p.Connected == nil || p.Connected(it.Ref)
			switch {
			case c.have[it.Ref]:
			case !here && h.Away.IsZero():
				c.expected = append(c.expected, it.Ref)
			case !here:
			case h.Coordinator:
				c.ready = append(c.ready, it.Ref)
			default:
				members = append(members, it.Ref)
			}
		}
		return nil
	})
	c.ready = append(c.ready, members...)
	return c, err
}

// hostsWithVDI adds the hosts that have the SR of a good VDI plugged.
func hostsWithVDI(v *store.View, ref xapi.Ref, have map[xapi.Ref]bool) error {
	rec, err := store.Get[VDI](v, ClassVDI, ref)
	if err != nil || rec.Missing || rec.Damage != "" {
		return err
	}
	for _, link := range v.Refs(ClassPBD, "SR", string(rec.SR)) {
		pbd, err := store.Get[PBD](v, ClassPBD, link)
		if err != nil {
			return err
		}
		if pbd.CurrentlyAttached {
			have[pbd.Host] = true
		}
	}
	return nil
}

// hostName is the name of a host for people.
func (p *Pool) hostName(ref xapi.Ref) string {
	var h Host
	err := p.Store.View(func(v *store.View) (err error) {
		h, err = store.Get[Host](v, ClassHost, ref)
		return err
	})
	if err != nil {
		return string(ref)
	}
	return fmt.Sprintf("%s (%s)", h.NameLabel, h.UUID)
}

// undoUpload takes back an upload that was not confirmed, and the copies of it
// that were made. Where an image lies on another host that one destroys it, when it
// is there again.
func (p *Pool) undoUpload(ctx context.Context, patch xapi.Ref, rec Patch) error {
	vdi, err := p.vdi(rec.VDI)
	if err == nil {
		p.undoCopies(ctx, vdi)
	}
	switch {
	case xapi.Is(err, xapi.HandleInvalid):
	case err != nil:
		return err
	case p.storage.repository(vdi.SR) != nil:
		if err := p.VDIDestroy(ctx, rec.VDI); err != nil && !xapi.Is(err, xapi.HandleInvalid) {
			return err
		}
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		now, err := store.Read[Patch](tx, ClassPatch, patch)
		if xapi.Is(err, xapi.HandleInvalid) || err == nil && now.Unconfirmed == nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := p.leaveToItsHost(tx, rec.VDI); err != nil {
			return err
		}
		if len(tx.Refs(ClassHostPatch, "pool_patch", string(patch))) == 0 {
			tx.Delete(ClassPatch, patch)
			return nil
		}
		now.VDI, now.Unconfirmed = xapi.NullRef, nil // of a patch that was cleaned before
		tx.Put(ClassPatch, patch, now)
		return nil
	})
}

// undoCopies destroys the replicas of a golden image that is to go, and cancels
// what makes further ones. What cannot be destroyed now goes with the next
// CollectReplicas, for its golden image is gone.
func (p *Pool) undoCopies(ctx context.Context, golden VDI) {
	err := p.endStaging(ctx, golden.Map)
	if err == nil {
		err = p.removeReplicas(ctx, golden.UUID)
	}
	if err != nil {
		p.Log.WithError(err).WithField("VDI", golden.UUID).Warn("copies of an upload that failed could not be destroyed; housekeeping does it")
	}
}

// endStaging cancels the open jobs that make an image with a map, and does not
// wait for their end.
func (p *Pool) endStaging(ctx context.Context, digest string) error {
	var open []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassJob) {
			var job Job
			if err := it.Decode(&job); err != nil {
				return err
			}
			if job.State != JobDone && job.Kind == JobCall && digest != "" && mapOfCall(job) == digest {
				open = append(open, it.Ref)
			}
		}
		return nil
	})
	for _, ref := range open {
		err = errors.Join(err, p.JobCancel(ctx, ref))
	}
	return err
}

// leaveToItsHost deletes the record of a VDI and tells the host that has its SR
// to destroy the volume.
func (p *Pool) leaveToItsHost(tx *store.Tx, ref xapi.Ref) error {
	if !tx.Has(ClassVDI, ref) {
		return nil
	}
	rec, err := store.Read[VDI](tx, ClassVDI, ref)
	if err != nil {
		return err
	}
	if links := tx.Refs(ClassPBD, "SR", string(rec.SR)); len(links) > 0 {
		pbd, err := store.Read[PBD](tx, ClassPBD, links[0])
		if err != nil {
			return err
		}
		intent, in := p.newIntent(Intent{Kind: IntentDestroy, SR: rec.SR, VDI: rec.UUID, Ref: ref})
		in.Host = pbd.Host
		tx.Put(ClassIntent, intent, in)
	}
	tx.Delete(ClassVDI, ref)
	return nil
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// VerifyReport is what a look at a whole image has found.
type VerifyReport struct {
	VDI     xapi.Ref
	Checked time.Time
	Blocks  int64 // of vdi.MapBlock bytes that the map has
	Damaged int64 // of them and of those that should be zeros; 0 also when the map itself is damaged
	// Damage says what is wrong, as the record keeps it; "" when nothing is.
	Damage string
}

// VDICheck is what is known about the state of one image that has a block map.
type VDICheck struct {
	VDI     xapi.Ref
	UUID    xapi.UUID
	Map     string    // digest of the block map
	Checked time.Time // zero: never
	Damage  string    // "": none was found
}

// VDIChecks lists what is known about the images with a block map.
func (p *Pool) VDIChecks() (out []VDICheck, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassVDI) {
			var rec VDI
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if rec.Map != "" {
				out = append(out, VDICheck{VDI: it.Ref, UUID: rec.UUID, Map: rec.Map, Checked: rec.Checked, Damage: rec.Damage})
			}
		}
		return nil
	})
	return out, err
}

// DamagedMap is the damage of an image whose map cannot be held against the
// digest in the record.
const DamagedMap = "its block map is gone or damaged"

func noMap(rec VDI) error {
	return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("VDI %s has no block map: only images of patches, which never change, have one", rec.UUID))
}

// VDIVerify reads a whole image and holds it against its block map, and that
// against the digest in the record. What it finds is in the report and in the
// record; damage also raises one message, which goes again with the damage.
// Progress shows in the task of ctx.
//
// Codes: those of UseVDI, VDI_MISSING, OPERATION_NOT_ALLOWED for a VDI without a
// map, TASK_CANCELLED.
func (p *Pool) VDIVerify(ctx context.Context, ref xapi.Ref) (VerifyReport, error) {
	if host, yes := p.vdiElsewhere(ref); yes {
		return p.verifyOn(ctx, host, ref)
	}
	rec, repo, release, err := p.useVDI(ref)
	if err != nil {
		return VerifyReport{}, err
	}
	defer release()
	t := task.FromContext(ctx)
	report, err := p.verify(ctx, look{ref, rec, repo}, func(done, total int64) {
		if total > 0 {
			t.Progress(float64(done) / float64(total))
		}
	})
	if err != nil {
		return report, err
	}
	return report, p.noteReport(ctx, rec, report, "")
}

// look is a VDI that somebody makes sure stays as it is.
type look struct {
	ref  xapi.Ref
	rec  VDI
	repo sr.Repository
}

// verify holds an image against its map; it changes nothing.
func (p *Pool) verify(ctx context.Context, l look, progress func(done, total int64)) (r VerifyReport, err error) {
	r.VDI = l.ref
	if l.rec.Map == "" {
		return r, noMap(l.rec)
	}
	f, err := p.openLive(ctx, l.repo, l.ref, l.rec, sr.ReadOnly)
	if err != nil {
		return r, err
	}
	defer f.Close()
	m, err := sr.ReadMap(ctx, l.repo, l.rec.UUID, l.rec.Map)
	switch {
	case sr.Alive(ctx) != nil:
		return r, sr.Alive(ctx)
	case err != nil && !p.answers(ctx, l.repo):
		return r, fmt.Errorf("read the block map of VDI %s: %w", l.rec.UUID, err)
	case err != nil:
		r.Damage = DamagedMap
	default:
		r.Blocks = int64(len(m.Blocks))
		if err := p.holdAgainst(ctx, &r, l, f, m, progress); err != nil {
			return r, fmt.Errorf("verify VDI %s: %w", l.rec.UUID, err)
		}
	}
	r.Checked = p.Now().UTC()
	return r, nil
}

// holdAgainst fills in what is wrong with the bytes of f. An SR that does not
// answer is an error, one that answers and cannot read them has lost them.
func (p *Pool) holdAgainst(ctx context.Context, r *VerifyReport, l look, f *os.File, m *vdi.Map, progress func(done, total int64)) error {
	err := m.Verify(ctx, f, progress)
	var damage *vdi.DamageError
	switch {
	case errors.As(err, &damage):
		r.Damaged, r.Damage = damage.Total, damage.Error()
	case err == nil || sr.Alive(ctx) != nil || !errors.Is(err, syscall.EIO) || !p.answers(ctx, l.repo):
		return err
	default:
		r.Damaged, r.Damage = 1, "it cannot be read to its end: "+err.Error()
	}
	return nil
}

// answers tells whether an SR is there at all.
func (p *Pool) answers(ctx context.Context, repo sr.Repository) bool {
	_, err := repo.Stat(ctx)
	return err == nil
}

// VDIDamaged records that somebody else has found an image damaged, such as a
// host that was about to execute it, and raises the message. What a whole check
// has found before says more and stays. Code: HANDLE_INVALID.
func (p *Pool) VDIDamaged(ctx context.Context, ref xapi.Ref, text string) error {
	rec, err := p.vdi(ref)
	if err != nil || rec.Map == "" || rec.Damage != "" {
		return err
	}
	return p.noteReport(ctx, rec, VerifyReport{VDI: ref, Damage: text}, "")
}

// DamageSaid takes it from another host that an image is damaged. It is believed of
// what that host works on. Any other image is looked at by the host that has it: the
// word of one host must not take an image from all. Code: HANDLE_INVALID.
func (p *Pool) DamageSaid(ctx context.Context, host, ref xapi.Ref, text string) error {
	rec, err := p.vdi(ref)
	if err != nil || rec.Map == "" || rec.Damage != "" {
		return err
	}
	believed := false
	err = p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		believed, err = p.worksOn(tx, host, rec.SR)
		return err
	})
	if err != nil {
		return err
	}
	if believed {
		return p.VDIDamaged(ctx, ref, text)
	}
	p.Log.WithField("VDI", rec.UUID).WithField("host", host).WithField("damage", text).Warn("a host says that an image is damaged; it is looked at")
	if other, yes := p.elsewhere(rec.SR); yes {
		return p.leaveCall(ctx, other, "VDIVerify", ref)
	}
	return p.changeVDI(ctx, ref, func(rec *VDI) { rec.Checked = longAgo }) // Scrub takes it next
}

// longAgo is when an image was checked that is to be checked at once.
var longAgo = time.Unix(1, 0).UTC()

// noteReport writes what was found into the record of rec, which was looked at,
// and keeps the messages about it in step: one for a damage, as long as it
// stands. mended names the message that follows a damage which is gone; "": none.
func (p *Pool) noteReport(ctx context.Context, looked VDI, r VerifyReport, mended string) error {
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[VDI](tx, ClassVDI, r.VDI)
		if err != nil || rec.Map != looked.Map {
			return err // it has become another
		}
		if !r.Checked.IsZero() {
			rec.Checked = r.Checked
		}
		before := rec.Damage
		rec.Damage = r.Damage
		tx.Put(ClassVDI, r.VDI, rec)
		if before == r.Damage {
			return nil
		}
		return p.tellDamage(tx, rec, mended)
	})
	if err != nil {
		return fmt.Errorf("record the check of VDI %s: %w", looked.UUID, err)
	}
	return nil
}

// untellDamage removes the messages about the damage of an image.
func untellDamage(tx *store.Tx, id xapi.UUID) error {
	for _, it := range tx.List(ClassMessage) {
		var m Message
		if err := it.Decode(&m); err != nil {
			return err
		}
		if m.ObjUUID == id && (m.Name == MessageVDIDamaged || m.Name == MessageVDIRepaired) {
			tx.Delete(ClassMessage, it.Ref)
		}
	}
	return nil
}

// forgetDamage removes what was said about an image that is gone for good.
func (p *Pool) forgetDamage(ctx context.Context, rec VDI) {
	if rec.Map == "" || rec.Checked.IsZero() && rec.Damage == "" {
		return
	}
	ctx, cancel := after(ctx)
	defer cancel()
	err := p.Store.Update(ctx, func(tx *store.Tx) error { return untellDamage(tx, rec.UUID) })
	if err != nil {
		p.Log.WithError(err).WithField("VDI", rec.UUID).Warn("the messages about the damage of a destroyed VDI could not be removed: remove them by hand")
	}
}

// tellDamage replaces the messages about the damage of an image by what holds now.
func (p *Pool) tellDamage(tx *store.Tx, rec VDI, mended string) error {
	if err := untellDamage(tx, rec.UUID); err != nil {
		return err
	}
	var where SR
	if err := tx.Get(ClassSR, rec.SR, &where); err != nil && !xapi.Is(err, xapi.HandleInvalid) {
		return err
	}
	about := fmt.Sprintf("VDI %s (%s) on SR %s (%s)", rec.NameLabel, rec.UUID, where.NameLabel, where.UUID)
	m := Message{Name: mended, Priority: 4, Cls: "VDI", ObjUUID: rec.UUID, Body: about + " was damaged and is good again"}
	if rec.Damage != "" {
		m.Name, m.Priority = MessageVDIDamaged, 2
		m.Body = fmt.Sprintf("%s is damaged: %s. %s", about, rec.Damage, cureOf(rec))
	}
	if m.Name != "" {
		p.putMessage(tx, xapi.NewRef(), m)
	}
	return nil
}

// cureOf says what helps a damaged image.
func cureOf(rec VDI) string {
	if rec.Damage == DamagedMap {
		return fmt.Sprintf("`patchd vdi repair %s` makes the map again from the image, or takes it from a copy", rec.UUID)
	}
	return fmt.Sprintf("`patchd vdi repair %s` takes good blocks from another VDI; where none has them, destroy the VDI and upload the patch again", rec.UUID)
}

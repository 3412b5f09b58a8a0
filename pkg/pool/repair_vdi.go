package pool

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// VDIRepair makes a damaged image again what its block map says. Blocks come
// from VDIs of the SRs plugged here: first those with the same map, then any
// whose map has a block with the same sum, such as an earlier revision; then from
// other hosts that have an image with the same map. No byte is written that was not
// checked. A block map that is gone or damaged is made again from the image when
// that is what the record says, else taken from a VDI with the same map. In the end the whole image is verified. A repair that was
// interrupted is begun again; what it had mended stays.
//
// Codes: those of UseVDI, VDI_IN_USE [VDI ref, "repair"], VDI_MISSING,
// OPERATION_NOT_ALLOWED for a VDI without a map, VDI_CONTENT_CHANGED [VDI ref,
// text] when there is not enough to repair it from, TASK_CANCELLED.
func (p *Pool) VDIRepair(ctx context.Context, ref xapi.Ref) error {
	if host, yes := p.vdiElsewhere(ref); yes {
		_, err := p.callOn(ctx, host, callRepair, ref)
		return err
	}
	if err := p.repairVDI(ctx, ref); err != nil {
		return err
	}
	if err := p.VDIUpdate(ctx, ref); err != nil {
		p.Log.WithError(err).WithField("VDI", ref).Warn("the sizes of a repaired VDI could not be read; the next scan does it")
	}
	return nil
}

func (p *Pool) repairVDI(ctx context.Context, ref xapi.Ref) error {
	rec, repo, release, err := p.holdVDI(ref, "repair")
	if err != nil {
		return err
	}
	defer release()
	if rec.Map == "" {
		return noMap(rec)
	}
	l := look{ref, rec, repo}
	donors, letGo, err := p.donors(ctx, l)
	if err != nil {
		return err
	}
	defer letGo()
	f, err := p.openLive(ctx, repo, ref, rec, sr.ReadWrite)
	if err != nil {
		return err
	}
	m, err := p.mendMap(ctx, l, f, donors)
	if err == nil {
		err = p.mendBlocks(ctx, l, f, m, donors)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	report, err := p.verify(ctx, l, nil)
	if err != nil {
		return err
	}
	if err := p.noteReport(ctx, rec, report, MessageVDIRepaired); err != nil {
		return err
	}
	if report.Damage != "" {
		return xapi.NewError(xapi.VDIContentChanged, string(ref), report.Damage)
	}
	return nil
}

// donor is a VDI that may have good blocks.
type donor struct {
	look
	m *vdi.Map
	f *os.File
}

// maxDonors bounds the images that a repair has open at once.
const maxDonors = 64

// donors opens the VDIs that a repair can take blocks from: those with the same
// map first. One that is in use for something else, or whose map cannot be read,
// is passed over.
func (p *Pool) donors(ctx context.Context, l look) (list []donor, letGo func(), err error) {
	var same, others []xapi.Ref
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassVDI) {
			var rec VDI
			if err := it.Decode(&rec); err != nil {
				return err
			}
			switch {
			case it.Ref == l.ref || rec.Map == "" || rec.Missing:
			case rec.Map == l.rec.Map:
				same = append(same, it.Ref)
			default:
				others = append(others, it.Ref)
			}
		}
		return nil
	})
	var undo []func()
	letGo = func() {
		for _, f := range undo {
			f()
		}
	}
	for _, ref := range append(same, others...) {
		if err != nil || len(list) == maxDonors {
			break
		}
		d, closeDonor, ok := p.openDonor(ctx, ref)
		if ok {
			list, undo = append(list, d), append(undo, closeDonor)
		}
		err = sr.Alive(ctx)
	}
	if err != nil {
		letGo()
		return nil, nil, err
	}
	return list, letGo, nil
}

func (p *Pool) openDonor(ctx context.Context, ref xapi.Ref) (d donor, closeDonor func(), ok bool) {
	rec, repo, release, err := p.useVDI(ref)
	if err != nil {
		return d, nil, false
	}
	d.look = look{ref, rec, repo}
	if d.m, err = sr.ReadMap(ctx, repo, rec.UUID, rec.Map); err == nil {
		d.f, err = repo.Open(ctx, sr.Live(rec.UUID), sr.ReadOnly)
	}
	if err != nil {
		release()
		p.Log.WithError(err).WithField("VDI", rec.UUID).Debug("nothing can be taken from this VDI")
		return d, nil, false
	}
	return d, func() { d.f.Close(); release() }, true
}

// mendMap gives the map of an image, and writes it again when it is gone or
// damaged.
func (p *Pool) mendMap(ctx context.Context, l look, f *os.File, donors []donor) (*vdi.Map, error) {
	m, err := sr.ReadMap(ctx, l.repo, l.rec.UUID, l.rec.Map)
	if err == nil {
		return m, nil
	}
	if !p.answers(ctx, l.repo) {
		return nil, fmt.Errorf("read the block map of VDI %s: %w", l.rec.UUID, errors.Join(sr.Alive(ctx), err))
	}
	for _, d := range donors {
		if d.rec.Map == l.rec.Map {
			return d.m, p.replaceMap(ctx, l, d.m)
		}
	}
	m, err = vdi.BuildMap(ctx, f, l.rec.VirtualSize)
	if err != nil {
		return nil, fmt.Errorf("read VDI %s: %w", l.rec.UUID, err)
	}
	if m.Digest() != l.rec.Map {
		if far := p.fetchMap(ctx, l.rec); far != nil {
			return far, p.replaceMap(ctx, l, far)
		}
		return nil, xapi.NewError(xapi.VDIContentChanged, string(l.ref),
			DamagedMap+", the image is damaged too, and no VDI of the SRs plugged here has the same map: destroy it and upload the patch again")
	}
	return m, p.replaceMap(ctx, l, m)
}

// replaceMap writes the block map of a VDI that is held. Until it is there the
// image counts as damaged; a part that a crash leaves is swept.
func (p *Pool) replaceMap(ctx context.Context, l look, m *vdi.Map) error {
	id := xapi.NewUUID()
	defer p.storage.begin(id)()
	part := sr.Part(sr.Owner{Pool: p.PoolUUID, Host: p.SelfUUID, Job: id}, l.rec.UUID).Map()
	if err := fault.Point("pool.map.replace"); err != nil {
		return err
	}
	err := writeMap(ctx, l.repo, part, m)
	if err == nil {
		err = l.repo.Destroy(ctx, sr.Live(l.rec.UUID).Map())
	}
	if err == nil {
		err = l.repo.Rename(ctx, part, sr.Live(l.rec.UUID).Map())
	}
	if err != nil {
		end, cancel := after(ctx)
		defer cancel()
		return fmt.Errorf("write the block map of VDI %s: %w", l.rec.UUID, errors.Join(p.inSR(l.rec.SR, err), l.repo.Destroy(end, part)))
	}
	return fault.Point("pool.map.replace.done")
}

// mendBlocks writes good blocks over damaged ones.
func (p *Pool) mendBlocks(ctx context.Context, l look, f *os.File, m *vdi.Map, donors []donor) error {
	t := task.FromContext(ctx)
	repaired, err := vdi.Repair(ctx, f, m, sourcesOf(m, donors), func(done, total int64) {
		if total > 0 {
			t.Progress(0.5 * float64(done) / float64(total)) // the other half is the check
		}
	})
	if repaired > 0 {
		p.Log.WithField("VDI", l.rec.UUID).WithField("blocks", repaired).Warn("damaged blocks of an image were repaired")
	}
	var left *vdi.DamageError
	switch {
	case errors.As(err, &left):
		return p.mendFromOthers(ctx, l, f, m, left)
	case err != nil:
		return fmt.Errorf("repair VDI %s: %w", l.rec.UUID, p.inSR(l.rec.SR, err))
	}
	return nil
}

// fetchMap gets the block map of a VDI from another host; nil: no host has it.
func (p *Pool) fetchMap(ctx context.Context, rec VDI) *vdi.Map {
	if p.Fetcher == nil {
		return nil
	}
	m, err := p.Fetcher.FetchMap(ctx, rec.Map)
	if err == nil && m.Digest() == rec.Map {
		return m
	}
	p.Log.WithError(err).WithField("VDI", rec.UUID).Debug("no other host gives the block map")
	return nil
}

// mendFromOthers writes over damaged blocks, for which nothing here is good, those
// of other hosts. Where none has the image the damage is the error.
func (p *Pool) mendFromOthers(ctx context.Context, l look, f *os.File, m *vdi.Map, left *vdi.DamageError) error {
	if p.fetchMap(ctx, l.rec) == nil {
		return errors.Join(sr.Alive(ctx), p.notEnough(ctx, l, left))
	}
	t := task.FromContext(ctx)
	err := p.Fetcher.Pull(ctx, m, f, true, func(done, total int64) {
		if total > 0 {
			t.Progress(0.5 * float64(done) / float64(total))
		}
	})
	switch {
	case err == nil:
		p.Log.WithField("VDI", l.rec.UUID).WithField("blocks", left.Total).Warn("damaged blocks of an image were fetched from other hosts")
		return nil
	case sr.Alive(ctx) != nil:
		return sr.Alive(ctx)
	}
	p.Log.WithError(err).WithField("VDI", l.rec.UUID).Warn("an image could not be repaired from other hosts")
	return p.notEnough(ctx, l, left)
}

// notEnough is the error of an image that could not be repaired as a whole. The
// record says what is left of the damage.
func (p *Pool) notEnough(ctx context.Context, l look, left *vdi.DamageError) error {
	report := VerifyReport{VDI: l.ref, Checked: p.Now().UTC(), Damaged: left.Total, Damage: left.Error()}
	return errors.Join(xapi.NewError(xapi.VDIContentChanged, string(l.ref), left.Error()+
		"; no VDI of the SRs plugged here has good ones, so plug an SR that holds a copy and repair again, or destroy the VDI and upload the patch again"), p.noteReport(ctx, l.rec, report, ""))
}

// sourcesOf shows the donors as images that m describes.
func sourcesOf(m *vdi.Map, donors []donor) (sources []io.ReaderAt) {
	var wanted map[[sha256.Size]byte]bool
	for _, d := range donors {
		if d.m.Equal(m) {
			sources = append(sources, d.f)
			continue
		}
		if wanted == nil {
			wanted = make(map[[sha256.Size]byte]bool, len(m.Blocks))
			for _, b := range m.Blocks {
				wanted[b.Sum] = true
			}
		}
		s := bySum{m: m, f: d.f, place: map[[sha256.Size]byte]int64{}}
		for _, b := range d.m.Blocks {
			if wanted[b.Sum] {
				s.place[b.Sum], _ = d.m.Span(b.Index)
			}
		}
		if len(s.place) > 0 {
			sources = append(sources, s)
		}
	}
	return sources
}

// bySum reads blocks of an image out of another one that has them elsewhere.
type bySum struct {
	m     *vdi.Map // of the image that is shown
	f     io.ReaderAt
	place map[[sha256.Size]byte]int64 // where f has the block with that sum
}

var errNoBlock = errors.New("this image does not have the block")

// ReadAt reads within one block.
func (s bySum) ReadAt(b []byte, off int64) (int, error) {
	start, length := s.m.Span(off / vdi.MapBlock)
	sum, ok := s.m.Sum(off / vdi.MapBlock)
	if !ok || off+int64(len(b)) > start+length {
		return 0, errNoBlock
	}
	at, ok := s.place[sum]
	if !ok {
		return 0, errNoBlock
	}
	return s.f.ReadAt(b, at+off-start)
}

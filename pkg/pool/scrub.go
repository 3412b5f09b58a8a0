package pool

import (
	"context"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// ScrubOptions say how images are looked at in the background.
type ScrubOptions struct {
	// Interval lies at least between two looks at one image; 0: none is looked at.
	Interval time.Duration
	// Rate bounds what is read, in bytes a second; 0: nothing does.
	Rate int64
}

const (
	// scrubGrace is how long an image is left alone that was never looked at,
	// for whoever has made it works with it now, or that could not be read.
	scrubGrace = 10 * time.Minute
	// scrubAgain is when an image is tried again that was wanted by somebody else.
	scrubAgain = time.Minute
)

// Scrub looks at the golden images of the SRs plugged here, one after the
// other, those first that were not looked at for the longest time, and records
// what it finds as VDIVerify does. Images of shared SRs are looked at by the
// coordinator alone. It gives way to everybody who wants an image for himself,
// goes on after a restart by what the records say, sleeps until an image is due,
// and ends with ctx.
func (p *Pool) Scrub(ctx context.Context, o ScrubOptions) {
	if o.Interval <= 0 {
		return
	}
	s := scrub{Pool: p, ScrubOptions: o, notBefore: map[xapi.Ref]time.Time{}}
	for ctx.Err() == nil {
		ref, due, rev, err := s.next()
		switch {
		case err != nil:
			p.Log.WithError(err).Error("what is to be scrubbed cannot be learned")
			sleep(ctx, scrubAgain)
		case ref == "" || due.After(p.Now()):
			s.wait(ctx, due, rev)
		default:
			s.look(ctx, ref)
		}
	}
}

type scrub struct {
	*Pool
	ScrubOptions
	notBefore map[xapi.Ref]time.Time // what the records do not know
}

// next picks the image that is due first, from the records of revision rev; ref
// is empty when there is none.
func (s *scrub) next() (ref xapi.Ref, due time.Time, rev int64, err error) {
	attached := s.storage.attached()
	seen := map[xapi.Ref]time.Time{}
	err = s.Store.View(func(v *store.View) error {
		rev = v.Revision()
		foreign, err := s.foreign(v)
		if err != nil {
			return err
		}
		for _, it := range v.List(ClassVDI) {
			var rec VDI
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if rec.Map == "" || rec.Missing || attached[rec.SR] == nil || foreign[rec.SR] {
				continue
			}
			at, known := s.notBefore[it.Ref]
			if rec.Checked.After(s.Now()) {
				rec.Checked = time.Time{} // the clock was set back
			}
			if !known && rec.Checked.IsZero() {
				at = s.Now().Add(min(scrubGrace, s.Interval))
			}
			seen[it.Ref] = at
			if next := rec.Checked.Add(s.Interval); !rec.Checked.IsZero() && next.After(at) {
				at = next
			}
			if ref == "" || at.Before(due) {
				ref, due = it.Ref, at
			}
		}
		return nil
	})
	s.notBefore = seen
	return ref, due, rev, err
}

// foreign gives the SRs that another host looks after.
func (s *scrub) foreign(v *store.View) (map[xapi.Ref]bool, error) {
	for _, it := range v.List(ClassPool) {
		var rec PoolRecord
		if err := it.Decode(&rec); err != nil {
			return nil, err
		}
		if rec.Master == s.Self {
			return nil, nil
		}
	}
	srs, err := store.All[SR](v, ClassSR)
	shared := map[xapi.Ref]bool{}
	for ref, rec := range srs {
		shared[ref] = rec.Shared
	}
	return shared, err
}

// wait sleeps until due, or for good when that is zero, unless images or SRs
// come, go or change.
func (s *scrub) wait(ctx context.Context, due time.Time, rev int64) {
	if !due.IsZero() {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, max(due.Sub(s.Now()), time.Millisecond))
		defer stop()
	}
	err := s.Store.Until(ctx, func(v *store.View) (bool, error) {
		changes, ok := v.Since(rev)
		rev = v.Revision()
		for _, c := range changes {
			ok = ok && c.Class != ClassVDI && c.Class != ClassPBD && c.Class != ClassSR
		}
		return !ok, nil
	})
	if err != nil {
		<-ctx.Done() // the store may end before the daemon does
	}
}

// look verifies one image at the rate that is allowed.
func (s *scrub) look(ctx context.Context, ref xapi.Ref) {
	s.notBefore[ref] = s.Now().Add(min(scrubAgain, s.Interval)) // unless it is done
	l, within, end, ok := s.glanceVDI(ctx, ref)
	if !ok {
		return
	}
	report, err := s.verify(within, l, throttle(within, s.Rate))
	wanted := within.Err() != nil
	end()
	if err == nil {
		err = s.noteReport(ctx, l.rec, report, "")
	}
	log := s.Log.WithField("VDI", l.rec.UUID)
	switch {
	case err == nil && report.Damage != "":
		log.Error("the scrub has found damage: " + report.Damage)
	case err == nil:
		log.Debug("the scrub has found the image good")
	case wanted || xapi.Is(err, xapi.HandleInvalid):
		log.Debug("the scrub has given way")
		return
	default:
		s.failed(ctx, l, err)
		s.notBefore[ref] = s.Now().Add(min(scrubGrace, s.Interval))
		return
	}
	s.notBefore[ref] = s.Now().Add(s.Interval)
}

// failed sees to an image that could not be looked at. One that is gone is
// marked so, as SR.scan does, and is left alone until it is there again.
func (s *scrub) failed(ctx context.Context, l look, err error) {
	log := s.Log.WithField("VDI", l.rec.UUID)
	log.WithError(err).Warn("the image could not be scrubbed")
	if !xapi.Is(err, xapi.VDIMissing) {
		return
	}
	if err := s.changeVDI(ctx, l.ref, func(rec *VDI) { rec.Missing = true }); err != nil {
		log.WithError(err).Warn("that the image is gone could not be recorded")
	}
}

// throttle gives a progress function that lets no more than rate bytes a second
// pass, as long as ctx lasts.
func throttle(ctx context.Context, rate int64) func(done, total int64) {
	if rate <= 0 {
		return nil
	}
	began := time.Now()
	return func(done, _ int64) {
		sleep(ctx, time.Duration(float64(done)/float64(rate)*float64(time.Second))-time.Since(began))
	}
}

// sleep lasts for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Storage is what this process knows about SRs and that is no record: the
// repositories that are attached here, and who uses what at this moment. Its
// zero value is ready.
type Storage struct {
	mu      sync.Mutex
	repos   map[xapi.Ref]sr.Repository // by SR
	users   map[xapi.Ref]int           // of a VDI or an SR, shared
	held    map[xapi.Ref]string        // the operation that has a VDI or an SR for itself
	active  map[xapi.UUID]bool         // intents that a call of this process looks after
	looks   map[xapi.Ref][]*glance     // of a VDI or an SR; they give way
	staging map[string]chan struct{}   // images that are staged, by the digest of their map
}

// opDestroy is the one operation after which there is nothing to wait for.
const opDestroy = "destroy"

// share counts one more user of object; holder is the operation that has it
// for itself, and then nothing was counted.
func (s *Storage) share(object xapi.Ref) (release func(), holder string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if op, taken := s.held[object]; taken {
		return nil, op
	}
	if s.users == nil {
		s.users = map[xapi.Ref]int{}
	}
	s.users[object]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.users[object]--; s.users[object] == 0 {
			delete(s.users, object)
		}
	}), ""
}

// hold takes object for op alone; ok is false when somebody uses it, or when
// holder has it. Whoever only glances at it is sent away first.
func (s *Storage) hold(object xapi.Ref, op string) (release func(), holder string, ok bool) {
	release, holder, ok = s.take(object, op)
	if ok {
		s.clear(object)
	}
	return release, holder, ok
}

func (s *Storage) take(object xapi.Ref, op string) (release func(), holder string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other, taken := s.held[object]; taken {
		return nil, other, false
	}
	if s.users[object] > 0 {
		return nil, "", false
	}
	if s.held == nil {
		s.held = map[xapi.Ref]string{}
	}
	s.held[object] = op
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.held, object)
	}), "", true
}

// repository gives the attached SR, or nil.
func (s *Storage) repository(ref xapi.Ref) sr.Repository {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.repos[ref]
}

// setRepository remembers the attached SR; nil forgets it.
func (s *Storage) setRepository(ref xapi.Ref, repo sr.Repository) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if repo == nil {
		delete(s.repos, ref)
		return
	}
	if s.repos == nil {
		s.repos = map[xapi.Ref]sr.Repository{}
	}
	s.repos[ref] = repo
}

func (s *Storage) attached() map[xapi.Ref]sr.Repository {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.repos)
}

// begin marks an intent as looked after by this process.
func (s *Storage) begin(intent xapi.UUID) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active == nil {
		s.active = map[xapi.UUID]bool{}
	}
	s.active[intent] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.active, intent)
	}
}

func (s *Storage) isActive(intent xapi.UUID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.active[intent]
}

// driver finds a driver by its type. Code: SR_UNKNOWN_DRIVER [type].
func (p *Pool) driver(typ string) (sr.Driver, error) {
	for _, d := range p.Drivers {
		if d.Info().Type == typ {
			return sr.FaultyDriver(d), nil
		}
	}
	return nil, xapi.NewError(xapi.SRUnknownDriver, fmt.Sprintf("%.64s", typ))
}

func (p *Pool) config(uuid xapi.UUID, device, sm map[string]string) sr.Config {
	name := func() string { return p.srName(uuid) }
	return sr.Config{SR: uuid, Device: device, SM: sm, KeepFree: p.KeepFree, Name: name, Dom0: p.Dom0, MountDir: p.MountDir}
}

// srName is the name-label of an SR, or "".
func (p *Pool) srName(uuid xapi.UUID) (name string) {
	err := p.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(ClassSR, uuid)
		if !ok {
			return nil
		}
		rec, err := store.Get[SR](v, ClassSR, it.Ref)
		name = rec.NameLabel
		return err
	})
	if err != nil {
		return ""
	}
	return name
}

// Repository gives the repository of an SR that is plugged on this host. Code:
// SR_NOT_ATTACHED [SR ref]. Whoever works with it for longer than a call
// should have its VDI marked by UseVDI, so that it is not unplugged meanwhile.
func (p *Pool) Repository(ref xapi.Ref) (sr.Repository, error) {
	repo := p.storage.repository(ref)
	if repo == nil {
		return nil, xapi.NewError(xapi.SRNotAttached, string(ref))
	}
	return repo, nil
}

// useSR gives the repository of an SR and keeps it plugged until release.
// Codes: HANDLE_INVALID, SR_HAS_NO_PBDS, SR_NOT_ATTACHED,
// OTHER_OPERATION_IN_PROGRESS ["SR", ref].
func (p *Pool) useSR(ref xapi.Ref) (repo sr.Repository, release func(), err error) {
	release, holder := p.storage.share(ref)
	if holder != "" {
		return nil, nil, srBusy(ref)
	}
	if repo, err = p.Repository(ref); err != nil {
		release()
		return nil, nil, p.whyNotAttached(ref, err)
	}
	return repo, release, nil
}

func srBusy(ref xapi.Ref) error {
	return xapi.NewError(xapi.OtherOperationInProgress, ClassSR, string(ref))
}

func (p *Pool) whyNotAttached(ref xapi.Ref, err error) error {
	verr := p.Store.View(func(v *store.View) error {
		if _, err := store.Get[SR](v, ClassSR, ref); err != nil {
			return err
		}
		if len(v.Refs(ClassPBD, "SR", string(ref))) == 0 {
			return xapi.NewError(xapi.SRHasNoPBDs, string(ref))
		}
		return nil
	})
	if verr != nil {
		return verr
	}
	return err
}

// holdSR takes an SR for op alone. Code: OTHER_OPERATION_IN_PROGRESS ["SR", ref].
func (p *Pool) holdSR(ref xapi.Ref, op string) (release func(), err error) {
	release, _, ok := p.storage.hold(ref, op)
	if !ok {
		return nil, srBusy(ref)
	}
	return release, nil
}

// UseVDI counts one more reader of a VDI: until release it cannot be
// destroyed, forgotten, resized or written to, nor its SR unplugged. Codes:
// HANDLE_INVALID, SR_NOT_ATTACHED, VDI_NOT_AVAILABLE [VDI ref] while it is
// being destroyed, VDI_IN_USE [VDI ref, operation] while it is being changed.
func (p *Pool) UseVDI(ref xapi.Ref) (release func(), err error) {
	_, _, release, err = p.useVDI(ref)
	return release, err
}

func (p *Pool) useVDI(ref xapi.Ref) (VDI, sr.Repository, func(), error) {
	free, holder := p.storage.share(ref)
	if holder != "" {
		return VDI{}, nil, nil, vdiBusy(ref, holder, holder)
	}
	return p.openUse(ref, free)
}

// readVDI is useVDI for whoever only reads what is in a VDI: where its SR is not
// plugged here, another one with the same block map that is here is as good, and
// is what is given. Codes: those of UseVDI; SR_NOT_ATTACHED has a second
// parameter, a text, when the SR or such a VDI is on other hosts.
func (p *Pool) readVDI(ref xapi.Ref) (source, func(), error) {
	rec, repo, release, err := p.useVDI(ref)
	if !xapi.Is(err, xapi.SRNotAttached) {
		return source{ref, rec, repo}, release, err
	}
	if rec, err := p.vdi(ref); err == nil {
		equal, err := p.Replicas(rec.Map)
		if err != nil {
			return source{}, nil, err
		}
		for _, r := range equal {
			rec, repo, release, err := p.useVDI(r.Ref)
			if err == nil && rec.Map == r.VDI.Map {
				return source{r.Ref, rec, repo}, release, nil
			}
			if err == nil {
				release()
			}
		}
		return source{}, nil, p.whereElse(rec)
	}
	return source{}, nil, err
}

// whereElse is the error of a VDI whose content is not on this host: it tells who
// has it, those first that are there.
func (p *Pool) whereElse(rec VDI) error {
	var there, away []string
	err := p.Store.View(func(v *store.View) error {
		hosts := map[xapi.Ref]bool{}
		if rec.Map != "" {
			var err error
			if hosts, err = p.holders(v, rec.Map); err != nil {
				return err
			}
		}
		for _, link := range v.Refs(ClassPBD, "SR", string(rec.SR)) {
			pbd, err := store.Get[PBD](v, ClassPBD, link)
			if err != nil {
				return err
			}
			if pbd.CurrentlyAttached {
				hosts[pbd.Host] = true
			}
		}
		for ref := range hosts {
			h, err := store.Get[Host](v, ClassHost, ref)
			switch {
			case err != nil || ref == p.Self:
			case p.there(ref):
				there = append(there, fmt.Sprintf("%s (%s)", h.NameLabel, h.UUID))
			default:
				away = append(away, fmt.Sprintf("%s (%s), which is away", h.NameLabel, h.UUID))
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(there)
	slices.Sort(away)
	names := append(there, away...)
	switch more := len(names) - maxNamed; {
	case len(names) == 0:
		return xapi.NewError(xapi.SRNotAttached, string(rec.SR))
	case more > 0:
		names = append(names[:maxNamed], fmt.Sprintf("%d more", more))
	}
	return xapi.NewError(xapi.SRNotAttached, string(rec.SR), "the image is not here but on "+strings.Join(names, ", "))
}

// maxNamed bounds the hosts that an error names.
const maxNamed = 3

// holdVDI takes a VDI for op alone. Codes: those of useVDI, where VDI_IN_USE
// names op.
func (p *Pool) holdVDI(ref xapi.Ref, op string) (VDI, sr.Repository, func(), error) {
	free, holder, ok := p.storage.hold(ref, op)
	if !ok {
		return VDI{}, nil, nil, vdiBusy(ref, holder, op)
	}
	return p.openUse(ref, free)
}

func vdiBusy(ref xapi.Ref, holder, op string) error {
	if holder == opDestroy {
		return xapi.NewError(xapi.VDINotAvailable, string(ref))
	}
	return xapi.NewError(xapi.VDIInUse, string(ref), op)
}

// openUse looks up the record of a VDI that is shared or held already, so that
// it cannot go any more, and takes a share of its SR.
func (p *Pool) openUse(ref xapi.Ref, free func()) (rec VDI, repo sr.Repository, release func(), err error) {
	rec, err = p.vdi(ref)
	if err != nil {
		free()
		return rec, nil, nil, err
	}
	repo, freeSR, err := p.useSR(rec.SR)
	if err != nil {
		free()
		return rec, nil, nil, err
	}
	return rec, repo, func() { free(); freeSR() }, nil
}

func (p *Pool) vdi(ref xapi.Ref) (rec VDI, err error) {
	err = p.Store.View(func(v *store.View) error {
		rec, err = store.Get[VDI](v, ClassVDI, ref)
		return err
	})
	return rec, err
}

func (p *Pool) sr(ref xapi.Ref) (rec SR, err error) {
	err = p.Store.View(func(v *store.View) error {
		rec, err = store.Get[SR](v, ClassSR, ref)
		return err
	})
	return rec, err
}

// SRCandidates lists what sr.Choose chooses from, and the pool's default SR.
// It must be called on the coordinator: plugged means plugged here. Where the
// default is the SR of another host, one that leads now has its own first SR in
// its place.
func (p *Pool) SRCandidates(context.Context) (defaultSR xapi.Ref, cs []sr.Candidate, err error) {
	_, pool, err := p.Record()
	if err != nil {
		return xapi.NullRef, nil, err
	}
	repos := p.storage.attached()
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassSR) {
			var rec SR
			if err := it.Decode(&rec); err != nil {
				return err
			}
			c := sr.Candidate{Ref: it.Ref, UUID: rec.UUID, Name: rec.NameLabel, Created: it.Created}
			if repo := repos[it.Ref]; repo != nil {
				c.Plugged, c.Clones = true, sr.Has(repo.Features(), sr.VDIClone)
			}
			cs = append(cs, c)
		}
		return nil
	})
	if err != nil {
		return xapi.NullRef, nil, err
	}
	def := pool.DefaultSR.OrNull()
	if instead, err := p.insteadOf(def); err != nil || instead != "" {
		return instead, cs, err
	}
	return def, cs, nil
}

// insteadOf gives this host's first SR where the pool's default is one that only
// other hosts are linked to; else "".
func (p *Pool) insteadOf(def xapi.Ref) (own xapi.Ref, err error) {
	theirs := false
	err = p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassPBD, "SR", string(def)) {
			pbd, err := store.Get[PBD](v, ClassPBD, ref)
			if err != nil {
				return err
			}
			if pbd.Host == p.Self {
				theirs = false
				return nil
			}
			theirs = true
		}
		return nil
	})
	if err != nil || !theirs {
		return "", err
	}
	if own, err = p.ownSR(); err != nil || p.storage.repository(own) == nil {
		return "", err
	}
	return own, nil
}

// inSR gives err the words of OUT_OF_SPACE ["name (uuid)"] when it says that
// the SR is full; an error with another code stays as it is.
func (p *Pool) inSR(ref xapi.Ref, err error) error {
	var known *xapi.Error
	if err == nil || (errors.As(err, &known) && known.Code != xapi.OutOfSpace) || !sr.NoSpace(err) {
		return err
	}
	rec, rerr := p.sr(ref)
	if rerr != nil {
		return err
	}
	return xapi.NewError(xapi.OutOfSpace, fmt.Sprintf("%s (%s)", rec.NameLabel, rec.UUID)).Because(err)
}

// notNil gives a map that renders as {} rather than null.
func notNil(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func notNilSet(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

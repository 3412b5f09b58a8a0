package agent

import (
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// Way is how a host comes by its private image of a patch.
type Way string

// The ways, the cheapest first.
const (
	WayClone Way = "clone" // clone the golden image, or one that is as good, inside its SR
	WayCopy  Way = "copy"  // copy it into an SR this host reaches
	// WayStage makes an image that is as good in an SR of this host, of blocks of
	// other hosts; then the plan is made again.
	WayStage Way = "stage"
	WayFetch Way = "fetch" // take the classic file from the coordinator
)

// Plan is a decision made from records: what to do, before anything is done.
type Plan struct {
	Way    Way      `json:"way"`
	Source xapi.Ref `json:"source,omitempty"` // the SR of the image that is read
	// Image is that image: the golden one or a replica. Empty with WayFetch and
	// WayStage.
	Image    xapi.UUID `json:"image,omitempty"`
	ImageRef xapi.Ref  `json:"image_ref,omitempty"`
	// Target is the SR the work image is made in, with WayStage the replica. With
	// WayFetch it may be empty: then the image lies in the journal folder.
	Target xapi.Ref `json:"target,omitempty"`
	// Room is what the target must have free, in bytes: with WayStage also for
	// what comes after it.
	Room int64 `json:"room"`
}

// Facts is what a plan is made from.
type Facts struct {
	Assignment pool.Assignment
	SRs        []SRFact       // attached to this host
	Replicas   []pool.Replica // VDIs in those SRs that are as good as the golden image
}

// SRFact is one SR attached to this host.
type SRFact struct {
	Ref    xapi.Ref
	Name   string // as errors name it: "name (uuid)"
	Shared bool
	Clones bool
	Free   int64 // bytes that are free and, as far as is known, promised to nobody
}

// headroom is what is asked for beyond the bytes themselves: filesystem
// structures and the journal of the filesystem below.
const headroom = 8 << 20

// MakePlan decides how this host gets the image. It changes nothing and asks
// nobody. Codes: CANNOT_FIND_PATCH when neither VDI nor file is there,
// HOST_CANNOT_SEE_SR [host, SR] when the VDI's SR is not attached here and the VDI
// has no block map to fetch it by, PATCH_PRECHECK_FAILED_OUT_OF_SPACE [patch,
// found, required], whose cause names the SRs.
func MakePlan(f Facts) (Plan, error) {
	a := f.Assignment
	if a.VDI == nil {
		if a.Patch.Filename == "" {
			return Plan{}, xapi.NewError(xapi.CannotFindPatch)
		}
		return planFetch(f)
	}
	images := f.images()
	if len(images) > 0 {
		return planFrom(f, images)
	}
	var short error
	if a.VDI.Map != "" && len(f.SRs) > 0 {
		p, err := planStage(f)
		if err == nil {
			return p, nil
		}
		short = err
	}
	switch {
	case a.Patch.Filename != "":
		return planFetch(f)
	case short != nil:
		return Plan{}, short
	}
	return Plan{}, xapi.NewError(xapi.HostCannotSeeSR, string(a.Job.Host), string(a.VDI.SR))
}

// images are those that can be read here, the golden one first.
func (f Facts) images() (list []pool.Replica) {
	if _, ok := f.find(f.Assignment.VDI.SR); ok {
		list = append(list, pool.Replica{Ref: f.Assignment.VDIRef, VDI: *f.Assignment.VDI})
	}
	for _, r := range f.Replicas {
		if _, ok := f.find(r.VDI.SR); ok && r.VDI.UUID != f.Assignment.VDI.UUID {
			list = append(list, r)
		}
	}
	return list
}

// planFrom clones the first image whose SR clones and has the room, else copies
// the first one.
func planFrom(f Facts, images []pool.Replica) (Plan, error) {
	var short error
	clones := false
	for _, i := range images {
		source, _ := f.find(i.VDI.SR)
		if !source.Clones {
			continue
		}
		clones = true
		p, err := planInto(f, Plan{Way: WayClone, Source: source.Ref, Image: i.VDI.UUID, ImageRef: i.Ref, Room: scratchOf(f.Assignment.Patch)}, []SRFact{source})
		if err == nil {
			return p, nil
		}
		short = cmpOr(short, err)
	}
	if clones {
		return Plan{}, short
	}
	source, _ := f.find(images[0].VDI.SR)
	room := f.Assignment.Patch.PayloadSize + scratchOf(f.Assignment.Patch)
	return planInto(f, Plan{Way: WayCopy, Source: source.Ref, Image: images[0].VDI.UUID, ImageRef: images[0].Ref, Room: room}, f.copyTargets(source))
}

func cmpOr(first, second error) error {
	if first != nil {
		return first
	}
	return second
}

// planStage finds an SR for a replica and for what is made of it: a clone where
// the SR clones, else a copy. Local ones come first, of those that clone.
func planStage(f Facts) (Plan, error) {
	patch := f.Assignment.Patch
	var targets []SRFact
	for _, shared := range []bool{false, true} {
		for _, clones := range []bool{true, false} {
			for _, t := range f.copyTargets(SRFact{}) {
				if t.Shared == shared && t.Clones == clones {
					targets = append(targets, t)
				}
			}
		}
	}
	var short error
	for _, t := range targets {
		room := headroom + patch.PayloadSize + scratchOf(patch)
		if !t.Clones {
			room += patch.PayloadSize
		}
		p, err := planInto(f, Plan{Way: WayStage, Room: room}, []SRFact{t})
		if err == nil {
			return p, nil
		}
		short = moreRoom(short, err)
	}
	return Plan{}, short
}

// moreRoom gives of two errors about room one that names the SRs of both, with the
// numbers of the one that found more.
func moreRoom(a, b error) error {
	var x, y *xapi.Error
	if !errors.As(a, &x) || !errors.As(b, &y) {
		return cmpOr(a, b)
	}
	best := x
	if foundBy(y) > foundBy(x) {
		best = y
	}
	return xapi.NewError(best.Code, best.Params...).Because(fmt.Errorf("%w; %w", x.Unwrap(), y.Unwrap()))
}

func foundBy(e *xapi.Error) (n int64) {
	fmt.Sscan(e.Params[1], &n) //nolint:errcheck // 0 when it is no number
	return n
}

func planFetch(f Facts) (Plan, error) {
	if len(f.SRs) == 0 {
		return Plan{Way: WayFetch}, nil
	}
	size := max(f.Assignment.Patch.PayloadSize, f.Assignment.Patch.Size)
	return planInto(f, Plan{Way: WayFetch, Room: 2 * size}, f.copyTargets(SRFact{}))
}

// planInto picks the first of the targets that has the room.
func planInto(f Facts, p Plan, targets []SRFact) (Plan, error) {
	p.Room += headroom
	var best int64
	var looked []string
	for _, t := range targets {
		if t.Free >= p.Room {
			p.Target = t.Ref
			return p, nil
		}
		best = max(best, t.Free)
		looked = append(looked, fmt.Sprintf("%s: %d bytes are free and promised to nobody, %d are needed", t.Name, t.Free, p.Room))
	}
	return Plan{}, xapi.NewError(xapi.PrecheckFailedOutOfSpace,
		string(f.Assignment.PatchRef), fmt.Sprint(best), fmt.Sprint(p.Room)).Because(errors.New(strings.Join(looked, "; ")))
}

// scratchOf is the scratch room of a patch: what its `info` says, else once
// the payload.
func scratchOf(p pool.Patch) int64 {
	if p.ScratchSize > 0 {
		return p.ScratchSize
	}
	return p.PayloadSize
}

func (f Facts) find(ref xapi.Ref) (SRFact, bool) {
	for _, s := range f.SRs {
		if s.Ref == ref {
			return s, true
		}
	}
	return SRFact{}, false
}

// nameOf is how errors name an SR; "" when it is none of these.
func (f Facts) nameOf(ref xapi.Ref) string {
	s, _ := f.find(ref)
	return s.Name
}

func (f Facts) free(ref xapi.Ref) int64 {
	s, _ := f.find(ref)
	return s.Free
}

// lower tells of an SR that less of it is free than was seen, in bytes.
func (f Facts) lower(ref xapi.Ref, free int64) {
	for i := range f.SRs {
		if f.SRs[i].Ref == ref {
			f.SRs[i].Free = min(f.SRs[i].Free, free)
		}
	}
}

// copyTargets orders the SRs a copy may go to: local ones first, the source
// itself before other local ones, then the most room.
func (f Facts) copyTargets(source SRFact) []SRFact {
	out := append([]SRFact(nil), f.SRs...)
	sort.SliceStable(out, func(i, j int) bool {
		a, b := out[i], out[j]
		switch {
		case a.Shared != b.Shared:
			return !a.Shared
		case (a.Ref == source.Ref) != (b.Ref == source.Ref):
			return a.Ref == source.Ref
		}
		return a.Free > b.Free
	})
	return out
}

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
	WayClone Way = "clone" // clone the golden image inside its SR
	WayCopy  Way = "copy"  // copy it into an SR this host reaches
	WayFetch Way = "fetch" // take the classic file from the coordinator
)

// Plan is a decision made from records: what to do, before anything is done.
type Plan struct {
	Way    Way      `json:"way"`
	Source xapi.Ref `json:"source,omitempty"` // the golden image's SR
	// Target is the SR the work image is made in. With WayFetch it may be
	// empty: then the image lies in the journal folder.
	Target xapi.Ref `json:"target,omitempty"`
	// Room is what the target must have free, in bytes.
	Room int64 `json:"room"`
}

// Facts is what a plan is made from.
type Facts struct {
	Assignment pool.Assignment
	SRs        []SRFact // attached to this host
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
// HOST_CANNOT_SEE_SR [host, SR] when the VDI's SR is not attached here,
// PATCH_PRECHECK_FAILED_OUT_OF_SPACE [patch, found, required], whose cause names
// the SRs.
func MakePlan(f Facts) (Plan, error) {
	a := f.Assignment
	if a.VDI == nil {
		if a.Patch.Filename == "" {
			return Plan{}, xapi.NewError(xapi.CannotFindPatch)
		}
		return planFetch(f)
	}
	source, ok := f.find(a.VDI.SR)
	if !ok {
		if a.Patch.Filename != "" {
			return planFetch(f)
		}
		return Plan{}, xapi.NewError(xapi.HostCannotSeeSR, string(a.Job.Host), string(a.VDI.SR))
	}
	if source.Clones {
		return planInto(f, Plan{Way: WayClone, Source: source.Ref, Room: scratchOf(a.Patch)}, []SRFact{source})
	}
	room := a.Patch.PayloadSize + scratchOf(a.Patch)
	return planInto(f, Plan{Way: WayCopy, Source: source.Ref, Room: room}, f.copyTargets(source))
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

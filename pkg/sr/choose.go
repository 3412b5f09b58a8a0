package sr

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/patchd/patchd/pkg/xapi"
)

// Candidate is one SR as Choose sees it.
type Candidate struct {
	Ref     xapi.Ref
	UUID    xapi.UUID
	Name    string // name_label
	Plugged bool   // on the coordinator
	Clones  bool   // the attached repository has VDI_CLONE
	Created int64  // order of creation in the database
}

// Choose says where a new patch goes.
//
// requested is the ref or uuid the client named, or "". A named SR never falls
// back: HANDLE_INVALID [SR, ref] or UUID_INVALID [SR, uuid] when there is none,
// SR_NOT_ATTACHED [SR ref] when it is not plugged on the coordinator.
//
// Else defaultSR is taken when it is plugged there. Else the oldest plugged SR
// whose repository clones; of two as old, the one with the lower uuid. How full
// an SR is plays no part: an admin who set a default wants to hear that it is
// full. With neither: DEFAULT_SR_NOT_FOUND [default ref, text], where the text
// names both reasons and the cure.
func Choose(requested string, defaultSR xapi.Ref, candidates []Candidate) (xapi.Ref, error) {
	if requested != "" {
		return chooseRequested(requested, candidates)
	}
	usable, reason := judgeDefault(defaultSR, candidates)
	if usable {
		return defaultSR, nil
	}
	cloning := slices.DeleteFunc(slices.Clone(candidates), func(c Candidate) bool { return !c.Plugged || !c.Clones })
	if len(cloning) == 0 {
		return xapi.NullRef, xapi.NewError(xapi.DefaultSRNotFound, string(defaultSR.OrNull()), reason+"; and "+noneClones(candidates)+
			". Set pool.default_SR to an SR that is plugged on the coordinator, or name one in the request (sr_id or sr_uuid)")
	}
	return slices.MinFunc(cloning, func(a, b Candidate) int {
		return cmp.Or(cmp.Compare(a.Created, b.Created), cmp.Compare(a.UUID, b.UUID))
	}).Ref, nil
}

func chooseRequested(requested string, candidates []Candidate) (xapi.Ref, error) {
	uuid, notUUID := xapi.ParseUUID(requested)
	for _, c := range candidates {
		if c.Ref != xapi.Ref(requested) && (notUUID != nil || c.UUID != uuid) {
			continue
		}
		if !c.Plugged {
			return xapi.NullRef, xapi.NewError(xapi.SRNotAttached, string(c.Ref))
		}
		return c.Ref, nil
	}
	if notUUID == nil {
		return xapi.NullRef, xapi.NewError(xapi.UUIDInvalid, "SR", string(uuid))
	}
	return xapi.NullRef, xapi.NewError(xapi.HandleInvalid, "SR", fmt.Sprintf("%.64s", requested))
}

// judgeDefault tells whether the default SR can be used, or why not.
func judgeDefault(ref xapi.Ref, candidates []Candidate) (usable bool, reason string) {
	if ref.IsNull() {
		return false, "pool.default_SR is not set"
	}
	i := slices.IndexFunc(candidates, func(c Candidate) bool { return c.Ref == ref })
	switch {
	case i < 0:
		return false, "pool.default_SR names an SR that does not exist"
	case !candidates[i].Plugged:
		return false, fmt.Sprintf("pool.default_SR %q (%s) is not plugged on the coordinator", candidates[i].Name, candidates[i].UUID)
	}
	return true, ""
}

// noneClones says why there is nothing to fall back to.
func noneClones(candidates []Candidate) string {
	if !slices.ContainsFunc(candidates, func(c Candidate) bool { return c.Plugged }) {
		return "no SR is plugged on the coordinator"
	}
	return "no SR that is plugged on the coordinator has VDI_CLONE"
}

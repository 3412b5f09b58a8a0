package pool

import (
	"context"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// The values of Compliance. Unknown is also what is known of a host that is away.
const (
	ComplianceYes     = "yes"
	ComplianceNo      = "no"
	ComplianceUnknown = "unknown"
	ComplianceExempt  = "exempt"
)

// Compliance tells whether one host has one patch.
type Compliance struct {
	Host, Patch         xapi.UUID
	HostName, PatchName string
	Value               string
	Since               time.Time // of what is known: the apply, or when the host was last heard of; zero: not said
	Note                string    // why it is unknown or exempt
}

// Compliance gives every host with every patch, or with one when patch is not "":
// patch by patch, the hosts in the order of the database. Code: HANDLE_INVALID.
func (p *Pool) Compliance(patch xapi.Ref) (all []Compliance, err error) {
	err = p.Store.View(func(v *store.View) error {
		patches := []xapi.Ref{patch}
		if patch == "" || patch.IsNull() {
			patches = nil
			for _, it := range v.List(ClassPatch) {
				patches = append(patches, it.Ref)
			}
		}
		for _, ref := range patches {
			of, err := p.complianceOf(v, ref)
			if err != nil {
				return err
			}
			all = append(all, of...)
		}
		return nil
	})
	return all, err
}

func (p *Pool) complianceOf(v *store.View, patch xapi.Ref) (all []Compliance, err error) {
	rec, err := store.Get[Patch](v, ClassPatch, patch)
	if err != nil {
		return nil, err
	}
	have := map[xapi.Ref]HostPatch{}
	for _, ref := range v.Refs(ClassHostPatch, "pool_patch", string(patch)) {
		hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
		if err != nil {
			return nil, err
		}
		have[hp.Host] = hp
	}
	for _, it := range v.List(ClassHost) {
		var h Host
		if err := it.Decode(&h); err != nil {
			return nil, err
		}
		if it.Ref == p.Self {
			h.Away = time.Time{}
		}
		hp, there := have[it.Ref]
		c := complianceValue(h, hp, there, rec.UUID)
		c.Host, c.HostName, c.Patch, c.PatchName = h.UUID, h.NameLabel, rec.UUID, rec.NameLabel
		all = append(all, c)
	}
	return all, nil
}

// complianceValue is the value of one host: what is known of it.
func complianceValue(h Host, hp HostPatch, there bool, patch xapi.UUID) (c Compliance) {
	reason, exempt := exemptions(h)[patch]
	switch {
	case !h.Away.IsZero() && hp.Applied:
		return Compliance{Value: ComplianceUnknown, Since: h.Away, Note: "the host is away; it had the patch when it was last heard of"}
	case hp.Applied:
		return Compliance{Value: ComplianceYes, Since: hp.TimestampApplied}
	case there && hp.OtherConfig[KeyState] == StateUnknown:
		return Compliance{Value: ComplianceUnknown, Note: "how an apply ended is unknown"}
	case exempt:
		return Compliance{Value: ComplianceExempt, Note: reason}
	case !h.Away.IsZero():
		return Compliance{Value: ComplianceUnknown, Since: h.Away, Note: "the host is away; it lacked the patch when it was last heard of"}
	case there:
		return Compliance{Value: ComplianceNo, Note: "it is being applied"}
	}
	return Compliance{Value: ComplianceNo}
}

// HostResync has a host compare its stampfiles with the records. Codes:
// HANDLE_INVALID, HOST_OFFLINE [host].
func (p *Pool) HostResync(ctx context.Context, host xapi.Ref) error {
	if host == p.Self {
		return p.Local.ResyncStamps(ctx)
	}
	err := p.Store.View(func(v *store.View) error {
		_, err := store.Get[Host](v, ClassHost, host)
		return err
	})
	if err != nil {
		return err
	}
	_, err = p.callOn(ctx, host, "Resync", struct{}{})
	return err
}

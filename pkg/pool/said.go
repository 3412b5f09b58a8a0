package pool

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"unicode"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// What another host says of itself goes into the pool database only within
// bounds, and only where it has a say: a host that was taken over must neither
// fill the database nor write what is others'.

// Bounds of what one host says, in bytes where nothing else is said.
const (
	maxStamps     = 10000    // stampfiles
	maxStampText  = 64 << 10 // of a stampfile and what it says
	maxFact       = 256      // of one fact
	maxFacts      = 64       // facts of one kind
	maxSaidRecord = 64 << 10 // of a record in an inventory
	maxHostSRs    = 256      // that one host is linked to
	maxHostVDIs   = 20000    // in the SRs that one host works on
)

// said is what a stampfile tells of its patch. All else of a record is the
// pool's to say. Code: INVALID_VALUE.
func (s Stamp) said() (Patch, error) {
	p := s.Patch
	text := len(p.NameLabel) + len(p.NameDescription) + len(p.Version) + len(p.InfoXML)
	for _, g := range p.AfterApplyGuidance {
		text += len(g) + 1
	}
	if !p.UUID.Valid() || text > maxStampText {
		return Patch{}, xapi.NewError(xapi.InvalidValue, "stampfile", fmt.Sprintf("%.64q is no uuid, or more than %d bytes are said of it", p.UUID, maxStampText))
	}
	return Patch{
		UUID: p.UUID, NameLabel: p.NameLabel, NameDescription: p.NameDescription, Version: p.Version,
		AfterApplyGuidance: slices.Concat([]xapi.Guidance{}, p.AfterApplyGuidance), ScratchSize: max(0, p.ScratchSize), InfoXML: p.InfoXML,
		VDI: xapi.NullRef, OtherConfig: map[string]string{},
	}, nil
}

// check refuses facts that nobody could be shown. Code: INVALID_VALUE.
func (f Facts) check() error {
	for name, text := range map[string]string{"hostname": f.Hostname, "address": f.Address, "url": f.URL} {
		if !isFact(text) {
			return xapi.NewError(xapi.InvalidValue, name, fmt.Sprintf("%.64q is too long, or not one line of text", text))
		}
	}
	for name, facts := range map[string]map[string]string{"software_version": f.SoftwareVersion, "cpu_info": f.CPUInfo} {
		if len(facts) > maxFacts {
			return xapi.NewError(xapi.InvalidValue, name, fmt.Sprintf("more than %d entries", maxFacts))
		}
		for k, v := range facts {
			if !isFact(k) || len(v) > 16*maxFact || !isLine(v) {
				return xapi.NewError(xapi.InvalidValue, name, fmt.Sprintf("%.64q is too long, or not one line of text", k))
			}
		}
	}
	if f.URL == "" {
		return nil // it does not listen on TLS
	}
	if u, err := url.Parse(f.URL); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return xapi.NewError(xapi.InvalidValue, "url", fmt.Sprintf("%.64q is not https://host:port", f.URL))
	}
	return nil
}

func isFact(text string) bool { return len(text) <= maxFact && isLine(text) }

// isLine tells whether a text may be shown on a terminal as it is.
func isLine(text string) bool {
	return strings.ToValidUTF8(text, "") == text && strings.IndexFunc(text, unicode.IsControl) < 0
}

// withoutLarge leaves out the content of records that are too large: the host keeps
// what the pool has of them, and all else of it is still told.
func (p *Pool) withoutLarge(host xapi.Ref, inv Inventory) Inventory {
	inv.Put = slices.Clone(inv.Put)
	for i, r := range inv.Put {
		if len(r.Record) > maxSaidRecord {
			p.Log.WithField("host", host).WithField("class", r.Class).Warnf("a record of a host has more than %d bytes and is passed over", maxSaidRecord)
			inv.Put[i].Record = nil
		}
	}
	return inv
}

// mayAdd refuses more records than one host may have. Code: INVALID_VALUE.
func (p *Pool) mayAdd(host xapi.Ref, inv Inventory) error {
	return p.Store.View(func(v *store.View) error {
		fresh := map[string]int{}
		for _, r := range inv.Put {
			if _, there := v.Get(r.Class, r.Ref); !there && len(r.Record) > 0 {
				fresh[r.Class]++
			}
		}
		links := v.Refs(ClassPBD, "host", string(host))
		if n := len(links) + max(fresh[ClassPBD], fresh[ClassSR]); n > maxHostSRs && fresh[ClassPBD]+fresh[ClassSR] > 0 {
			return xapi.NewError(xapi.InvalidValue, "inventory", fmt.Sprintf("more than %d SRs", maxHostSRs))
		}
		if fresh[ClassVDI] == 0 {
			return nil
		}
		n := fresh[ClassVDI]
		for _, link := range links {
			rec, err := store.Get[PBD](v, ClassPBD, link)
			if err != nil {
				return err
			}
			n += len(v.Refs(ClassVDI, "SR", string(rec.SR)))
		}
		if n > maxHostVDIs {
			return xapi.NewError(xapi.InvalidValue, "inventory", fmt.Sprintf("more than %d VDIs", maxHostVDIs))
		}
		return nil
	})
}

// linkedBy are the SRs to which an inventory has links of the host.
func (inv Inventory) linkedBy(host xapi.Ref) map[xapi.Ref]bool {
	srs := map[xapi.Ref]bool{}
	for _, r := range inv.Put {
		var rec PBD
		if r.Class == ClassPBD && json.Unmarshal(r.Record, &rec) == nil && rec.Host == host {
			srs[rec.SR] = true
		}
	}
	return srs
}

// mayLink tells whether a host may say that it has a link to an SR: one that is
// shared, that the pool has linked to it, or that nobody else is linked to.
func mayLink(tx *store.Tx, host, sr xapi.Ref) (bool, error) {
	rec, err := store.Read[SR](tx, ClassSR, sr)
	if err != nil || rec.Shared {
		return err == nil, err
	}
	for _, ref := range tx.Refs(ClassPBD, "SR", string(sr)) {
		link, err := store.Read[PBD](tx, ClassPBD, ref)
		if err != nil {
			return false, err
		}
		if link.Host != host {
			return false, nil
		}
	}
	return true, nil
}

// ownFacts are the records of a new host as it may bring them: its words, and
// nothing by which patchd steers itself.
func ownFacts(h Host) Host {
	h.OtherConfig = maps.Clone(h.OtherConfig)
	maps.DeleteFunc(h.OtherConfig, func(k, _ string) bool { return strings.HasPrefix(k, ownKey) })
	h.Leaving = false
	return h
}

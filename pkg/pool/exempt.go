package pool

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// KeyExempt in host.other_config names the patches that a host shall not have: a
// JSON object, uuid of the patch to the reason.
const KeyExempt = "patchd-exempt"

// The bounds of what is kept under KeyExempt.
const (
	maxExempt       = 200
	maxExemptReason = 256
)

// exemptions reads KeyExempt of a host. What cannot be read exempts from nothing.
func exemptions(h Host) map[xapi.UUID]string {
	all := map[xapi.UUID]string{}
	if text := h.OtherConfig[KeyExempt]; text != "" && json.Unmarshal([]byte(text), &all) != nil {
		return map[xapi.UUID]string{}
	}
	return all
}

// exemption tells whether a host is exempt from a patch, and why.
func exemption(v *store.View, host xapi.Ref, patch xapi.UUID) (exempt bool, why string) {
	h, err := store.Get[Host](v, ClassHost, host)
	if err != nil {
		return false, ""
	}
	why, exempt = exemptions(h)[patch]
	return exempt, why
}

// HostExempt says that a host shall not have a patch, and why; with exempt false it
// takes that back. Codes: HANDLE_INVALID, VALUE_NOT_SUPPORTED.
func (p *Pool) HostExempt(ctx context.Context, host, patch xapi.Ref, exempt bool, reason string) error {
	if exempt && (reason == "" || len(reason) > maxExemptReason) {
		return unsupported("reason", reason, fmt.Sprintf("say why, in at most %d bytes", maxExemptReason))
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Patch](tx, ClassPatch, patch)
		if err != nil {
			return err
		}
		h, err := store.Read[Host](tx, ClassHost, host)
		if err != nil {
			return err
		}
		all := exemptions(h)
		delete(all, rec.UUID)
		if exempt {
			all[rec.UUID] = reason
		}
		if len(all) > maxExempt {
			return unsupported("patch", string(rec.UUID), fmt.Sprintf("a host is exempt from at most %d patches", maxExempt))
		}
		delete(h.OtherConfig, KeyExempt)
		if len(all) > 0 {
			text, err := json.Marshal(all)
			if err != nil {
				return err
			}
			if h.OtherConfig == nil {
				h.OtherConfig = map[string]string{}
			}
			h.OtherConfig[KeyExempt] = string(text)
		}
		tx.Put(ClassHost, host, h)
		return nil
	})
}

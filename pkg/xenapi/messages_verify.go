package xenapi

import (
	"context"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// VerifyPool is the side of checking images against their block maps.
type VerifyPool interface {
	VDIVerify(ctx context.Context, vdi xapi.Ref) (pool.VerifyReport, error)
	VDIRepair(ctx context.Context, vdi xapi.Ref) error
	VDIChecks() ([]pool.VDICheck, error)
}

// verifyMessages are not of the XenAPI: no classic message looks at the bytes of
// an image.
func verifyMessages() []*Message {
	vdi := refParam("vdi", "VDI")
	return []*Message{
		// What is wrong with the image, "" when nothing is.
		work("patchd", "vdi_verify", String, func(c *call) (any, error) {
			report, err := c.srv.Pool.VDIVerify(c.ctx, c.ref(0))
			return textResult(report.Damage, err)
		}, vdi),
		work("patchd", "vdi_repair", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.VDIRepair(c.ctx, c.ref(0))
		}, vdi),
		look("patchd", "vdi_checks", SetOf(stringMap), vdiChecks),
	}
}

// vdiChecks gives, for each image with a block map: VDI (its ref), uuid, map
// (digest of the map), checked (when it was last looked at; "": never) and damage.
func vdiChecks(c *call) (any, error) {
	checks, err := c.srv.Pool.VDIChecks()
	if err != nil {
		return nil, err
	}
	out := make([]any, len(checks))
	for i, k := range checks {
		checked := ""
		if !k.Checked.IsZero() {
			checked = xapi.FormatTime(k.Checked)
		}
		out[i] = map[string]any{
			"VDI": string(k.VDI), "uuid": string(k.UUID), "map": k.Map, "checked": checked, "damage": k.Damage,
		}
	}
	return out, nil
}

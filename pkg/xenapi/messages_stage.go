package xenapi

import (
	"context"

	"github.com/patchd/patchd/pkg/xapi"
)

// StagePool is the side of moving images ahead of time.
type StagePool interface {
	PatchStage(ctx context.Context, patch xapi.Ref, hosts []xapi.Ref) error
}

// stageMessages are not of the XenAPI, where an apply moves the bytes.
func stageMessages() []*Message {
	return []*Message{
		// To the hosts that are named, to all when none is.
		work("patchd", "patch_stage", Void, func(c *call) (any, error) {
			var hosts []xapi.Ref
			for _, h := range c.texts(1) {
				hosts = append(hosts, xapi.Ref(h))
			}
			return nil, c.srv.Pool.PatchStage(c.ctx, c.ref(0), hosts)
		}, refParam("patch", "pool_patch"), Param{Name: "hosts", Type: stringSet}.or([]any{})),
	}
}

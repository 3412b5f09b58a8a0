package xenapi

import (
	"github.com/patchd/patchd/pkg/xapi"
)

// patchMessages are those of pool_patch and host_patch.
func patchMessages() []*Message {
	self, host := refParam("self", "pool_patch"), refParam("host", "host")
	return []*Message{
		work("pool_patch", "precheck", String, func(c *call) (any, error) {
			return textResult(c.srv.Pool.PatchPrecheck(c.ctx, c.ref(0), c.ref(1)))
		}, self, host),
		work("pool_patch", "apply", String, func(c *call) (any, error) {
			return textResult(c.srv.Pool.PatchApply(c.ctx, c.ref(0), c.ref(1)))
		}, self, host),
		work("pool_patch", "pool_apply", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.PatchPoolApply(c.ctx, c.ref(0))
		}, self),
		work("pool_patch", "clean", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.PatchClean(c.ctx, c.ref(0))
		}, self),
		work("pool_patch", "clean_on_host", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.PatchCleanOnHost(c.ctx, c.ref(0), c.ref(1))
		}, self, host),
		work("pool_patch", "pool_clean", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.PatchPoolClean(c.ctx, c.ref(0))
		}, self),
		work("pool_patch", "destroy", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.PatchDestroy(c.ctx, c.ref(0))
		}, self),
		work("host_patch", "destroy", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.HostPatchDestroy(c.ctx, c.ref(0))
		}, refParam("self", "host_patch")),
		work("host_patch", "apply", String, func(*call) (any, error) {
			return nil, xapi.NewError(xapi.MessageDeprecated)
		}, refParam("self", "host_patch")),
	}
}

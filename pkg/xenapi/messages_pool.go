package xenapi

import (
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// exists is nil when the object of parameter i is there.
func (c *call) exists(i int) error {
	class, ok := c.srv.model.Class(c.msg.Params[i].Type.Name)
	if !ok {
		return xapi.NewError(xapi.HandleInvalid, c.msg.Params[i].Type.Name, string(c.ref(i)))
	}
	return c.srv.Store.View(func(v *store.View) error {
		_, err := c.object(v, class, c.ref(i))
		return err
	})
}

// poolMessages are the explicit messages of pool. What needs HA, external
// authentication, VLANs or licences does not exist here and is not listed.
func poolMessages() []*Message {
	self := refParam("self", "pool")
	return []*Message{
		// Every write is durable when its call returns: there is nothing to flush.
		work("pool", "sync_database", Void, nothing),
		look("pool", "get_license_state", stringMap, given(map[string]any{"edition": "free", "expiry": "never"}), self),
		look("pool", "has_extension", Bool, given(false), self, textParam("name")).by(session.PoolAdmin),
		refused("pool", "designate_new_master", refParam("host", "host")),
		refused("pool", "ha_prevent_restarts_for", intParam("seconds")),
		refused("pool", "create_new_blob", refParam("pool", "pool"), textParam("name"), textParam("mime_type"), boolParam("public")),
		refused("pool", "test_archive_target", self, mapParam("config")),
	}
}

// hostMessages are the explicit messages of host. A host here runs no VMs, so
// evacuating one is done at once; what would restart it is refused.
func hostMessages() []*Message {
	host, self := refParam("host", "host"), refParam("self", "host")
	return []*Message{
		work("host", "enable", Void, setEnabled(true), host),
		work("host", "disable", Void, setEnabled(false), host),
		look("host", "get_servertime", Datetime, serverTime, host),
		look("host", "get_server_localtime", Datetime, serverTime, host),
		look("host", "list_methods", stringSet, func(c *call) (any, error) { return c.srv.messages.names(), nil }),
		look("host", "get_management_interface", RefTo("PIF"), given(nullRefText), host).by(session.PoolOperator),
		look("host", "assert_can_evacuate", Void, given(nil), host).by(session.PoolOperator),
		look("host", "get_vms_which_prevent_evacuation", MapOf(RefTo("VM"), stringSet), given(map[string]any{}), self),
		look("host", "get_uncooperative_resident_VMs", SetOf(RefTo("VM")), given([]any{}), self),
		work("host", "evacuate", Void, given(nil), host,
			refParam("network", "network").or(xapi.NullRef), intParam("evacuate_batch_size").or(int64(0))),
		look("host", "has_extension", Bool, given(false), host, textParam("name")).by(session.PoolAdmin),
		noPlugin("call_plugin", host, textParam("plugin"), textParam("fn"), mapParam("args")),
		noPlugin("call_extension", host, textParam("call")),
		refused("host", "reboot", host),
		refused("host", "shutdown", host),
		refused("host", "power_on", host),
		refused("host", "restart_agent", host),
		refused("host", "dmesg", host),
		refused("host", "dmesg_clear", host),
		refused("host", "get_log", host).by(session.ReadOnly),
		refused("host", "send_debug_keys", host, textParam("keys")).by(session.PoolAdmin),
		refused("host", "set_hostname_live", host, textParam("hostname")),
		refused("host", "refresh_pack_info", host),
		refused("host", "apply_edition", host, textParam("edition"), boolParam("force").or(false)),
	}
}

// noPlugin refuses plug-ins clearly: there are none. It is not listed.
func noPlugin(name string, params ...Param) *Message {
	m := look("host", name, String, func(c *call) (any, error) {
		return nil, xapi.NewError(xapi.XenAPIMissingPlugin, clip(c.text(1), 256))
	}, params...).by(session.PoolAdmin)
	m.hidden = true
	return m
}

// setEnabled marks a host as one that may or may not be given new work by
// clients; patchd itself patches disabled hosts, too.
func setEnabled(enabled bool) func(*call) (any, error) {
	set := func(any, []any) (any, error) { return enabled, nil }
	return func(c *call) (any, error) {
		class, _ := c.srv.model.Class("host")
		f, _ := class.Field("enabled")
		return changeField(class, f, set)(c)
	}
}

func serverTime(c *call) (any, error) {
	if err := c.exists(0); err != nil {
		return nil, err
	}
	return Date(xapi.FormatTime(c.srv.Now())), nil
}

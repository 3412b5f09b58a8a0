package xenapi

import (
	"context"
	"strconv"
	"strings"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// MemberPool is the side of hosts that come and go.
type MemberPool interface {
	HostEject(ctx context.Context, host xapi.Ref, force bool) error
	HostRevoke(ctx context.Context, host xapi.Ref) error
	HostStates(ctx context.Context) ([]pool.HostInfo, error)
}

// Members is what this process can do about its own place in a pool; see
// package server.
type Members interface {
	// JoinToken makes a token for one host, as text.
	JoinToken(ctx context.Context) (string, error)
	// Join makes this host a member of another pool; patchd opens again as one
	// after the answer.
	Join(ctx context.Context, spec pool.JoinSpec) (pool.JoinAnswer, error)
	// Leave makes a member a pool of its own although nobody has ejected it.
	Leave(ctx context.Context) error
	// RotateKey gives this host another key and tells its SHA-256.
	RotateKey(ctx context.Context) (pin string, err error)
}

// memberMessages are about hosts that come and go.
func memberMessages() []*Message {
	host := refParam("host", "host")
	join := func(c *call) (any, error) {
		m, err := c.members()
		if err == nil {
			_, err = m.Join(c.ctx, pool.JoinSpec{Address: c.text(0), User: c.text(1), Password: c.text(2)})
		}
		return nil, err
	}
	address := []Param{textParam("master_address"), textParam("master_username"), textParam("master_password")}
	eject := func(force func(c *call) bool) func(*call) (any, error) {
		return func(c *call) (any, error) { return nil, c.srv.Pool.HostEject(c.ctx, c.ref(0), force(c)) }
	}
	list := []*Message{
		work("pool", "join", Void, join, address...),
		work("pool", "join_force", Void, join, address...),
		work("pool", "eject", Void, eject(func(*call) bool { return false }), host),
		work("patchd", "host_eject", Void, eject(func(c *call) bool { return c.flag(1) }), host, boolParam("force")),
		work("patchd", "host_revoke", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.HostRevoke(c.ctx, c.ref(0))
		}, host),
		write("patchd", "join_token", String, func(c *call) (any, error) {
			return c.memberText(Members.JoinToken)
		}),
		work("patchd", "pool_join", stringMap, poolJoin, textParam("address"), mapParam("options")),
	}
	for _, m := range list {
		m.by(session.PoolAdmin)
	}
	return append(list,
		look("patchd", "host_states", SetOf(stringMap), hostStates),
		// These are about this very host, whoever leads, and for its root only.
		write("patchd", "rotate_key", String, localOnly(func(c *call) (any, error) {
			return c.memberText(Members.RotateKey)
		})).open().everywhere(),
		write("patchd", "pool_leave", Void, localOnly(func(c *call) (any, error) {
			m, err := c.members()
			if err != nil {
				return nil, err
			}
			return nil, m.Leave(c.ctx)
		})).open().everywhere(),
	)
}

// localOnly is for messages that take no session: root says them over the unix
// socket.
func localOnly(run func(*call) (any, error)) func(*call) (any, error) {
	return func(c *call) (any, error) {
		if !session.Trusted(c.ctx) {
			return nil, xapi.NewError(xapi.RBACPermissionDenied, c.msg.FullName(), "only root on the host itself may do this, over the unix socket")
		}
		return run(c)
	}
}

// hostStates gives ref, uuid, name_label, address, rank, connected ("true" or
// "false"), since (empty when nobody knows), version, jobs and keys (the SHA-256
// of each, joined by spaces) of every host.
func hostStates(c *call) (any, error) {
	states, err := c.srv.Pool.HostStates(c.ctx)
	if err != nil {
		return nil, err
	}
	out := make([]any, len(states))
	for i, s := range states {
		since := ""
		if !s.Since.IsZero() {
			since = xapi.FormatTime(s.Since)
		}
		out[i] = map[string]any{
			"ref": string(s.Ref), "uuid": string(s.UUID), "name_label": s.NameLabel, "address": s.Address, "rank": string(s.Rank),
			"connected": strconv.FormatBool(s.Connected), "since": since, "version": s.Version, "jobs": strconv.Itoa(s.Jobs),
			"keys": strings.Join(s.Keys, " "),
		}
	}
	return out, nil
}

// members is this host's own place in the pool. Code: NOT_IMPLEMENTED where
// there is none to change.
func (c *call) members() (Members, error) {
	if c.srv.Members == nil {
		return nil, xapi.NewError(xapi.NotImplemented, c.msg.FullName())
	}
	return c.srv.Members, nil
}

func (c *call) memberText(f func(Members, context.Context) (string, error)) (any, error) {
	m, err := c.members()
	if err != nil {
		return nil, err
	}
	return textResult(f(m, c.ctx))
}

// poolJoin is pool.join with all it can be told: token, or user and password with
// fingerprint; trust-keys and align are "true" or absent. It gives the pool's
// uuid and name, and, one a line, keys (fingerprint and name), lacks and patches
// (uuid and name).
func poolJoin(c *call) (any, error) {
	o := map[string]string{}
	for k, v := range c.args[1].(map[string]any) {
		o[k], _ = v.(string)
	}
	m, err := c.members()
	if err != nil {
		return nil, err
	}
	a, err := m.Join(c.ctx, pool.JoinSpec{
		Address: c.text(0), Token: o["token"], User: o["user"], Password: o["password"], Fingerprint: o["fingerprint"],
		TrustKeys: o["trust-keys"] == "true", Align: o["align"] == "true",
	})
	if err != nil {
		return nil, err
	}
	keys := ""
	for _, k := range a.Keys {
		keys += k.Fingerprint + " " + k.Name + "\n"
	}
	return map[string]any{
		"pool": string(a.Pool), "name_label": a.PoolName, "keys": keys, "lacks": patchLines(a.Lacks), "patches": patchLines(a.Patches),
	}, nil
}

func patchLines(list []pool.PatchName) (text string) {
	for _, p := range list {
		text += string(p.UUID) + " " + p.Name + " " + p.Version + "\n"
	}
	return text
}

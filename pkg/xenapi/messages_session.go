package xenapi

import (
	"strconv"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// sessionMessages are the explicit messages of session.
func sessionMessages() []*Message {
	ref := RefTo("session")
	return []*Message{
		login("login_with_password", ref, func(c *call) (any, error) {
			if session.Trusted(c.ctx) && c.text(0) == session.Root {
				return refResult(c.srv.Sessions.LoginLocal(c.ctx, c.text(3)))
			}
			return refResult(c.srv.Sessions.Login(c.ctx, c.text(0), c.text(1), c.text(3), address(c.ctx)))
		}, textParam("uname"), textParam("pwd"), textParam("version").or(""), textParam("originator").or("")),
		login("slave_local_login_with_password", ref, localLogin, textParam("uname"), textParam("pwd")),
		// Hosts of a pool show the pool secret with each request instead.
		refused("session", "slave_login", refParam("host", "host"), textParam("psecret")).open(),
		refused("session", "slave_local_login", textParam("psecret")).open(),
		write("session", "logout", Void, logout).by(session.ReadOnly),
		write("session", "local_logout", Void, logout).by(session.ReadOnly),
		write("session", "change_password", Void, func(c *call) (any, error) {
			return nil, c.srv.Sessions.ChangePassword(c.ctx, c.sess, c.text(0), c.text(1))
		}, textParam("old_pwd"), textParam("new_pwd")).by(session.ReadOnly),
		// There is no external directory, so nobody is logged in by one.
		look("session", "get_all_subject_identifiers", stringSet, always([]any{})),
		write("session", "logout_subject_identifier", Void, nothing, textParam("subject_identifier")),
	}
}

// open makes a message one that takes no session.
func (m *Message) open() *Message { m.noSession = true; return m }

// everywhere makes a message one that any host answers, whoever leads.
func (m *Message) everywhere() *Message { m.anywhere = true; return m }

func login(name string, result Type, run func(*call) (any, error), params ...Param) *Message {
	m := look("session", name, result, run, params...)
	m.mode, m.noSession = modeLogin, true
	return m
}

// localLogin is the login of an admin at this very host.
func localLogin(c *call) (any, error) {
	ref, err := c.srv.Sessions.Login(c.ctx, c.text(0), c.text(1), "local login", address(c.ctx))
	if err != nil {
		return nil, err
	}
	s, err := c.srv.Sessions.Get(ref)
	if err == nil {
		err = s.Require(session.PoolAdmin, c.msg.FullName())
	}
	if err != nil {
		if gone := c.srv.Sessions.Logout(c.ctx, ref); gone != nil {
			c.srv.Log.WithError(gone).Warn("a session that was refused could not be ended")
		}
		return nil, err
	}
	return string(ref), nil
}

func logout(c *call) (any, error) {
	err := c.srv.Sessions.Logout(c.ctx, c.sess.Ref)
	c.srv.Events.Drop(c.sess.Ref)
	return nil, err
}

// ownMessages are not of the XenAPI: what patchd's own command line needs and
// no classic message does. They stand under a class name of our own.
func ownMessages() []*Message {
	name, pwd, role := textParam("name"), textParam("password"), textParam("role")
	users := []*Message{
		write("patchd", "user_add", Void, func(c *call) (any, error) {
			return nil, c.srv.Sessions.AddUser(c.ctx, c.text(0), c.text(1), session.Role(c.text(2)))
		}, name, pwd, role),
		write("patchd", "user_passwd", Void, func(c *call) (any, error) {
			return nil, c.srv.Sessions.SetPassword(c.ctx, c.text(0), c.text(1))
		}, name, pwd),
		write("patchd", "user_remove", Void, func(c *call) (any, error) {
			return nil, c.srv.Sessions.RemoveUser(c.ctx, c.text(0))
		}, name),
		look("patchd", "user_list", SetOf(stringMap), userList),
	}
	for _, m := range users {
		m.by(session.PoolAdmin)
	}
	return append(users,
		look("patchd", "doctor", SetOf(stringMap), examine),
		look("patchd", "role", stringMap, tellRole).open().everywhere(),
		work("patchd", "patch_settle", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.PatchSettle(c.ctx, c.ref(0), c.ref(1), c.flag(2))
		}, refParam("patch", "pool_patch"), refParam("host", "host"), boolParam("applied")),
		work("patchd", "patch_import", RefTo("pool_patch"), func(c *call) (any, error) {
			return refResult(c.srv.Pool.PatchImport(c.ctx, c.text(0)))
		}, textParam("path")).by(session.PoolAdmin),
	)
}

// tellRole tells which part this host plays: role ("coordinator", "standby"), pool,
// host (uuids) and, where one is known, coordinator (uuid), coordinator_name,
// coordinator_address, coordinator_url and coordinator_pin (the SHA-256 of its key).
func tellRole(c *call) (any, error) {
	out := map[string]any{}
	for k, v := range c.srv.Role() {
		out[k] = v
	}
	return out, nil
}

// examine gives what was looked at for an admin: check, ok ("true" or
// "false"), text and, where it is about one object, class, uuid and name.
func examine(c *call) (any, error) {
	e, ok := c.srv.Pool.(Examiner)
	if !ok {
		return []any{}, nil
	}
	found, err := e.Examine(c.ctx)
	if err != nil {
		return nil, err
	}
	out := make([]any, len(found))
	for i, f := range found {
		out[i] = map[string]any{
			"check": f.Check, "ok": strconv.FormatBool(f.OK), "text": f.Text,
			"class": f.Class, "uuid": string(f.UUID), "name": f.Name,
		}
	}
	return out, nil
}

// userList gives name, role, created and changed (of the password) of each user.
func userList(c *call) (any, error) {
	users, err := c.srv.Sessions.Users()
	if err != nil {
		return nil, err
	}
	out := make([]any, len(users))
	for i, u := range users {
		out[i] = map[string]any{
			"name": u.Name, "role": string(u.Role),
			"created": xapi.FormatTime(u.Created), "changed": xapi.FormatTime(u.Changed),
		}
	}
	return out, nil
}

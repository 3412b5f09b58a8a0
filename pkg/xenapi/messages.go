package xenapi

import (
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// allMessages binds every message that is served. An explicit message comes
// before the implicit one of the same name.
func allMessages(m *Model) []*Message {
	var all []*Message
	for _, list := range [][]*Message{
		sessionMessages(), eventMessages(m), taskMessages(), patchMessages(), poolMessages(), hostMessages(),
		srMessages(), pbdMessages(), vdiMessages(m), messageMessages(m), ownMessages(), verifyMessages(), roomMessages(), memberMessages(), runMessages(), stageMessages(),
	} {
		all = append(all, list...)
	}
	for _, c := range m.Classes() {
		all = append(all, implicitMessages(c)...)
	}
	return all
}

// The shapes of messages: what they may do and who may send them. The roles
// are those of the data model, reduced to the three there are.

func look(class, name string, result Type, run func(*call) (any, error), params ...Param) *Message {
	return &Message{Class: class, Name: name, Params: params, Result: result, role: session.ReadOnly, run: run}
}

func write(class, name string, result Type, run func(*call) (any, error), params ...Param) *Message {
	m := look(class, name, result, run, params...)
	m.role, m.mode = session.PoolOperator, modeWrite
	return m
}

func work(class, name string, result Type, run func(*call) (any, error), params ...Param) *Message {
	m := write(class, name, result, run, params...)
	m.mode = modeTask
	return m
}

// by sets the role a message needs.
func (m *Message) by(role session.Role) *Message { m.role = role; return m }

// refused is a message that classic servers have and this one knowingly has
// not: its parameters are checked, so that a client learns what is wrong.
func refused(class, name string, params ...Param) *Message {
	m := look(class, name, Void, func(c *call) (any, error) {
		return nil, xapi.NewError(xapi.NotImplemented, c.msg.FullName())
	}, params...)
	m.role, m.hidden = session.PoolOperator, true
	return m
}

// nothing is a message that has nothing to do here but check its object.
func nothing(*call) (any, error) { return nil, nil }

// always answers with one value.
func always(v any) func(*call) (any, error) {
	return func(*call) (any, error) { return cloneValue(v), nil }
}

// given makes one value the answer when the object of the first parameter is
// there: HANDLE_INVALID [class, ref] when it is not.
func given(v any) func(*call) (any, error) {
	return func(c *call) (any, error) {
		if err := c.exists(0); err != nil {
			return nil, err
		}
		return cloneValue(v), nil
	}
}

// Parameters that many messages have.

func refParam(name, class string) Param { return Param{Name: name, Type: RefTo(class)} }

func textParam(name string) Param { return Param{Name: name, Type: String} }

func intParam(name string) Param { return Param{Name: name, Type: Int} }

func boolParam(name string) Param { return Param{Name: name, Type: Bool} }

func mapParam(name string) Param { return Param{Name: name, Type: stringMap} }

// or makes a parameter one that may be left out, in the form of arguments:
// xapi.Ref, int64, map[string]any and so on.
func (p Param) or(def any) Param {
	p.Optional, p.Default = true, def
	return p
}

// noConfig is the default of maps.
func noConfig() map[string]any { return map[string]any{} }

// refResult is the answer of what makes an object.
func refResult(ref xapi.Ref, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return string(ref), nil
}

// textResult is the answer of what gives a text.
func textResult(s string, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}

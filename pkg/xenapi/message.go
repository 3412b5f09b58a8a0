package xenapi

import (
	"context"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// mode says how a message runs.
type mode int

const (
	// modeRead looks, and changes nothing. It ends with the request.
	modeRead mode = iota
	// modeWrite changes something in one short step: no task, no Async form. It
	// does not end with the request.
	modeWrite
	// modeLogin opens a session: it is audited, and ends with the request.
	modeLogin
	// modeTask does work: it runs as a visible task, under the task's context,
	// and has an Async form.
	modeTask
)

// Param is one parameter of a message; the session is not counted among them.
type Param struct {
	Name string
	Type Type
	// Optional params stand last and may be left out; Default is their value.
	Optional bool
	Default  any
}

// Message is one call of the API, bound to what it does.
type Message struct {
	Class, Name string
	Params      []Param
	Result      Type

	role      session.Role
	mode      mode
	noSession bool
	anywhere  bool // answered by every host of the pool
	hidden    bool // exists only to be refused: not listed
	implicit  bool
	run       func(c *call) (any, error)
}

// FullName is class.message.
func (m *Message) FullName() string { return m.Class + "." + m.Name }

// Async tells whether the message has an Async form.
func (m *Message) Async() bool { return m.mode == modeTask }

// Effect tells whether the message changes something.
func (m *Message) Effect() bool { return m.mode != modeRead }

// Role is the lowest role that may send the message.
func (m *Message) Role() session.Role { return m.role }

// required is how many parameters have to be given.
func (m *Message) required() int {
	n := 0
	for _, p := range m.Params {
		if !p.Optional {
			n++
		}
	}
	return n
}

// call is one run of a message: its arguments, checked and converted, and who
// sent it.
type call struct {
	ctx  context.Context
	srv  *Server
	msg  *Message
	name string // as the client wrote it
	sess *session.Session
	args []any
}

// The arguments by position. The dispatch has checked their types, so a wrong
// one is a mistake in the table and gives the zero value.

func (c *call) text(i int) string           { s, _ := c.args[i].(string); return s }
func (c *call) ref(i int) xapi.Ref          { r, _ := c.args[i].(xapi.Ref); return r }
func (c *call) number(i int) int64          { n, _ := c.args[i].(int64); return n }
func (c *call) real(i int) float64          { f, _ := c.args[i].(float64); return f }
func (c *call) flag(i int) bool             { b, _ := c.args[i].(bool); return b }
func (c *call) when(i int) time.Time        { t, _ := c.args[i].(time.Time); return t }
func (c *call) list(i int) []any            { l, _ := c.args[i].([]any); return l }
func (c *call) record(i int) map[string]any { m, _ := c.args[i].(map[string]any); return m }

func (c *call) dict(i int) map[string]string { return textMap(c.record(i)) }

func textMap(m map[string]any) map[string]string {
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[k], _ = v.(string)
	}
	return out
}

func (c *call) texts(i int) []string {
	var out []string
	for _, v := range c.list(i) {
		s, _ := v.(string)
		out = append(out, s)
	}
	return out
}

// messageTable is every message by its full name, and by class_message for
// clients that write it so.
type messageTable struct {
	byName map[string]*Message
	alias  map[string]*Message
	sorted []*Message
}

func newMessageTable(msgs []*Message) *messageTable {
	t := &messageTable{byName: map[string]*Message{}, alias: map[string]*Message{}, sorted: msgs}
	for _, m := range msgs {
		if _, bound := t.byName[m.FullName()]; bound {
			continue // an explicit message comes before the implicit one of that name
		}
		t.byName[m.FullName()] = m
		t.alias[m.Class+"_"+m.Name] = m
	}
	return t
}

// find looks a method up: class.message, class_message, Async.class.message.
func (t *messageTable) find(method string) (m *Message, async bool, err error) {
	name, async := strings.CutPrefix(method, "Async.")
	m = t.byName[name]
	if m == nil && !async {
		m = t.alias[name]
	}
	if m == nil {
		return nil, false, xapi.NewError(xapi.MessageMethodUnknown, clip(method, 256))
	}
	return m, async, nil
}

// names lists what is really served, as system.listMethods does.
func (t *messageTable) names() []any {
	out := []any{"system.listMethods"}
	for _, m := range t.sorted {
		if m.hidden || t.byName[m.FullName()] != m {
			continue
		}
		out = append(out, m.FullName())
		if m.Async() {
			out = append(out, "Async."+m.FullName())
		}
	}
	return out
}

// clip shortens what a client sent before it goes into an answer or a log.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "\ufffd")
}

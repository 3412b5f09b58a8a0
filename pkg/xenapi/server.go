package xenapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/event"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// Options are what the wire converts for and delegates to. All but
// Members, Coordinator, Limits and Now are needed.
type Options struct {
	Store    *store.Store
	Pool     Pool
	Tasks    *task.Manager
	Sessions *session.Manager
	Events   *event.Broker
	Log      logrus.FieldLogger

	// Members is this host's own place in the pool.
	Members Members

	// Coordinator tells whether this host is the coordinator now and, where it
	// is not, the address of the one that is ("" when nobody knows). nil: this
	// host always is.
	Coordinator func() (address string, here bool)
	// Role is what patchd.role tells of this host; nil: that it is the coordinator.
	Role func() map[string]string
	// Limits of one request; the zero value is DefaultLimits.
	Limits Limits
	// Now is the clock; nil is the real one.
	Now func() time.Time
}

// Server answers calls. It keeps no state of its own but the table, starts no
// goroutines, and may be used by many at once.
type Server struct {
	Options
	model    *Model
	messages *messageTable
	intake   *Intake
	// What system.listMethods answers, made once: it needs no login.
	namesXML  []byte
	namesJSON json.RawMessage
}

// New makes a Server.
func New(o Options) (*Server, error) {
	if o.Store == nil || o.Pool == nil || o.Tasks == nil || o.Sessions == nil || o.Events == nil || o.Log == nil {
		return nil, errors.New("xenapi: an option is missing")
	}
	if o.Limits == (Limits{}) {
		o.Limits = DefaultLimits
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Coordinator == nil {
		o.Coordinator = func() (string, bool) { return "", true }
	}
	if o.Role == nil {
		o.Role = func() map[string]string { return map[string]string{"role": "coordinator"} }
	}
	s := &Server{Options: o, model: NewModel()}
	s.messages = newMessageTable(allMessages(s.model))
	s.intake = NewIntake(0)
	names := s.messages.names()
	var text bytes.Buffer
	encodeJSON(&text, names)
	s.namesXML, s.namesJSON = xmlResponse(names), text.Bytes()
	return s, nil
}

// Model is the table of classes.
func (s *Server) Model() *Model { return s.model }

// Methods are the names that system.listMethods gives.
func (s *Server) Methods() []string {
	var out []string
	for _, n := range s.messages.names() {
		out = append(out, n.(string))
	}
	return out
}

// Message finds a message by class.message.
func (s *Server) Message(name string) (*Message, bool) {
	m, ok := s.messages.byName[name]
	return m, ok
}

type addressKey struct{}

// WithAddress notes in ctx from where a call comes, for the audit log and the
// limits of logins.
func WithAddress(ctx context.Context, addr string) context.Context {
	return context.WithValue(ctx, addressKey{}, addr)
}

func address(ctx context.Context) string {
	a, _ := ctx.Value(addressKey{}).(string)
	return a
}

// Call sends one message from inside the process: what the wire does once it
// has decoded. sess is the caller's session, nil for messages that take none;
// params leave it out. Values are string (also for ints, enums, refs and
// dates), bool, float64, []any and map[string]any, nil for void; refs, uuids
// and the usual Go forms of sets and maps are taken, too. The error has a code.
func (s *Server) Call(ctx context.Context, sess *session.Session, method string, params []any) (any, error) {
	if method == listMethods {
		return s.messages.names(), nil
	}
	m, async, err := s.lookUp(method)
	if err != nil {
		return nil, err
	}
	if err := m.count(method, len(params)); err != nil {
		return nil, err
	}
	if sess == nil && !m.noSession {
		return nil, xapi.NewError(xapi.SessionInvalid, nullRefText)
	}
	plain := make([]any, len(params))
	for i, p := range params {
		plain[i] = argument(p)
	}
	v, err := s.invoke(ctx, m, async, method, sess, plain)
	return plainValue(v), err
}

const listMethods = "system.listMethods"

// lookUp finds the message and refuses what nobody here may answer: an unknown
// name, an Async form that does not exist, any call while another host is the
// coordinator.
func (s *Server) lookUp(method string) (*Message, bool, error) {
	m, async, err := s.messages.find(method)
	if err != nil {
		return nil, false, err
	}
	if async && !m.Async() {
		return nil, false, xapi.NewError("Fault", "no asynchronous form of "+m.FullName())
	}
	if addr, here := s.Coordinator(); !here && !m.anywhere {
		return nil, false, notHere(addr)
	}
	return m, async, nil
}

// notHere is the answer of a host that is not the coordinator. addr is the
// address of the one that is, or "".
func notHere(addr string) *xapi.Error {
	if addr == "" {
		return xapi.NewError(xapi.HostStillBooting)
	}
	return xapi.NewError(xapi.HostIsSlave, addr)
}

// dispatch is one call as it came over the wire: the session is the first
// parameter.
func (s *Server) dispatch(ctx context.Context, method string, params []any) (any, error) {
	m, async, err := s.lookUp(method)
	if err != nil {
		return nil, err
	}
	if m.noSession {
		if err := m.count(method, len(params)); err != nil {
			return nil, err
		}
		return s.invoke(ctx, m, async, method, nil, params)
	}
	if err := m.count(method, len(params)-1); err != nil {
		return nil, err
	}
	ref, _ := params[0].(string)
	sess, err := s.Sessions.Get(xapi.Ref(ref))
	if err != nil {
		return nil, err
	}
	session.Proven(ctx)
	return s.invoke(ctx, m, async, method, sess, params[1:])
}

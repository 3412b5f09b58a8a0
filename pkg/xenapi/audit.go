package xenapi

import (
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// audit writes the one line that every call which changes something leaves in
// the log: who, from where, what, on which objects, how it ended. Texts that a
// client sent are never in it, so no password is; nor is a session ref, only
// the beginning of what it is stored under.
type audit struct {
	log    logrus.FieldLogger // nil: the call changes nothing
	clock  func() time.Time
	began  time.Time
	fields logrus.Fields
	once   sync.Once
}

func (s *Server) beginAudit(c *call) *audit {
	if !c.msg.Effect() {
		return &audit{}
	}
	a := &audit{log: s.Log, clock: s.Now, began: s.Now(), fields: logrus.Fields{
		"method": clip(c.name, 256), "address": address(c.ctx),
	}}
	if c.sess != nil {
		a.fields["user"] = c.sess.User
		a.fields["session"] = sessionMark(c.sess.Stored)
		a.fields["originator"] = c.sess.Originator
	}
	return a
}

// sessionMark is enough of a stored session ref to tell sessions apart.
func sessionMark(stored xapi.Ref) string {
	return clip(strings.TrimPrefix(string(stored), "OpaqueRef:"), 8)
}

// note remembers the objects a call is about, while they are still there.
func (a *audit) note(c *call) {
	if a.log == nil {
		return
	}
	var objects []string
	_ = c.srv.Store.View(func(v *store.View) error {
		for i, p := range c.msg.Params {
			ref, ok := c.args[i].(xapi.Ref)
			if !ok || ref.IsNull() || p.Type.Name == "session" {
				continue
			}
			objects = append(objects, objectName(v, p.Type.Name, ref))
		}
		return nil
	})
	if len(objects) > 0 {
		a.fields["objects"] = strings.Join(objects, ", ")
	}
	if c.msg.Class == "session" && len(c.msg.Params) > 0 && c.msg.Params[0].Name == "uname" {
		a.fields["user"] = clip(c.text(0), 128)
	}
}

// objectName is class, ref and uuid of an object.
func objectName(v *store.View, class string, ref xapi.Ref) string {
	name := class + " " + string(ref)
	if it, ok := v.Get(class, ref); ok {
		if rec, err := decodeStored(it); err == nil {
			name += " (uuid " + rec.text("uuid") + ")"
		}
	}
	return name
}

// done writes the line; only the first call does.
func (a *audit) done(err error) {
	if a.log == nil {
		return
	}
	a.once.Do(func() {
		outcome := "Success"
		if err != nil {
			outcome = xapi.AsError(err).Code
		}
		a.log.WithFields(a.fields).WithFields(logrus.Fields{
			"outcome": outcome, "duration": a.clock().Sub(a.began).Round(time.Microsecond).String(),
		}).Info("audit")
	})
}

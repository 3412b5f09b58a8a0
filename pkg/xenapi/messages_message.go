package xenapi

import (
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// messageMessages are those of the class message: it has no getters of single
// fields.
func messageMessages(m *Model) []*Message {
	class, _ := m.Class("message")
	cls, since := Param{Name: "cls", Type: enumCls}, Param{Name: "since", Type: Datetime}
	records := MapOf(RefTo("message"), RecordOf("message"))
	return []*Message{
		work("message", "create", RefTo("message"), func(c *call) (any, error) {
			uuid, err := xapi.ParseUUID(c.text(3))
			if err != nil {
				return nil, xapi.NewError(xapi.UUIDInvalid, c.text(2), clip(c.text(3), 128))
			}
			return refResult(c.srv.Pool.MessageCreate(c.ctx, c.text(0), c.number(1), c.text(2), uuid, c.text(4)))
		}, textParam("name"), intParam("priority"), cls, textParam("obj_uuid"), textParam("body")),
		work("message", "destroy", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.MessageDestroy(c.ctx, c.ref(0))
		}, refParam("self", "message")),
		look("message", "get", records, func(c *call) (any, error) {
			return c.messagesWhere(class, func(rec map[string]any, at time.Time) bool {
				return rec["cls"] == c.text(0) && rec["obj_uuid"] == c.text(1) && at.After(c.when(2))
			})
		}, cls, textParam("obj_uuid"), since),
		look("message", "get_since", records, func(c *call) (any, error) {
			return c.messagesWhere(class, func(_ map[string]any, at time.Time) bool { return at.After(c.when(0)) })
		}, since),
	}
}

// messagesWhere gives the messages that keep is true for.
func (c *call) messagesWhere(class *Class, keep func(rec map[string]any, at time.Time) bool) (any, error) {
	return c.recordsWhere(class, func(_ xapi.Ref, rec map[string]any) (bool, error) {
		text, _ := rec["timestamp"].(Date)
		at, err := xapi.ParseTime(string(text))
		return err == nil && keep(rec, at), nil
	})
}

package xenapi

import (
	"strconv"
	"time"

	"github.com/patchd/patchd/pkg/event"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// eventMessages are those of event. It has no objects.
func eventMessages(m *Model) []*Message {
	classes := Param{Name: "classes", Type: stringSet}
	render := m.renderSnapshot
	return []*Message{
		look("event", "from", eventBatch, func(c *call) (any, error) {
			batch, err := c.srv.Events.From(c.ctx, c.texts(0), c.text(1), seconds(c.real(2)), render)
			if err != nil {
				return nil, err
			}
			return batchValue(batch), nil
		}, classes, textParam("token"), Param{Name: "timeout", Type: Float}),
		write("event", "inject", String, func(c *call) (any, error) {
			return textResult(c.srv.Events.Inject(c.ctx, c.text(0), xapi.Ref(c.text(1))))
		}, textParam("class"), textParam("ref")).by(session.ReadOnly),
		look("event", "get_current_id", Int, func(c *call) (any, error) {
			return strconv.FormatInt(c.srv.Events.CurrentID(), 10), nil
		}),
		look("event", "register", Void, func(c *call) (any, error) {
			return nil, c.srv.Events.Register(c.sess.Ref, c.texts(0))
		}, classes),
		look("event", "unregister", Void, func(c *call) (any, error) {
			return nil, c.srv.Events.Unregister(c.sess.Ref, c.texts(0))
		}, classes),
		look("event", "next", SetOf(RecordOf("event")), func(c *call) (any, error) {
			events, err := c.srv.Events.Next(c.ctx, c.sess.Ref, render)
			if err != nil {
				return nil, err
			}
			return eventValues(events), nil
		}),
	}
}

// renderSnapshot is the whole record that an event carries.
func (m *Model) renderSnapshot(v *store.View, it store.Item) (any, error) {
	class, ok := m.Class(it.Class)
	if !ok || class.Empty {
		return map[string]any{}, nil
	}
	return class.Render(v, it)
}

// maxWait bounds how long a client may ask to wait for events.
const maxWait = 24 * time.Hour

// seconds turns a time-out as it was sent into a duration.
func seconds(s float64) time.Duration {
	return time.Duration(min(max(s, 0), maxWait.Seconds()) * float64(time.Second))
}

func batchValue(b event.Batch) any {
	counts := make(map[string]any, len(b.Counts))
	for class, n := range b.Counts {
		counts[class] = Int32(n)
	}
	return map[string]any{"events": eventValues(b.Events), "valid_ref_counts": counts, "token": b.Token}
}

// eventValues gives each event as real servers send it: id and timestamp are
// texts, whatever the data model says of them.
func eventValues(events []event.Event) []any {
	out := make([]any, len(events))
	for i, e := range events {
		m := map[string]any{
			"id": strconv.FormatInt(e.ID, 10), "timestamp": "0.0", "class": e.Class,
			"operation": string(e.Op), "ref": string(e.Ref),
		}
		if e.Op != store.Del {
			m["snapshot"] = e.Snapshot
		}
		out[i] = m
	}
	return out
}

package xenapi

import (
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/task"
)

// taskMessages are the explicit messages of task. Whoever may log in may make
// tasks and drive his own; those of others take a pool-operator.
func taskMessages() []*Message {
	self := refParam("self", "task")
	return []*Message{
		taskWrite("create", RefTo("task"), func(c *call) (any, error) {
			return refResult(c.srv.Tasks.Create(c.ctx, task.Spec{
				Label: c.text(0), Description: c.text(1), Session: c.sess.Stored, User: c.sess.User,
			}))
		}, textParam("label"), textParam("description")),
		taskWrite("cancel", Void, own(func(c *call) error {
			return c.srv.Tasks.Cancel(c.ctx, c.ref(0))
		}), refParam("task", "task")),
		taskWrite("destroy", Void, own(func(c *call) error {
			return c.srv.Tasks.Destroy(c.ctx, c.ref(0))
		}), self),
		taskWrite("set_progress", Void, own(func(c *call) error {
			return c.srv.Tasks.SetProgress(c.ctx, c.ref(0), c.real(1))
		}), self, Param{Name: "value", Type: Float}),
		taskWrite("set_status", Void, own(func(c *call) error {
			return c.srv.Tasks.SetStatus(c.ctx, c.ref(0), task.Status(c.text(1)))
		}), self, Param{Name: "value", Type: enumTaskStatusType}),
		taskWrite("set_result", Void, own(func(c *call) error {
			return c.srv.Tasks.SetResult(c.ctx, c.ref(0), c.text(1))
		}), self, textParam("value")),
		taskWrite("set_error_info", Void, own(func(c *call) error {
			return c.srv.Tasks.SetErrorInfo(c.ctx, c.ref(0), c.texts(1))
		}), self, Param{Name: "value", Type: stringSet}),
	}
}

func taskWrite(name string, result Type, run func(*call) (any, error), params ...Param) *Message {
	return write("task", name, result, run, params...).by(session.ReadOnly)
}

// own runs f on a task of the caller's own, or on any when the caller is a
// pool-operator. Codes: HANDLE_INVALID, RBAC_PERMISSION_DENIED ["task.x/any", text].
func own(f func(c *call) error) func(*call) (any, error) {
	return func(c *call) (any, error) {
		rec, err := c.srv.Tasks.Get(c.ref(0))
		if err != nil {
			return nil, err
		}
		if !rec.OwnedBy(c.sess.Stored, c.sess.User) {
			if err := c.sess.Require(session.PoolOperator, c.msg.FullName()+"/any"); err != nil {
				return nil, err
			}
		}
		return nil, f(c)
	}
}

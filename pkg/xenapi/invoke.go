package xenapi

import (
	"context"
	"errors"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// writeTimeout bounds a message that writes without a task.
const writeTimeout = 60 * time.Second

// invoke checks role and arguments and runs the message in its mode. The error
// it returns always has a code.
func (s *Server) invoke(ctx context.Context, m *Message, async bool, method string, sess *session.Session, params []any) (any, error) {
	c := &call{ctx: ctx, srv: s, msg: m, name: method, sess: sess}
	audit := s.beginAudit(c)
	v, err := s.start(c, async, params, audit)
	if err == nil {
		return v, nil
	}
	audit.done(err)
	return nil, s.coded(c, err)
}

// start runs c, or starts it where it is asynchronous. A failure is left for
// the caller to audit; whatever else becomes of the call is audited here.
func (s *Server) start(c *call, async bool, params []any, audit *audit) (v any, err error) {
	if err := authorize(c); err != nil {
		return nil, err
	}
	if c.args, err = c.msg.bind(params); err != nil {
		return nil, err
	}
	if err := misplaced(c); err != nil {
		return nil, err
	}
	audit.note(c)
	switch {
	case c.msg.mode == modeRead:
		return s.read(c)
	case c.msg.mode == modeLogin:
		if v, err = c.msg.run(c); err == nil {
			session.Proven(c.ctx)
		}
	case c.msg.mode == modeWrite:
		v, err = s.write(c)
	case async:
		return s.startTask(c, audit)
	default:
		v, err = s.runTask(c)
	}
	if err == nil {
		audit.done(nil)
	}
	return v, err
}

// authorize compares the session's role with the one the message needs.
func authorize(c *call) error {
	if c.msg.noSession {
		return nil
	}
	return c.sess.Require(c.msg.role, c.msg.FullName())
}

// misplaced refuses the caller's own session where another object belongs,
// before anything is made that would keep and show the secret ref.
func misplaced(c *call) error {
	if c.sess == nil {
		return nil
	}
	for i, p := range c.msg.Params {
		if ref, ok := c.args[i].(xapi.Ref); ok && ref == c.sess.Ref && p.Type.Name != session.Class {
			return xapi.NewError(xapi.HandleInvalid, p.Type.Name, string(ref))
		}
	}
	return nil
}

// read runs under the request and ends, too, when the session does: whoever
// waits for events learns of a logout at once.
func (s *Server) read(c *call) (any, error) {
	if c.sess == nil {
		return c.msg.run(c)
	}
	ctx, cancel := context.WithCancelCause(c.ctx)
	defer cancel(nil)
	over := c.sess.Context()
	stop := context.AfterFunc(over, func() { cancel(context.Cause(over)) })
	defer stop()
	c.ctx = ctx
	v, err := c.msg.run(c)
	if err != nil && over.Err() != nil && errors.Is(err, context.Canceled) {
		return nil, context.Cause(over)
	}
	return v, err
}

// write runs to its end whether or not the client waits for it.
func (s *Server) write(c *call) (any, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.ctx), writeTimeout)
	defer cancel()
	c.ctx = ctx
	return c.msg.run(c)
}

func (c *call) spec() task.Spec {
	return task.Spec{Label: c.name, Session: c.sess.Stored, User: c.sess.User}
}

// runTask runs a call that the client waits for, as a task that others can see
// and cancel. A client that goes away changes nothing; the finished task is
// there for it to find. A client that gets the answer has no use for it, and
// as few finished tasks are kept, it must not push out those of others.
func (s *Server) runTask(c *call) (any, error) {
	request, base := c.ctx, context.WithoutCancel(c.ctx)
	ref, err := s.Tasks.Create(base, c.spec())
	if err != nil {
		return nil, err
	}
	var out any
	_, err = s.Tasks.Run(base, ref, func(ctx context.Context, _ *task.Handle) (string, error) {
		c.ctx = ctx
		v, err := c.msg.run(c)
		if err != nil {
			return "", err
		}
		out = v
		return XMLValue(v), nil
	})
	if request.Err() == nil {
		s.forget(base, ref)
	}
	return out, err
}

// forget destroys the task of an answered call. Others may have been quicker.
// One that has not finished stays: patchd is stopping, and its work goes on.
func (s *Server) forget(ctx context.Context, ref xapi.Ref) {
	if rec, err := s.Tasks.Get(ref); err == nil && !rec.Status.Finished() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if err := s.Tasks.Destroy(ctx, ref); err != nil && !xapi.Is(err, xapi.HandleInvalid) {
		s.Log.WithError(err).WithField("task_ref", ref).Warn("the task of an answered call stays until it is old")
	}
}

// startTask starts an asynchronous call and gives its task. What becomes of it
// is the task's to tell, and the audit's.
func (s *Server) startTask(c *call, audit *audit) (any, error) {
	base := context.WithoutCancel(c.ctx)
	ref, err := s.Tasks.Create(base, c.spec())
	if err != nil {
		return nil, err
	}
	s.Tasks.Go(ref, func(ctx context.Context, _ *task.Handle) (string, error) {
		c.ctx = pool.Resuming(ctx)
		v, err := c.msg.run(c)
		audit.done(err)
		if err != nil {
			return "", s.coded(c, err)
		}
		return XMLValue(v), nil
	})
	return string(ref), nil
}

// coded gives err as an error with a code, and logs the cause of what the
// client will see as an internal error: this is the border.
func (s *Server) coded(c *call, err error) error {
	if cause := new(xapi.Error); errors.As(err, &cause) && cause.Code != xapi.InternalError {
		return err
	}
	if errors.Is(err, store.ErrDeposed) { // nothing was written
		addr, _ := s.Coordinator()
		return notHere(addr)
	}
	if !errors.Is(err, context.Canceled) {
		s.Log.WithError(err).WithField("method", c.msg.FullName()).Error("call failed")
	}
	return xapi.AsError(err)
}

package upload

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// sendChunk is how much is sent between two looks at the clock.
const sendChunk = 4 * mib

// patchDownload serves GET /pool_patch_download?uuid=…: the signed file of a
// patch that still lies in this host's patch-dir. 400 without a uuid; UUID_INVALID
// and CANNOT_FIND_PATCH are the task's failure and 404.
func (h *Handler) patchDownload(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "pool_patch_download", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	uuid, err := xapi.ParseUUID(param(r, "uuid"))
	if err != nil {
		err := xapi.NewError(xapi.InvalidValue, "uuid", fmt.Sprintf("%.64s", param(r, "uuid")))
		c.failTask(err)
		c.refuse(err)
		return
	}
	c.send(func(context.Context) (*os.File, func(), error) {
		f, _, err := h.Pool.PatchFile(uuid)
		if err != nil {
			return nil, nil, err
		}
		return f, func() { f.Close() }, nil
	})
}

// send answers with the bytes of what open gives, under the task.
func (c *call) send(open func(context.Context) (f *os.File, release func(), err error)) {
	c.sendBy(open, c.sendFile)
}

// sendBy gives what open gives to send, under the task.
func (c *call) sendBy(open func(context.Context) (f *os.File, release func(), err error), send func(context.Context, *task.Handle, *os.File) error) {
	if !c.begin() {
		return
	}
	_, err := c.run(func(ctx context.Context, t *task.Handle) (string, error) {
		f, release, err := open(ctx)
		if err != nil {
			return "", err
		}
		defer release()
		return "<value></value>", send(ctx, t, f)
	})
	if err != nil {
		c.refuse(err)
	}
}

// sendFile sends f, or the range of it that was asked for. A client that takes
// nothing for too long is cut off.
func (c *call) sendFile(ctx context.Context, t *task.Handle, f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("size: %w", err)
	}
	unhook := context.AfterFunc(ctx, func() { c.rc.SetWriteDeadline(time.Unix(1, 0)) })
	defer unhook()
	out := c.outgoing(ctx, t, st.Size())
	http.ServeContent(out, c.r, "", time.Time{}, f)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case out.err != nil:
		return fmt.Errorf("send: %w", out.err)
	case out.status >= http.StatusBadRequest:
		return xapi.NewError(xapi.InvalidValue, "Range", fmt.Sprintf("%.64s", c.r.Header.Get("Range")))
	}
	return nil
}

// outgoing makes the answer for bytes, of which size are expected; 0: not known.
func (c *call) outgoing(ctx context.Context, t *task.Handle, size int64) *outgoing {
	c.w.Header().Set("Content-Type", "application/octet-stream")
	c.answer = true
	return &outgoing{ResponseWriter: c.w, ctx: ctx, rc: c.rc, stall: c.h.Stall, task: t, size: size}
}

// outgoing is an answer that moves its deadline on as the client takes it,
// ends with the task, and remembers what went wrong.
type outgoing struct {
	http.ResponseWriter
	ctx   context.Context
	rc    *http.ResponseController
	stall time.Duration
	task  *task.Handle
	size  int64

	status int
	sent   int64
	err    error
}

func (o *outgoing) WriteHeader(status int) {
	o.status = status
	o.ResponseWriter.WriteHeader(status)
}

func (o *outgoing) Write(p []byte) (int, error) {
	o.rc.SetWriteDeadline(time.Now().Add(o.stall)) //nolint:errcheck // a server without deadlines does not stall out
	if o.ctx.Err() != nil {
		return 0, context.Cause(o.ctx)
	}
	n, err := o.ResponseWriter.Write(p)
	o.note(int64(n), err)
	return n, err
}

// ReadFrom hands the file to the connection a chunk at a time, so that the
// kernel may send it.
func (o *outgoing) ReadFrom(r io.Reader) (sent int64, err error) {
	for err == nil {
		o.rc.SetWriteDeadline(time.Now().Add(o.stall)) //nolint:errcheck // a server without deadlines does not stall out
		if o.ctx.Err() != nil {
			return sent, context.Cause(o.ctx)
		}
		var n int64
		n, err = io.CopyN(o.ResponseWriter, r, sendChunk)
		sent += n
		if err != io.EOF {
			o.note(n, err)
		} else {
			o.note(n, nil)
		}
	}
	if err == io.EOF {
		return sent, nil
	}
	return sent, err
}

func (o *outgoing) note(n int64, err error) {
	o.sent += n
	if err != nil && o.err == nil {
		o.err = err
	}
	if o.size > 0 {
		o.task.Progress(float64(o.sent) / float64(o.size))
	}
}

package upload

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
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

// exportRaw serves GET /export_raw_vdi?vdi=…: all bytes of a VDI. 400 without a
// VDI, 404 for another format than raw.
func (h *Handler) exportRaw(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "export_raw_vdi", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	id, format := param(r, "vdi"), param(r, "format")
	if id == "" || format != "" && format != "raw" {
		status, text := http.StatusBadRequest, "name the VDI (vdi)"
		if id != "" {
			status, text = http.StatusNotFound, fmt.Sprintf("format %.32q is not supported, only raw is", format)
		}
		c.failTask(xapi.NewError(xapi.InvalidValue, "vdi", text))
		c.reply(status, problem{Code: xapi.InvalidValue, Params: []string{text}, Message: text})
		return
	}
	c.send(func(ctx context.Context) (*os.File, func(), error) {
		ref, err := h.vdiRef(id)
		if err != nil {
			return nil, nil, err
		}
		return h.Pool.VDIForExport(ctx, string(ref))
	})
}

// send answers with the bytes of what open gives, under the task.
func (c *call) send(open func(context.Context) (f *os.File, release func(), err error)) {
	if !c.begin() {
		return
	}
	_, err := c.run(func(ctx context.Context, t *task.Handle) (string, error) {
		f, release, err := open(ctx)
		if err != nil {
			return "", err
		}
		defer release()
		return "<value></value>", c.sendFile(ctx, t, f)
	})
	if err != nil {
		c.refuse(err)
	}
}

// sendFile sends f. A client that takes nothing for too long is cut off.
func (c *call) sendFile(ctx context.Context, t *task.Handle, f *os.File) error {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("rewind: %w", err)
	}
	unhook := context.AfterFunc(ctx, func() { c.rc.SetWriteDeadline(time.Unix(1, 0)) })
	defer unhook()
	c.w.Header().Set("Content-Type", "application/octet-stream")
	c.w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	c.w.WriteHeader(http.StatusOK)
	c.answer = true
	for sent := int64(0); sent < size; {
		c.rc.SetWriteDeadline(time.Now().Add(c.h.Stall)) //nolint:errcheck // a server without deadlines does not stall out
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := io.CopyN(c.w, f, min(sendChunk, size-sent))
		sent += n
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("send: %w", err)
		}
		t.Progress(float64(sent) / float64(size))
	}
	return nil
}

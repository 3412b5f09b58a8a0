package upload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// importRaw serves PUT /import_raw_vdi: the body becomes content of the VDI named
// by vdi (ref or uuid), or of a new VDI on the SR named by sr_id or sr_uuid. With
// format=raw it is the bytes from the first on, and a new VDI is as long as the
// body; with format=extents or blocks it is a stream of vdi's frames, which also
// tells the size. Content-Encoding zstd is taken with each. The status is 200
// before the body is read; the outcome is the task's, whose result is the VDI.
//
// Before that: 400 when neither is named or the size of a new VDI cannot be known,
// 404 for another format and for chunked raw bodies, 415 for another encoding.
func (h *Handler) importRaw(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "import_raw_vdi", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	into := param(r, "vdi")
	form, status, text := judgeImport(r, into)
	if status != http.StatusOK {
		c.failTask(xapi.NewError(xapi.ImportError, text))
		c.reply(status, problem{Code: xapi.ImportError, Params: []string{text}, Message: text})
		c.linger()
		return
	}
	if !c.begin() {
		return
	}
	c.ok()
	_, err := c.run(func(ctx context.Context, t *task.Handle) (string, error) {
		leave, err := enter(ctx, h.streams)
		if err != nil {
			return "", err
		}
		defer leave()
		b := c.newBody(ctx, t)
		defer b.close()
		ref, err := h.importForm(ctx, b, form, into, requestedSR(r))
		if err != nil {
			b.drain()
		}
		return "<value>" + string(ref) + "</value>", err
	})
	if err != nil {
		c.refuse(err)
	}
}

// vdiRef finds a VDI by ref or uuid.
func (h *Handler) vdiRef(id string) (ref xapi.Ref, err error) {
	err = h.Store.View(func(v *store.View) error {
		if it, ok := v.Get(pool.ClassVDI, xapi.Ref(id)); ok {
			ref = it.Ref
			return nil
		}
		uuid, err := xapi.ParseUUID(id)
		if err != nil {
			return xapi.NewError(xapi.HandleInvalid, pool.ClassVDI, fmt.Sprintf("%.64s", id))
		}
		it, ok := v.ByUUID(pool.ClassVDI, uuid)
		if !ok {
			return xapi.NewError(xapi.UUIDInvalid, pool.ClassVDI, string(uuid))
		}
		ref = it.Ref
		return nil
	})
	return ref, err
}

// importInto writes content over a VDI that is there.
//
// Codes: those of finding and opening it, VDI_TOO_SMALL, OUT_OF_SPACE,
// VDI_IO_ERROR when the body ends early, IMPORT_ERROR when it is damaged.
func (h *Handler) importInto(ctx context.Context, in content, id string) (xapi.Ref, error) {
	ref, err := h.vdiRef(id)
	if err != nil {
		return "", err
	}
	f, release, err := h.Pool.VDIForImport(ctx, string(ref))
	if err != nil {
		return "", err
	}
	defer release()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "", fmt.Errorf("size of VDI %s: %w", ref, err)
	}
	if in.size() > size {
		return "", xapi.NewError(xapi.VDITooSmall, string(ref), strconv.FormatInt(in.size(), 10))
	}
	err = in.write(ctx, f, size, false)
	if errors.Is(err, errTooMuch) {
		return "", xapi.NewError(xapi.VDITooSmall, string(ref), strconv.FormatInt(size+1, 10)).Because(err)
	}
	return ref, noRoom(h.whereIs(ctx, ref), err)
}

// whereIs gives the SR of a VDI as an error names it.
func (h *Handler) whereIs(ctx context.Context, ref xapi.Ref) sr.Candidate {
	var rec pool.VDI
	err := h.Store.View(func(v *store.View) (err error) {
		rec, err = store.Get[pool.VDI](v, pool.ClassVDI, ref)
		return err
	})
	if err != nil {
		return sr.Candidate{}
	}
	_, candidates, _ := h.Pool.SRCandidates(ctx)
	for _, c := range candidates {
		if c.Ref == rec.SR {
			return c
		}
	}
	return sr.Candidate{}
}

// importNew makes a VDI of content. Its size is rounded up to 1 MiB.
//
// Codes: those of sr.Choose, OUT_OF_SPACE, VDI_IO_ERROR when the body ends early,
// IMPORT_ERROR when it is damaged.
func (h *Handler) importNew(ctx context.Context, in content, requested string) (xapi.Ref, error) {
	u := &patchUpload{h: h}
	u.requested = requested
	if err := u.choose(ctx, 0); err != nil {
		return "", err
	}
	if in.size() <= 0 {
		return "", xapi.NewError(xapi.ImportError, "the image is empty")
	}
	ref, err := h.Pool.NewVDI(ctx, pool.NewVDI{
		SR:          u.where.Ref,
		Room:        headroom, // more is taken as it comes: how much of it is zeros nobody knows
		VirtualSize: (in.size() + mib - 1) / mib * mib,
		VDI:         pool.VDI{NameLabel: "Imported VDI", Type: "user", OtherConfig: map[string]string{}},
		Fill: func(ctx context.Context, f *os.File, _ string) error {
			err := in.write(ctx, f, in.size(), true)
			if errors.Is(err, errTooMuch) {
				err = xapi.NewError(xapi.ImportError, "there is more data than was said").Because(err)
			}
			return u.noRoom(err)
		},
		Commit: func(tx *store.Tx, ref xapi.Ref) error {
			return task.Settle(tx, task.FromContext(ctx).Ref(), string(ref))
		},
	})
	return ref, u.noRoom(err)
}

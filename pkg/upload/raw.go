package upload

import (
	"bytes"
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

// importRaw serves PUT /import_raw_vdi: the body becomes the content of the VDI
// named by vdi (ref or uuid), from its first byte on; or of a new VDI as long as
// the body, on the SR named by sr_id or sr_uuid. The status is 200 before the
// body is read; the outcome is the task's, whose result is the VDI.
//
// Before that: 400 when neither is named or a new VDI has no Content-Length, 404
// for another format than raw and for chunked bodies.
func (h *Handler) importRaw(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "import_raw_vdi", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	into := param(r, "vdi")
	if status, text := judgeImport(r, into); status != http.StatusOK {
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
		ref := xapi.Ref("")
		if into != "" {
			ref, err = h.importInto(ctx, b, into)
		} else {
			ref, err = h.importNew(ctx, b, requestedSR(r))
		}
		if err != nil {
			b.drain()
		}
		return "<value>" + string(ref) + "</value>", err
	})
	if err != nil {
		c.refuse(err)
	}
}

// judgeImport tells whether the request says enough.
func judgeImport(r *http.Request, into string) (status int, text string) {
	_, framed := r.URL.Query()["chunked"]
	format := param(r, "format")
	switch {
	case len(r.TransferEncoding) > 0 || framed:
		return http.StatusNotFound, "chunked data is not supported: send Content-Length"
	case format != "" && format != "raw":
		return http.StatusNotFound, fmt.Sprintf("format %.32q is not supported, only raw is", format)
	case into == "" && requestedSR(r) == "":
		return http.StatusBadRequest, "name the VDI (vdi) or the SR for a new one (sr_id or sr_uuid)"
	case into == "" && (r.ContentLength <= 0 || r.ContentLength == unknownLength):
		return http.StatusBadRequest, "a new VDI needs Content-Length: it is its size"
	}
	return http.StatusOK, ""
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

// importInto writes the body over a VDI that is there.
//
// Codes: those of finding and opening it, VDI_TOO_SMALL, OUT_OF_SPACE,
// VDI_IO_ERROR when the body ends early.
func (h *Handler) importInto(ctx context.Context, b *body, id string) (xapi.Ref, error) {
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
	if b.length > size {
		return "", xapi.NewError(xapi.VDITooSmall, string(ref), strconv.FormatInt(b.length, 10))
	}
	err = copyRaw(b, f, size, false)
	if errors.Is(err, errTooMuch) {
		return "", xapi.NewError(xapi.VDITooSmall, string(ref), strconv.FormatInt(b.n, 10)).Because(err)
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

// importNew makes a VDI of the body. Its size is rounded up to 1 MiB.
//
// Codes: those of sr.Choose, OUT_OF_SPACE, VDI_IO_ERROR when the body ends early.
func (h *Handler) importNew(ctx context.Context, b *body, requested string) (xapi.Ref, error) {
	u := &patchUpload{h: h}
	u.requested = requested
	if err := u.choose(ctx, 0); err != nil {
		return "", err
	}
	size := (b.length + mib - 1) / mib * mib
	ref, err := h.Pool.NewVDI(ctx, pool.NewVDI{
		SR:          u.where.Ref,
		VirtualSize: size,
		VDI:         pool.VDI{NameLabel: "Imported VDI", Type: "user", OtherConfig: map[string]string{}},
		Fill: func(_ context.Context, f *os.File, _ string) error {
			return u.noRoom(copyRaw(b, f, size, true))
		},
		Commit: func(*store.Tx, xapi.Ref) error { return nil },
	})
	return ref, u.noRoom(err)
}

var zeros [copyChunk]byte

var errTooMuch = errors.New("more data than the VDI holds")

// copyRaw writes the body to f from its first byte on, at most size bytes, and
// syncs f. In a fresh volume zeros stay holes.
func copyRaw(b *body, f *os.File, size int64, fresh bool) error {
	buf := make([]byte, copyChunk)
	for at := int64(0); ; {
		n, err := io.ReadFull(b, buf)
		if at+int64(n) > size {
			return errTooMuch
		}
		if n > 0 && !(fresh && bytes.Equal(buf[:n], zeros[:n])) {
			if _, werr := f.WriteAt(buf[:n], at); werr != nil {
				return fmt.Errorf("write VDI: %w", werr)
			}
		}
		at += int64(n)
		// io.ReadFull turns the end after some bytes into ErrUnexpectedEOF, too.
		if err != nil && b.err == io.EOF {
			break
		}
		if err != nil {
			return rawError(err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync VDI: %w", err)
	}
	return nil
}

func rawError(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return xapi.NewError(xapi.VDIIOError, "the data ended before its Content-Length").Because(err)
	}
	return err
}

package upload

import (
	"bytes"
	"context"
	"crypto/md5"  //nolint:gosec // the client's choice, against accidents
	"crypto/sha1" //nolint:gosec // as above
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// maxChecked is the most bytes of a request with Upload-Checksum: they are
	// held until it is known. maxSums such requests are read at once.
	maxChecked = 8 * mib
	maxSums    = 4

	statusChecksumMismatch = 460 // of the protocol

	offsetStream = "application/offset+octet-stream"
)

// checksums are the algorithms of Upload-Checksum.
var checksums = map[string]func() hash.Hash{
	"sha256": sha256.New, "sha1": sha1.New, "md5": md5.New, "crc32": func() hash.Hash { return crc32.NewIEEE() },
}

const checksumNames = "sha256,sha1,crc32,md5"

// errCut is the error of a body whose request made room for another one.
var errCut = errors.New("another request has taken over")

// delivery is one PATCH on its way.
type delivery struct {
	c      *call
	u      *resumable
	offset int64
	sum    []byte // of the body; nil: none is given
	hash   hash.Hash
}

// tusPatch serves PATCH: bytes for an upload. What a request that ends early has
// brought counts. The one with the last byte, or an empty one at the end, is
// answered when the upload is over.
func (h *Handler) tusPatch(w http.ResponseWriter, r *http.Request) {
	c, u, done, ok := h.tusFind(w, r)
	if !ok {
		return
	}
	defer done()
	d := &delivery{c: c, u: u}
	if status, err := d.read(r.Header); err != nil {
		c.tusStatus(status, err)
		return
	}
	narrow(r.Context())
	ctx, cut := context.WithCancelCause(context.Background())
	defer cut(nil)
	leave, err := u.enter(r.Context(), d.offset, func() { cut(errCut) })
	if err != nil && !errors.Is(err, errBusy) {
		return // the client has gone
	}
	if err == nil {
		defer leave()
	}
	if end := u.outcome(); end != nil {
		c.answerEnd(u, end)
		return
	}
	at := u.received()
	u.offsetHeaders(w.Header())
	switch missing := u.plan.Length - at; {
	case err != nil || d.offset != at:
		c.tusStatus(http.StatusConflict, invalid("Upload-Offset", fmt.Sprintf("%d, but %d bytes are there", d.offset, at)))
	case r.ContentLength > missing:
		c.tusStatus(http.StatusRequestEntityTooLarge, xapi.NewError(xapi.MessageTooLarge, fmt.Sprintf("%d bytes are missing, %d come", missing, r.ContentLength)))
	default:
		d.run(ctx, cut, missing)
	}
}

// read reads the headers.
func (d *delivery) read(head http.Header) (status int, err error) {
	if t := head.Get("Content-Type"); t != offsetStream {
		return http.StatusUnsupportedMediaType, invalid("Content-Type", fmt.Sprintf("%.64q, not %s", t, offsetStream))
	}
	text := head.Get("Upload-Offset")
	n, err := strconv.ParseUint(text, 10, 62)
	if err != nil {
		return http.StatusBadRequest, invalid("Upload-Offset", fmt.Sprintf("%.32q is not a number of bytes", text))
	}
	d.offset = int64(n)
	text = head.Get("Upload-Checksum")
	if text == "" {
		return 0, nil
	}
	name, value, _ := strings.Cut(text, " ")
	begin := checksums[name]
	if begin == nil {
		return http.StatusBadRequest, invalid("Upload-Checksum", fmt.Sprintf("%.32q is not one of %s", name, checksumNames))
	}
	d.hash = begin()
	d.sum, err = base64.StdEncoding.DecodeString(value)
	if err != nil || len(d.sum) != d.hash.Size() {
		return http.StatusBadRequest, invalid("Upload-Checksum", "not a checksum of this kind in base64")
	}
	if length := head.Get("Content-Length"); length != "" {
		if n, err := strconv.ParseInt(length, 10, 64); err == nil && n > maxChecked {
			return http.StatusRequestEntityTooLarge, tooMuchToCheck()
		}
	}
	return 0, nil
}

func tooMuchToCheck() error {
	return xapi.NewError(xapi.MessageTooLarge, fmt.Sprintf("at most %d bytes in a request with Upload-Checksum: send more requests, or none", maxChecked))
}

// run takes the body and answers. missing is how many bytes the upload lacks.
func (d *delivery) run(ctx context.Context, cut context.CancelCauseFunc, missing int64) {
	c, u := d.c, d.u
	body := c.newBody(ctx, nil)
	defer body.close()
	in := &intake{r: body, left: missing, done: make(chan struct{})}
	if n := c.r.ContentLength; n >= 0 {
		in.left = n
	}
	if d.sum != nil {
		held, status, err := d.check(ctx, missing)
		if err != nil {
			c.tusStatus(status, err)
			return
		}
		in.r, in.left = bytes.NewReader(held), int64(len(held))
	}
	r, err := u.live(ctx)
	if err != nil {
		c.tusRefuse(err)
		return
	}
	if r != nil && in.left > 0 && missing > 0 {
		err = r.deliver(ctx, in, cut)
	}
	body.close()
	c.rc.SetReadDeadline(time.Time{}) //nolint:errcheck // what follows waits for no byte
	if end := u.outcome(); end == nil && u.received() < u.plan.Length {
		d.answer(err)
		return
	}
	d.await(r)
}

// deliver lets the run read what the request brings. It returns when the run
// reads it no more; cut ends a read that waits for the client.
func (r *run) deliver(ctx context.Context, in *intake, cut context.CancelCauseFunc) error {
	select {
	case r.give <- in:
	case <-r.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-in.done:
		return in.err
	case <-r.ctx.Done():
	}
	select {
	case <-in.done: // that came first, and the client may wait for the answer
	default:
		cut(context.Cause(r.ctx))
		<-in.done
		<-r.done // it may be over then
	}
	return in.err
}

// answer tells how far the upload is after a request that does not end it.
func (d *delivery) answer(err error) {
	c, u := d.c, d.u
	u.offsetHeaders(c.w.Header())
	switch {
	case u.h.isClosed():
		c.tusRefuse(task.ErrStopping)
	case err == nil || err == io.EOF:
		c.audit(nil)
		u.expiryHeader(c.w.Header())
		c.w.WriteHeader(http.StatusNoContent)
	case errors.Is(err, errCut):
		c.tusStatus(http.StatusConflict, xapi.NewError(xapi.OtherOperationInProgress, "upload", string(u.plan.ID)).Because(err))
	case errors.Is(err, io.ErrUnexpectedEOF):
		c.tusStatus(http.StatusBadRequest, invalid("Content-Length", "the body ended before it").Because(err))
	default:
		c.tusRefuse(err)
	}
}

// await waits for the end of an upload whose last byte is there, and answers.
func (d *delivery) await(r *run) {
	c, u := d.c, d.u
	var stopped <-chan struct{}
	if r != nil {
		stopped = r.done
	}
	select {
	case <-u.over:
	case <-stopped:
	case <-c.r.Context().Done():
	}
	end := u.outcome()
	if end == nil && c.r.Context().Err() != nil {
		return // it asks again
	}
	if end == nil {
		c.tusRefuse(task.ErrStopping)
		return
	}
	if end.err == nil {
		c.audit(nil)
	}
	c.answerEnd(u, end)
}

// check holds the body until its checksum is known: none of it counts when that
// is wrong.
func (d *delivery) check(ctx context.Context, missing int64) (held []byte, status int, err error) {
	leave, err := enter(ctx, d.u.h.sums)
	if err != nil {
		return nil, http.StatusServiceUnavailable, err
	}
	defer leave()
	// All of it has to come in the time in which otherwise anything has to.
	ctx, cancel := context.WithTimeoutCause(ctx, d.u.h.Stall, xapi.NewError(xapi.Timeout, "a body with Upload-Checksum takes too long: send less at once"))
	defer cancel()
	b := d.c.newBody(ctx, nil)
	defer b.close()
	held, err = io.ReadAll(io.LimitReader(b, min(maxChecked, missing)+1))
	switch {
	case err != nil && errors.Is(err, io.ErrUnexpectedEOF):
		return nil, http.StatusBadRequest, invalid("Content-Length", "the body ended before it")
	case err != nil:
		status, _ = describe(err)
		return nil, status, err
	case len(held) > maxChecked:
		return nil, http.StatusRequestEntityTooLarge, tooMuchToCheck()
	case int64(len(held)) > missing:
		return nil, http.StatusRequestEntityTooLarge, xapi.NewError(xapi.MessageTooLarge, fmt.Sprintf("only %d bytes are missing", missing))
	}
	d.hash.Write(held)
	if !bytes.Equal(d.hash.Sum(nil), d.sum) {
		return nil, statusChecksumMismatch, invalid("Upload-Checksum", "the body has another checksum: nothing of it is kept")
	}
	return held, 0, nil
}

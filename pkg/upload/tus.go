package upload

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/gorilla/mux"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// Resumable uploads speak the tus protocol 1.0; docs/resumable-upload.md is the
// wire.
const (
	tusPath       = "/pool_patch_uploads"
	tusVersion    = "1.0.0"
	tusExtensions = "creation,expiration,checksum,termination"
	// PatchHeader names the pool_patch that an upload has become.
	PatchHeader = "Patchd-Pool-Patch"
	// ErrorHeader gives the code of the error where an answer has no body.
	ErrorHeader = "Patchd-Error"
)

// tusRoutes adds the paths of resumable uploads.
func (h *Handler) tusRoutes(r *mux.Router) {
	for _, p := range []string{tusPath, tusPath + "/"} {
		r.HandleFunc(p, h.tusOptions).Methods(http.MethodOptions)
		r.HandleFunc(p, h.tusCreate).Methods(http.MethodPost)
	}
	one := tusPath + "/{id}"
	r.HandleFunc(one, h.tusOptions).Methods(http.MethodOptions)
	r.HandleFunc(one, h.tusHead).Methods(http.MethodHead)
	r.HandleFunc(one, h.tusPatch).Methods(http.MethodPatch)
	r.HandleFunc(one, h.tusDelete).Methods(http.MethodDelete)
}

// tusOptions tells what is spoken here; nobody needs to log in for that.
func (h *Handler) tusOptions(w http.ResponseWriter, _ *http.Request) {
	for name, value := range map[string]string{
		"Tus-Resumable": tusVersion, "Tus-Version": tusVersion, "Tus-Extension": tusExtensions,
		"Tus-Checksum-Algorithm": checksumNames, "Tus-Max-Size": strconv.FormatInt(maxUpload, 10),
	} {
		w.Header().Set(name, value)
	}
	w.WriteHeader(http.StatusNoContent)
}

// tusAccept is accept for a request of the protocol. On false the answer is given.
func (h *Handler) tusAccept(w http.ResponseWriter, r *http.Request) (*call, func(), bool) {
	w.Header().Set("Tus-Resumable", tusVersion)
	c, done, ok := h.accept(w, r, kindUpload, session.PoolOperator)
	if !ok {
		return nil, nil, false
	}
	if v := r.Header.Get("Tus-Resumable"); v != tusVersion {
		w.Header().Set("Tus-Version", tusVersion)
		c.tusStatus(http.StatusPreconditionFailed, invalid("Tus-Resumable", fmt.Sprintf("%.16q is not spoken here, %s is", v, tusVersion)))
		done()
		return nil, nil, false
	}
	w.Header().Del("Connection") // the next request comes soon
	return c, done, true
}

// tusFind is tusAccept for a request to one upload, which must be the caller's own,
// or the caller a pool-admin.
func (h *Handler) tusFind(w http.ResponseWriter, r *http.Request) (*call, *resumable, func(), bool) {
	c, done, ok := h.tusAccept(w, r)
	if !ok {
		return nil, nil, nil, false
	}
	id, err := xapi.ParseUUID(mux.Vars(r)["id"])
	u := h.find(id)
	if err != nil || u == nil {
		c.tusStatus(http.StatusNotFound, xapi.NewError(xapi.UUIDInvalid, "upload", fmt.Sprintf("%.64s", mux.Vars(r)["id"])))
		done()
		return nil, nil, nil, false
	}
	if u.plan.User != c.sess.User && !c.sess.Role.AtLeast(session.PoolAdmin) {
		c.tusRefuse(xapi.NewError(xapi.RBACPermissionDenied, "http/"+kindUpload, "the upload belongs to another user"))
		done()
		return nil, nil, nil, false
	}
	return c, u, done, true
}

// tusRefuse answers with the status of err.
func (c *call) tusRefuse(err error) {
	status, _ := describe(err)
	if errors.Is(err, task.ErrStopping) {
		c.w.Header().Set("Retry-After", "1")
		status = http.StatusServiceUnavailable
	}
	c.tusStatus(status, err)
}

// tusStatus answers with a status and err as the problem. The connection closes:
// what the client still sends is not wanted.
func (c *call) tusStatus(status int, err error) {
	_, p := describe(err)
	c.w.Header().Set("Connection", "close")
	c.w.Header().Set(ErrorHeader, p.Code)
	c.audit(err)
	c.reply(status, p)
	c.linger()
}

// expiryHeader tells when the upload goes, if its client does not come back.
func (u *resumable) expiryHeader(h http.Header) {
	u.mu.Lock()
	defer u.mu.Unlock()
	h.Set("Upload-Expires", u.expires.UTC().Format(http.TimeFormat))
}

// offsetHeaders tell how far the upload is.
func (u *resumable) offsetHeaders(h http.Header) {
	h.Set("Upload-Offset", strconv.FormatInt(u.received(), 10))
	h.Set("Upload-Length", strconv.FormatInt(u.plan.Length, 10))
	h.Set("Task-Id", string(u.plan.Task))
}

// tusHead serves HEAD of an upload. While a request brings bytes, it waits for
// a moment whether that ends: what a client that has gone had sent is counted.
func (h *Handler) tusHead(w http.ResponseWriter, r *http.Request) {
	c, u, done, ok := h.tusFind(w, r)
	if !ok {
		return
	}
	defer done()
	u.mu.Lock()
	t := u.turn
	u.mu.Unlock()
	if t != nil && t.wait(r.Context(), false) != nil {
		return
	}
	if end := u.outcome(); end != nil {
		c.answerEnd(u, end)
		return
	}
	u.offsetHeaders(w.Header())
	u.expiryHeader(w.Header())
	w.WriteHeader(http.StatusOK)
}

// answerEnd tells how an upload has ended: the pool_patch, or the status and
// problem that PUT would have given; 410 when it was deleted or has expired.
func (c *call) answerEnd(u *resumable, end *outcome) {
	if end.err == nil {
		u.offsetHeaders(c.w.Header())
		c.w.Header().Set(PatchHeader, string(end.ref))
		status := http.StatusNoContent
		if c.r.Method == http.MethodHead {
			status = http.StatusOK
		}
		c.w.WriteHeader(status)
		return
	}
	if end.gone {
		c.tusStatus(http.StatusGone, end.err)
		return
	}
	c.tusRefuse(end.err)
}

// tusDelete serves DELETE: the upload ends, and is forgotten when it had ended
// before.
func (h *Handler) tusDelete(w http.ResponseWriter, r *http.Request) {
	c, u, done, ok := h.tusFind(w, r)
	if !ok {
		return
	}
	defer done()
	if end := u.outcome(); end != nil {
		h.forget(u)
	} else {
		u.kill(xapi.NewError(xapi.TaskCancelled, string(u.plan.Task)))
	}
	c.audit(nil)
	w.WriteHeader(http.StatusNoContent)
}

package upload

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// outcomes is the one table from code to HTTP status, with the text for people
// where the parameters do not say it already.
var outcomes = map[string]struct {
	status int
	text   string
}{
	xapi.SessionAuthenticationFailed: {http.StatusUnauthorized, "log in first: session_id, or Basic credentials"},
	xapi.SessionInvalid:              {http.StatusUnauthorized, "the session is not, or no longer, valid: log in again"},
	xapi.RBACPermissionDenied:        {http.StatusForbidden, "the user's role does not allow this"},

	xapi.InvalidPatch:        {http.StatusUnprocessableEntity, "the file is not a patch signed by a trusted key, or it was cut short"},
	xapi.InvalidPatchWithLog: {http.StatusUnprocessableEntity, "the patch does not work as one"},
	xapi.PatchAlreadyExists:  {http.StatusConflict, "a patch with this uuid is there already"},
	xapi.DefaultSRNotFound:   {http.StatusConflict, "there is no SR to put the patch on"},
	xapi.OutOfSpace:          {http.StatusInsufficientStorage, "there is not enough room on this SR"},
	xapi.SRFull:              {http.StatusInsufficientStorage, "the SR is full"},
	xapi.MessageTooLarge:     {http.StatusRequestEntityTooLarge, "the payload is too large"},
	xapi.Timeout:             {http.StatusRequestTimeout, "time ran out"},

	xapi.HandleInvalid:   {http.StatusNotFound, "there is no object with this ref"},
	xapi.UUIDInvalid:     {http.StatusNotFound, "there is no object with this uuid"},
	xapi.CannotFindPatch: {http.StatusNotFound, "this host has no file of the patch"},
	xapi.VDINotAvailable: {http.StatusNotFound, "the VDI's volume is not there"},

	xapi.SRNotAttached:            {http.StatusConflict, "the SR is not plugged on this host"},
	xapi.VDIContentChanged:        {http.StatusConflict, "the image is not what was uploaded"},
	xapi.VDIInUse:                 {http.StatusConflict, "the VDI is in use"},
	xapi.VDIReadonly:              {http.StatusConflict, "the VDI is read-only"},
	xapi.VDITooSmall:              {http.StatusConflict, "the VDI is too small for the data"},
	xapi.OperationNotAllowed:      {http.StatusConflict, "this cannot be done now"},
	xapi.OtherOperationInProgress: {http.StatusConflict, "another operation is in progress"},
	xapi.TaskCancelled:            {http.StatusConflict, "the task was cancelled"},
	xapi.ValueNotSupported:        {http.StatusBadRequest, "a value is not supported"},
	xapi.InvalidValue:             {http.StatusBadRequest, "a value is not valid"},
	xapi.ImportError:              {http.StatusUnprocessableEntity, "the data cannot be imported"},
	xapi.HostIsSlave:              {http.StatusServiceUnavailable, "ask the coordinator of the pool"},
	xapi.HostStillBooting:         {http.StatusServiceUnavailable, "the host is still starting"},
}

// problem is the body of a refusal.
type problem struct {
	Code    string   `json:"code"`
	Params  []string `json:"params"`
	Message string   `json:"message"`
}

// describe gives the status and body for err.
func describe(err error) (int, problem) {
	e := xapi.AsError(err)
	p := problem{Code: e.Code, Params: e.Params, Message: "something went wrong inside patchd; its log says what"}
	if p.Params == nil {
		p.Params = []string{}
	}
	status := http.StatusInternalServerError
	if o, ok := outcomes[e.Code]; ok {
		status, p.Message = o.status, o.text
	}
	if len(p.Params) > 0 {
		p.Message += ": " + strings.Join(p.Params, ", ")
	}
	var short *sr.Shortage
	if errors.As(err, &short) {
		p.Message += ": " + short.Error()
	}
	return status, p
}

// ok sends 200 and the headers before the body is read. A client that asked
// whether it may go on is told to first.
func (c *call) ok() {
	if c.asks() {
		c.w.WriteHeader(http.StatusContinue)
	}
	c.invited = true
	c.w.WriteHeader(http.StatusOK)
	c.rc.Flush() //nolint:errcheck // the next read or write shows it
	c.answer = true
}

// asks tells whether the client waits to be told that it may send the body.
func (c *call) asks() bool {
	return c.r.ProtoAtLeast(1, 1) && strings.EqualFold(c.r.Header.Get("Expect"), "100-continue")
}

// refuse answers with the status of err, unless a status is out already.
func (c *call) refuse(err error) {
	if !c.answer {
		status, p := describe(err)
		c.reply(status, p)
	}
	c.linger()
}

// reply sends a status with v as JSON.
func (c *call) reply(status int, v any) {
	text, err := json.Marshal(v)
	if err != nil {
		c.log.WithError(err).Error("answer not encoded")
		status, text = http.StatusInternalServerError, []byte("{}")
	}
	c.w.Header().Set("Content-Type", "application/json")
	c.w.WriteHeader(status)
	c.w.Write(append(text, '\n')) //nolint:errcheck // the client is gone: nothing to tell
	c.rc.Flush()                  //nolint:errcheck
	c.answer = true
}

// linger reads what the client still sends, for a while: a connection closed
// with unread bytes is reset, and the answer is lost.
func (c *call) linger() {
	if c.r.Body == nil || c.r.Body == http.NoBody || c.asks() && !c.invited {
		return
	}
	if c.rc.SetReadDeadline(time.Now().Add(c.h.Linger)) != nil {
		return
	}
	io.Copy(io.Discard, c.r.Body) //nolint:errcheck // whatever it is, it is not wanted
}

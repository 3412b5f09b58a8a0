package upload

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/gorilla/mux"
	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// Pool is what this package asks of the pool; *pool.Pool is one.
type Pool interface {
	// SRCandidates gives what sr.Choose needs.
	SRCandidates(ctx context.Context) (defaultSR xapi.Ref, cs []sr.Candidate, err error)
	// Repository gives an SR that is plugged on this host.
	Repository(ref xapi.Ref) (sr.Repository, error)
	// Promised is what of an SR's free bytes is promised to work under way.
	Promised(ctx context.Context, sr xapi.Ref) (int64, error)
	// NewVDI makes a VDI and fills it; on any failure nothing is left.
	NewVDI(ctx context.Context, n pool.NewVDI) (xapi.Ref, error)
	// IntroducePatch writes the record of a patch, to be used in NewVDI.Commit.
	IntroducePatch(tx *store.Tx, rec pool.Patch) (xapi.Ref, error)
	// PatchFile opens the classic file of a patch.
	PatchFile(uuid xapi.UUID) (f *os.File, size int64, err error)
	// VDIForImport and VDIForExport open the volume of a VDI and keep it from
	// being destroyed until release.
	VDIForImport(ctx context.Context, refOrUUID string) (f *os.File, release func(), err error)
	VDIForExport(ctx context.Context, refOrUUID string) (f *os.File, release func(), err error)
	// VDIMap reads the block map of a VDI; nil when it has none.
	VDIMap(ctx context.Context, ref xapi.Ref) (*vdi.Map, error)
}

// Sessions tells who a request comes from; *session.Manager is one.
type Sessions interface {
	FromRequest(r *http.Request) (*session.Session, func(), error)
}

// DefaultStall is how long a client may send nothing.
const DefaultStall = 5 * time.Minute

// Options are what a Handler works with.
type Options struct {
	Pool     Pool
	Store    *store.Store
	Tasks    *task.Manager
	Sessions Sessions
	Dom0     dom0.Dom0
	Log      logrus.FieldLogger

	// Keys reads the trusted keys; it is asked for every upload.
	Keys func() (*patch.Keyring, error)
	// Check holds the pinned digests and the limits of messages.
	Check patch.Options
	// Attested is where this host remembers what it has verified; "": nowhere.
	Attested patch.Attestations
	// InfoTimeout is how long `patch info` may take; 0: 10 s.
	InfoTimeout time.Duration
	// Stall is how long a client may send or take nothing; 0: DefaultStall.
	Stall time.Duration
	// Linger is how long a body that is no longer wanted is read, so that the
	// client sees the answer before the connection closes; 0: 2 s.
	Linger time.Duration
	// Drafts keeps the resumable uploads, and UploadsDir their logs; without
	// Drafts there are none. Start and Close belong to them.
	Drafts     Drafts
	UploadsDir string
	// LogRoom is how many bytes the logs may still take where UploadsDir lies;
	// nil: nobody counts them.
	LogRoom func() int64
	// UploadExpiry is how long an unfinished upload waits for its client; 0:
	// DefaultUploadExpiry.
	UploadExpiry time.Duration
	// Now is the clock of their expiry; nil: the system's.
	Now func() time.Time
	// Layout is who lays out the images of patches.
	Layout vdi.LayoutKind
	// Confirm ends the upload of a patch once its records are there; on failure
	// it has taken it back. Nil: what is recorded is confirmed.
	Confirm func(ctx context.Context, patch xapi.Ref) error
	// Render gives a record as the API shows it. Nil: as it is stored, without
	// what is our own.
	Render func(class string, ref xapi.Ref) (json.RawMessage, error)
}

// maxStreams is how many bodies are read at once: each has its buffers and its
// unfinished image. Further ones wait under their task before anything of them
// is read.
const maxStreams = 128

// maxTexts is the same for clear-signed patches: each is in memory as a whole.
const maxTexts = 2

// Handler serves the paths of this package.
type Handler struct {
	Options
	keeper
	streams chan struct{} // one element for each body that is read
	texts   chan struct{} // one for each that is clear-signed, which takes memory
	chunks  *chunkCache
}

// New makes a Handler.
func New(o Options) *Handler {
	if o.Stall <= 0 {
		o.Stall = DefaultStall
	}
	if o.Linger <= 0 {
		o.Linger = 2 * time.Second
	}
	if o.UploadExpiry <= 0 {
		o.UploadExpiry = DefaultUploadExpiry
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Handler{Options: o, keeper: newKeeper(), streams: make(chan struct{}, maxStreams), texts: make(chan struct{}, maxTexts), chunks: newChunkCache()}
}

// enter waits for a place among those that places has room for.
func enter(ctx context.Context, places chan struct{}) (leave func(), err error) {
	select {
	case places <- struct{}{}:
		return func() { <-places }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Routes adds the paths to r, each with and without a slash at its end.
func (h *Handler) Routes(r *mux.Router) {
	if h.Drafts != nil {
		h.tusRoutes(r)
	}
	for _, route := range []struct {
		method, path string
		serve        http.HandlerFunc
	}{
		{http.MethodPut, "/pool_patch_upload", h.patchUpload},
		{http.MethodGet, "/pool_patch_download", h.patchDownload},
		{http.MethodGet, "/pool_patch_chunks", h.patchChunks},
		{http.MethodPut, "/import_raw_vdi", h.importRaw},
		{http.MethodGet, "/export_raw_vdi", h.exportRaw},
		{http.MethodPost, "/export_raw_vdi", h.exportRaw},
		{http.MethodGet, "/vdi_block_map", h.blockMap},
	} {
		r.HandleFunc(route.path, route.serve).Methods(route.method)
		// Routing is by prefix: curl -T adds the name of the file behind a slash.
		r.PathPrefix(route.path + "/").HandlerFunc(route.serve).Methods(route.method)
	}
}

// param is a parameter of the request: a cookie, else in the query.
func param(r *http.Request, name string) string {
	if c, err := r.Cookie(name); err == nil && c.Value != "" {
		if v, err := url.QueryUnescape(c.Value); err == nil {
			return v
		}
		return c.Value
	}
	return r.URL.Query().Get(name)
}

// requestedSR is the ref or uuid of the SR that the client named, or "".
func requestedSR(r *http.Request) string {
	if id := param(r, "sr_id"); id != "" {
		return id
	}
	return param(r, "sr_uuid")
}

// call is one request with its caller and, after begin, its task.
type call struct {
	h    *Handler
	w    http.ResponseWriter
	r    *http.Request
	rc   *http.ResponseController
	name string
	sess *session.Session
	log  logrus.FieldLogger

	began   time.Time
	given   xapi.Ref // task_id, or ""
	ref     xapi.Ref // the task
	answer  bool     // the status is out
	invited bool     // the client was told that it may send the body
}

// accept finds out who calls and whether they may. On false the answer is
// given. done is to be called when the request ends.
func (h *Handler) accept(w http.ResponseWriter, r *http.Request, name string, need session.Role) (c *call, done func(), ok bool) {
	c = &call{h: h, w: w, r: r, rc: http.NewResponseController(w), name: name, began: time.Now(), given: xapi.Ref(param(r, "task_id"))}
	c.log = h.Log.WithField("request", name)
	w.Header().Set("Connection", "close")
	w.Header().Set("Cache-Control", "no-cache, no-store")
	c.rc.EnableFullDuplex() //nolint:errcheck // not there: the body is read after the status all the same

	sess, release, err := h.Sessions.FromRequest(r)
	if err != nil {
		release()
		if session.HTTPStatus(err) == http.StatusUnauthorized {
			err = xapi.NewError(xapi.SessionAuthenticationFailed).Because(err)
			w.Header().Set("WWW-Authenticate", `Basic realm="`+name+`"`)
		}
		c.failTask(err)
		c.audit(err)
		c.refuse(err)
		return nil, nil, false
	}
	c.sess = sess
	if _, err := url.ParseQuery(r.URL.RawQuery); err != nil {
		// What cannot be read would be as if it had not been said.
		c.refuse(xapi.NewError(xapi.InvalidValue, "query", "cannot be read").Because(err))
		release()
		return nil, nil, false
	}
	if err := sess.Require(need, "http/"+name); err != nil {
		c.failTask(err)
		c.audit(err)
		c.refuse(err)
		release()
		return nil, nil, false
	}
	return c, release, true
}

// failTask ends the client's own task, unless it is at work elsewhere.
func (c *call) failTask(err error) {
	if c.given == "" {
		return
	}
	if rec, gerr := c.h.Tasks.Get(c.given); gerr != nil || !c.mayUse(rec) {
		return
	}
	if _, aerr := c.h.Tasks.Adopt(c.given); aerr != nil {
		return // unknown, finished, or driven by another request
	}
	if werr := c.h.Tasks.Complete(context.WithoutCancel(c.r.Context()), c.given, "", err); werr != nil {
		c.log.WithError(werr).WithField("task_ref", c.given).Warn("the task of a refused request is not ended")
	}
}

// begin takes the client's task or makes one. On false the answer is given.
func (c *call) begin() bool {
	if c.given == "" {
		// A client that has closed its side already may still read the answer.
		t, err := c.h.Tasks.Begin(context.WithoutCancel(c.r.Context()), task.Spec{
			Label: c.name, Session: c.sess.Stored, User: c.sess.User, SubtaskOf: xapi.Ref(param(c.r, "subtask_of")),
		})
		if err != nil {
			c.refuse(err)
			return false
		}
		c.ref = t.Ref()
	} else if err := c.adopt(); err != nil {
		if rec, gerr := c.h.Tasks.Get(c.given); gerr == nil && rec.Status.Finished() {
			c.ok() // it was cancelled before: the task says so
			c.linger()
			return false
		}
		c.refuse(err)
		return false
	}
	c.w.Header().Set("Task-Id", string(c.ref))
	c.log = c.log.WithField("task_ref", c.ref)
	return true
}

// mayUse tells whether the task is the caller's own, or the caller an admin. Of
// a caller who is not known only the ref is known: it fails the task (xapi does).
func (c *call) mayUse(rec task.Record) bool {
	return c.sess == nil || rec.OwnedBy(c.sess.Stored, c.sess.User) || c.sess.Role.AtLeast(session.PoolAdmin)
}

// adopt takes over the client's task, which must be its own.
func (c *call) adopt() error {
	rec, err := c.h.Tasks.Get(c.given)
	if err != nil {
		return err
	}
	if !c.mayUse(rec) {
		return xapi.NewError(xapi.RBACPermissionDenied, "task", "the task belongs to another user")
	}
	if _, err := c.h.Tasks.Adopt(c.given); err != nil {
		for _, theirs := range []string{xapi.TaskCancelled, xapi.OperationNotAllowed, xapi.OtherOperationInProgress, xapi.HandleInvalid} {
			if xapi.Is(err, theirs) {
				return err
			}
		}
		// The task itself is in order, and whoever waits for it is told.
		return errors.Join(err, c.h.Tasks.Complete(context.WithoutCancel(c.r.Context()), c.given, "", err))
	}
	c.ref = c.given
	return nil
}

// run does the work under the task and gives its outcome. The request's own
// context plays no part.
func (c *call) run(f task.Func) (string, error) {
	result, err := c.h.Tasks.Run(context.WithoutCancel(c.r.Context()), c.ref, f)
	c.audit(err)
	if err != nil && !errors.Is(err, task.ErrStopping) {
		c.log.WithError(err).Info("request failed")
	}
	return result, err
}

// audit writes the one line that every request which changes something leaves
// in the log: who, from where, what, how it ended. It is as that of a call.
func (c *call) audit(err error) {
	if c.r.Method == http.MethodGet || c.r.Method == http.MethodHead {
		return
	}
	outcome := "Success"
	if err != nil {
		outcome = xapi.AsError(err).Code
	}
	fields := logrus.Fields{
		"method": "http/" + c.name, "address": c.r.RemoteAddr, "outcome": outcome,
		"duration": time.Since(c.began).Round(time.Microsecond).String(),
	}
	if c.sess != nil {
		stored := strings.TrimPrefix(string(c.sess.Stored), "OpaqueRef:")
		fields["user"], fields["originator"] = c.sess.User, c.sess.Originator
		fields["session"] = stored[:min(8, len(stored))]
	}
	c.log.WithFields(fields).Info("audit")
}

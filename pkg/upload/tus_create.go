package upload

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// maxUpload is the most bytes of a signed file, and of what is sent.
	maxUpload = 256 << 30
	// maxMetadata is the most bytes of Upload-Metadata.
	maxMetadata = 4 << 10
	maxFilename = 255
)

// tusCreate serves POST /pool_patch_uploads: an upload begins.
//
// Codes: INVALID_VALUE [header or key, text] (400), MESSAGE_TOO_LARGE (413),
// OPERATION_NOT_ALLOWED for too many uploads (429), those of choosing an SR,
// UUID_INVALID and CANNOT_FIND_PATCH for a base that is not there, OUT_OF_SPACE.
func (h *Handler) tusCreate(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.tusAccept(w, r)
	if !ok {
		return
	}
	defer done()
	p, requested, err := readCreation(r)
	if err != nil {
		c.tusRefuse(err)
		return
	}
	if ref, ok := h.patchByDigest(p.Digest); ok {
		c.audit(nil)
		record, err := h.render(pool.ClassPatch, ref)
		if err != nil {
			c.tusRefuse(err)
			return
		}
		c.reply(http.StatusOK, record)
		return
	}
	p.User = c.sess.User
	release, err := h.reserve(p.User)
	if err != nil {
		if xapi.Is(err, xapi.OperationNotAllowed) {
			c.tusStatus(http.StatusTooManyRequests, err)
			return
		}
		c.tusRefuse(err)
		return
	}
	defer release()
	// A client that goes away now finds no upload, or a whole one.
	u, err := h.create(context.WithoutCancel(r.Context()), c.sess, p, requested)
	if err != nil {
		c.tusRefuse(err)
		return
	}
	c.audit(nil)
	w.Header().Set("Location", tusPath+"/"+string(p.ID))
	w.Header().Set("Task-Id", string(u.plan.Task))
	u.expiryHeader(w.Header())
	w.WriteHeader(http.StatusCreated)
}

// readCreation reads what a client announces.
func readCreation(r *http.Request) (p plan, requested string, err error) {
	if r.Header.Get("Upload-Defer-Length") != "" {
		return p, "", invalid("Upload-Defer-Length", "the length must be known: send Upload-Length")
	}
	if p.Length, err = length("Upload-Length", r.Header.Get("Upload-Length")); err != nil {
		return p, "", err
	}
	meta, err := readMetadata(r.Header.Get("Upload-Metadata"))
	if err != nil {
		return p, "", err
	}
	p.ID, p.Size, p.Digest, requested = xapi.NewUUID(), p.Length, strings.ToLower(meta["digest"]), meta["sr"]
	p.Filename = filename(meta["filename"])
	if requested == "" {
		requested = requestedSR(r)
	}
	if b, err := hex.DecodeString(p.Digest); p.Digest != "" && (err != nil || len(b) != 32) {
		return p, "", invalid("digest", "not a SHA-256 in hexadecimal")
	}
	if meta["payload_size"] != "" {
		if p.Payload, err = length("payload_size", meta["payload_size"]); err != nil {
			return p, "", err
		}
	}
	switch meta["encoding"] {
	case "":
		return p, requested, nil
	case "delta":
		return p, requested, p.readDelta(meta)
	}
	return p, "", invalid("encoding", "only delta is known")
}

func (p *plan) readDelta(meta map[string]string) (err error) {
	p.Delta = true
	if p.Base, err = xapi.ParseUUID(meta["base"]); err != nil {
		return invalid("base", "the uuid of a pool_patch is needed with encoding delta")
	}
	p.Size, err = length("size", meta["size"])
	return err
}

func invalid(field, text string) *xapi.Error { return xapi.NewError(xapi.InvalidValue, field, text) }

// length reads a number of bytes that must be there.
func length(field, text string) (int64, error) {
	n, err := strconv.ParseUint(text, 10, 63)
	switch {
	case errors.Is(err, strconv.ErrRange) || err == nil && n > maxUpload:
		return 0, xapi.NewError(xapi.MessageTooLarge, fmt.Sprintf("%s: at most %d bytes", field, int64(maxUpload)))
	case err != nil || n == 0:
		return 0, invalid(field, fmt.Sprintf("%.32q is not a number of bytes", text))
	}
	return int64(n), nil
}

// readMetadata reads Upload-Metadata: keys, each with a value in base64.
func readMetadata(text string) (map[string]string, error) {
	if len(text) > maxMetadata {
		return nil, xapi.NewError(xapi.MessageTooLarge, fmt.Sprintf("Upload-Metadata: at most %d bytes", maxMetadata))
	}
	meta := map[string]string{}
	for part := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(strings.TrimSpace(part), " ")
		if key == "" {
			continue
		}
		plain, err := base64.StdEncoding.DecodeString(strings.TrimSpace(value))
		if _, twice := meta[key]; err != nil || twice {
			return nil, invalid("Upload-Metadata", fmt.Sprintf("%.32q: given twice, or not in base64", key))
		}
		meta[key] = string(plain)
	}
	return meta, nil
}

// filename is a name as it may be shown.
func filename(name string) string {
	name = path.Base(strings.ToValidUTF8(name, "?"))
	if name == "." || name == "/" {
		return ""
	}
	for len(name) > maxFilename {
		_, n := utf8.DecodeLastRuneInString(name)
		name = name[:len(name)-n]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, name)
}

// patchByDigest finds a patch with that payload whose VDI is there.
func (h *Handler) patchByDigest(digest string) (ref xapi.Ref, found bool) {
	if digest == "" {
		return "", false
	}
	err := h.Store.View(func(v *store.View) error {
		for _, it := range v.List(pool.ClassPatch) {
			var rec pool.Patch
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if rec.Digest != digest || rec.VDI.IsNull() {
				continue
			}
			image, err := store.Get[pool.VDI](v, pool.ClassVDI, rec.VDI)
			if err == nil && !image.Missing && image.Damage == "" {
				ref, found = it.Ref, true
				return nil
			}
		}
		return nil
	})
	return ref, found && err == nil
}

// create makes an upload: its task, its draft with the room it is promised, and
// its log. On failure nothing is left but the task, which tells of it.
func (h *Handler) create(ctx context.Context, sess *session.Session, p plan, requested string) (u *resumable, err error) {
	if h.LogRoom != nil && h.LogRoom() < 2*ringSize {
		return nil, xapi.NewError(xapi.OutOfSpace, "the state directory of the coordinator")
	}
	where, _, err := h.chooseSR(ctx, requested)
	if err != nil {
		return nil, err
	}
	p.SR = where.Ref
	if p.Delta {
		if err := h.planBase(ctx, &p, requested); err != nil {
			return nil, err
		}
	}
	t, err := h.Tasks.Begin(ctx, task.Spec{Label: kindUpload, Description: p.Filename, Session: sess.Stored, User: sess.User})
	if err != nil {
		return nil, err
	}
	p.Task = t.Ref()
	var undo xapi.Undo
	undo.Push("end task", func(ctx context.Context) error { return h.Tasks.Complete(ctx, p.Task, "", err) })
	defer func() { err = undo.Close(ctx, err) }()
	f, err := os.OpenFile(h.logPath(p.ID), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make the log of the upload: %w", err)
	}
	undo.Push("remove log", func(context.Context) error { return os.Remove(h.logPath(p.ID)) })
	if err := errors.Join(f.Sync(), f.Close(), syncDir(h.UploadsDir)); err != nil {
		return nil, fmt.Errorf("make the log of the upload: %w", err)
	}
	expires := h.Now().Add(h.UploadExpiry)
	draft, err := h.newDraft(ctx, p, expires.Add(h.slack()))
	if err != nil {
		return nil, noRoom(where, err)
	}
	undo.Push("discard draft", draft.Discard)
	if err := draft.Close(); err != nil {
		return nil, err
	}
	u = h.newResumable(p, draft.ID(), t)
	u.expires, u.noted, u.fresh = expires, expires.Add(h.slack()), true
	u.unhook = context.AfterFunc(t.Context(), u.taskEnded)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.uploads[p.ID] = u
	return u, nil
}

// newDraft makes the draft of an upload.
func (h *Handler) newDraft(ctx context.Context, p plan, expires time.Time) (*pool.Draft, error) {
	o := pool.DraftOptions{Expires: expires}
	expect := p.expect()
	if p.Over {
		rec, _, err := h.patchByUUID(p.Base)
		if err != nil {
			return nil, err
		}
		o.CloneOf, expect = rec.VDI, p.Size
	}
	size := vdi.Size(expect)
	p.Layout = h.Layout.For(size, h.Dom0)
	var err error
	if o.Note, err = p.note(); err != nil {
		return nil, err
	}
	return h.Drafts.NewDraft(ctx, pool.NewVDI{
		SR: p.SR, VDI: beingUploaded(), VirtualSize: size, Room: p.Size + p.Size/20 + headroom,
	}, o)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

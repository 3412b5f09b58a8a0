package upload

import (
	"bytes"
	"container/list"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/delta"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// baseHeader names the patch whose chunks are in the answer.
const baseHeader = "Patchd-Base"

// patchChunks serves GET /pool_patch_chunks: the chunks of the payload of one
// patch (delta.Index), for a client that wants to send a new patch as its
// difference to it. The patch is named by uuid; or name_label is given, and it
// is the newest one of that name whose image is there. The header Patchd-Base is
// its uuid.
//
// Codes: UUID_INVALID and CANNOT_FIND_PATCH (404), VDI_CONTENT_CHANGED for a
// damaged image, those of opening its VDI.
func (h *Handler) patchChunks(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "pool_patch_chunks", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	text, rec, err := h.chunksOf(r)
	if err != nil {
		c.refuse(err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.Header().Set(baseHeader, string(rec.UUID))
	c.answer = true
	for len(text) > 0 && err == nil {
		c.rc.SetWriteDeadline(time.Now().Add(h.Stall)) //nolint:errcheck // a server without deadlines does not stall out
		var n int
		n, err = w.Write(text[:min(len(text), mib)])
		text = text[n:]
	}
	if err != nil {
		c.log.WithError(err).Debug("the client has not taken the chunks")
	}
}

// chunksOf finds the patch that is asked for and gives its index.
func (h *Handler) chunksOf(r *http.Request) ([]byte, pool.Patch, error) {
	rec, err := h.baseOf(param(r, "uuid"), param(r, "name_label"))
	if err != nil {
		return nil, rec, err
	}
	text, err := h.chunks.get(r.Context(), rec.Digest, func(ctx context.Context) ([]byte, error) { return h.buildChunks(ctx, rec) })
	return text, rec, err
}

// baseOf finds a patch whose image is there.
func (h *Handler) baseOf(id, label string) (rec pool.Patch, err error) {
	if id == "" && label == "" {
		return rec, xapi.NewError(xapi.InvalidValue, "uuid", "")
	}
	err = h.Store.View(func(v *store.View) error {
		if id == "" {
			rec, err = newest(v, label)
			return err
		}
		uuid, err := xapi.ParseUUID(id)
		if err != nil {
			return xapi.NewError(xapi.InvalidValue, "uuid", fmt.Sprintf("%.64s", id))
		}
		it, ok := v.ByUUID(pool.ClassPatch, uuid)
		if !ok {
			return xapi.NewError(xapi.UUIDInvalid, pool.ClassPatch, string(uuid))
		}
		if err := it.Decode(&rec); err != nil {
			return err
		}
		return usableBase(v, rec)
	})
	return rec, err
}

// newest gives the patch with that label that came last, of those with an image.
func newest(v *store.View, label string) (pool.Patch, error) {
	all := v.List(pool.ClassPatch)
	for i := len(all) - 1; i >= 0; i-- {
		var rec pool.Patch
		if err := all[i].Decode(&rec); err != nil {
			return rec, err
		}
		if rec.NameLabel == label && usableBase(v, rec) == nil {
			return rec, nil
		}
	}
	return pool.Patch{}, xapi.NewError(xapi.CannotFindPatch)
}

// usableBase tells whether the image of a patch is there and whole.
func usableBase(v *store.View, rec pool.Patch) error {
	if rec.VDI.IsNull() || rec.Digest == "" {
		return xapi.NewError(xapi.CannotFindPatch)
	}
	image, err := store.Get[pool.VDI](v, pool.ClassVDI, rec.VDI)
	if err != nil {
		return xapi.NewError(xapi.CannotFindPatch).Because(err)
	}
	if image.Damage != "" {
		return xapi.NewError(xapi.VDIContentChanged, string(rec.VDI), image.Damage)
	}
	return nil
}

// buildChunks reads the payload of a patch in its image.
func (h *Handler) buildChunks(ctx context.Context, rec pool.Patch) ([]byte, error) {
	payload, release, err := h.openBase(ctx, rec.UUID)
	if err != nil {
		return nil, err
	}
	defer release()
	ix, err := delta.BuildIndex(&whileContext{ctx, io.NewSectionReader(payload, 0, payload.Size())}, payload.Size())
	if err != nil {
		return nil, fmt.Errorf("chunks of patch %s: %w", rec.UUID, err)
	}
	var b bytes.Buffer
	err = ix.Encode(&b)
	return b.Bytes(), err
}

// whileContext reads as long as the context lives.
type whileContext struct {
	ctx context.Context
	r   io.Reader
}

func (w *whileContext) Read(p []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	return w.r.Read(p)
}

const (
	// maxKeptChunks bounds the indexes that are kept, in bytes: those of 20 GiB.
	maxKeptChunks = 10 * mib
	// maxChunkBuilds is how many are made at once.
	maxChunkBuilds = 2
)

// chunkCache makes indexes, each once, and keeps those that were used last.
type chunkCache struct {
	builds chan struct{} // one element for each that is being made

	mu    sync.Mutex
	kept  map[string]*list.Element // by digest of the payload
	used  list.List                // of *keptChunks, the last one in front
	size  int                      // of all texts, in bytes
	turns map[string]*turn
}

type keptChunks struct {
	digest string
	text   []byte
}

// turn is who makes an index; others wait for theirs.
type turn struct {
	is      chan struct{} // one element while somebody makes it
	waiting int
}

func newChunkCache() *chunkCache {
	return &chunkCache{builds: make(chan struct{}, maxChunkBuilds), kept: map[string]*list.Element{}, turns: map[string]*turn{}}
}

// get gives the index of a payload; one caller at a time makes it, under its
// own context: when it goes away the next one does.
func (c *chunkCache) get(ctx context.Context, digest string, build func(context.Context) ([]byte, error)) ([]byte, error) {
	text, t := c.lookUp(digest)
	if text != nil {
		return text, nil
	}
	defer c.leave(digest, t)
	done, err := enter(ctx, t.is)
	if err != nil {
		return nil, err
	}
	defer done()
	if text := c.find(digest); text != nil {
		return text, nil
	}
	built, err := enter(ctx, c.builds)
	if err != nil {
		return nil, err
	}
	defer built()
	if text, err = build(ctx); err != nil {
		return nil, err
	}
	c.keep(digest, text)
	return text, nil
}

// lookUp gives an index that is kept, or a place among those who wait for it.
func (c *chunkCache) lookUp(digest string) ([]byte, *turn) {
	if text := c.find(digest); text != nil {
		return text, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.turns[digest]
	if t == nil {
		t = &turn{is: make(chan struct{}, 1)}
		c.turns[digest] = t
	}
	t.waiting++
	return nil, t
}

func (c *chunkCache) leave(digest string, t *turn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.waiting--; t.waiting == 0 {
		delete(c.turns, digest)
	}
}

func (c *chunkCache) find(digest string) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.kept[digest]
	if !ok {
		return nil
	}
	c.used.MoveToFront(e)
	return e.Value.(*keptChunks).text
}

func (c *chunkCache) keep(digest string, text []byte) {
	if len(text) > maxKeptChunks {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kept[digest] = c.used.PushFront(&keptChunks{digest, text})
	c.size += len(text)
	for c.size > maxKeptChunks {
		k := c.used.Remove(c.used.Back()).(*keptChunks)
		delete(c.kept, k.digest)
		c.size -= len(k.text)
	}
}

package upload

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// patchUpload serves PUT /pool_patch_upload.
func (h *Handler) patchUpload(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "pool_patch_upload", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	if c.given == "" && (r.ContentLength == 0 || r.ContentLength == unknownLength) {
		c.ok() // a probe: nothing is made
		return
	}
	if !c.begin() {
		return
	}
	if c.given != "" {
		c.ok()
	}
	var made xapi.Ref
	_, err := c.run(func(ctx context.Context, t *task.Handle) (result string, err error) {
		leave, err := enter(ctx, h.streams)
		if err != nil {
			return "", err
		}
		defer leave()
		b := c.newBody(ctx, t)
		defer b.close()
		in := readAhead(b)
		u := &patchUpload{h: h, in: in, length: b.length, requested: requestedSR(r), task: t.Ref()}
		made, err = u.run(ctx)
		if in.close(); err != nil {
			b.drain()
		}
		return "<value>" + string(made) + "</value>", err
	})
	if err != nil {
		c.refuse(err)
		return
	}
	if !c.answer {
		c.created(pool.ClassPatch, made)
	}
}

// created answers 201 with the record.
func (c *call) created(class string, ref xapi.Ref) {
	record, err := c.h.render(class, ref)
	if err != nil {
		c.refuse(err)
		return
	}
	c.reply(http.StatusCreated, record)
}

// render gives a record as JSON, with its ref.
func (h *Handler) render(class string, ref xapi.Ref) (map[string]json.RawMessage, error) {
	var raw json.RawMessage
	var err error
	if h.Render != nil {
		raw, err = h.Render(class, ref)
	} else {
		err = h.Store.View(func(v *store.View) error {
			it, ok := v.Get(class, ref)
			if !ok {
				return xapi.NewError(xapi.HandleInvalid, class, string(ref))
			}
			raw = it.Raw
			return nil
		})
	}
	if err != nil {
		return nil, err
	}
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, fmt.Errorf("record of %s %s: %w", class, ref, err)
	}
	for name := range fields {
		if strings.HasPrefix(name, "_") {
			delete(fields, name)
		}
	}
	fields["ref"], _ = json.Marshal(ref)
	return fields, nil
}

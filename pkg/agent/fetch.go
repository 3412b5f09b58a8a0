package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// fetch takes the classic patch file from the coordinator, verifies it on the
// way and lays it into a work image: from there on it is like any other.
// Codes: CANNOT_FIND_PATCH when the file is gone, CANNOT_FETCH_PATCH [uuid]
// when it cannot be had, INVALID_PATCH.
func (e *execution) fetch(dst sr.Repository, entry Entry, run *Run) error {
	a, uuid := e.agent, entry.Assignment.Patch.UUID
	if err := fault.Point("agent.fetch"); err != nil {
		return xapi.NewError(xapi.CannotFetchPatch, string(uuid)).Because(err)
	}
	file, size, err := a.Coordinator.FetchPatch(e.ctx, uuid)
	if err != nil {
		if xapi.Is(err, xapi.CannotFindPatch) {
			return err
		}
		return xapi.NewError(xapi.CannotFetchPatch, string(uuid)).Because(err)
	}
	defer file.Close()
	image, err := e.openImage(dst, entry, vdi.Size(size))
	if err != nil {
		return err
	}
	got, err := a.intake(e.ctx, file, image, vdi.Size(size))
	if err = errors.Join(err, image.Close()); err != nil {
		return err
	}
	if run.Digest != "" && run.Digest != got.Digest {
		return xapi.NewError(xapi.InvalidPatch, fmt.Sprintf("the file has SHA-256 %s, the record of patch %s says %s", got.Digest, uuid, run.Digest))
	}
	run.Digest, run.Signature = got.Digest, got.Signature
	return nil
}

// openImage makes the empty work image: a volume of dst, or, where this host
// has no SR, a file in the journal folder.
func (e *execution) openImage(dst sr.Repository, entry Entry, size int64) (*os.File, error) {
	if dst == nil {
		f, err := os.OpenFile(e.agent.journal.path(e.id, fileImage), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		return f, f.Truncate(size)
	}
	if _, err := dst.Create(e.ctx, entry.Work, size); err != nil {
		return nil, err
	}
	return dst.Open(e.ctx, entry.Work, sr.ReadWrite)
}

// taken is what intake learned.
type taken struct {
	Digest    string // SHA-256 of the payload
	Payload   int64  // bytes
	Signature patch.Signature
}

// intake streams a signed patch file into an image and verifies it.
func (a *Agent) intake(ctx context.Context, r io.Reader, image *os.File, size int64) (t taken, err error) {
	keys, err := patch.LoadKeyring(a.KeysDir)
	if err != nil {
		return t, err
	}
	msg, err := patch.Open(r, keys, patch.Options{Pinned: a.Pinned, Limits: patch.Limits{Cleartext: a.MaxCleartext}})
	if err != nil {
		return t, err
	}
	w, err := vdi.NewWriter(ctx, image, size, -1, vdi.Options{Layout: a.Layout, Dom0: a.Dom0})
	if err != nil {
		return t, err
	}
	if _, err := io.Copy(w, msg); err != nil {
		w.Abort()
		return t, err
	}
	done, err := w.Finish(ctx)
	if err != nil {
		return t, err
	}
	t.Payload = done.Size
	t.Digest, t.Signature = msg.Digest(), msg.Signature()
	return t, nil
}

package upload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	mib = 1 << 20
	// headroom is what must be free beyond the bytes that come: the filesystem
	// around them and the writes of others.
	headroom = 8 * mib
	// roomEvery is how many bytes lie between two looks at the room left.
	roomEvery = 64 * mib
	copyChunk = 128 << 10
)

// input is a signed file on its way in. Its errors have a code, but for
// io.ErrUnexpectedEOF.
type input interface {
	io.Reader
	// end makes sure that the input ends here.
	end() error
	// size is how many bytes of the signed file have been read.
	size() int64
}

// patchUpload is one patch on its way from the wire into the pool.
type patchUpload struct {
	h         *Handler
	in        input
	length    int64  // of the signed file in bytes; -1: not known
	requested string // SR
	// syncs tells that Read of in syncs the image writer, which must not be
	// reading then.
	syncs bool
	task  xapi.Ref // whose result the pool_patch is
	// over tells that the image began as a copy of another one: its filesystem
	// was not made here just now, and nobody vouches for it.
	over bool

	where   sr.Candidate
	repo    sr.Repository
	message *patch.Message
	image   vdi.Written
	info    patch.Info
	ref     xapi.Ref
}

// run takes the six steps of an upload and gives the pool_patch.
//
// Codes: DEFAULT_SR_NOT_FOUND, SR_NOT_ATTACHED, OUT_OF_SPACE ["SR name (uuid)"],
// INVALID_PATCH, INVALID_PATCH_WITH_LOG, PATCH_ALREADY_EXISTS [uuid],
// MESSAGE_TOO_LARGE, TIMEOUT, TASK_CANCELLED.
func (u *patchUpload) run(ctx context.Context) (xapi.Ref, error) {
	if err := u.choose(ctx, max(u.length, 0)); err != nil {
		return "", err
	}
	keys, err := u.h.Keys()
	if err != nil {
		return "", fmt.Errorf("read trusted keys: %w", err)
	}
	leave, err := u.open(ctx, keys)
	if err != nil {
		return "", err
	}
	defer leave()
	length := u.expect()
	size := vdi.Size(length)
	_, err = u.h.Pool.NewVDI(ctx, pool.NewVDI{
		SR:          u.where.Ref,
		VirtualSize: size,
		Room:        u.room(),
		VDI:         beingUploaded(),
		Fill: func(ctx context.Context, f *os.File, path string) error {
			w, err := vdi.NewWriter(ctx, f, size, length, vdi.Options{Layout: u.h.Layout, Dom0: u.h.Dom0})
			if err != nil {
				return err
			}
			defer w.Abort()
			return u.fill(ctx, w, path)
		},
		Map:    func() *vdi.Map { return u.image.Map },
		Commit: u.commit,
	})
	if err != nil {
		return "", u.noRoom(err)
	}
	return u.ref, u.confirm(ctx)
}

// confirm ends the upload of the patch whose records are there.
func (u *patchUpload) confirm(ctx context.Context) error {
	if u.h.Confirm == nil {
		return nil
	}
	return u.h.Confirm(ctx, u.ref)
}

// expect is the likely size of the payload, -1 when it may be any. Known after open.
func (u *patchUpload) expect() int64 {
	if u.message.Compressed() {
		return -1
	}
	return u.length
}

// beingUploaded is the record of a VDI whose patch is not known yet.
func beingUploaded() pool.VDI {
	return pool.VDI{
		NameLabel: "Patch", NameDescription: "being uploaded", Type: "user", ReadOnly: true,
		OtherConfig: map[string]string{},
	}
}

// open reads the beginning of the message. Of clear-signed ones, which are read
// as a whole here, few are let in at once, until leave is called.
func (u *patchUpload) open(ctx context.Context, keys *patch.Keyring) (leave func(), err error) {
	begin := make([]byte, len(patch.CleartextBegin))
	n, err := io.ReadFull(u.in, begin)
	if n == 0 && err != io.EOF {
		return nil, err
	}
	leave = func() {}
	if string(begin) == patch.CleartextBegin {
		if leave, err = enter(ctx, u.h.texts); err != nil {
			return nil, err
		}
	}
	check := u.h.Check
	_, check.Ahead = u.in.(*ahead)
	u.message, err = patch.Open(io.MultiReader(bytes.NewReader(begin[:n]), u.in), keys, check)
	if err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}

// choose finds the SR and makes sure that need bytes have room on it.
func (u *patchUpload) choose(ctx context.Context, need int64) error {
	where, repo, err := u.h.chooseSR(ctx, u.requested)
	if err != nil {
		return err
	}
	u.where, u.repo = where, repo
	return u.checkRoom(ctx, need+need/20+headroom)
}

// room is what the upload is promised, in bytes. Without a length it takes what
// is promised to nobody, as it comes.
func (u *patchUpload) room() int64 {
	need := max(u.length, 0)
	return need + need/20 + headroom
}

// chooseSR finds the SR that the client named, or that is right without a name.
func (h *Handler) chooseSR(ctx context.Context, requested string) (sr.Candidate, sr.Repository, error) {
	def, candidates, err := h.Pool.SRCandidates(ctx)
	if err != nil {
		return sr.Candidate{}, nil, err
	}
	ref, err := sr.Choose(requested, def, candidates)
	if err != nil {
		return sr.Candidate{}, nil, err
	}
	return h.findSR(ctx, ref)
}

// checkRoom makes sure that need bytes are free, and promised to nobody else.
func (u *patchUpload) checkRoom(ctx context.Context, need int64) error {
	promised, err := u.h.Pool.Promised(ctx, u.where.Ref)
	if err != nil {
		return fmt.Errorf("room on SR %s: %w", u.where.UUID, err)
	}
	st, err := u.repo.Stat(ctx)
	if err != nil {
		return fmt.Errorf("room on SR %s: %w", u.where.UUID, err)
	}
	if st.Free-promised < need {
		return outOfSpace(u.where).Because(&sr.Shortage{Needed: need, Free: st.Free, Promised: promised})
	}
	return nil
}

// watchRoom ends an upload when the SR gets full: also by somebody else, where
// it was promised all its room, else when what is left is promised to others.
func (u *patchUpload) watchRoom(ctx context.Context) error {
	if u.expect() < 0 {
		return u.checkRoom(ctx, headroom/2)
	}
	st, err := u.repo.Stat(ctx)
	if err != nil {
		return fmt.Errorf("room on SR %s: %w", u.where.UUID, err)
	}
	if st.Free < headroom/2 {
		return outOfSpace(u.where).Because(&sr.Shortage{Needed: headroom / 2, Free: st.Free})
	}
	return nil
}

func outOfSpace(c sr.Candidate) *xapi.Error {
	return xapi.NewError(xapi.OutOfSpace, fmt.Sprintf("%s (%s)", c.Name, c.UUID))
}

// noRoom gives the error of a full disk its code.
func (u *patchUpload) noRoom(err error) error { return noRoom(u.where, err) }

func noRoom(where sr.Candidate, err error) error {
	var coded *xapi.Error
	full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
	if full && !errors.As(err, &coded) {
		return outOfSpace(where).Because(err)
	}
	return err
}

// fill streams the payload into the image, checks it and asks it what it is.
func (u *patchUpload) fill(ctx context.Context, w *vdi.Writer, path string) (err error) {
	to := io.Writer(w)
	if u.syncs {
		to = struct{ io.Writer }{w} // without ReadFrom
	}
	if err := u.stream(ctx, to); err != nil {
		return u.noRoom(err)
	}
	if u.image, err = w.Finish(ctx); err != nil {
		return u.noRoom(err)
	}
	u.attest()
	u.info, err = patch.Query(ctx, u.h.Dom0, path, u.h.InfoTimeout)
	return err
}

// attest remembers on this host that the image with this map holds a payload
// whose signature has held. Should that fail, or the image be a copy of another
// one but for the payload, the first apply verifies it again.
func (u *patchUpload) attest() {
	if u.image.Map == nil || u.over {
		return
	}
	sig := u.message.Signature()
	err := u.h.Attested.Remember(patch.Attestation{
		Map: u.image.Map.Digest(), Digest: u.message.Digest(), Kind: sig.Kind, Signer: sig.Signer,
	})
	if err != nil {
		u.h.Log.WithError(err).Warn("what was verified cannot be remembered: the first apply reads it again")
	}
}

// stream copies the payload until its signature holds, and watches the room.
func (u *patchUpload) stream(ctx context.Context, w io.Writer) error {
	for {
		_, err := io.CopyN(w, u.message, roomEvery)
		if err == io.EOF {
			break
		}
		if err == nil {
			err = u.watchRoom(ctx)
		}
		if err != nil {
			return err
		}
	}
	if err := u.in.end(); err != nil {
		var coded *xapi.Error
		if errors.As(err, &coded) {
			return err
		}
		return xapi.NewError(xapi.InvalidPatch).Because(err)
	}
	return nil
}

// commit writes the record of the patch in the transaction that shows the VDI.
// A restart before the task has ended is no failure of it then.
func (u *patchUpload) commit(tx *store.Tx, ref xapi.Ref) error {
	sig := u.message.Signature()
	rec := pool.Patch{
		UUID: u.info.UUID, NameLabel: u.info.NameLabel, NameDescription: u.info.NameDescription,
		Version: u.info.Version, AfterApplyGuidance: u.info.Guidance,
		Size: u.in.size(), VDI: ref, OtherConfig: map[string]string{},
		Digest: u.message.Digest(), PayloadSize: u.message.Size(),
		Signature: sig.Packet, SignatureKind: string(sig.Kind), Signer: sig.Signer,
		InfoXML: u.info.XML, ScratchSize: u.info.ScratchSize,
	}
	if u.h.Confirm != nil {
		rec.Unconfirmed = &pool.Unconfirmed{Task: u.task, Since: u.h.Now().UTC()}
	}
	patchRef, err := u.h.Pool.IntroducePatch(tx, rec)
	if err != nil {
		return err
	}
	u.ref = patchRef
	var image pool.VDI
	if err := tx.Get(pool.ClassVDI, ref, &image); err != nil {
		return err
	}
	image.NameLabel = "Patch " + u.info.NameLabel
	image.NameDescription = u.info.NameDescription
	image.OtherConfig["patchd-patch-uuid"] = string(u.info.UUID)
	tx.Put(pool.ClassVDI, ref, image)
	if rec.Unconfirmed != nil {
		return nil
	}
	return task.Settle(tx, u.task, string(patchRef))
}

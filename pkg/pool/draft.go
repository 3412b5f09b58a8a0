package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// Draft is a VDI in the making that outlives this process: its volume lies on
// the SR under a name of working data, and an intent in the database says what
// it is to become. It ends in one of three ways: Publish makes it a VDI,
// Discard removes it, and when it has expired the sweeper does.
//
// While it is open nobody else has it, and its SR can be neither unplugged nor
// destroyed. Close lets it go, and OpenDraft takes it up again, also after a
// crash at any step:
//
//	d, err := p.NewDraft(ctx, NewVDI{SR: sr, VirtualSize: size, Room: need}, DraftOptions{Expires: tomorrow})
//	…                                  // write to d.File(), say in d.SetNote how far that is
//	d.Close()
//	d, err = p.OpenDraft(ctx, id)      // later, maybe in another process
//	ref, err := d.Publish(ctx, m, commit)
//
// What was written is durable once it was synced, as with any file. A Draft is
// used by one goroutine, but Note may be called by others.
type Draft struct {
	p       *Pool
	repo    sr.Repository
	ref     xapi.Ref // of the intent
	file    *os.File
	path    string
	size    int64 // of the volume, in bytes
	shares  bool  // the bytes are those of another VDI and were not looked at
	over    bool  // it is a VDI, or gone
	release func()
	end     func()

	mu sync.Mutex // guards what Note reads
	in Intent     // as it is recorded
}

// DraftOptions says what a draft needs beside NewVDI.
type DraftOptions struct {
	// Expires is when nobody needs the draft any more. When it has passed, the
	// draft goes as soon as nobody has it open.
	Expires time.Time
	// Note is what its owner must know to go on, at most 16 KiB.
	Note map[string]string
	// CloneOf is a VDI of the same SR, which must have VDI_CLONE, whose bytes
	// the draft begins with; empty: it begins with zeros.
	CloneOf xapi.Ref
}

// DraftInfo describes a draft that may be opened.
type DraftInfo struct {
	ID          xapi.UUID
	SR          xapi.Ref
	VirtualSize int64 // bytes
	Expires     time.Time
	Created     time.Time
	Note        map[string]string
}

// maxNote bounds the note of a draft, in bytes.
const maxNote = 16 << 10

func checkNote(note map[string]string) error {
	size := 0
	for k, v := range note {
		size += len(k) + len(v)
	}
	if size > maxNote {
		return xapi.NewError(xapi.InvalidValue, "note", fmt.Sprintf("%d bytes, at most %d", size, maxNote))
	}
	return nil
}

// NewDraft begins a draft; Fill, Map and Commit of n are not looked at. The
// virtual size of a clone is at least that of its source. On failure nothing is
// left. Codes: those of NewVDI and UseVDI, INVALID_VALUE,
// SR_OPERATION_NOT_SUPPORTED [SR ref] for a clone on an SR that cannot or of a
// VDI in another SR.
func (p *Pool) NewDraft(ctx context.Context, n NewVDI, o DraftOptions) (*Draft, error) {
	if err := checkNote(o.Note); err != nil {
		return nil, err
	}
	prepare := (*Draft).create
	if !o.CloneOf.IsNull() {
		base, size, release, err := p.cloneable(ctx, n.SR, o.CloneOf)
		if err != nil {
			return nil, err
		}
		defer release()
		n.VirtualSize = max(n.VirtualSize, size)
		prepare = func(d *Draft, ctx context.Context) error { return d.clone(ctx, base, size) }
	}
	if n.VirtualSize <= 0 {
		return nil, xapi.NewError(xapi.InvalidValue, "virtual_size", fmt.Sprint(n.VirtualSize))
	}
	d, err := p.begin(ctx, n, Intent{Kind: IntentDraft, Expires: o.Expires.UTC(), Note: maps.Clone(o.Note), Clone: !o.CloneOf.IsNull()})
	if err != nil {
		return nil, err
	}
	if err = prepare(d, ctx); err == nil {
		err = d.open(ctx)
	}
	if err == nil {
		return d, nil
	}
	return nil, joinUndo(p.inSR(n.SR, err), d.Discard(ctx))
}

// cloneable gives the volume of a VDI that a draft on an SR may begin as, and
// its size in bytes, in use until release.
func (p *Pool) cloneable(ctx context.Context, on, ref xapi.Ref) (base sr.Name, size int64, release func(), err error) {
	rec, repo, release, err := p.useVDI(ref)
	if err != nil {
		return base, 0, nil, err
	}
	if rec.SR != on || !sr.Has(repo.Features(), sr.VDIClone) {
		err = xapi.NewError(xapi.SROperationNotSupported, string(on))
	} else {
		size, err = p.sizeOf(ctx, source{ref, rec, repo})
	}
	if err != nil {
		release()
		return base, 0, nil, err
	}
	return sr.Live(rec.UUID), size, release, nil
}

// clone makes the part volume as a clone of base, which has size bytes.
func (d *Draft) clone(ctx context.Context, base sr.Name, size int64) error {
	part := d.p.part(d.in)
	v, err := d.repo.Clone(ctx, base, part)
	if err != nil {
		return err
	}
	d.size = v.VirtualSize
	if d.in.Size <= d.size {
		return nil
	}
	if err := d.repo.Resize(ctx, part, d.in.Size); err != nil {
		return err
	}
	d.size, err = volumeLength(ctx, d.repo, part)
	return err
}

func volumeLength(ctx context.Context, repo sr.Repository, n sr.Name) (int64, error) {
	f, err := repo.Open(ctx, n, sr.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, 2)
}

// Drafts lists the drafts of this host that may be opened, oldest first: also
// those that are open.
func (p *Pool) Drafts() (list []DraftInfo, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			if p.openable(in) {
				list = append(list, DraftInfo{in.UUID, in.SR, in.Size, in.Expires, in.Created, in.Note})
			}
		}
		return nil
	})
	slices.SortStableFunc(list, func(a, b DraftInfo) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	return list, err
}

// openable tells whether an intent is a draft that somebody may go on with.
func (p *Pool) openable(in Intent) bool {
	return in.Kind == IntentDraft && in.Host == p.Self && !in.Undo && (p.Now().Before(in.Expires) || p.storage.isActive(in.UUID))
}

// OpenDraft takes up a draft where it was let go. One whose volume is lost is
// dropped. Codes: HANDLE_INVALID ["draft", id] when there is none, or it has
// expired, VDI_IN_USE [uuid of the VDI to be, "draft"] while somebody has it
// open, VDI_NOT_AVAILABLE [uuid of the VDI to be] when its volume is lost, and
// those of Repository.
func (p *Pool) OpenDraft(ctx context.Context, id xapi.UUID) (*Draft, error) {
	ref, in, err := p.draft(id)
	if err != nil {
		return nil, err
	}
	end, ok := p.storage.claim(id)
	if !ok {
		return nil, xapi.NewError(xapi.VDIInUse, string(in.VDI), "draft")
	}
	repo, release, err := p.useSR(in.SR)
	if err != nil {
		end()
		return nil, err
	}
	d := &Draft{p: p, repo: repo, ref: ref, in: in, release: release, end: end}
	lost, err := d.reopen(ctx)
	switch {
	case err == nil:
		return d, nil
	case lost:
		return nil, joinUndo(xapi.NewError(xapi.VDINotAvailable, string(in.VDI)).Because(err), d.Discard(ctx))
	}
	return nil, errors.Join(err, d.Close())
}

// draft finds a draft that may be opened. Code: HANDLE_INVALID ["draft", id].
func (p *Pool) draft(id xapi.UUID) (ref xapi.Ref, in Intent, err error) {
	err = p.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(ClassIntent, id)
		if ok {
			ref = it.Ref
			if err := it.Decode(&in); err != nil {
				return err
			}
		}
		if !ok || !p.openable(in) {
			return xapi.NewError(xapi.HandleInvalid, "draft", fmt.Sprintf("%.64s", id))
		}
		return nil
	})
	return ref, in, err
}

// reopen opens the volume of a draft under its part name. lost tells that it is
// not there, or not whole.
func (d *Draft) reopen(ctx context.Context) (lost bool, err error) {
	// Only now is it ours alone: it may have ended meanwhile.
	if _, d.in, err = d.p.draft(d.in.UUID); err != nil {
		return false, err
	}
	err = unname(ctx, d.repo, d.p.part(d.in), sr.Live(d.in.VDI))
	if err == nil {
		err = d.open(ctx)
	}
	if err != nil {
		return xapi.Is(err, xapi.VDINotAvailable), err
	}
	if d.size, err = d.file.Seek(0, 2); err != nil {
		return false, fmt.Errorf("measure draft %s: %w", d.in.UUID, err)
	}
	if d.size < d.in.Size {
		return true, fmt.Errorf("the volume of draft %s has %d bytes, not %d", d.in.UUID, d.size, d.in.Size)
	}
	return false, nil
}

// ID names the draft in the database, and in the name of its volume.
func (d *Draft) ID() xapi.UUID { return d.in.UUID }

// File is the volume, open for reading and writing at offsets; its length must
// not be changed. It is closed by Publish, Discard and Close.
func (d *Draft) File() *os.File { return d.file }

// Path is what File was opened from, valid while the draft is open.
func (d *Draft) Path() string { return d.path }

// Size is the length of the volume in bytes: at least what was asked for.
func (d *Draft) Size() int64 { return d.size }

// Clear makes all of the volume read as zeros, and durably so, where that needs
// no writing: EOPNOTSUPP else.
func (d *Draft) Clear() error {
	err := unix.Fallocate(int(d.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, d.size)
	if err == nil {
		err = d.file.Sync()
	}
	if err != nil {
		return fmt.Errorf("clear draft %s: %w", d.in.UUID, err)
	}
	return nil
}

// Note is what was last noted.
func (d *Draft) Note() map[string]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.in.Note)
}

// SetNote replaces note and expiry. Codes: INVALID_VALUE for more than 16 KiB,
// HANDLE_INVALID ["draft", id] when the draft is no more.
func (d *Draft) SetNote(ctx context.Context, note map[string]string, expires time.Time) error {
	if err := checkNote(note); err != nil {
		return err
	}
	var in Intent
	err := d.p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		if in, err = store.Read[Intent](tx, ClassIntent, d.ref); xapi.Is(err, xapi.HandleInvalid) {
			return xapi.NewError(xapi.HandleInvalid, "draft", string(d.in.UUID))
		}
		if err != nil {
			return err
		}
		in.Note, in.Expires = maps.Clone(note), expires.UTC()
		tx.Put(ClassIntent, d.ref, in)
		return nil
	})
	if err == nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.in = in
	}
	return err
}

// Publish makes the draft a VDI: bytes and map are synced and named on the SR,
// then one transaction writes the record together with what commit adds. m, the
// block map of all bytes, may be nil; commit, too. Then the draft is over and
// closed. A second Publish gives the same VDI.
//
// On failure, also of commit, also a cancel, the draft is as it was and still
// open: publish again, discard or close it. Codes: those of commit,
// OUT_OF_SPACE ["SR name (uuid)"].
func (d *Draft) Publish(ctx context.Context, m *vdi.Map, commit func(tx *store.Tx, vdi xapi.Ref) error) (xapi.Ref, error) {
	if d.over {
		return d.published()
	}
	err := d.flush()
	var digest string
	if err == nil {
		digest, err = d.name(ctx, m)
	}
	if err == nil {
		err = d.record(ctx, digest, commit)
	}
	if err != nil {
		born, rerr := d.refuse(ctx)
		if !born {
			return "", joinUndo(d.p.inSR(d.in.SR, err), rerr)
		}
	}
	d.over = true
	if err := d.Close(); err != nil {
		d.p.Log.WithError(err).WithField("VDI", d.in.VDI).Warn("a VDI that is complete could not be closed")
	}
	return d.in.Ref, nil
}

// published is the VDI of a draft that is over. Code: HANDLE_INVALID.
func (d *Draft) published() (xapi.Ref, error) {
	_, err := d.p.vdi(d.in.Ref)
	if err != nil {
		return "", err
	}
	return d.in.Ref, nil
}

// Discard removes the draft and all it has on the SR. One that was published
// stays the VDI that it is. What cannot be removed now is removed by the
// sweeper.
func (d *Draft) Discard(ctx context.Context) error {
	if d.over {
		return d.Close()
	}
	d.over = true
	defer d.letGo()
	d.shut()
	_, err := d.unmake(ctx)
	return err
}

// Close lets the draft go and keeps what is there for OpenDraft. A second Close
// does nothing.
func (d *Draft) Close() error {
	defer d.letGo()
	return d.shut()
}

// shut closes the file.
func (d *Draft) shut() error {
	if d.file == nil {
		return nil
	}
	err := d.file.Close()
	d.file = nil
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// letGo gives back the draft's hold on file, intent and SR.
func (d *Draft) letGo() {
	d.shut()
	d.end()
	d.release()
}

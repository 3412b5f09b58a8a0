package sr

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// roomEvery is how many bytes are copied between two looks at the room that is left.
const roomEvery = 64 << 20

// Copy makes volume dstName of dst with the size and bytes of srcName of src,
// durably: by a clone where both are in one repository that clones, else byte
// by byte, holes kept. progress, when given, hears of bytes done and to do.
//
// dst is refused for want of room before anything is written, and again while
// it is (OUT_OF_SPACE). On any failure, and when ctx ends, dstName is gone.
func Copy(ctx context.Context, dst Repository, dstName Name, src Repository, srcName Name, progress func(done, total int64)) error {
	return CopyVerified(ctx, dst, dstName, src, srcName, nil, false, progress)
}

// CopyVerified is Copy of a volume that has the block map m: what dstName holds
// in the end is as the map says, and was read or passed through a hash to know
// it, a clone too. A source that is not as the map says is a *vdi.DamageError.
// Without a map it is Copy.
//
// With resume dstName may be there already, from an earlier call that did not
// come to its end: what of it is as the map says is kept. It then stays after a
// failure, for the next call to go on; the caller destroys it when there will be none.
func CopyVerified(ctx context.Context, dst Repository, dstName Name, src Repository, srcName Name, m *vdi.Map, resume bool, progress func(done, total int64)) error {
	c := copying{repo: dst, name: dstName, m: m, resume: resume && m != nil, progress: progress}
	var undo xapi.Undo
	if !c.resume {
		undo.Push("destroy copy", func(ctx context.Context) error { return dst.Destroy(ctx, dstName) })
	}
	if dst == src && Has(src.Features(), VDIClone) {
		made, err := c.clone(ctx, srcName)
		if !made {
			return err
		}
		return undo.Close(ctx, err)
	}
	from, err := src.Open(ctx, srcName, ReadOnly)
	if err != nil {
		return err
	}
	defer from.Close()
	need, err := Taken(ctx, src, srcName, from)
	if err != nil {
		return err
	}
	if err := c.make(ctx, from, need); err != nil {
		return err
	}
	return undo.Close(ctx, c.into(ctx, from))
}

// copying is one copy into volume name of repo.
type copying struct {
	repo     Repository
	name     Name
	m        *vdi.Map // nil: not verified
	resume   bool
	progress func(done, total int64)
}

// clone makes the volume as a clone and verifies it. made tells whether there is
// a volume that is to be undone on a failure.
func (c copying) clone(ctx context.Context, srcName Name) (made bool, err error) {
	_, err = c.repo.Clone(ctx, srcName, c.name)
	there := c.resume && errors.Is(err, os.ErrExist)
	if c.m == nil || err != nil && !there {
		return false, err
	}
	f, err := c.repo.Open(ctx, c.name, ReadOnly)
	if err != nil {
		return !there, err
	}
	defer f.Close()
	if err := c.m.Verify(ctx, f, c.progress); err != nil {
		return !there, fmt.Errorf("clone to volume %s: %w", c.name, err)
	}
	return !there, nil
}

// make makes the volume for the bytes of from, which takes need, unless it is
// there to be resumed.
func (c copying) make(ctx context.Context, from *os.File, need int64) error {
	size, err := length(from)
	if err != nil {
		return err
	}
	if c.m != nil {
		size = c.m.Size // a volume that was rounded up is not what is copied
	}
	if c.resume {
		f, err := c.repo.Open(ctx, c.name, ReadOnly)
		if err == nil {
			have, err := Taken(ctx, c.repo, c.name, f)
			return errors.Join(err, f.Close(), enoughRoom(ctx, c.repo, need-have))
		}
		if !xapi.Is(err, xapi.VDINotAvailable) {
			return err
		}
	}
	if err := enoughRoom(ctx, c.repo, need); err != nil {
		return err
	}
	_, err = c.repo.Create(ctx, c.name, size)
	return err
}

// into copies the bytes of from into the volume.
func (c copying) into(ctx context.Context, from *os.File) (err error) {
	to, err := c.repo.Open(ctx, c.name, ReadWrite)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	before, err := length(to)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	watch := watchRoom(ctx, stop, c.repo, c.progress)
	if c.m != nil {
		_, err = vdi.CopyVerified(ctx, to, from, c.m, vdi.CopyOptions{Resume: c.resume, Progress: watch})
	} else {
		err = vdi.Copy(ctx, to, from, watch)
	}
	switch cause := Alive(ctx); {
	case err == nil:
	case cause != nil:
		return fmt.Errorf("copy to volume %s: %w", c.name, cause)
	case NoSpace(err):
		return xapi.NewError(xapi.OutOfSpace, c.name.String()).Because(err)
	default:
		return fmt.Errorf("copy to volume %s: %w", c.name, err)
	}
	if after, err := length(to); err != nil || after != before {
		return errors.Join(fmt.Errorf("volume %s changed its size from %d to %d bytes while it was written", c.name, before, after), err)
	}
	return nil
}

// watchRoom is a progress function that ends the copy when dst gets full.
func watchRoom(ctx context.Context, stop context.CancelCauseFunc, dst Repository, progress func(done, total int64)) func(done, total int64) {
	next := int64(roomEvery)
	return func(done, total int64) {
		if progress != nil {
			progress(done, total)
		}
		if done < next {
			return
		}
		next = done + roomEvery
		if s, err := dst.Stat(ctx); err != nil {
			stop(err)
		} else if s.Free <= 0 {
			stop(xapi.NewError(xapi.OutOfSpace, "no room is left for the copy"))
		}
	}
}

// enoughRoom refuses a copy that takes need bytes when dst has not as many.
func enoughRoom(ctx context.Context, dst Repository, need int64) error {
	s, err := dst.Stat(ctx)
	if err != nil {
		return err
	}
	if s.Free < need {
		return xapi.NewError(xapi.OutOfSpace, fmt.Sprintf("the copy needs %d bytes, %d are free", need, s.Free))
	}
	return nil
}

func length(f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("stat volume: %w", err)
	}
	if !fi.Mode().IsRegular() {
		// A block device tells its size by its end.
		n, err := f.Seek(0, 2)
		if err != nil || n == math.MaxInt64 {
			return 0, fmt.Errorf("size of volume: %w", errors.Join(err, os.ErrInvalid))
		}
		return n, nil
	}
	return fi.Size(), nil
}

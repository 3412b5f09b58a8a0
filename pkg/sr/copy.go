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
	if dst == src && Has(src.Features(), VDIClone) {
		_, err := src.Clone(ctx, srcName, dstName)
		return err
	}
	from, err := src.Open(ctx, srcName, ReadOnly)
	if err != nil {
		return err
	}
	defer from.Close()
	size, err := length(from)
	if err != nil {
		return err
	}
	if err := enoughRoom(ctx, dst, from); err != nil {
		return err
	}
	if _, err := dst.Create(ctx, dstName, size); err != nil {
		return err
	}
	var undo xapi.Undo
	undo.Push("destroy copy", func(ctx context.Context) error { return dst.Destroy(ctx, dstName) })
	return undo.Close(ctx, CopyInto(ctx, dst, dstName, from, progress))
}

// CopyInto copies all bytes of from into the existing volume dstName, which
// must be as large at least and read as zeros, and syncs it. What it has
// written when it fails stays.
func CopyInto(ctx context.Context, dst Repository, dstName Name, from *os.File, progress func(done, total int64)) (err error) {
	to, err := dst.Open(ctx, dstName, ReadWrite)
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
	err = vdi.Copy(ctx, to, from, watchRoom(ctx, stop, dst, progress))
	if err == nil {
		err = to.Sync()
	}
	switch cause := Alive(ctx); {
	case err == nil:
	case cause != nil:
		return fmt.Errorf("copy to volume %s: %w", dstName, cause)
	case NoSpace(err):
		return xapi.NewError(xapi.OutOfSpace, dstName.String()).Because(err)
	default:
		return fmt.Errorf("copy to volume %s: %w", dstName, err)
	}
	if after, err := length(to); err != nil || after != before {
		return errors.Join(fmt.Errorf("volume %s changed its size from %d to %d bytes while it was written", dstName, before, after), err)
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

func enoughRoom(ctx context.Context, dst Repository, from *os.File) error {
	need, err := vdi.Allocated(from)
	if err != nil {
		return fmt.Errorf("measure source of copy: %w", err)
	}
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

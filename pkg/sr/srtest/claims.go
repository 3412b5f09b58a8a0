package srtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// Claims: every feature that is offered works, and none that works is hidden.
func (s Suite) Claims(t *testing.T) {
	r := s.attached(t)
	for what, check := range map[string]func(context.Context, sr.Repository) error{
		"features": CheckFeatures, "clone": CheckCloneClaim, "resize": CheckResizeClaim,
	} {
		if err := check(t.Context(), r); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// CloneRoom: a clone takes no room of its own.
func (s Suite) CloneRoom(t *testing.T) {
	if s.Double {
		return
	}
	if err := CheckCloneRoom(t.Context(), s.attached(t)); err != nil {
		t.Error(err)
	}
}

// CheckFeatures tells whether the list of features makes sense: known ones, once
// each, and VDI_SNAPSHOT only with the VDI_CLONE it is made by.
func CheckFeatures(_ context.Context, r sr.Repository) error {
	known := map[sr.Feature]bool{
		sr.VDICreate: true, sr.VDIDelete: true, sr.VDIClone: true, sr.VDISnapshot: true,
		sr.VDIResize: true, sr.VDIIntro: true, sr.SRProbe: true, sr.SRUpdate: true,
	}
	for _, f := range r.Features() {
		if !known[f] {
			return fmt.Errorf("claims %s, which is unknown or claimed twice", f)
		}
		known[f] = false
	}
	if sr.Has(r.Features(), sr.VDISnapshot) != sr.Has(r.Features(), sr.VDIClone) {
		return errors.New("claims one of VDI_SNAPSHOT and VDI_CLONE without the other: a snapshot is a clone")
	}
	return nil
}

// CheckCloneClaim tells whether r is honest about VDI_CLONE: a clone has every
// byte, the source keeps its own, and neither sees what is written into the
// other. Whether a driver hides that it could clone is told where its volumes
// are files: two of them share blocks when the filesystem is asked to (FICLONE).
// Of block devices that cannot be told; there the refusal alone is looked at.
func CheckCloneClaim(ctx context.Context, r sr.Repository) error {
	src, dst := live(), work()
	if _, err := r.Create(ctx, src, 2*mib); err != nil {
		return err
	}
	defer r.Destroy(ctx, src)
	defer r.Destroy(ctx, dst)
	data := pattern(5, mib)
	if err := put(ctx, r, src, data, mib); err != nil {
		return err
	}
	_, err := r.Clone(ctx, src, dst)
	if sr.Has(r.Features(), sr.VDIClone) {
		if err != nil {
			return fmt.Errorf("claims VDI_CLONE but cannot clone: %w", err)
		}
		return trueClone(ctx, r, src, dst, data)
	}
	if err == nil {
		return errors.New("can clone but does not claim VDI_CLONE")
	}
	if !xapi.Is(err, xapi.SROperationNotSupported) {
		return fmt.Errorf("clone without VDI_CLONE: %w, want %s", err, xapi.SROperationNotSupported)
	}
	if _, err := r.Open(ctx, dst, sr.ReadOnly); !xapi.Is(err, xapi.VDINotAvailable) {
		return fmt.Errorf("a refused clone left a volume: %w", err)
	}
	return couldReflink(ctx, r, src)
}

// trueClone: dst has the bytes of src, and each is its own.
func trueClone(ctx context.Context, r sr.Repository, src, dst sr.Name, data []byte) error {
	if err := holds(ctx, r, dst, 2*mib, data); err != nil {
		return fmt.Errorf("claims VDI_CLONE but the clone is wrong: %w", err)
	}
	if err := holds(ctx, r, src, 2*mib, data); err != nil {
		return fmt.Errorf("cloning changes the source: %w", err)
	}
	for _, pair := range [][2]sr.Name{{dst, src}, {src, dst}} {
		written, other := pair[0], pair[1]
		before, err := get(ctx, r, other, 2*mib, 0)
		if err != nil {
			return err
		}
		if err := put(ctx, r, written, pattern(6, 8192), mib); err != nil {
			return err
		}
		after, err := get(ctx, r, other, 2*mib, 0)
		if err != nil {
			return err
		}
		if string(before) != string(after) {
			return fmt.Errorf("a write into %s shows in %s: a clone that shares writes", written, other)
		}
		if err := put(ctx, r, written, data[:8192], mib); err != nil {
			return err
		}
	}
	return nil
}

// couldReflink complains when the storage below reflinks what the driver says cannot be cloned.
func couldReflink(ctx context.Context, r sr.Repository, src sr.Name) error {
	dst := part()
	if _, err := r.Create(ctx, dst, 2*mib); err != nil {
		return err
	}
	defer r.Destroy(ctx, dst)
	from, err := r.Open(ctx, src, sr.ReadOnly)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := r.Open(ctx, dst, sr.ReadWrite)
	if err != nil {
		return err
	}
	defer to.Close()
	if unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) == nil {
		return errors.New("hides VDI_CLONE: two of its volumes can share blocks")
	}
	return nil
}

// CheckCloneRoom tells whether a clone shares its blocks: one that copies takes
// room, and its time grows with the size. Time itself is not measured here.
func CheckCloneRoom(ctx context.Context, r sr.Repository) error {
	if !sr.Has(r.Features(), sr.VDIClone) {
		return nil
	}
	const size = 32 * mib
	src, dst := live(), work()
	if _, err := r.Create(ctx, src, size); err != nil {
		return err
	}
	defer r.Destroy(ctx, src)
	defer r.Destroy(ctx, dst)
	if err := put(ctx, r, src, pattern(8, size), 0); err != nil {
		return err
	}
	before, err := used(ctx, r, src)
	if err != nil {
		return err
	}
	if _, err := r.Clone(ctx, src, dst); err != nil {
		return err
	}
	after, err := used(ctx, r, dst)
	if err != nil {
		return err
	}
	if grown := after - before; grown > size/4 {
		return fmt.Errorf("claims VDI_CLONE but copies: a clone of %d bytes takes %d", int64(size), grown)
	}
	return nil
}

// used is the room taken in r once everything is on disk.
func used(ctx context.Context, r sr.Repository, n sr.Name) (int64, error) {
	f, err := r.Open(ctx, n, sr.ReadWrite)
	if err != nil {
		return 0, err
	}
	err = f.Sync()
	if st, serr := f.Stat(); err == nil && serr == nil && st.Mode().IsRegular() {
		err = unix.Syncfs(int(f.Fd()))
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return 0, err
	}
	s, err := r.Stat(ctx)
	return s.PhysicalUtilisation, err
}

// CheckResizeClaim tells whether r is honest about VDI_RESIZE.
func CheckResizeClaim(ctx context.Context, r sr.Repository) error {
	n := live()
	if _, err := r.Create(ctx, n, 4*mib); err != nil {
		return err
	}
	defer r.Destroy(ctx, n)
	data := pattern(9, 4096)
	if err := put(ctx, r, n, data, 0); err != nil {
		return err
	}
	err := r.Resize(ctx, n, 8*mib)
	if !sr.Has(r.Features(), sr.VDIResize) {
		if err == nil {
			return errors.New("can resize but does not claim VDI_RESIZE")
		}
		if !xapi.Is(err, xapi.SROperationNotSupported) {
			return fmt.Errorf("resize without VDI_RESIZE: %w, want %s", err, xapi.SROperationNotSupported)
		}
		return holds(ctx, r, n, 4*mib, make([]byte, mib))
	}
	if err != nil {
		return fmt.Errorf("claims VDI_RESIZE but cannot: %w", err)
	}
	if err := holds(ctx, r, n, 8*mib, make([]byte, 4*mib)); err != nil {
		return fmt.Errorf("claims VDI_RESIZE but does not: %w", err)
	}
	got, err := get(ctx, r, n, len(data), 0)
	if err == nil && string(got) != string(data) {
		err = errors.New("resize loses bytes")
	}
	return err
}

// Maps: the block map of a VDI is a volume like any other, beside its image and
// with a name of its own kind, from part to live to gone.
func (s Suite) Maps(t *testing.T) {
	d, c := s.New(t)
	r := attach(t, d, c)
	ctx := t.Context()
	vdi := xapi.NewUUID()
	p, l := sr.Part(owner, vdi), sr.Live(vdi)
	filled(t, r, p, mib, []byte("image"))
	filled(t, r, p.Map(), 4096, []byte("map"))
	wantNames(t, r, p, p.Map())
	must(t, r.Rename(ctx, p.Map(), l.Map()))
	must(t, r.Rename(ctx, p, l))
	must(t, r.Rename(ctx, p.Map(), l.Map()))
	wantNames(t, r, l, l.Map())
	must(t, holds(ctx, r, l, mib, []byte("image")))
	must(t, holds(ctx, r, l.Map(), 4096, []byte("map")))
	filled(t, r, p.Map(), 8192, []byte("another"))
	if err := r.Rename(ctx, p.Map(), l.Map()); !errors.Is(err, os.ErrExist) {
		t.Errorf("rename over another map: %v, want os.ErrExist", err)
	}
	must(t, r.Destroy(ctx, p.Map()))
	must(t, r.Detach(ctx))
	r, err := d.Attach(ctx, c)
	must(t, err)
	defer r.Detach(context.Background())
	wantNames(t, r, l, l.Map())
	must(t, r.Destroy(ctx, l))
	wantNames(t, r, l.Map())
	must(t, r.Destroy(ctx, l.Map()))
	must(t, r.Destroy(ctx, l.Map()))
	wantNames(t, r)
}

package srtest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/sr/memory"
	"github.com/patchd/patchd/pkg/sr/srtest"
	"github.com/patchd/patchd/pkg/sr/xfs"
	"github.com/patchd/patchd/pkg/xapi"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
}

// attached gives an SR of a driver.
func attached(t *testing.T, d sr.Driver, c sr.Config) sr.Repository {
	t.Helper()
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	t.Cleanup(func() { must(t, r.Detach(context.Background())) })
	return r
}

func inMemory(t *testing.T, d *memory.Driver) sr.Repository {
	return attached(t, d, sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"tag": "t"}})
}

// onXFS gives an SR that really clones.
func onXFS(t *testing.T) sr.Repository {
	t.Helper()
	d, err := dom0.New(dom0.Options{CgroupPrefix: fmt.Sprintf("patchd-lies-%d", os.Getpid())})
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	dir := t.TempDir()
	return attached(t, xfs.New(), sr.Config{
		SR: xapi.NewUUID(), Dom0: d, MountDir: filepath.Join(dir, "mnt"),
		Device: map[string]string{"device": filepath.Join(dir, "disk"), "size": "400MiB"},
	})
}

// claims is a repository that says it has other features than it has.
type claims struct {
	sr.Repository
	features []sr.Feature
}

func (c claims) Features() []sr.Feature { return c.features }

func with(r sr.Repository, f ...sr.Feature) claims {
	return claims{r, append(slices.Clone(r.Features()), f...)}
}

func without(r sr.Repository, f sr.Feature) claims {
	return claims{r, slices.DeleteFunc(slices.Clone(r.Features()), func(g sr.Feature) bool { return f == g })}
}

// refusing also refuses what it hides, as an honest driver would.
type refusing struct{ claims }

func (r refusing) Clone(context.Context, sr.Name, sr.Name) (sr.Volume, error) {
	return sr.Volume{}, xapi.NewError(xapi.SROperationNotSupported, "")
}

// cloning clones in a way of its own.
type cloning struct {
	claims
	clone func(ctx context.Context, r sr.Repository, src, dst sr.Name) error
}

func (c cloning) Clone(ctx context.Context, src, dst sr.Name) (sr.Volume, error) {
	return sr.Volume{Name: dst}, c.clone(ctx, c.Repository, src, dst)
}

// copying copies byte by byte.
func copying(ctx context.Context, r sr.Repository, src, dst sr.Name) error {
	from, err := r.Open(ctx, src, sr.ReadOnly)
	if err != nil {
		return err
	}
	defer from.Close()
	b, err := io.ReadAll(from)
	if err != nil {
		return err
	}
	if _, err := r.Create(ctx, dst, int64(len(b))); err != nil {
		return err
	}
	to, err := r.Open(ctx, dst, sr.ReadWrite)
	if err != nil {
		return err
	}
	_, err = to.WriteAt(b, 0)
	return errors.Join(err, to.Close())
}

// sharing gives the same file a second name.
func sharing(ctx context.Context, r sr.Repository, src, dst sr.Name) error {
	path, err := r.Path(ctx, src)
	if err != nil {
		return err
	}
	return os.Link(path, filepath.Join(filepath.Dir(path), dst.String()+".img"))
}

// emptying clones, and takes the source's bytes away.
func emptying(ctx context.Context, r sr.Repository, src, dst sr.Name) error {
	if _, err := r.Clone(ctx, src, dst); err != nil {
		return err
	}
	f, err := r.Open(ctx, src, sr.ReadWrite)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, 4096), 1<<20)
	return errors.Join(err, f.Close())
}

// blank makes an empty volume.
func blank(ctx context.Context, r sr.Repository, _, dst sr.Name) error {
	_, err := r.Create(ctx, dst, 2<<20)
	return err
}

// resizing says that it has resized.
type resizing struct{ claims }

func (resizing) Resize(context.Context, sr.Name, int64) error { return nil }

// A driver that claims what it lacks, or hides what it has, does not pass.
func TestTheSuiteFindsLies(t *testing.T) {
	folder := sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"location": filepath.Join(t.TempDir(), "sr")}}
	clones, plain := onXFS(t), attached(t, &file.Driver{}, folder)
	copies, double := inMemory(t, &memory.Driver{}), inMemory(t, &memory.Driver{Clones: true})
	all := []func(context.Context, sr.Repository) error{srtest.CheckFeatures, srtest.CheckCloneClaim, srtest.CheckResizeClaim, srtest.CheckCloneRoom}
	for name, test := range map[string]struct {
		repo sr.Repository
		want string // "": it is honest
	}{
		"honest, clones":                {clones, ""},
		"honest, does not clone":        {copies, ""},
		"claims VDI_CLONE, cannot":      {with(copies, sr.VDIClone, sr.VDISnapshot), "claims VDI_CLONE but cannot"},
		"claims VDI_CLONE, copies":      {cloning{with(plain, missing(plain)...), copying}, "claims VDI_CLONE but copies"},
		"copies where it could clone":   {cloning{with(clones), copying}, "claims VDI_CLONE but copies"},
		"a double that copies":          {double, "claims VDI_CLONE but copies"},
		"clones that share writes":      {cloning{with(clones), sharing}, "shares writes"},
		"clones that change the source": {cloning{with(clones), emptying}, "changes the source"},
		"clones without bytes":          {cloning{with(clones), blank}, "the clone is wrong"},
		"hides VDI_CLONE, but clones":   {without(without(clones, sr.VDIClone), sr.VDISnapshot), "does not claim"},
		"hides VDI_CLONE, and refuses":  {refusing{without(without(clones, sr.VDIClone), sr.VDISnapshot)}, "hides VDI_CLONE"},
		"claims VDI_SNAPSHOT alone":     {with(copies, sr.VDISnapshot), "VDI_SNAPSHOT"},
		"claims VDI_RESIZE, does not":   {resizing{with(copies)}, "claims VDI_RESIZE but does not"},
		"hides VDI_RESIZE":              {without(copies, sr.VDIResize), "does not claim VDI_RESIZE"},
		"claims what nobody knows":      {with(copies, "VDI_TELEPORT"), "unknown"},
		"claims a feature twice":        {with(copies, sr.VDICreate), "twice"},
	} {
		var found []error
		for _, check := range all {
			found = append(found, check(t.Context(), test.repo))
		}
		err := errors.Join(found...)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
		if list, err := test.repo.Scan(t.Context()); err != nil || len(list) > 0 {
			t.Errorf("%s: the checks left %v, %v", name, list, err)
		}
	}
}

// missing are the features for cloning that r does not have.
func missing(r sr.Repository) []sr.Feature {
	if sr.Has(r.Features(), sr.VDIClone) {
		return nil
	}
	return []sr.Feature{sr.VDIClone, sr.VDISnapshot}
}

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/xfs"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// cloners is an xfs SR with one golden image in it, of which many hosts make
// clones at the same time.
type cloners struct {
	t      *testing.T
	dir    string
	dom0   *dom0.System
	repo   sr.Repository
	golden sr.Name
	own    sr.Owner
}

// newCloners makes the SR and the golden image: a filesystem of 4 GiB with an
// executable of 1 GiB, nearly all of it holes.
func newCloners(t *testing.T) *cloners {
	t.Helper()
	system, err := dom0.New(dom0.Options{CgroupPrefix: fmt.Sprintf("patchd-clones-%d", os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { system.Close() })
	c := &cloners{t: t, dir: t.TempDir(), dom0: system, golden: sr.Live(xapi.NewUUID())}
	c.own = sr.Owner{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Job: xapi.NewUUID()}
	drv := xfs.New()
	cfg := sr.Config{
		SR: xapi.NewUUID(), Dom0: system, MountDir: filepath.Join(c.dir, "mnt"),
		Device: map[string]string{"device": filepath.Join(c.dir, "sr.disk"), "size": "8GiB"},
	}
	if err := drv.Create(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if c.repo, err = drv.Attach(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := errors.Join(c.repo.Destroy(ctx, c.golden), c.repo.Detach(ctx), drv.Destroy(ctx, cfg)); err != nil {
			t.Error(err)
		}
	})
	root := filepath.Join(c.dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\necho \"$1\" >\"${0%/*}/ran\"\nexit\n"
	if err := os.WriteFile(filepath.Join(root, vdi.FileName), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(root, vdi.FileName), gib); err != nil {
		t.Fatal(err)
	}
	if _, err := c.repo.Create(t.Context(), c.golden, 4*gib); err != nil {
		t.Fatal(err)
	}
	path, err := c.repo.Path(t.Context(), c.golden)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", root, path)
	run(t, "sync", "-f", path)
	return c
}

// all makes n clones, mounts them all, runs every one, and takes them away.
func (c *cloners) all(n int) time.Duration {
	c.t.Helper()
	var mounted, done sync.WaitGroup
	errs := make([]error, n)
	mounted.Add(n)
	start := time.Now()
	for i := range n {
		done.Go(func() { errs[i] = c.one(i, &mounted) })
	}
	done.Wait()
	took := time.Since(start)
	if err := errors.Join(errs...); err != nil {
		c.t.Errorf("%d clones: %v", n, err)
	}
	return took
}

// one is the life of a clone. It runs once all the others are mounted, or have failed.
func (c *cloners) one(i int, mounted *sync.WaitGroup) (err error) {
	arrive := sync.OnceFunc(mounted.Done)
	defer arrive()
	ctx := context.Background()
	work, dir := sr.Work(c.own, xapi.NewUUID()), filepath.Join(c.dir, fmt.Sprintf("m%d", i))
	var undo xapi.Undo
	defer func() { err = errors.Join(err, undo.Run(ctx)) }()
	if _, err := c.repo.Clone(ctx, c.golden, work); err != nil {
		return err
	}
	undo.Push("destroy", func(ctx context.Context) error { return c.repo.Destroy(ctx, work) })
	path, err := c.repo.Path(ctx, work)
	if err != nil {
		return err
	}
	dev, err := c.dom0.Attach(ctx, path, false)
	if err != nil {
		return err
	}
	undo.Push("detach", func(context.Context) error { return dev.Close() })
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	undo.Push("remove", func(context.Context) error { return os.Remove(dir) })
	if err := c.dom0.Mount(ctx, dom0.Mount{Source: dev.Path(), Target: dir, Type: "ext4", Options: "errors=remount-ro,noinit_itable"}); err != nil {
		return err
	}
	undo.Push("unmount", func(ctx context.Context) error { return c.dom0.Unmount(ctx, dir) })
	arrive()
	mounted.Wait()
	end, err := c.dom0.Run(ctx, dom0.Cmd{
		Path: filepath.Join(dir, vdi.FileName), Args: []string{fmt.Sprint(i)}, Dir: "/",
		Env: []string{"PATH=/usr/bin:/bin"}, Group: fmt.Sprintf("clone-%d", i),
	})
	if err != nil || end.ExitCode != 0 {
		return fmt.Errorf("clone %d ended with %+v: %w", i, end, err)
	}
	ran, err := os.ReadFile(filepath.Join(dir, "ran"))
	if err == nil && strings.TrimSpace(string(ran)) != fmt.Sprint(i) {
		err = fmt.Errorf("clone %d sees what %q wrote", i, ran)
	}
	return err
}

// A hundred clones of one patch of 1 GiB are mounted and run at the same time;
// nothing is left of them, and the golden image has not changed.
func TestAHundredClonesAtOnce(t *testing.T) {
	c := newCloners(t)
	path, err := c.repo.Path(t.Context(), c.golden)
	if err != nil {
		t.Fatal(err)
	}
	before, room := c.facts(path)
	few := c.all(32)
	many := c.all(100)
	t.Logf("32 clones: %s, 100 clones: %s, ratio %.1f", few.Round(time.Millisecond), many.Round(time.Millisecond), float64(many)/float64(few))
	// A mount namespace that some other process made meanwhile may hold a copy
	// of a mount until that process ends.
	until(t, "the loop devices of the clones to go", func() bool { return len(loopsOf(t, c.dir)) <= 1 })
	after, left := c.facts(path)
	if after != before {
		t.Error("the golden image has changed")
	}
	if left > room+16*mib {
		t.Errorf("the clones took %d bytes, %d are left", room, left)
	}
	volumes, err := c.repo.Scan(t.Context())
	if err != nil || len(volumes) != 1 {
		t.Errorf("left on the SR: %v, %v", volumes, err)
	}
	if mounts := mountsBelow(t, c.dir); len(mounts) != 1 { // the SR itself
		t.Errorf("left mounted: %v", mounts)
	}
	if loops := loopsOf(t, c.dir); len(loops) != 1 {
		t.Errorf("left loop devices: %v", loops)
	}
	groups, err := c.dom0.Groups()
	if err != nil || len(groups) > 0 {
		t.Errorf("left control groups: %v, %v", groups, err)
	}
}

// facts are a digest of what the golden image holds where it is not a hole, and
// the room that is taken on the SR.
func (c *cloners) facts(path string) (sum string, used int64) {
	c.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	m, err := vdi.BuildMap(c.t.Context(), f, 4*gib)
	if err != nil {
		c.t.Fatal(err)
	}
	run(c.t, "sync", "-f", path)
	st, err := c.repo.Stat(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	return m.Digest(), st.PhysicalUtilisation
}

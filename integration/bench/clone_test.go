//go:build bench

package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/xfs"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// cloner is an xfs SR on an image file of its own.
type cloner struct {
	*bench
	dom0 dom0.Dom0
	repo sr.Repository
	own  sr.Owner
}

func (b *bench) cloner(size int64) *cloner {
	b.Helper()
	c := &cloner{bench: b, dom0: b.system(), own: sr.Owner{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Job: xapi.NewUUID()}}
	disk := filepath.Join(b.dir, "xfs.disk")
	f, err := os.Create(disk)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		b.Fatal(err)
	}
	f.Close()
	cfg := sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"device": disk}, Dom0: c.dom0, MountDir: filepath.Join(b.dir, "mnt")}
	drv := xfs.New()
	if err := drv.Create(b.Context(), cfg); err != nil {
		b.Fatal(err)
	}
	if c.repo, err = drv.Attach(b.Context(), cfg); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := c.repo.Detach(context.Background()); err != nil {
			b.Error(err)
		}
	})
	return c
}

// golden makes a live volume with a payload of n bytes.
func (c *cloner) golden(n int64) (live sr.Name, path string) {
	c.Helper()
	live = sr.Live(xapi.NewUUID())
	if _, err := c.repo.Create(c.Context(), live, vdi.Size(n)); err != nil {
		c.Fatal(err)
	}
	path, err := c.repo.Path(c.Context(), live)
	if err != nil {
		c.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		c.Fatal(err)
	}
	c.image(c.dom0, path, n)
	return live, path
}

// cycle clones a golden volume, mounts the clone, runs what is in it, and
// takes all of it away.
func (c *cloner) cycle(live sr.Name, dir, group string) error {
	ctx := context.Background()
	work := sr.Work(c.own, xapi.NewUUID())
	if _, err := c.repo.Clone(ctx, live, work); err != nil {
		return err
	}
	var undo xapi.Undo
	undo.Push("destroy", func(ctx context.Context) error { return c.repo.Destroy(ctx, work) })
	err := func() error {
		path, err := c.repo.Path(ctx, work)
		if err != nil {
			return err
		}
		dev, err := c.dom0.Attach(ctx, path, false)
		if err != nil {
			return err
		}
		undo.Push("detach", func(context.Context) error { return dev.Close() })
		if err := c.dom0.Mount(ctx, dom0.Mount{Source: dev.Path(), Target: dir, Type: "ext4", Options: "errors=remount-ro,noinit_itable"}); err != nil {
			return err
		}
		undo.Push("unmount", func(ctx context.Context) error { return c.dom0.Unmount(ctx, dir) })
		end, err := c.dom0.Run(ctx, dom0.Cmd{Path: filepath.Join(dir, vdi.FileName), Dir: dir, Group: group})
		if err == nil && end.ExitCode != 0 {
			err = fmt.Errorf("exit status %d", end.ExitCode)
		}
		return err
	}()
	if uerr := undo.Run(ctx); err == nil {
		err = uerr
	}
	return err
}

const shellCycle = `set -e
cp --reflink=always "$1" "$1.work"
mount -o loop "$1.work" "$2"
"$2/patch"
umount "$2"
rm "$1.work"`

// benchClone runs the cycle of one clone against the same by shell, and small
// and large images against each other.
func benchClone(b *bench) []row {
	c := b.cloner(20 * gib)
	dir, shellDir := c.folder("ours"), c.folder("shell")
	var medians []float64
	var rows []row
	for _, n := range []int64{gib, 10 * mib, 8 * gib} {
		live, path := c.golden(n)
		r := c.pairs(row{name: "Clone1GiB", what: "clone, loop, mount, run, unmount, destroy; 1 GiB, xfs", baseline: "cp --reflink, mount -o loop, run, umount, rm", target: 0.5},
			func() time.Duration {
				return timed(func() { b.run("sh", "-c", shellCycle, "sh", path, shellDir) })
			},
			func() time.Duration {
				return timed(func() {
					if err := c.cycle(live, dir, "bench"); err != nil {
						b.Fatal(err)
					}
				})
			})
		if n == gib {
			rows = append(rows, r)
		}
		medians = append(medians, float64(median(r.got)))
		if err := c.repo.Destroy(b.Context(), live); err != nil {
			b.Fatal(err)
		}
	}
	lo, hi := min(medians[0], medians[1], medians[2]), max(medians[0], medians[1], medians[2])
	return append(rows, row{name: "CloneBySize", what: "the slowest of 10 MiB, 1 GiB and 8 GiB", baseline: "the fastest of them", target: 2, figures: []float64{hi / lo}})
}

func (b *bench) folder(name string) string {
	b.Helper()
	dir := filepath.Join(b.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	return dir
}

// benchClones runs many cycles at the same time.
func benchClones(b *bench) []row {
	c := b.cloner(6 * gib)
	live, _ := c.golden(gib)
	crowd := func(n int) time.Duration {
		errs := make([]error, n)
		var all sync.WaitGroup
		took := timed(func() {
			for i := range n {
				dir := c.folder(fmt.Sprintf("clone-%d", i))
				all.Go(func() { errs[i] = c.cycle(live, dir, fmt.Sprintf("bench-%d", i)) })
			}
			all.Wait()
		})
		for i, err := range errs {
			if err != nil {
				b.Fatalf("clone %d of %d: %v", i, n, err)
			}
		}
		return took
	}
	r := c.pairs(row{name: "Clones100", what: "100 clones mounted and run at the same time, xfs", baseline: "32 clones", target: 3.5},
		func() time.Duration { return crowd(32) }, func() time.Duration { return crowd(100) })
	if vols, err := c.repo.Scan(b.Context()); err != nil || len(vols) != 1 {
		b.Errorf("after it: %v %v", vols, err)
	}
	return []row{r}
}

// benchApply applies a patch of 1 GiB that always fails in the end, so that it
// can be applied again: the first time its image is read, then no more.
func benchApply(b *bench) []row {
	h := lab.Start(b, lab.Options{Dir: b.dir})
	s := h.Root()
	setDefault(s, b.loopSR(s, "xfs", 8*gib))
	r := row{name: "SecondApply", what: "the second apply of 1 GiB on a local SR", baseline: "the first apply", target: 0.2}
	for range benchRounds {
		p := &lab.Patch{Apply: "exit 1"}
		path := b.signedFile(p, noise(1, gib))
		b.curlPut(h.URL+"/pool_patch_upload", s.Ref, path)
		h.Restart() // nothing is remembered of the upload
		s = h.Root()
		ref := s.Call("pool_patch.get_by_uuid", string(p.UUID))
		apply := func() time.Duration {
			return timed(func() {
				_, err := s.Try("pool_patch.apply", ref, s.Host())
				if !xapi.Is(err, xapi.PatchApplyFailed) {
					b.Fatal(err)
				}
			})
		}
		r.base = append(r.base, apply())
		r.got = append(r.got, apply())
		destroyPatch(s, p)
		os.Remove(path)
	}
	return []row{r}
}

package dom0test_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/dom0/dom0test"
)

// work is a small use of every effect, with its undo.
func work(d dom0.Dom0) (err error) {
	ctx := context.Background()
	dev, err := d.Attach(ctx, "/srv/a.img", true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	m := dom0.Mount{Source: dev.Path(), Target: "/mnt/a", Type: "ext4", ReadOnly: true, Options: "noload"}
	if err := d.Mount(ctx, m); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Unmount(ctx, "/mnt/a")) }()
	if _, err := d.Run(ctx, dom0.Cmd{Path: "/mnt/a/patch", Args: []string{"info"}, Group: "g"}); err != nil {
		return err
	}
	return d.SyncFS(ctx, "/mnt/a")
}

var effects = []dom0test.Call{
	{Op: "attach", What: "/srv/a.img ro"},
	{Op: "mount", What: "ext4 /dev/loop0 on /mnt/a ro,noload"},
	{Op: "run", What: "g: /mnt/a/patch info"},
	{Op: "syncfs", What: "/mnt/a"},
	{Op: "unmount", What: "/mnt/a"},
	{Op: "detach", What: "/dev/loop0"},
}

func TestEffectsAreRecordedInOrder(t *testing.T) {
	d := dom0test.New(nil)
	defer d.Close()
	if err := work(d); err != nil {
		t.Fatal(err)
	}
	if got := d.Calls(); !slices.Equal(got, effects) {
		t.Errorf("%v", got)
	}
	if l := d.Leaks(); l != nil {
		t.Errorf("%v", l)
	}
}

func TestEveryEffectCanFail(t *testing.T) {
	why := errors.New("why")
	for n := range effects {
		d := dom0test.New(nil)
		d.FailAt(n+1, why)
		if err := work(d); !errors.Is(err, why) {
			t.Errorf("effect %d: %v", n+1, err)
		}
		want := 0
		if effects[n].Op == "unmount" {
			want = 2 // the mount and its device
		}
		if l := d.Leaks(); len(l) != want {
			t.Errorf("effect %d leaves %v", n+1, l)
		}
		d.Close()
	}
}

func TestACrashLeavesTheMount(t *testing.T) {
	for name, c := range map[string]struct {
		crash func(d *dom0test.Dom0)
		want  int
	}{
		"before the mount": {func(d *dom0test.Dom0) { d.CrashAt(2) }, 0},
		"after the mount":  {func(d *dom0test.Dom0) { d.CrashAfter(2) }, 2},
		"privately":        {func(d *dom0test.Dom0) { d.Private = true; d.CrashAfter(2) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			d := dom0test.New(nil)
			defer d.Close()
			c.crash(d)
			if err := work(d); !errors.Is(err, dom0test.ErrCrashed) || !d.Crashed() {
				t.Errorf("%v", err)
			}
			if l := d.Leaks(); len(l) != c.want {
				t.Errorf("leaks: %v", l)
			}
			if _, err := d.BootID(); !errors.Is(err, dom0test.ErrCrashed) {
				t.Errorf("a dead process asked: %v", err)
			}
			d.Restart()
			if err := d.Unmount(t.Context(), "/mnt/a"); err != nil {
				t.Error(err)
			}
			if l := d.Leaks(); l != nil {
				t.Errorf("after repair: %v", l)
			}
		})
	}
}

func TestASpawnedProgramOutlivesACrash(t *testing.T) {
	d := dom0test.New(func(ctx context.Context, p *dom0test.Process) dom0.Result {
		<-ctx.Done()
		return dom0.Result{}
	})
	defer d.Close()
	d.CrashAfter(1)
	if _, err := d.Spawn(t.Context(), dom0.Cmd{Path: "/runner", Group: "job"}); !errors.Is(err, dom0test.ErrCrashed) {
		t.Fatal(err)
	}
	d.Restart()
	if alive, err := d.Alive("job"); !alive || err != nil {
		t.Fatalf("%v, %v", alive, err)
	}
	if err := d.Kill(t.Context(), "job", 0); err != nil {
		t.Fatal(err)
	}
	if l := d.Leaks(); l != nil {
		t.Errorf("%v", l)
	}
}

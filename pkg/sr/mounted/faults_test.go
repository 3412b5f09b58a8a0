package mounted_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/ext"
	"github.com/patchd/patchd/pkg/sr/mounted"
	"github.com/patchd/patchd/pkg/sr/xfs"
	"github.com/patchd/patchd/pkg/xapi"
)

var errBroken = errors.New("broken off")

// broken is a machine whose owner dies at the nth point: two for each effect,
// one before it and one after. From then on nothing happens any more.
type broken struct {
	dom0.Dom0
	at    int
	fired bool
}

func (b *broken) point() error {
	if b.at--; b.at < 0 {
		b.fired = true
		return errBroken
	}
	return nil
}

func (b *broken) around(f func() error) error {
	if err := b.point(); err != nil {
		return err
	}
	return errors.Join(f(), b.point())
}

func (b *broken) Kill(ctx context.Context, group string, grace time.Duration) error {
	return b.around(func() error { return b.Dom0.Kill(ctx, group, grace) })
}

func (b *broken) Mount(ctx context.Context, m dom0.Mount) error {
	return b.around(func() error { return b.Dom0.Mount(ctx, m) })
}

func (b *broken) Unmount(ctx context.Context, target string) error {
	return b.around(func() error { return b.Dom0.Unmount(ctx, target) })
}

func (b *broken) Attach(ctx context.Context, image string, readOnly bool) (dev dom0.Device, err error) {
	err = b.around(func() error {
		dev, err = b.Dom0.Attach(ctx, image, readOnly)
		return err
	})
	if err != nil && dev != nil {
		dev.Close()
		dev = nil
	}
	return dev, err
}

func (b *broken) Run(ctx context.Context, c dom0.Cmd) (r dom0.Result, err error) {
	err = b.around(func() error {
		r, err = b.Dom0.Run(ctx, c)
		return err
	})
	return r, err
}

// Create and Destroy broken off at effect 0, 1, 2 … can be repeated, and taken
// back, by the next life of the daemon; nothing is left.
func TestBrokenOffAtEveryEffect(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	ctx := t.Context()
	begun := map[string]func(d *mounted.Driver, c sr.Config) error{
		"create": func(d *mounted.Driver, c sr.Config) error { return d.Create(ctx, c) },
		"attach": func(d *mounted.Driver, c sr.Config) error {
			must(t, d.Create(ctx, with(c, l.dom0)))
			r, err := d.Attach(ctx, c)
			if err == nil {
				err = r.Detach(ctx)
			}
			return err
		},
		"destroy": func(d *mounted.Driver, c sr.Config) error {
			must(t, d.Create(ctx, with(c, l.dom0)))
			return d.Destroy(ctx, c)
		},
	}
	for what, begin := range begun {
		for n := 0; ; n++ {
			b := &broken{Dom0: l.dom0, at: n}
			again, gone := with(l.config("32MiB"), b), with(l.config("32MiB"), b)
			err := begin(ext.New(), again)
			fired := b.fired
			b.at = n
			err = errors.Join(err, begin(ext.New(), gone))
			again, gone = with(again, l.dom0), with(gone, l.dom0)
			next := ext.New()
			must(t, next.Create(ctx, again))
			r, aerr := next.Attach(ctx, again)
			must(t, aerr)
			must(t, r.Detach(ctx))
			must(t, next.Destroy(ctx, again))
			must(t, next.Destroy(ctx, gone))
			if left := l.left(t); len(left) > 0 {
				t.Fatalf("%s broken off at point %d left %v", what, n, left)
			}
			for _, c := range []sr.Config{again, gone} {
				if _, err := os.Stat(image(c)); !os.IsNotExist(err) {
					t.Fatalf("%s broken off at point %d left the image: %v", what, n, err)
				}
			}
			if !fired {
				must(t, err)
				if n < 4 {
					t.Errorf("%s has only %d points", what, n)
				}
				break
			}
			if err == nil {
				t.Errorf("%s broken off at point %d succeeds", what, n)
			}
		}
	}
}

func with(c sr.Config, d dom0.Dom0) sr.Config {
	c.Dom0 = d
	return c
}

// A device that is gone: calls fail with a code and name the SR, the SR can be
// let go of, and is attached again when the device is back.
func TestADeviceThatGoesAway(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]*mounted.Driver{"xfs": xfs.New()} {
		l := newLab(t)
		ctx := t.Context()
		c := l.config("320MiB")
		must(t, d.Create(ctx, c))
		r, err := d.Attach(ctx, c)
		must(t, err)
		n := sr.Live(xapi.NewUUID())
		_, err = r.Create(ctx, n, mib)
		must(t, err)
		must(t, l.dom0.SyncFS(ctx, point(c)))
		kept := image(c) + ".kept"
		run(t, "cp", "--sparse=always", image(c), kept)
		must(t, os.Truncate(image(c), 0))
		for range 500 { // the first ones may be answered from memory
			if _, err = r.Create(ctx, sr.Live(xapi.NewUUID()), mib); err != nil {
				break
			}
		}
		var coded *xapi.Error
		if !errors.As(err, &coded) || !strings.Contains(err.Error(), string(c.SR)) {
			t.Errorf("%s: a device that is gone gives %v", name, err)
		}
		must(t, r.Detach(ctx))
		if _, err := d.Attach(ctx, c); !xapi.Is(err, xapi.SRBackendFailure) || !strings.Contains(err.Error(), string(c.SR)) {
			t.Errorf("%s: attach of an empty device: %v", name, err)
		}
		must(t, os.Rename(kept, image(c)))
		must(t, os.Chmod(image(c), 0o600))
		r, err = d.Attach(ctx, c)
		must(t, err)
		if list, err := r.Scan(ctx); err != nil || len(list) == 0 {
			t.Errorf("%s: after it came back: %v, %v", name, list, err)
		}
		must(t, r.Detach(ctx))
	}
}

package dom0

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
)

// everyEffect uses every effect once and undoes what it did; an undo is tried
// twice, as the next start of a daemon does.
func everyEffect(s *System, image, dir string) (err error) {
	ctx := context.Background()
	undo := func(f func() error) {
		if again := f(); again != nil {
			err = errors.Join(err, again)
			if last := f(); last != nil {
				err = errors.Join(err, fmt.Errorf("left behind: %w", last))
			}
		}
	}
	dev, err := s.Attach(ctx, image, false)
	if err != nil {
		return err
	}
	defer undo(dev.Close)
	if err := s.Mount(ctx, Mount{Source: dev.Path(), Target: dir, Type: "ext4"}); err != nil {
		return err
	}
	defer undo(func() error { return s.Unmount(ctx, dir) })
	if err := s.SyncFS(ctx, dir); err != nil {
		return err
	}
	c := sh("exit 0")
	c.Group = "g"
	if _, err := s.Run(ctx, c); err != nil {
		return err
	}
	defer undo(func() error { return s.Kill(ctx, "g", 0) })
	_, err = s.Spawn(ctx, c)
	return err
}

// helperEffects does it in a process of its own.
func helperEffects(image, dir string) error {
	s, err := New(Options{CgroupPrefix: fmt.Sprintf("patchd-test-%d", os.Getpid())})
	if err != nil {
		return err
	}
	err = everyEffect(s, image, dir)
	if groups, gerr := s.Groups(); gerr != nil || len(groups) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind: %v, %w", groups, gerr))
	}
	return errors.Join(err, s.Close())
}

func TestEveryEffectInARow(t *testing.T) {
	s := newSystem(t, Options{})
	if err := everyEffect(s, newImage(t, nil), t.TempDir()); err != nil {
		t.Error(err)
	}
}

package dom0

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// shimPatience bounds the wait for what the shim has to say.
const shimPatience = 30 * time.Second

// Spawn implements Dom0. It returns when the program has begun, or with a
// *StartError. While this process lives it reaps the child; the control group
// stays until Kill.
func (s *System) Spawn(ctx context.Context, c Cmd) (pid int, err error) {
	if err := c.ValidateSpawn(); err != nil {
		return 0, err
	}
	if _, ok := c.Stdin.(*os.File); c.Stdin != nil && !ok {
		return 0, fmt.Errorf("spawn %s: stdin is not a file", c.Path)
	}
	for _, w := range []io.Writer{c.Stdout, c.Stderr} {
		if _, ok := w.(*os.File); w != nil && !ok {
			return 0, fmt.Errorf("spawn %s: output is not a file", c.Path)
		}
	}
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	err = effect("spawn", func() (err error) {
		pid, err = s.spawn(c)
		return err
	}, func() { s.kill(context.Background(), c.Group, 0) })
	if err != nil {
		return 0, err
	}
	return pid, nil
}

func (s *System) spawn(c Cmd) (int, error) {
	e, release, err := s.openGroup(c)
	if err != nil {
		return 0, err
	}
	io, err := openStreams(c)
	if err != nil {
		e.close()
		return 0, errors.Join(err, release())
	}
	p, err := s.start(c, e, io.child)
	e.close()
	io.closeChild()
	if err != nil {
		return 0, errors.Join(err, release())
	}
	if err := s.adopt(p); err != nil {
		unix.Kill(p.pid, unix.SIGKILL)
		p.shim.closeParent()
		return 0, errors.Join(err, killGroup(s.groups, c.Group), release())
	}
	if err := p.begun(c.Path); err != nil {
		return 0, errors.Join(err, killGroup(s.groups, c.Group), release())
	}
	s.mu.Lock()
	delete(s.busy, c.Group) // from here on the group speaks for itself
	s.mu.Unlock()
	return p.pid, nil
}

// begun waits until the shim has become the program.
func (p *process) begun(path string) error {
	if p.shim == nil {
		return nil
	}
	said, err := p.shim.read(time.Now().Add(shimPatience))
	p.shim.closeParent()
	if err != nil {
		return fmt.Errorf("spawn %s: %w", path, err)
	}
	if said.Failed {
		return said.failure(path)
	}
	return nil
}

// adopt lets a goroutine reap the child, until Close.
func (s *System) adopt(p *process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		p.abandon()
		return errors.New("spawn: this System is closed")
	}
	s.reapers[p] = struct{}{}
	s.wg.Go(func() {
		p.wait()
		s.mu.Lock()
		delete(s.reapers, p)
		s.mu.Unlock()
	})
	return nil
}

// Alive implements Dom0.
func (s *System) Alive(group string) (bool, error) {
	if err := ValidateGroup(group); err != nil {
		return false, err
	}
	if s.groups == nil {
		return false, ErrNoGroups
	}
	return s.groups.alive(group)
}

// Kill implements Dom0. When ctx ends during the grace, the grace is over.
func (s *System) Kill(ctx context.Context, group string, grace time.Duration) error {
	if err := ValidateGroup(group); err != nil {
		return err
	}
	if s.groups == nil {
		return ErrNoGroups
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return effect("kill", func() error { return s.kill(ctx, group, grace) }, nil)
}

func (s *System) kill(ctx context.Context, group string, grace time.Duration) error {
	if err := stopGroup(ctx, s.groups, group, grace); err != nil {
		return err
	}
	return s.removeGroup(group)
}

// WaitEmpty implements Dom0.
func (s *System) WaitEmpty(ctx context.Context, group string) error {
	if err := ValidateGroup(group); err != nil {
		return err
	}
	if s.groups == nil {
		return ErrNoGroups
	}
	return s.groups.wait(ctx, group)
}

// Groups implements Dom0.
func (s *System) Groups() ([]string, error) {
	if s.groups == nil {
		return nil, nil
	}
	return s.groups.list()
}

package dom0

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Run implements Dom0. When ctx ends, the program is ended as by a timeout,
// and the cause of ctx is the error. A *StartError tells that it did not start.
func (s *System) Run(ctx context.Context, c Cmd) (Result, error) {
	if err := c.Validate(); err != nil {
		return Result{}, err
	}
	if err := context.Cause(ctx); err != nil {
		return Result{}, err
	}
	var r Result
	err := effect("run", func() (err error) {
		r, err = s.run(ctx, c)
		return err
	}, nil)
	return r, err
}

func (s *System) run(ctx context.Context, c Cmd) (r Result, err error) {
	if c.Sandbox != nil {
		c.Group = s.sandboxGroup(c.Group)
	}
	e, release, err := s.openGroup(c)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, release()) }()
	io, err := openStreams(c)
	if err != nil {
		e.close()
		return Result{}, err
	}
	p, err := s.start(c, e, io.child)
	e.close()
	io.closeChild()
	if err != nil {
		io.abort()
		return Result{}, err
	}
	go p.wait() // awaited below, by ended
	io.pump()
	timedOut, err := s.supervise(ctx, p, c)
	left, killErr := s.finish(p, c)
	if io.drain(s.patience) {
		s.log.WithField("program", c.Path).Warn("A process outside of the control group still holds the output; it is no longer read")
	}
	r, resErr := p.outcome(c.Path)
	r.TimedOut = timedOut
	r.Straggler = r.Straggler || left
	return r, errors.Join(err, killErr, resErr)
}

// settleTime is what children get to end by themselves after the program:
// what reads its last output through a pipe ends a moment later.
const settleTime = 200 * time.Millisecond

// supervise waits for the end of the program, and brings it about when time is
// up or ctx ends.
func (s *System) supervise(ctx context.Context, p *process, c Cmd) (timedOut bool, err error) {
	var timeout <-chan time.Time
	if c.Timeout > 0 {
		t := time.NewTimer(c.Timeout)
		defer t.Stop()
		timeout = t.C
	}
	select {
	case <-p.ended:
		return false, nil
	case <-timeout:
		timedOut = true
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return timedOut, errors.Join(err, s.end(p, c))
}

// end ends the program by TERM, then after Grace by KILL.
func (s *System) end(p *process, c Cmd) error {
	if g := s.groupsFor(c); g != nil {
		return stopGroup(context.Background(), g, c.Group, c.Grace)
	}
	if c.Grace > 0 && unix.Kill(-p.pid, unix.SIGTERM) == nil {
		t := time.NewTimer(c.Grace)
		defer t.Stop()
		select {
		case <-p.ended:
			return nil
		case <-t.C:
		}
	}
	return ignoreGone(unix.Kill(-p.pid, unix.SIGKILL))
}

// finish waits for the process itself, which has ended or was killed, and
// kills what it left behind in the group.
func (s *System) finish(p *process, c Cmd) (left bool, err error) {
	t := time.NewTimer(killPatience)
	defer t.Stop()
	select {
	case <-p.ended:
	case <-t.C:
		p.abandon()
		<-p.ended
	}
	g := s.groupsFor(c)
	if g == nil {
		return false, nil
	}
	limit, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	err = g.wait(limit, c.Group)
	if !errors.Is(err, context.DeadlineExceeded) {
		return false, err
	}
	return true, killGroup(g, c.Group)
}

// outcome puts together what the kernel and the shim said.
func (p *process) outcome(path string) (Result, error) {
	if p.lost != nil {
		p.shim.closeParent()
		return Result{ExitCode: -1}, fmt.Errorf("run %s: the end was not learned: %w", path, p.lost)
	}
	r := p.result()
	if p.shim == nil {
		return r, nil
	}
	said, err := p.shim.read(time.Now().Add(shimPatience))
	p.shim.closeParent()
	if err != nil {
		return r, fmt.Errorf("run %s: %w", path, err)
	}
	if said.Failed {
		return Result{}, said.failure(path)
	}
	if said.Ended {
		r = Result{ExitCode: said.ExitCode, Signal: said.Signal, Straggler: said.Straggler}
	}
	return r, nil
}

// groupsFor gives the hierarchy that c's group lives in, or nil when it runs
// in none.
func (s *System) groupsFor(c Cmd) hierarchy {
	if c.Group == "" || s.groups == nil {
		return nil
	}
	return s.groups
}

// sandboxGroup names a group for a sandbox that was not given one. Without any
// hierarchy its process namespace has to do.
func (s *System) sandboxGroup(given string) string {
	if s.groups == nil {
		return ""
	}
	if given != "" {
		return given
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serial++
	return fmt.Sprintf("sandbox-%d-%d", os.Getpid(), s.serial)
}

// openGroup makes the group of c, which must not be in use. release removes it
// when it is empty.
func (s *System) openGroup(c Cmd) (e entry, release func() error, err error) {
	nothing := func() error { return nil }
	if c.Group == "" {
		return entry{}, nothing, nil
	}
	if s.groups == nil {
		return entry{}, nil, ErrNoGroups
	}
	s.mu.Lock()
	taken := s.busy[c.Group]
	s.busy[c.Group] = true
	s.mu.Unlock()
	if taken {
		return entry{}, nil, fmt.Errorf("group %s: %w", c.Group, ErrGroupBusy)
	}
	free := func() {
		s.mu.Lock()
		delete(s.busy, c.Group)
		s.mu.Unlock()
	}
	if err := s.freshGroup(c.Group); err != nil {
		free()
		return entry{}, nil, err
	}
	release = func() error {
		defer free()
		return s.removeGroup(c.Group)
	}
	if e, err = s.groups.entry(c.Group); err != nil {
		return entry{}, nil, errors.Join(err, release())
	}
	if c.Sandbox != nil {
		e.bounded = s.boundGroup(c.Group, &e)
	}
	return e, release, nil
}

// boundGroup limits the group of a sandbox by what controllers there are, and
// tells whether the number of its processes is bounded.
func (s *System) boundGroup(group string, e *entry) bool {
	if u, ok := s.groups.(*unified); ok && u.limit(group, sandboxGroupMemory, sandboxGroupPids) {
		return true
	}
	if s.pids == nil || os.MkdirAll(s.pids.of(group), 0o755) != nil {
		return false
	}
	dir := s.pids.of(group)
	if writeControl(filepath.Join(dir, "pids.max"), strconv.Itoa(sandboxGroupPids)) != nil {
		return false
	}
	// Only the thread that starts the program joins, and the program with it:
	// a bomb must not keep the runtime of process 1 from making threads.
	e.join = append(e.join, filepath.Join(dir, "tasks"))
	return true
}

// removeGroup removes a group from every hierarchy it was made in.
func (s *System) removeGroup(group string) error {
	err := s.groups.remove(group)
	if s.pids != nil {
		err = errors.Join(err, s.pids.remove(group))
	}
	return err
}

// freshGroup creates a group; an empty one that was left over is replaced.
func (s *System) freshGroup(group string) error {
	alive, err := s.groups.alive(group)
	if err != nil {
		return err
	}
	if alive {
		return fmt.Errorf("group %s: %w", group, ErrGroupBusy)
	}
	err = s.groups.create(group)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := s.removeGroup(group); err != nil {
		return err
	}
	return s.groups.create(group)
}

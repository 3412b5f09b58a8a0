package dom0test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
)

// Run implements dom0.Dom0. A Program that returns after TERM gives its own
// Result, one that was killed did not: signal 9.
func (d *Dom0) Run(ctx context.Context, c dom0.Cmd) (dom0.Result, error) {
	if err := c.Validate(); err != nil {
		return dom0.Result{}, err
	}
	var p *Process
	var result dom0.Result
	err := d.effect(ctx, Call{"run", describe(c)}, func() (err error) {
		p, err = d.begin(c, &result)
		return err
	})
	if p == nil {
		return dom0.Result{}, err
	}
	if err != nil { // crashed: the program goes on without us
		return dom0.Result{}, err
	}
	killed, timedOut, err := d.supervise(ctx, p)
	d.forget(c.Group)
	if killed {
		return dom0.Result{ExitCode: -1, Signal: int(syscall.SIGKILL), TimedOut: timedOut}, err
	}
	result.TimedOut = timedOut
	return result, err
}

// supervise waits for the end of p or brings it about.
func (d *Dom0) supervise(ctx context.Context, p *Process) (killed, timedOut bool, err error) {
	var timeout <-chan time.Time
	if p.Timeout > 0 {
		t := time.NewTimer(p.Timeout)
		defer t.Stop()
		timeout = t.C
	}
	select {
	case <-p.done:
		return false, false, nil
	case <-timeout:
		timedOut = true
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return d.end(p, p.Grace), timedOut, err
}

// end is TERM, then after grace KILL; it tells whether KILL was needed.
func (d *Dom0) end(p *Process, grace time.Duration) (killed bool) {
	if grace > 0 {
		p.term(ErrTerminated)
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-p.done:
			return false
		case <-t.C:
		}
	}
	p.kill()
	p.term(ErrTerminated)
	<-p.done
	return true
}

// Spawn implements dom0.Dom0. The group stays until Kill, as in reality.
func (d *Dom0) Spawn(ctx context.Context, c dom0.Cmd) (int, error) {
	if err := c.ValidateSpawn(); err != nil {
		return 0, err
	}
	for _, s := range []any{c.Stdin, c.Stdout, c.Stderr} {
		if _, ok := s.(*os.File); s != nil && !ok {
			return 0, fmt.Errorf("spawn %s: %T is not a file", c.Path, s)
		}
	}
	var p *Process
	err := d.effect(ctx, Call{"spawn", describe(c)}, func() (err error) {
		p, err = d.begin(c, new(dom0.Result))
		return err
	})
	if err != nil {
		return 0, err
	}
	return p.PID, nil
}

// begin starts the Program in a goroutine. d.mu is held.
func (d *Dom0) begin(c dom0.Cmd, result *dom0.Result) (*Process, error) {
	if len(d.groups[c.Group]) > 0 {
		return nil, fmt.Errorf("group %s: %w", c.Group, dom0.ErrGroupBusy)
	}
	d.pid++
	killed := make(chan struct{})
	ctx, term := context.WithCancelCause(context.Background())
	p := &Process{
		Cmd: complete(c), PID: 1000 + d.pid, Killed: killed, term: term, done: make(chan struct{}),
		kill: sync.OnceFunc(func() { close(killed) }),
	}
	if c.Group != "" {
		d.groups[c.Group] = []*Process{p}
	}
	d.wg.Go(func() {
		*result = d.program(ctx, p)
		term(nil)
		d.leave(p)
		close(p.done)
	})
	return p, nil
}

// leave takes a process that has ended out of its group.
func (d *Dom0) leave(p *Process) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ps, ok := d.groups[p.Group]; ok {
		d.groups[p.Group] = slices.DeleteFunc(ps, func(o *Process) bool { return o == p })
	}
	d.signal()
}

// forget removes a group.
func (d *Dom0) forget(group string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.groups, group)
	d.signal()
}

// Alive implements dom0.Dom0.
func (d *Dom0) Alive(group string) (alive bool, err error) {
	if err := dom0.ValidateGroup(group); err != nil {
		return false, err
	}
	err = d.query(func() error {
		alive = len(d.groups[group]) > 0
		return nil
	})
	return alive, err
}

// Kill implements dom0.Dom0.
func (d *Dom0) Kill(ctx context.Context, group string, grace time.Duration) error {
	if err := dom0.ValidateGroup(group); err != nil {
		return err
	}
	var victims []*Process
	err := d.effect(ctx, Call{"kill", fmt.Sprintf("%s after %v", group, grace)}, func() error {
		victims = slices.Clone(d.groups[group])
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range victims {
		d.end(p, grace)
	}
	d.forget(group)
	return nil
}

// WaitEmpty implements dom0.Dom0.
func (d *Dom0) WaitEmpty(ctx context.Context, group string) error {
	if err := dom0.ValidateGroup(group); err != nil {
		return err
	}
	for {
		var changed chan struct{}
		empty := false
		err := d.query(func() error {
			changed, empty = d.changed, len(d.groups[group]) == 0
			return nil
		})
		if err != nil || empty {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Groups implements dom0.Dom0.
func (d *Dom0) Groups() (names []string, err error) {
	err = d.query(func() error {
		for g := range d.groups {
			names = append(names, g)
		}
		return nil
	})
	slices.Sort(names)
	return names, err
}

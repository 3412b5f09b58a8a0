package nfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// maxCalls is how many calls run on one mount at a time, and so the most that
// can be left behind.
const maxCalls = 8

// graceAfterCancel is what a call still gets when its context has ended: on a
// server that answers it ends by itself, and nothing is left behind.
const graceAfterCancel = 2 * time.Second

// gate lets calls through to one mount, each for a limited time.
type gate struct {
	slots chan struct{} // one per running call

	mu    sync.Mutex
	what  func() string // the SR, for errors
	limit time.Duration
	stuck int       // calls that were left behind and still run
	since time.Time // when the first of those was left behind
}

func newGate(what func() string, limit time.Duration) *gate {
	return &gate{what: what, limit: limit, slots: make(chan struct{}, maxCalls)}
}

// set gives the gate another name and another limit.
func (g *gate) set(what func() string, limit time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.what, g.limit = what, limit
}

func (g *gate) name() string {
	g.mu.Lock()
	what := g.what
	g.mu.Unlock()
	return what()
}

func (g *gate) patience() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.limit
}

// hung tells whether a call that was left behind still runs.
func (g *gate) hung() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stuck > 0
}

// silent is the error about a server that does not answer. It holds
// errors.Is(err, os.ErrDeadlineExceeded).
func (g *gate) silent(verb, what string) error {
	text := fmt.Sprintf("%s: %s: the server does not answer: %s", g.name(), verb, what)
	return xapi.NewError(xapi.SRBackendFailure, "1", "", text).Because(os.ErrDeadlineExceeded)
}

// refuse gives the error of a call that need not be tried.
func (g *gate) refuse(verb string) error {
	g.mu.Lock()
	stuck, since := g.stuck, g.since
	g.mu.Unlock()
	if stuck == 0 {
		return nil
	}
	return g.silent(verb, fmt.Sprintf("%d earlier calls wait for it, since %s", stuck, since.UTC().Format(time.RFC3339)))
}

// outcome is what a call gives.
type outcome[T any] struct {
	value T
	err   error
}

// call makes f and waits for it as long as the gate allows. When that is over
// f's context ends, the call is left behind, and late gets what it gives if it
// succeeds after all. f must end when what it waits for in the kernel does.
func call[T any](ctx context.Context, g *gate, verb string, f func(context.Context) (T, error), late func(T)) (v T, err error) {
	if err := sr.Alive(ctx); err != nil {
		return v, err
	}
	if err := g.refuse(verb); err != nil {
		return v, err
	}
	timer := time.NewTimer(g.patience())
	defer timer.Stop()
	select {
	case g.slots <- struct{}{}:
	case <-ctx.Done():
		return v, context.Cause(ctx)
	case <-timer.C:
		return v, g.silent(verb, fmt.Sprintf("no turn within %s", g.patience()))
	}
	if err := g.refuse(verb); err != nil {
		<-g.slots
		return v, err
	}
	c := start(ctx, g, f, late)
	select {
	case o := <-c.done:
		return o.value, g.worded(ctx, verb, o.err)
	case <-timer.C:
	case <-ctx.Done():
		grace := time.NewTimer(graceAfterCancel)
		defer grace.Stop()
		select {
		case o := <-c.done:
			return o.value, g.worded(ctx, verb, o.err)
		case <-timer.C:
		case <-grace.C:
		}
	}
	if o, ended := c.leave(); ended {
		return o.value, g.worded(ctx, verb, o.err)
	}
	if err := sr.Alive(ctx); err != nil {
		return v, err
	}
	return v, g.silent(verb, fmt.Sprintf("not within %s", g.patience()))
}

// running is a call that is on its way.
type running[T any] struct {
	gate   *gate
	done   chan outcome[T] // holds one
	cancel context.CancelCauseFunc
	left   bool // behind; guarded by gate.mu
}

func start[T any](ctx context.Context, g *gate, f func(context.Context) (T, error), late func(T)) *running[T] {
	inner, cancel := context.WithCancelCause(ctx)
	c := &running[T]{gate: g, done: make(chan outcome[T], 1), cancel: cancel}
	go func() {
		v, err := f(inner)
		g.mu.Lock()
		left := c.left
		if !left {
			c.done <- outcome[T]{v, err}
		}
		g.mu.Unlock()
		if left && err == nil && late != nil {
			late(v)
		}
		if left {
			g.mu.Lock()
			g.stuck--
			g.mu.Unlock()
		}
		cancel(nil)
		<-g.slots
	}()
	return c
}

// leave leaves the call behind, unless it ended just now.
func (c *running[T]) leave() (o outcome[T], ended bool) {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	select {
	case o = <-c.done:
		return o, true
	default:
	}
	c.left = true
	if c.gate.stuck++; c.gate.stuck == 1 {
		c.gate.since = time.Now()
	}
	c.cancel(os.ErrDeadlineExceeded)
	return o, false
}

// do is call for what gives nothing.
func (g *gate) do(ctx context.Context, verb string, f func(context.Context) error) error {
	_, err := call(ctx, g, verb, func(ctx context.Context) (struct{}, error) { return struct{}{}, f(ctx) }, nil)
	return err
}

// worded names the SR in the errors by which the kernel says that the server
// did not answer, or knows the files no more.
func (g *gate) worded(ctx context.Context, verb string, err error) error {
	if err == nil || sr.Alive(ctx) != nil && errors.Is(err, sr.Alive(ctx)) {
		return err
	}
	for _, gone := range []unix.Errno{unix.ETIMEDOUT, unix.EIO, unix.ESTALE, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ECONNREFUSED, unix.ESHUTDOWN, unix.EREMOTEIO} {
		if errors.Is(err, gone) {
			return xapi.NewError(xapi.SRBackendFailure, "1", "", fmt.Sprintf("%s: %s: %v", g.name(), verb, gone)).Because(err)
		}
	}
	var known *xapi.Error
	if errors.As(err, &known) || errors.Is(err, os.ErrExist) {
		return err
	}
	return sr.BackendFailure("%s: %s: %w", g.name(), verb, err)
}

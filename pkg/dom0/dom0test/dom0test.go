// Package dom0test is dom0.Dom0 in memory. It keeps what the real one keeps —
// devices, mounts, groups of processes — so that a leak shows, records every
// effect as a value that a test can compare, and can fail or crash at effect n.
//
// # Programs
//
// A Program plays whatever Run and Spawn start:
//
//	d := dom0test.New(func(ctx context.Context, p *dom0test.Process) dom0.Result {
//		fmt.Fprint(p.Stdout, "<info …/>")
//		return dom0.Result{}
//	})
//	defer d.Close()
//
// # Crashes
//
// Effects are counted from 1. After CrashAt or CrashAfter strikes, every call
// answers ErrCrashed, as the caller is dead: its undo must not be able to do
// anything. Restart begins a new life on the same machine: spawned processes
// still run, mounts are still there.
//
//	for n := 1; ; n++ {
//		d := dom0test.New(program)
//		d.CrashAt(n)
//		err := work(d)
//		if !d.Crashed() {
//			break // every effect had its turn
//		}
//		d.Restart()
//		repair(d)
//		if l := d.Leaks(); len(l) > 0 { … }
//	}
package dom0test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/patchd/patchd/pkg/dom0"
)

// ErrCrashed is the answer of every call after a crash.
var ErrCrashed = errors.New("dom0test: the process that called is dead")

// ErrTerminated is the cause with which the context of a Program ends on TERM.
var ErrTerminated = errors.New("dom0test: terminated")

// Call is one effect. Op is the name of its fault point without "dom0.", or
// "detach" for Device.Close. What says on what, as one line:
//
//	attach  /srv/a.img rw
//	mount   ext4 /dev/loop0 on /mnt/a ro,noload
//	run     patch-1: /mnt/a/patch apply
//	run     sandbox-1: /patch info in /srv/a.img
//	spawn   job-1: /usr/bin/patchd runner 1 (private mounts)
//	kill    job-1 after 5s
type Call struct{ Op, What string }

// String is Op and What.
func (c Call) String() string { return c.Op + " " + c.What }

// Program plays a program. ctx ends on TERM, with the cause ErrTerminated. A
// program that will not listen waits for p.Killed, and must return then.
type Program func(ctx context.Context, p *Process) dom0.Result

// Process is what a Program is given: the Cmd, with Stdin, Stdout and Stderr
// never nil.
type Process struct {
	dom0.Cmd
	PID    int
	Killed <-chan struct{} // closed by KILL

	term context.CancelCauseFunc
	kill func()
	done chan struct{}
}

// Dom0 is the fake. Set its fields before the first call.
type Dom0 struct {
	// Exists tells which images there are. Nil: all.
	Exists func(image string) bool
	// Private says that the caller lives in a mount namespace of its own:
	// its mounts vanish when it crashes.
	Private bool
	// Room is the answer of Space. The zero value: 1 TiB, all of it free.
	Room func(path string) (dom0.Space, error)
	// Boot is the answer of BootID.
	Boot string

	program Program

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when a group changes
	calls   []Call
	rules   rules
	devices []*device
	mounts  []dom0.Mount
	groups  map[string][]*Process
	pid     int
	wg      sync.WaitGroup
}

var _ dom0.Dom0 = (*Dom0)(nil)

// rules say which effect goes wrong.
type rules struct {
	failAt    map[int]error
	failOn    map[string]error
	crashAt   int
	after     bool
	crashed   bool
	beforeAll func(Call)
}

// New makes a machine on which nothing is attached, mounted or running.
// program may be nil: then everything that runs succeeds and says nothing.
func New(program Program) *Dom0 {
	if program == nil {
		program = func(context.Context, *Process) dom0.Result { return dom0.Result{} }
	}
	return &Dom0{
		program: program,
		changed: make(chan struct{}),
		groups:  map[string][]*Process{},
		rules:   rules{failAt: map[int]error{}, failOn: map[string]error{}},
		Boot:    "5a1de000-0000-4000-8000-000000000001",
	}
}

// FailAt makes effect n, counted from 1, fail with err and do nothing.
func (d *Dom0) FailAt(n int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules.failAt[n] = err
}

// FailOn makes every effect op fail with err, until err is nil.
func (d *Dom0) FailOn(op string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules.failOn[op] = err
}

// CrashAt kills the caller instead of effect n, counted from 1.
func (d *Dom0) CrashAt(n int) { d.crash(n, false) }

// CrashAfter kills the caller when effect n has happened, and before it learns so.
func (d *Dom0) CrashAfter(n int) { d.crash(n, true) }

func (d *Dom0) crash(n int, after bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules.crashAt, d.rules.after = n, after
}

// Before calls f ahead of every effect, so that a test can look at other state
// at that moment. f must not call d.
func (d *Dom0) Before(f func(Call)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules.beforeAll = f
}

// Crashed tells whether the crash has struck.
func (d *Dom0) Crashed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.rules.crashed
}

// Restart lets calls work again, as after the start of a new process on the
// same machine. Nothing fails any more; counting and recording go on.
func (d *Dom0) Restart() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules = rules{failAt: map[int]error{}, failOn: map[string]error{}, beforeAll: d.rules.beforeAll}
}

// Calls gives the effects so far, those that failed included, in order.
func (d *Dom0) Calls() []Call {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

// Ops gives the names of the effects so far.
func (d *Dom0) Ops() []string {
	var ops []string
	for _, c := range d.Calls() {
		ops = append(ops, c.Op)
	}
	return ops
}

// Leaks names what is still attached, mounted, or in a group.
func (d *Dom0) Leaks() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []string
	for _, dev := range d.devices {
		all = append(all, fmt.Sprintf("device %s of %s", dev.path, dev.image))
	}
	for _, m := range d.mounts {
		all = append(all, fmt.Sprintf("mount of %s on %s", m.Source, m.Target))
	}
	for g, ps := range d.groups {
		all = append(all, fmt.Sprintf("group %s with %d processes", g, len(ps)))
	}
	slices.Sort(all)
	return all
}

// Mounted gives what is mounted on target.
func (d *Dom0) Mounted(target string) (dom0.Mount, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range slices.Backward(d.mounts) {
		if m.Target == target {
			return m, true
		}
	}
	return dom0.Mount{}, false
}

// ImageOf gives the image behind an attached device, or behind what is mounted
// on a target.
func (d *Dom0) ImageOf(path string) (string, bool) {
	if m, ok := d.Mounted(path); ok {
		path = m.Source
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, dev := range d.devices {
		if dev.path == path {
			return dev.image, true
		}
	}
	return "", false
}

// Close kills every process that still runs and waits for the Programs.
func (d *Dom0) Close() {
	d.mu.Lock()
	for _, ps := range d.groups {
		for _, p := range ps {
			p.term(ErrTerminated)
			p.kill()
		}
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// effect records one call and does it as the rules allow. d.mu is held while f runs.
func (d *Dom0) effect(ctx context.Context, c Call, f func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.rules.crashed {
		return ErrCrashed
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if d.rules.beforeAll != nil {
		d.rules.beforeAll(c)
	}
	d.calls = append(d.calls, c)
	n := len(d.calls)
	if n == d.rules.crashAt && !d.rules.after {
		d.die()
		return ErrCrashed
	}
	err := d.rules.failAt[n]
	if err == nil {
		err = d.rules.failOn[c.Op]
	}
	if err == nil {
		err = f()
	}
	if n == d.rules.crashAt {
		d.die()
		return ErrCrashed
	}
	return err
}

// die is kill -9 of the caller: its descriptors close.
func (d *Dom0) die() {
	d.rules.crashed = true
	if d.Private {
		d.mounts = nil
	}
	for _, dev := range d.devices {
		dev.open = false
	}
	d.autoclear()
}

// query is a call that changes nothing.
func (d *Dom0) query(f func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.rules.crashed {
		return ErrCrashed
	}
	return f()
}

// signal wakes whoever waits for a group. d.mu is held.
func (d *Dom0) signal() {
	close(d.changed)
	d.changed = make(chan struct{})
}

func describe(c dom0.Cmd) string {
	var b strings.Builder
	if c.Group != "" {
		fmt.Fprintf(&b, "%s: ", c.Group)
	}
	b.WriteString(strings.Join(append([]string{c.Path}, c.Args...), " "))
	if c.Sandbox != nil {
		fmt.Fprintf(&b, " in %s", c.Sandbox.Image)
	}
	if c.PrivateMounts {
		b.WriteString(" (private mounts)")
	}
	return b.String()
}

// complete gives c streams that are never nil.
func complete(c dom0.Cmd) dom0.Cmd {
	if c.Stdin == nil {
		c.Stdin = strings.NewReader("")
	}
	if c.Stdout == nil {
		c.Stdout = io.Discard
	}
	if c.Stderr == nil {
		c.Stderr = io.Discard
	}
	return c
}

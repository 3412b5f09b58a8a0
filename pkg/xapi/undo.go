package xapi

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Undo is a stack of steps that take back what was done. Push right after
// each success; on failure call Run, on success Keep.
//
//	var undo xapi.Undo
//	defer func() { err = undo.Close(ctx, err) }()
//	id, err := sr.Create(ctx, …)
//	if err != nil { return err }
//	undo.Push("destroy vdi", func(ctx context.Context) error { return sr.Destroy(ctx, id) })
//
// An Undo is used by one goroutine.
type Undo struct {
	steps []undoStep
}

type undoStep struct {
	name string
	f    func(context.Context) error
}

// undoTimeout bounds one whole run of the stack: undoing happens under its own
// context, for the one of the operation may be cancelled already.
const undoTimeout = 60 * time.Second

// Push adds a step; steps run last in, first out.
func (u *Undo) Push(name string, f func(context.Context) error) {
	u.steps = append(u.steps, undoStep{name, f})
}

// Keep forgets every step: the operation has succeeded.
func (u *Undo) Keep() { u.steps = nil }

// Run takes every step back, whatever fails on the way, and joins the
// failures. A second Run does nothing.
func (u *Undo) Run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	var errs []error
	for len(u.steps) > 0 {
		s := u.steps[len(u.steps)-1]
		u.steps = u.steps[:len(u.steps)-1]
		if err := s.f(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", s.name, err))
		}
	}
	return errors.Join(errs...)
}

// Close ends an operation: with err nil the stack is kept, else it is run and
// what failed while undoing is joined to err. The code of err stays the first.
func (u *Undo) Close(ctx context.Context, err error) error {
	if err == nil {
		u.Keep()
		return nil
	}
	if uerr := u.Run(ctx); uerr != nil {
		return errors.Join(err, uerr)
	}
	return err
}

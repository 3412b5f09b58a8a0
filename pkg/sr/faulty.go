package sr

import (
	"context"
	"os"

	"github.com/patchd/patchd/pkg/fault"
)

// FaultyAt is r with a point before and after every call that has an effect:
// "sr.create", "sr.create.done" and so on. An error of a point before the call
// stands for a call that was never made, of one after it for an answer that was
// lost: the effect has happened.
func FaultyAt(r Repository, point func(name string) error) Repository {
	return &faulty{Repository: r, point: point}
}

// FaultyDriver is d with a fault.Point, empty in a release build, at "sr.make", "sr.attach" and
// "sr.remove" (Create, Attach and Destroy of an SR), and at the effects of its repositories.
func FaultyDriver(d Driver) Driver { return FaultyDriverAt(d, fault.Point) }

// FaultyDriverAt is FaultyDriver with a point function of one's own.
func FaultyDriverAt(d Driver, point func(name string) error) Driver {
	return &faultyDriver{Driver: d, point: point}
}

type faulty struct {
	Repository
	point func(string) error
}

var _ Repository = (*faulty)(nil)

type faultyDriver struct {
	Driver
	point func(string) error
}

var _ Driver = (*faultyDriver)(nil)

// around makes the call between its two points.
func around[T any](point func(string) error, name string, call func() (T, error)) (T, error) {
	var none T
	if err := point("sr." + name); err != nil {
		return none, err
	}
	v, err := call()
	if err != nil {
		return v, err
	}
	return v, point("sr." + name + ".done")
}

func (f *faulty) around(name string, call func() error) error {
	_, err := around(f.point, name, func() (struct{}, error) { return struct{}{}, call() })
	return err
}

// Create is Repository.Create between its points.
func (f *faulty) Create(ctx context.Context, n Name, size int64) (Volume, error) {
	return around(f.point, "create", func() (Volume, error) { return f.Repository.Create(ctx, n, size) })
}

// Open is Repository.Open between its points; a file whose answer was lost is closed.
func (f *faulty) Open(ctx context.Context, n Name, m Mode) (*os.File, error) {
	file, err := around(f.point, "open", func() (*os.File, error) { return f.Repository.Open(ctx, n, m) })
	if err != nil && file != nil {
		file.Close()
		return nil, err
	}
	return file, err
}

// Clone is Repository.Clone between its points.
func (f *faulty) Clone(ctx context.Context, src, dst Name) (Volume, error) {
	return around(f.point, "clone", func() (Volume, error) { return f.Repository.Clone(ctx, src, dst) })
}

// Resize is Repository.Resize between its points.
func (f *faulty) Resize(ctx context.Context, n Name, size int64) error {
	return f.around("resize", func() error { return f.Repository.Resize(ctx, n, size) })
}

// Rename is Repository.Rename between its points.
func (f *faulty) Rename(ctx context.Context, from, to Name) error {
	return f.around("rename", func() error { return f.Repository.Rename(ctx, from, to) })
}

// Destroy is Repository.Destroy between its points.
func (f *faulty) Destroy(ctx context.Context, n Name) error {
	return f.around("destroy", func() error { return f.Repository.Destroy(ctx, n) })
}

// Create is Driver.Create between its points.
func (f *faultyDriver) Create(ctx context.Context, c Config) error {
	_, err := around(f.point, "make", func() (struct{}, error) { return struct{}{}, f.Driver.Create(ctx, c) })
	return err
}

// Attach is Driver.Attach between its points; a repository whose answer was
// lost is detached.
func (f *faultyDriver) Attach(ctx context.Context, c Config) (Repository, error) {
	repo, err := around(f.point, "attach", func() (Repository, error) { return f.Driver.Attach(ctx, c) })
	if err != nil {
		if repo != nil {
			repo.Detach(context.WithoutCancel(ctx))
		}
		return nil, err
	}
	return FaultyAt(repo, f.point), nil
}

// Destroy is Driver.Destroy between its points.
func (f *faultyDriver) Destroy(ctx context.Context, c Config) error {
	_, err := around(f.point, "remove", func() (struct{}, error) { return struct{}{}, f.Driver.Destroy(ctx, c) })
	return err
}

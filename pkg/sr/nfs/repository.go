package nfs

import (
	"context"
	"errors"
	"os"
	"sync"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// repository is the SR in its folder, behind the gate of its mount.
type repository struct {
	config sr.Config
	mount  *mount

	mu     sync.Mutex
	inner  sr.Repository
	closed bool
}

var (
	_ sr.Repository = (*repository)(nil)
	_ sr.Inspector  = (*repository)(nil)
)

// through makes one call of the repository behind its gate.
func through[T any](ctx context.Context, r *repository, verb string, f func(context.Context, sr.Repository) (T, error), late func(T)) (v T, err error) {
	r.mu.Lock()
	inner, closed := r.inner, r.closed
	r.mu.Unlock()
	if err := sr.Alive(ctx); err != nil {
		return v, err
	}
	if closed {
		return v, xapi.NewError(xapi.SRNotAttached, string(r.mount.uuid))
	}
	return call(ctx, r.mount.gate, verb, func(ctx context.Context) (T, error) { return f(ctx, inner) }, late)
}

func (r *repository) do(ctx context.Context, verb string, f func(context.Context, sr.Repository) error) error {
	_, err := through(ctx, r, verb, func(ctx context.Context, in sr.Repository) (struct{}, error) { return struct{}{}, f(ctx, in) }, nil)
	return err
}

// Features are what was tried out at attach.
func (r *repository) Features() []sr.Feature {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.inner.Features()
}

// Stat tells the room on the server's filesystem.
func (r *repository) Stat(ctx context.Context) (sr.Stat, error) {
	return through(ctx, r, "measure", func(ctx context.Context, in sr.Repository) (sr.Stat, error) { return in.Stat(ctx) }, nil)
}

// Scan lists the volumes.
func (r *repository) Scan(ctx context.Context) ([]sr.Volume, error) {
	return through(ctx, r, "scan", func(ctx context.Context, in sr.Repository) ([]sr.Volume, error) { return in.Scan(ctx) }, nil)
}

// Strangers names what is no volume.
func (r *repository) Strangers(ctx context.Context, limit int) ([]string, int, error) {
	type list struct {
		names []string
		total int
	}
	l, err := through(ctx, r, "list strangers", func(ctx context.Context, in sr.Repository) (l list, err error) {
		l.names, l.total, err = sr.Strangers(ctx, in, limit)
		return l, err
	}, nil)
	return l.names, l.total, err
}

// Create makes a sparse file.
func (r *repository) Create(ctx context.Context, n sr.Name, size int64) (sr.Volume, error) {
	return through(ctx, r, "create a volume", func(ctx context.Context, in sr.Repository) (sr.Volume, error) { return in.Create(ctx, n, size) }, nil)
}

// Open opens the file of a volume. Reads and writes of it end by the time-out
// of the mount.
func (r *repository) Open(ctx context.Context, n sr.Name, m sr.Mode) (*os.File, error) {
	return through(ctx, r, "open a volume", func(ctx context.Context, in sr.Repository) (*os.File, error) { return in.Open(ctx, n, m) }, func(f *os.File) { f.Close() })
}

// Path is the path of the file.
func (r *repository) Path(ctx context.Context, n sr.Name) (string, error) {
	return through(ctx, r, "find a volume", func(ctx context.Context, in sr.Repository) (string, error) { return in.Path(ctx, n) }, nil)
}

// Clone makes dst by CLONE of NFS 4.2.
func (r *repository) Clone(ctx context.Context, src, dst sr.Name) (sr.Volume, error) {
	return through(ctx, r, "clone a volume", func(ctx context.Context, in sr.Repository) (sr.Volume, error) { return in.Clone(ctx, src, dst) }, nil)
}

// Resize lengthens the file.
func (r *repository) Resize(ctx context.Context, n sr.Name, size int64) error {
	return r.do(ctx, "resize a volume", func(ctx context.Context, in sr.Repository) error { return in.Resize(ctx, n, size) })
}

// Rename gives the file another name.
func (r *repository) Rename(ctx context.Context, from, to sr.Name) error {
	return r.do(ctx, "rename a volume", func(ctx context.Context, in sr.Repository) error { return in.Rename(ctx, from, to) })
}

// Destroy removes the file. The client keeps one that is open on this host.
func (r *repository) Destroy(ctx context.Context, n sr.Name) error {
	return r.do(ctx, "destroy a volume", func(ctx context.Context, in sr.Repository) error { return in.Destroy(ctx, n) })
}

// Detach closes the SR and unmounts. When something on this host still uses a
// volume it fails, and the SR stays attached. When the server does not answer
// the SR is unmounted by force; that is an error too, but the SR is detached.
func (r *repository) Detach(ctx context.Context) error {
	if err := sr.Alive(ctx); err != nil {
		return err
	}
	r.mu.Lock()
	inner, closed := r.inner, r.closed
	r.closed = true
	r.mu.Unlock()
	if closed {
		return nil
	}
	err := r.mount.do(ctx, "detach", inner.Detach)
	if err == nil || r.mount.hung() {
		var gone bool
		if gone, err = r.mount.close(ctx); gone {
			return err
		}
		again, aerr := r.mount.inside(ctx, r.config)
		if aerr != nil {
			return errors.Join(err, aerr)
		}
		inner = again
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inner, r.closed = inner, false
	return err
}

package nfs

import (
	"context"
	"os"
	"sync"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// repository is the SR in its folder, behind the gate of its mount.
type repository struct {
	inner sr.Repository
	mount *mount

	mu     sync.Mutex
	closed bool
}

var (
	_ sr.Repository = (*repository)(nil)
	_ sr.Inspector  = (*repository)(nil)
)

// through makes one call of the repository behind its gate.
func through[T any](ctx context.Context, r *repository, verb string, f func(context.Context) (T, error), late func(T)) (v T, err error) {
	r.mu.Lock()
	closed := r.closed
	r.mu.Unlock()
	if err := sr.Alive(ctx); err != nil {
		return v, err
	}
	if closed {
		return v, xapi.NewError(xapi.SRNotAttached, string(r.mount.uuid))
	}
	return call(ctx, r.mount.gate, verb, f, late)
}

func (r *repository) do(ctx context.Context, verb string, f func(context.Context) error) error {
	_, err := through(ctx, r, verb, func(ctx context.Context) (struct{}, error) { return struct{}{}, f(ctx) }, nil)
	return err
}

// Features are what was tried out at attach.
func (r *repository) Features() []sr.Feature { return r.inner.Features() }

// Stat tells the room on the server's filesystem.
func (r *repository) Stat(ctx context.Context) (sr.Stat, error) {
	return through(ctx, r, "measure", r.inner.Stat, nil)
}

// Scan lists the volumes.
func (r *repository) Scan(ctx context.Context) ([]sr.Volume, error) {
	return through(ctx, r, "scan", r.inner.Scan, nil)
}

// Strangers names what is no volume.
func (r *repository) Strangers(ctx context.Context, limit int) ([]string, int, error) {
	type list struct {
		names []string
		total int
	}
	l, err := through(ctx, r, "list strangers", func(ctx context.Context) (l list, err error) {
		l.names, l.total, err = sr.Strangers(ctx, r.inner, limit)
		return l, err
	}, nil)
	return l.names, l.total, err
}

// Create makes a sparse file.
func (r *repository) Create(ctx context.Context, n sr.Name, size int64) (sr.Volume, error) {
	return through(ctx, r, "create a volume", func(ctx context.Context) (sr.Volume, error) { return r.inner.Create(ctx, n, size) }, nil)
}

// Open opens the file of a volume. Reads and writes of it end by the time-out
// of the mount.
func (r *repository) Open(ctx context.Context, n sr.Name, m sr.Mode) (*os.File, error) {
	return through(ctx, r, "open a volume", func(ctx context.Context) (*os.File, error) { return r.inner.Open(ctx, n, m) }, func(f *os.File) { f.Close() })
}

// Path is the path of the file.
func (r *repository) Path(ctx context.Context, n sr.Name) (string, error) {
	return through(ctx, r, "find a volume", func(ctx context.Context) (string, error) { return r.inner.Path(ctx, n) }, nil)
}

// Clone makes dst by CLONE of NFS 4.2.
func (r *repository) Clone(ctx context.Context, src, dst sr.Name) (sr.Volume, error) {
	return through(ctx, r, "clone a volume", func(ctx context.Context) (sr.Volume, error) { return r.inner.Clone(ctx, src, dst) }, nil)
}

// Resize lengthens the file.
func (r *repository) Resize(ctx context.Context, n sr.Name, size int64) error {
	return r.do(ctx, "resize a volume", func(ctx context.Context) error { return r.inner.Resize(ctx, n, size) })
}

// Rename gives the file another name.
func (r *repository) Rename(ctx context.Context, from, to sr.Name) error {
	return r.do(ctx, "rename a volume", func(ctx context.Context) error { return r.inner.Rename(ctx, from, to) })
}

// Destroy removes the file. The client keeps one that is open on this host.
func (r *repository) Destroy(ctx context.Context, n sr.Name) error {
	return r.do(ctx, "destroy a volume", func(ctx context.Context) error { return r.inner.Destroy(ctx, n) })
}

// Detach closes the SR and unmounts. When something on this host still uses a
// volume it fails and the SR stays attached; when the server does not answer
// it is unmounted by force, which is an error too, but the SR is detached.
func (r *repository) Detach(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	if err := sr.Alive(ctx); err != nil {
		return err
	}
	if r.inner != nil {
		err := r.mount.do(ctx, "detach", r.inner.Detach)
		if err != nil && !r.mount.hung() {
			return err
		}
	}
	err := r.mount.close(ctx)
	r.closed = err == nil || !r.mount.mounted()
	if r.closed {
		return err
	}
	return err
}

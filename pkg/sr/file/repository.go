package file

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// How the name of a volume's file ends: that of a VDI's block map, and all others.
const (
	suffix    = ".img"
	mapSuffix = ".map"
)

// repository is an attached folder. Calls hold mu for reading, Detach for
// writing: the descriptor is not closed under a running call.
type repository struct {
	uuid     xapi.UUID
	features []sr.Feature
	keepFree func(string) int64
	release  func(context.Context) error // of whoever mounted the folder; may be nil

	mu     sync.RWMutex
	folder *os.File // nil once detached
}

var _ sr.Repository = (*repository)(nil)

// enter begins a call about volumes; leave ends it.
func (r *repository) enter(ctx context.Context, names ...sr.Name) (leave func(), err error) {
	if err := sr.Sound(ctx, names...); err != nil {
		return nil, err
	}
	r.mu.RLock()
	if r.folder == nil {
		r.mu.RUnlock()
		return nil, xapi.NewError(xapi.SRNotAttached, string(r.uuid))
	}
	return r.mu.RUnlock, nil
}

// fileName is the file of volume n: <uuid>.img of a VDI, <uuid>.map of its block
// map, and the whole name of working data.
func fileName(n sr.Name) string {
	if n.Kind == sr.KindMap {
		return string(n.VDI) + mapSuffix
	}
	return n.String() + suffix
}

// volumeName is the volume whose file has that name, if it is one of ours.
func volumeName(file string) (n sr.Name, ok bool) {
	if base, isMap := strings.CutSuffix(file, mapSuffix); isMap {
		n = sr.Live(xapi.UUID(base)).Map()
		return n, n.Validate() == nil
	}
	base, ours := strings.CutSuffix(file, suffix)
	n, ok = sr.ParseName(base)
	return n, ok && ours && n.Kind != sr.KindMap
}

// volumeError says what went wrong with volume n, with a code.
func (r *repository) volumeError(err error, verb string, n sr.Name) error {
	var known *xapi.Error
	switch {
	case err == nil, errors.As(err, &known):
		return err
	case errors.Is(err, os.ErrNotExist), errors.Is(err, errNotRegular), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENXIO):
		return xapi.NewError(xapi.VDINotAvailable, n.String()).Because(err)
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.ESHUTDOWN):
		return xapi.NewError(xapi.VDIIOError, n.String()).Because(fmt.Errorf("SR %s: %w", r.uuid, err))
	case errors.Is(err, unix.EFBIG):
		return xapi.NewError(xapi.InvalidValue, "virtual_size", "more than the filesystem can hold in one file").Because(err)
	}
	return coded(err, "%s volume %s of SR %s", verb, n, r.uuid)
}

// Features are what was tried out at attach.
func (r *repository) Features() []sr.Feature { return slices.Clone(r.features) }

// Stat tells the room on the filesystem of the folder.
func (r *repository) Stat(ctx context.Context) (sr.Stat, error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return sr.Stat{}, err
	}
	defer leave()
	s, err := room(r.folder, r.keepFree)
	if err != nil {
		return s, coded(err, "measure the SR in %s", r.folder.Name())
	}
	return s, nil
}

// room measures the filesystem that holds folder.
func room(folder *os.File, keepFree func(string) int64) (sr.Stat, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(folder.Fd()), &fs); err != nil {
		return sr.Stat{}, fmt.Errorf("statfs: %w", err)
	}
	block := int64(cmp.Or(fs.Frsize, fs.Bsize))
	s := sr.Stat{
		PhysicalSize:        int64(fs.Blocks) * block,
		PhysicalUtilisation: int64(fs.Blocks-fs.Bfree) * block,
		Free:                int64(fs.Bavail) * block,
	}
	if keepFree != nil {
		s.Free -= min(s.Free, max(0, keepFree(folder.Name())))
	}
	return s, nil
}

// hasRoom refuses to make anything new in a full SR. btrfs counts what was
// removed as free only when that is on disk, so a full SR is synced before.
func (r *repository) hasRoom() error {
	s, err := room(r.folder, r.keepFree)
	if err == nil && s.Free <= 0 {
		if err = unix.Syncfs(int(r.folder.Fd())); err == nil {
			s, err = room(r.folder, r.keepFree)
		}
	}
	if err != nil {
		return err
	}
	if s.Free <= 0 {
		return xapi.NewError(xapi.OutOfSpace, fmt.Sprintf("%s (%s)", r.folder.Name(), r.uuid))
	}
	return nil
}

// Scan lists the regular files with the name of a volume.
func (r *repository) Scan(ctx context.Context) ([]sr.Volume, error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	volumes, err := scan(ctx, r.folder)
	if err != nil && sr.Alive(ctx) == nil {
		return nil, coded(err, "scan the SR in %s", r.folder.Name())
	}
	return volumes, err
}

func scan(ctx context.Context, folder *os.File) ([]sr.Volume, error) {
	volumes := []sr.Volume{}
	var failed error
	err := eachName(folder, func(name string) bool {
		n, ours := volumeName(name)
		if !ours {
			return true
		}
		if failed = sr.Alive(ctx); failed != nil {
			return false
		}
		v, err := look(folder, n)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, errNotRegular):
		case err != nil:
			failed = err
		default:
			volumes = append(volumes, v)
		}
		return failed == nil
	})
	if err := cmp.Or(failed, err); err != nil {
		return nil, err
	}
	slices.SortFunc(volumes, func(a, b sr.Volume) int { return cmp.Compare(a.Name.String(), b.Name.String()) })
	return volumes, nil
}

var _ sr.Inspector = (*repository)(nil)

// Strangers names what is neither a volume nor the marker of the SR.
func (r *repository) Strangers(ctx context.Context, limit int) (names []string, total int, err error) {
	leave, err := r.enter(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer leave()
	err = eachName(r.folder, func(name string) bool {
		if n, ours := volumeName(name); name == markerName || name == "lost+found" || ours && isVolume(r.folder, n) {
			return true
		}
		total++
		names = append(names, name)
		if len(names) > 2*limit { // the first ones in order are kept
			slices.Sort(names)
			names = names[:limit]
		}
		return sr.Alive(ctx) == nil
	})
	slices.Sort(names)
	return names[:min(limit, len(names))], total, cmp.Or(err, sr.Alive(ctx))
}

func isVolume(folder *os.File, n sr.Name) bool {
	_, err := look(folder, n)
	return err == nil || !errors.Is(err, errNotRegular)
}

// eachName calls f for every name in folder until it answers false.
func eachName(folder *os.File, f func(name string) bool) error {
	fd, err := unix.Openat(int(folder.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("list folder: %w", err)
	}
	list := os.NewFile(uintptr(fd), folder.Name())
	defer list.Close()
	for {
		names, err := list.Readdirnames(256)
		for _, name := range names {
			if !f(name) {
				return nil
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list folder: %w", err)
		}
	}
}

// look says what is known about a volume without opening it.
func look(folder *os.File, n sr.Name) (sr.Volume, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(folder.Fd()), fileName(n), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return sr.Volume{}, fmt.Errorf("stat %s: %w", fileName(n), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return sr.Volume{}, fmt.Errorf("stat %s: %w", fileName(n), errNotRegular)
	}
	return sr.Volume{Name: n, VirtualSize: st.Size, PhysicalUtilisation: st.Blocks * 512}, nil
}

// Create makes a sparse file. It takes no room, but is refused when none is left.
func (r *repository) Create(ctx context.Context, n sr.Name, size int64) (sr.Volume, error) {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return sr.Volume{}, err
	}
	defer leave()
	if size <= 0 {
		return sr.Volume{}, xapi.NewError(xapi.InvalidValue, "virtual_size", strconv.FormatInt(size, 10))
	}
	if err = r.hasRoom(); err == nil {
		err = fresh(r.folder, fileName(n), keep(n), func(f *os.File) error { return f.Truncate(size) })
	}
	if err != nil {
		return sr.Volume{}, r.volumeError(err, "create", n)
	}
	v, err := look(r.folder, n)
	return v, r.volumeError(err, "create", n)
}

// Open opens the file of a volume.
func (r *repository) Open(ctx context.Context, n sr.Name, m sr.Mode) (*os.File, error) {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return nil, err
	}
	defer leave()
	flags := unix.O_RDONLY
	if m == sr.ReadWrite {
		flags = unix.O_RDWR
	}
	f, err := openRegular(r.folder, fileName(n), flags)
	return f, r.volumeError(err, "open", n)
}

// Path is the path of the file.
func (r *repository) Path(ctx context.Context, n sr.Name) (string, error) {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return "", err
	}
	defer leave()
	if _, err := look(r.folder, n); err != nil {
		return "", r.volumeError(err, "find", n)
	}
	return r.folder.Name() + "/" + fileName(n), nil
}

// Clone makes dst by FICLONE.
func (r *repository) Clone(ctx context.Context, src, dst sr.Name) (sr.Volume, error) {
	leave, err := r.enter(ctx, src, dst)
	if err != nil {
		return sr.Volume{}, err
	}
	defer leave()
	if !sr.Has(r.features, sr.VDIClone) {
		return sr.Volume{}, xapi.NewError(xapi.SROperationNotSupported, string(r.uuid))
	}
	from, err := openRegular(r.folder, fileName(src), unix.O_RDONLY)
	if err != nil {
		return sr.Volume{}, r.volumeError(err, "clone", src)
	}
	defer from.Close()
	if err = r.hasRoom(); err == nil {
		err = fresh(r.folder, fileName(dst), keep(dst), func(f *os.File) error { return unix.IoctlFileClone(int(f.Fd()), int(from.Fd())) })
	}
	if err != nil {
		return sr.Volume{}, r.volumeError(err, "clone to", dst)
	}
	v, err := look(r.folder, dst)
	return v, r.volumeError(err, "clone to", dst)
}

// clonesHere tries FICLONE between two unnamed files of the folder.
func clonesHere(folder *os.File) (bool, error) {
	var files [2]*os.File
	for i := range files {
		f, err := scratch(folder)
		if err != nil {
			return false, fmt.Errorf("try cloning: %w", err)
		}
		defer f.Close()
		files[i] = f
	}
	// On a full filesystem a hole must do instead of data.
	if _, err := files[0].Write(make([]byte, 4096)); err != nil {
		if err := files[0].Truncate(4096); err != nil {
			return false, fmt.Errorf("try cloning: %w", err)
		}
	}
	return unix.IoctlFileClone(int(files[1].Fd()), int(files[0].Fd())) == nil, nil
}

// scratch opens a file without a name.
func scratch(folder *os.File) (*os.File, error) {
	fd, err := unix.Openat(int(folder.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if noTmpfile(err) {
		name := ".patchd-try-" + string(xapi.NewUUID())
		fd, err = unix.Openat(int(folder.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err == nil {
			err = unix.Unlinkat(int(folder.Fd()), name, 0)
		}
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "scratch"), nil
}

// Resize lengthens the file.
func (r *repository) Resize(ctx context.Context, n sr.Name, size int64) error {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	f, err := openRegular(r.folder, fileName(n), unix.O_RDWR)
	if err != nil {
		return r.volumeError(err, "resize", n)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return r.volumeError(err, "resize", n)
	}
	if size < fi.Size() {
		return xapi.NewError(xapi.InvalidValue, "virtual_size", strconv.FormatInt(size, 10))
	}
	if err = f.Truncate(size); err == nil {
		err = f.Sync()
	}
	return r.volumeError(err, "resize", n)
}

// Rename gives the file another name, never over an existing one.
func (r *repository) Rename(ctx context.Context, from, to sr.Name) error {
	leave, err := r.enter(ctx, from, to)
	if err != nil {
		return err
	}
	defer leave()
	if from == to {
		_, err := look(r.folder, from)
		return r.volumeError(err, "rename", from)
	}
	return r.volumeError(rename(r.folder, fileName(from), fileName(to)), "rename", from)
}

func rename(folder *os.File, from, to string) error {
	dir := int(folder.Fd())
	err := unix.Renameat2(dir, from, dir, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		err = relink(folder, from, to)
	}
	var st unix.Stat_t
	if errors.Is(err, unix.ENOENT) && unix.Fstatat(dir, to, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
		err = nil // it was renamed before
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", from, to, err)
	}
	return syncFolder(folder, durable)
}

// relink renames on a filesystem that cannot rename without replacing (NFS): a
// second name, then the first one goes. Broken off in between it can be repeated.
func relink(folder *os.File, from, to string) error {
	dir := int(folder.Fd())
	err := unix.Linkat(dir, from, dir, to, 0)
	if errors.Is(err, unix.EEXIST) {
		var a, b unix.Stat_t
		same := unix.Fstatat(dir, from, &a, unix.AT_SYMLINK_NOFOLLOW) == nil &&
			unix.Fstatat(dir, to, &b, unix.AT_SYMLINK_NOFOLLOW) == nil && a.Dev == b.Dev && a.Ino == b.Ino
		if same {
			err = nil
		}
	}
	if err == nil {
		err = syncFolder(folder, durable)
	}
	if err == nil {
		err = unix.Unlinkat(dir, from, 0)
	}
	return err
}

// Destroy unlinks the file.
func (r *repository) Destroy(ctx context.Context, n sr.Name) error {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	_, err = look(r.folder, n)
	switch {
	case errors.Is(err, os.ErrNotExist):
		// It may have gone a moment ago, before a crash: make that durable.
		return r.volumeError(syncFolder(r.folder, keep(n)), "destroy", n)
	case err != nil:
		return coded(err, "destroy volume %s", n)
	}
	return r.volumeError(unlink(r.folder, fileName(n), keep(n)), "destroy", n)
}

// Detach closes the folder once every running call has ended, and lets go of
// what is mounted there. When that fails the SR stays attached.
func (r *repository) Detach(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.folder == nil {
		return nil
	}
	path := r.folder.Name()
	err := r.folder.Close()
	r.folder = nil
	if err != nil {
		return sr.BackendFailure("detach SR %s: %w", r.uuid, err)
	}
	if r.release == nil {
		return nil
	}
	if err = r.release(ctx); err == nil {
		return nil
	}
	folder, again := openFolder(path)
	if again != nil {
		return errors.Join(err, fmt.Errorf("go on with SR %s: %w", r.uuid, again))
	}
	r.folder = folder
	return err
}

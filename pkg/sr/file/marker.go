package file

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// markerName is the file that makes a folder an SR. It holds the line
// "patchd file SR 1 <uuid>", where 1 is the version of the layout.
const (
	markerName   = ".patchd-sr"
	markerPrefix = "patchd file SR 1 "
	markerMax    = 256
)

var errUnknownMarker = errors.New("not the marker of an SR that this version knows")

// readMarker gives the uuid of the SR in folder, or "" when there is none.
func readMarker(folder *os.File) (xapi.UUID, error) {
	f, err := openRegular(folder, markerName, unix.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, markerMax))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", f.Name(), err)
	}
	id, ok := strings.CutPrefix(string(text), markerPrefix)
	uuid := xapi.UUID(strings.TrimSuffix(id, "\n"))
	if !ok || !uuid.Valid() {
		return "", fmt.Errorf("%s/%s: %w", folder.Name(), markerName, errUnknownMarker)
	}
	return uuid, nil
}

// writeMarker makes folder the SR of that uuid. An existing marker is os.ErrExist.
func writeMarker(folder *os.File, uuid xapi.UUID) error {
	return fresh(folder, markerName, durable, func(f *os.File) error {
		_, err := fmt.Fprintf(f, "%s%s\n", markerPrefix, uuid)
		return err
	})
}

// keeping says what shall be left of a change after a power failure.
type keeping bool

const (
	durable keeping = true
	// passing is for working data, which is swept after a power failure: all
	// or nothing of it may be left.
	passing keeping = false
)

// keep is how changes of volume n are kept.
func keep(n sr.Name) keeping { return keeping(n.Kind != sr.KindWork) }

// fresh makes a file that has its name only when fill has succeeded, and its
// bytes are on disk if it is to be durable. An existing name is os.ErrExist and
// is left as it is.
func fresh(folder *os.File, name string, k keeping, fill func(f *os.File) error) (err error) {
	dir := int(folder.Fd())
	fd, err := unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if noTmpfile(err) {
		return freshNamed(folder, name, k, fill)
	}
	if err != nil {
		return fmt.Errorf("make file %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := fillAndSync(f, k, fill); err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := unix.Linkat(unix.AT_FDCWD, from, dir, name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("name file %s: %w", name, err)
	}
	if err := syncFolder(folder, k); err != nil {
		return errors.Join(err, unlink(folder, name, k))
	}
	return nil
}

// freshNamed is fresh for a filesystem without unnamed files: the name is
// there at once, and goes again when the rest fails.
func freshNamed(folder *os.File, name string, k keeping, fill func(f *os.File) error) (err error) {
	fd, err := unix.Openat(int(folder.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make file %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	err = errors.Join(fillAndSync(f, k, fill), f.Close())
	if err == nil {
		err = syncFolder(folder, k)
	}
	if err != nil {
		return errors.Join(err, unlink(folder, name, k))
	}
	return nil
}

func fillAndSync(f *os.File, k keeping, fill func(f *os.File) error) error {
	if err := fill(f); err != nil {
		return fmt.Errorf("fill file %s: %w", f.Name(), err)
	}
	if k == passing {
		return nil
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync file %s: %w", f.Name(), err)
	}
	return nil
}

// noTmpfile tells whether the filesystem has no unnamed files (NFS, old overlays).
func noTmpfile(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL)
}

// unlink removes a name; an absent one is success.
func unlink(folder *os.File, name string, k keeping) error {
	err := unix.Unlinkat(int(folder.Fd()), name, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove file %s: %w", name, err)
	}
	return syncFolder(folder, k)
}

func syncFolder(folder *os.File, k keeping) error {
	if k == passing {
		return nil
	}
	if err := folder.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", folder.Name(), err)
	}
	return nil
}

// openRegular opens a regular file of folder, never through a link and never
// waiting for the other end of a pipe.
func openRegular(folder *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(folder.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errNotRegular
	}
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), folder.Name()+"/"+name), nil
}

var errNotRegular = errors.New("not a regular file")

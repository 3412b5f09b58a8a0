package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
)

// keyLocation is the one key of device_config.
const keyLocation = "location"

// systemTrees are no place for disk images, nor is anything below them.
var systemTrees = []string{"/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin", "/sys", "/usr"}

// location gives the folder that c points to: an absolute, clean path that is
// not the root and lies in no system tree.
func location(c sr.Config) (string, error) {
	if err := sr.CheckConfig(info, c.Device); err != nil {
		return "", err
	}
	if !c.SR.Valid() {
		return "", fmt.Errorf("SR uuid %.64q is not a uuid", c.SR)
	}
	given := c.Device[keyLocation]
	if reason := badPath(given); reason != "" {
		return "", badLocation(given, reason)
	}
	return cleanPath(given), nil
}

func cleanPath(given string) string { return strings.TrimRight(given, "/") }

// badPath says why nothing may be put at the given path, or "".
func badPath(given string) (reason string) {
	path := cleanPath(given)
	switch {
	case !filepath.IsAbs(given):
		return "must be absolute"
	case path == "":
		return "must be a place of its own, not the root"
	case path != filepath.Clean(path):
		return "must be written without empty, '.' or '..' parts"
	case len(path) > unix.PathMax/2:
		return "is too long"
	}
	for _, tree := range systemTrees {
		if path == tree || strings.HasPrefix(path, tree+"/") {
			return "lies in " + tree + ", which belongs to the operating system"
		}
	}
	return ""
}

func badLocation(given, reason string) error {
	return sr.BadConfig(keyLocation, given, "the location "+reason)
}

// openFolder opens the folder at path, which no symbolic link may be part of
// and no other SR may lie above. The error of an absent folder is
// os.ErrNotExist.
func openFolder(path string) (*os.File, error) {
	at, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /: %w", err)
	}
	parts := strings.Split(path[1:], "/")
	for i, part := range parts {
		if i > 0 && unix.Faccessat(at, markerName, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW) == nil {
			unix.Close(at)
			return nil, badLocation(path, "lies inside another SR: /"+filepath.Join(parts[:i]...))
		}
		flags := unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		if i == len(parts)-1 {
			flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		}
		next, err := unix.Openat(at, part, flags, 0)
		if err != nil {
			err = explainOpen(at, path, part, err)
			unix.Close(at)
			return nil, err
		}
		unix.Close(at)
		at = next
	}
	return os.NewFile(uintptr(at), path), nil
}

// explainOpen says what stands at part, of which err is the error of opening it.
func explainOpen(at int, path, part string, err error) error {
	if !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("open %s at %q: %w", path, part, err)
	}
	var st unix.Stat_t
	if unix.Fstatat(at, part, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return badLocation(path, fmt.Sprintf("has a symbolic link in it (%q); name the real path", part))
	}
	return badLocation(path, fmt.Sprintf("is not a folder (%q)", part))
}

// makeFolder makes the last part of path where it is absent; the rest must exist.
func makeFolder(path string) (*os.File, error) {
	folder, err := openFolder(path)
	if !errors.Is(err, os.ErrNotExist) {
		return folder, err
	}
	parentPath, base := filepath.Split(path)
	parentPath = filepath.Clean(parentPath)
	if parentPath == "/" {
		parent, err := os.Open("/")
		if err != nil {
			return nil, err
		}
		return makeIn(parent, base, path)
	}
	parent, err := openFolder(parentPath)
	if errors.Is(err, os.ErrNotExist) {
		return nil, badLocation(path, "has no parent folder: make "+parentPath+" first, or mount what belongs there")
	}
	if err != nil {
		return nil, err
	}
	return makeIn(parent, base, path)
}

// makeIn makes folder base in parent, which it closes.
func makeIn(parent *os.File, base, path string) (*os.File, error) {
	defer parent.Close()
	if err := unix.Mkdirat(int(parent.Fd()), base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make folder %s: %w", path, err)
	}
	if err := parent.Sync(); err != nil {
		return nil, fmt.Errorf("sync parent of %s: %w", path, err)
	}
	return openFolder(path)
}

// checkOwner refuses a folder that somebody else can write to: whoever can
// replace a golden image there would be root on every host.
func checkOwner(folder *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(folder.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", folder.Name(), err)
	}
	if st.Mode&0o022 != 0 {
		return badLocation(folder.Name(), "may be written by others: chmod go-w it")
	}
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return badLocation(folder.Name(), fmt.Sprintf("belongs to user %d: chown it to the user patchd runs as", st.Uid))
	}
	return checkWay(folder.Name())
}

// checkWay refuses a folder that somebody else can put another in the place of,
// between a look at it and its use: whoever can write to a folder above it. Where
// only the owner of a name may change it (/tmp), that is nobody else.
func checkWay(path string) error {
	for dir := filepath.Dir(path); dir != "/"; dir = filepath.Dir(dir) {
		var st unix.Stat_t
		if err := unix.Lstat(dir, &st); err != nil {
			return fmt.Errorf("stat %s: %w", dir, err)
		}
		if st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
			return badLocation(path, fmt.Sprintf("lies in %s, which others may write to: chmod go-w it", dir))
		}
		if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
			return badLocation(path, fmt.Sprintf("lies in %s, which belongs to user %d, who could put something else there", dir, st.Uid))
		}
	}
	return nil
}

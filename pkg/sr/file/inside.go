package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// The functions of this file are for drivers that mount a filesystem and keep
// an SR of this kind in its root: marker, names and rules are the same.

// Make makes the folder at path, which exists, the SR of that uuid. It may hold
// nothing but lost+found (SR_DEVICE_IN_USE). Twice is success.
func Make(path string, uuid xapi.UUID) error {
	if err := create(path, uuid); err != nil {
		return coded(err, "create an SR in %s", path)
	}
	return nil
}

// Inside gives the SR in the folder at path, which must have c.SR's marker, and
// tries out whether it clones. release is called by Detach when nothing of the
// repository holds the folder any more; when it fails the SR stays attached.
func Inside(path string, c sr.Config, release func(context.Context) error) (sr.Repository, error) {
	r, err := attach(path, c, release)
	if err != nil {
		return nil, coded(err, "attach the SR in %s", path)
	}
	return r, nil
}

// Empty tells whether the folder at path holds nothing but lost+found and,
// where it is an SR, the marker of uuid. Anything else is SR_NOT_EMPTY, with its
// name; the marker of another SR is SR_DEVICE_IN_USE.
func Empty(path string, uuid xapi.UUID) error {
	folder, err := openFolder(path)
	if err != nil {
		return coded(err, "look into the SR in %s", path)
	}
	defer folder.Close()
	found, err := readMarker(folder)
	if err == nil && found != "" && found != uuid {
		return inUse(fmt.Errorf("%s is SR %s", path, found))
	}
	inside := ""
	if err == nil {
		err = eachName(folder, func(name string) bool {
			if name != "lost+found" && (name != markerName || found == "") {
				inside = name
			}
			return inside == ""
		})
	}
	if err != nil {
		return coded(err, "look into the SR in %s", path)
	}
	if inside != "" {
		return xapi.NewError(xapi.SRNotEmpty).Because(fmt.Errorf("%s holds %q", path, inside))
	}
	return nil
}

// CheckPath holds the value of a device_config key against the rules for the
// place of an SR: absolute, clean, in no system tree. It gives the path
// without a slash at its end. Code: VALUE_NOT_SUPPORTED.
func CheckPath(key, given string) (string, error) {
	if reason := badPath(given); reason != "" {
		return "", sr.BadConfig(key, given, "the path "+reason)
	}
	return cleanPath(given), nil
}

// OpenFolder opens the folder at path, no part of which may be a symbolic link
// and which may not lie inside an SR; nobody but root and the user patchd runs as
// may write to it. Codes: VALUE_NOT_SUPPORTED of that key of device_config; the
// error of an absent folder is os.ErrNotExist.
func OpenFolder(key, path string) (*os.File, error) {
	folder, err := ownFolder(path)
	var bad *xapi.Error
	if errors.As(err, &bad) && bad.Code == xapi.ValueNotSupported && len(bad.Params) == 3 {
		reason := strings.TrimPrefix(bad.Params[2], "the location ")
		return nil, sr.BadConfig(key, path, "the folder "+reason)
	}
	return folder, err
}

func ownFolder(path string) (*os.File, error) {
	folder, err := openFolder(path)
	if err != nil {
		return nil, err
	}
	err = checkOwner(folder)
	if err == nil && unix.Faccessat(int(folder.Fd()), markerName, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW) == nil {
		err = badLocation(path, "is an SR itself")
	}
	if err != nil {
		return nil, errors.Join(err, folder.Close())
	}
	return folder, nil
}

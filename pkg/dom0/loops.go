package dom0

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Adopt gives the loop device that writes to image already, or nil when there
// is none. It is held as one that Attach gave: two loop devices on one image,
// both mounted, would destroy what is in it.
func Adopt(image string) (Device, error) {
	var devices []string
	for dev := range loops() {
		devices = append(devices, dev)
	}
	slices.Sort(devices)
	for _, path := range devices {
		dev, err := adopt(path, image)
		if dev != nil || err != nil {
			return dev, err
		}
	}
	return nil, nil
}

// adopt opens the loop device at path and keeps it when it writes to image.
func adopt(path, image string) (Device, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) {
		return nil, nil // gone meanwhile, or read-only
	}
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	info, ours, err := loopOf(f, image)
	if err != nil || !ours || info.Flags&unix.LO_FLAGS_READ_ONLY != 0 {
		return nil, errors.Join(err, f.Close())
	}
	return &loopDevice{f: f}, nil
}

// IsLoopOf tells whether the block device at path is a loop device of image.
func IsLoopOf(path, image string) (bool, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at %s: %w", path, err)
	}
	defer f.Close()
	_, ours, err := loopOf(f, image)
	return ours, err
}

// loopOf tells what an open loop device is bound to, and whether that is image.
// A device that is bound to nothing, or no loop device, is not.
func loopOf(f *os.File, image string) (*unix.LoopInfo64, bool, error) {
	st, err := os.Stat(image)
	if err != nil {
		return nil, false, fmt.Errorf("look for loop devices: %w", err)
	}
	file, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, false, fmt.Errorf("look for loop devices: %s has no inode", image)
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look at %s: %w", f.Name(), err)
	}
	return info, info.Device == file.Dev && info.Inode == file.Ino, nil
}

// loops lists the loop devices that are bound, and the files they are bound to.
func loops() map[string]string {
	found := map[string]string{}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil
	}
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil {
			dev := filepath.Base(filepath.Dir(filepath.Dir(file)))
			found["/dev/"+dev] = strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)")
		}
	}
	return found
}

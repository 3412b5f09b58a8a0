package mounted

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/xapi"
)

// place is where an SR is, or shall be.
type place struct {
	sr    xapi.UUID
	given string // as in device_config
	path  string // given with links followed, for a block device
	block bool
	size  int64 // of an image file to be made; 0: none is made
}

// place reads device_config. A block device may be named by a link, as in
// /dev/disk/by-id: it is followed at every call, for names like /dev/sdb change.
func (d *Driver) place(c sr.Config) (place, error) {
	if err := sr.CheckConfig(d.kind.Info, c.Device); err != nil {
		return place{}, err
	}
	if !c.SR.Valid() {
		return place{}, fmt.Errorf("SR uuid %.64q is not a uuid", c.SR)
	}
	given := c.Device[keyDevice]
	p := place{sr: c.SR, given: given}
	if strings.HasPrefix(given, "/dev/") {
		return p.blockDevice(c.Device[keySize])
	}
	path, err := file.CheckPath(keyDevice, given)
	if err != nil {
		return place{}, err
	}
	p.path = path
	if text := c.Device[keySize]; text != "" {
		n, err := humanize.ParseBytes(text)
		if err != nil || n > 1<<60 {
			return place{}, sr.BadConfig(keySize, text, `must be a number of bytes, or one like "100GiB"`)
		}
		p.size = int64(n) &^ (mib - 1)
		if p.size < d.kind.MinSize {
			return place{}, sr.BadConfig(keySize, text, fmt.Sprintf("an SR of type %s has %s at least", d.kind.Info.Type, humanize.IBytes(uint64(d.kind.MinSize))))
		}
	}
	return p, nil
}

// blockDevice follows the links of a path below /dev.
func (p place) blockDevice(size string) (place, error) {
	bad := func(reason string) (place, error) { return place{}, sr.BadConfig(keyDevice, p.given, reason) }
	if size != "" {
		return place{}, sr.BadConfig(keySize, size, "only an image file can be made; a block device has its size")
	}
	if p.given != filepath.Clean(p.given) {
		return bad("the path must be written without empty, '.' or '..' parts")
	}
	path, err := filepath.EvalSymlinks(p.given)
	if errors.Is(err, os.ErrNotExist) {
		return bad("there is no such device: is it connected?")
	}
	if err != nil {
		return bad("the device cannot be looked up: " + err.Error())
	}
	st, err := os.Stat(path)
	if err != nil {
		return bad("the device cannot be looked at: " + err.Error())
	}
	if st.Mode()&os.ModeDevice == 0 || st.Mode()&os.ModeCharDevice != 0 || !strings.HasPrefix(path, "/dev/") {
		return bad("is not a block device")
	}
	p.path, p.block = path, true
	return p, nil
}

// open opens the device or image file. An image file is a regular file with one
// name, in a folder that only root and patchd's user can write to; one that is
// absent is os.ErrNotExist.
func (p place) open(flags int) (*os.File, error) {
	if p.block {
		return os.OpenFile(p.path, flags|unix.O_CLOEXEC, 0)
	}
	folder, err := file.OpenFolder(keyDevice, filepath.Dir(p.path))
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	fd, err := unix.Openat(int(folder.Fd()), filepath.Base(p.path), flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == unix.ELOOP {
		return nil, sr.BadConfig(keyDevice, p.given, "is a symbolic link; name the real path")
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p.path, err)
	}
	f := os.NewFile(uintptr(fd), p.path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(fmt.Errorf("stat %s: %w", p.path, err), f.Close())
	}
	reason := ""
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		reason = "is neither a block device below /dev nor a regular file"
	case st.Nlink != 1:
		reason = "has more than one name"
	case st.Mode&0o022 != 0:
		reason = "may be written by others: chmod go-w it"
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		reason = fmt.Sprintf("belongs to user %d: chown it to the user patchd runs as", st.Uid)
	}
	if reason != "" {
		f.Close()
		return nil, sr.BadConfig(keyDevice, p.given, reason)
	}
	return f, nil
}

// lockPatience is how long a device is waited for that something else, udev for
// one, has locked for a moment.
const lockPatience = 5 * time.Second

// take opens the place to change what is on it, and locks it: nobody else may
// use or lock it. SR_DEVICE_IN_USE else.
func (p place) take(ctx context.Context) (*os.File, error) {
	f, err := p.open(os.O_RDWR)
	if err != nil {
		return nil, err
	}
	limit, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	for {
		user, err := p.user(f)
		if err == nil && user == "" {
			return f, nil
		}
		if err == nil && !pause(limit, 10*time.Millisecond) {
			if err = sr.Alive(ctx); err == nil {
				err = inUse("%s is in use: %s. Unmount it, or take it out there, and try again", p.path, user)
			}
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
}

// user says who uses an open device or image file, and locks it when nobody does.
func (p place) user(f *os.File) (string, error) {
	if p.block {
		// Refused by the kernel while it is mounted or part of something.
		alone, err := os.OpenFile(p.path, os.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EBUSY) {
			return "it is mounted, or part of a volume group or an array", nil
		}
		if err != nil {
			return "", err
		}
		alone.Close()
	} else {
		dev, err := dom0.Adopt(p.path)
		if err != nil {
			return "", err
		}
		if dev != nil {
			return "it is attached as " + dev.Path(), dev.Close()
		}
	}
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return "a program has it locked", nil
	}
	return "", err
}

// pause waits for t or until ctx ends, and tells whether it lasted.
func pause(ctx context.Context, t time.Duration) bool {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// length is the size of an open device or file, in bytes.
func length(f *os.File) (int64, error) {
	n, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	return n, nil
}

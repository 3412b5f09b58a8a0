package dom0

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount implements Dom0.
func (s *System) Mount(ctx context.Context, m Mount) error {
	if err := m.Validate(); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if st, err := os.Lstat(m.Target); err != nil {
		return fmt.Errorf("mount: %w", err)
	} else if !st.IsDir() {
		return fmt.Errorf("mount on %s: %w", m.Target, unix.ENOTDIR)
	}
	used, err := mountinfo.Mounted(m.Target)
	if err != nil {
		return fmt.Errorf("mount on %s: %w", m.Target, err)
	}
	if used {
		return fmt.Errorf("mount %s on %s: %w", m.Source, m.Target, unix.EBUSY)
	}
	return effect("mount", func() error {
		return mount(m)
	}, func() { unix.Unmount(m.Target, unix.UMOUNT_NOFOLLOW) })
}

func mount(m Mount) error {
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if m.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if m.NoExec {
		flags |= unix.MS_NOEXEC
	}
	if m.NoAtime {
		flags |= unix.MS_NOATIME
	}
	if err := unix.Mount(m.Source, m.Target, m.Type, flags, m.Options); err != nil {
		return fmt.Errorf("mount %s (%s) on %s: %w", m.Source, m.Type, m.Target, err)
	}
	return nil
}

// ForceUnmount takes away a mount whose server does not answer: calls that wait
// for it are broken off (MNT_FORCE), and what is left goes when its last user
// goes (MNT_DETACH). It may block as long as the server is silent. It is no part of
// Dom0: a driver asks for it by an interface of its own.
func (s *System) ForceUnmount(ctx context.Context, target string) error {
	if !filepath.IsAbs(target) {
		return fmt.Errorf("unmount: %q is not absolute", target)
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return effect("unmount", func() error {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_FORCE)
		if err == unix.EBUSY {
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err == nil || err == unix.EINVAL || err == unix.ENOENT {
			return nil // EINVAL: nothing is mounted there
		}
		return fmt.Errorf("unmount %s by force: %w", target, err)
	}, nil)
}

// unmountPatience is how long a busy mount is tried again: descriptors that
// live between fork and exec hold it for a moment.
const unmountPatience = 5 * time.Second

// Unmount implements Dom0.
func (s *System) Unmount(ctx context.Context, target string) error {
	if !filepath.IsAbs(target) {
		return fmt.Errorf("unmount: %q is not absolute", target)
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return effect("unmount", func() error {
		return unmount(ctx, target)
	}, nil)
}

func unmount(ctx context.Context, target string) error {
	limit, cancel := context.WithTimeout(ctx, unmountPatience)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if err == nil || err == unix.EINVAL || err == unix.ENOENT {
			return nil // EINVAL: nothing is mounted there
		}
		if err == unix.EBUSY && pause(limit, wait) {
			continue
		}
		if err == unix.EBUSY {
			if who := holders(target); len(who) > 0 {
				return fmt.Errorf("unmount %s: %w, held by %s", target, err, strings.Join(who, ", "))
			}
		}
		return fmt.Errorf("unmount %s: %w", target, err)
	}
}

// holders names who keeps target busy: loop devices of files in it, processes
// by pid and name, and mounts below it. At most ten.
func holders(target string) []string {
	const most = 10
	var found []string
	inside := func(path string) bool {
		return path == target || strings.HasPrefix(path, target+"/")
	}
	below, err := mountinfo.GetMounts(mountinfo.PrefixFilter(target))
	if err == nil {
		for _, m := range below {
			if m.Mountpoint != target {
				found = append(found, "the mount "+m.Mountpoint)
			}
		}
	}
	for dev, image := range loops() {
		if inside(image) {
			found = append(found, fmt.Sprintf("the loop device %s of %s", dev, image))
		}
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return found
	}
	for _, d := range dirs {
		if len(found) >= most {
			return append(found[:most], "and more")
		}
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if processUses(pid, inside) {
			found = append(found, fmt.Sprintf("process %d (%s)", pid, processName(pid)))
		}
	}
	return found
}

// processUses looks at the folders, the program, the open and the mapped files
// of a process.
func processUses(pid int, inside func(path string) bool) bool {
	dir := fmt.Sprintf("/proc/%d/", pid)
	for _, name := range []string{"cwd", "root", "exe"} {
		if path, err := os.Readlink(dir + name); err == nil && inside(path) {
			return true
		}
	}
	for _, sub := range []string{"fd", "map_files"} {
		files, err := os.ReadDir(dir + sub)
		if err != nil {
			continue // ended, or not ours to see
		}
		for _, f := range files {
			if path, err := os.Readlink(dir + sub + "/" + f.Name()); err == nil && inside(path) {
				return true
			}
		}
	}
	return false
}

func processName(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if errors.Is(err, os.ErrNotExist) || len(b) == 0 {
		return "ended"
	}
	return strings.TrimSpace(string(b))
}

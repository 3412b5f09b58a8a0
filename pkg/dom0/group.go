package dom0

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// hierarchy keeps groups of processes that a process cannot leave by itself.
type hierarchy interface {
	name() string
	create(group string) error // fs.ErrExist when it is there
	// entry tells how a new process gets into the group.
	entry(group string) (entry, error)
	alive(group string) (bool, error)
	signal(group string, sig unix.Signal) error // to all that are in it now
	kill(group string) error                    // KILL to all, also to those being forked
	wait(ctx context.Context, group string) error
	remove(group string) error // absent is no error
	list() ([]string, error)
	tidy() // removes what is left of the prefix when it is empty
}

// entry is a way into a group: by descriptor at clone, by files the shim writes
// itself into, or by a mark in the environment.
type entry struct {
	dir  *os.File
	join []string
	env  []string
	// bounded: the number of processes in the group has a limit of its own.
	bounded bool
}

func (e entry) close() {
	if e.dir != nil {
		e.dir.Close()
	}
}

// detect chooses the best hierarchy that is mounted here and writable, and the
// v1 controller of the number of processes, or nil.
func detect(prefix string, allowNone bool) (h hierarchy, pids *folder, err error) {
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.FSType != "cgroup2" && i.FSType != "cgroup", false
	})
	if err != nil {
		return nil, nil, fmt.Errorf("look for control groups: %w", err)
	}
	for _, m := range mounts {
		if m.FSType == "cgroup" && hasOption(m.VFSOptions, "pids") && unix.Access(m.Mountpoint, unix.W_OK) == nil {
			pids = &folder{filepath.Join(m.Mountpoint, prefix), m.Mountpoint}
		}
	}
	h, err = choose(mounts, prefix, allowNone)
	return h, pids, err
}

func choose(mounts []*mountinfo.Info, prefix string, allowNone bool) (hierarchy, error) {
	var freezer, systemd string
	for _, m := range mounts {
		if unix.Access(m.Mountpoint, unix.W_OK) != nil {
			continue // mounted read-only, or not ours
		}
		switch {
		case m.FSType == "cgroup2":
			return &unified{folder{filepath.Join(m.Mountpoint, prefix), m.Mountpoint}}, nil
		case hasOption(m.VFSOptions, "freezer"):
			freezer = m.Mountpoint
		case hasOption(m.VFSOptions, "name=systemd"):
			systemd = m.Mountpoint
		}
	}
	if freezer != "" {
		h := &frozen{folder: folder{filepath.Join(freezer, prefix), freezer}}
		if systemd != "" {
			h.systemd = &folder{filepath.Join(systemd, prefix), systemd}
		}
		return h, nil
	}
	if allowNone {
		return &marked{prefix: prefix}, nil
	}
	return nil, ErrNoGroups
}

func hasOption(options, want string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == want {
			return true
		}
	}
	return false
}

// stopGroup ends all processes of a group by TERM, then after grace by KILL,
// and waits until none is left. It does not remove the group.
func stopGroup(ctx context.Context, h hierarchy, group string, grace time.Duration) error {
	alive, err := h.alive(group)
	if err != nil || !alive {
		return err
	}
	if grace > 0 {
		if err := h.signal(group, unix.SIGTERM); err != nil {
			return fmt.Errorf("terminate group %s: %w", group, err)
		}
		limit, cancel := context.WithTimeout(ctx, grace)
		err := h.wait(limit, group)
		cancel()
		if err == nil {
			return nil
		}
	}
	return killGroup(h, group)
}

// killPatience bounds the wait for processes that got KILL: one that the kernel
// does not let go (state D) must not hold us for ever.
const killPatience = 20 * time.Second

func killGroup(h hierarchy, group string) error {
	limit, cancel := context.WithTimeout(context.Background(), killPatience)
	defer cancel()
	if err := h.kill(group); err != nil {
		return fmt.Errorf("kill group %s: %w", group, err)
	}
	if err := h.wait(limit, group); err != nil {
		return fmt.Errorf("group %s still has processes %v after KILL: %w", group, killPatience, err)
	}
	return nil
}

// folder is the place of our groups in one hierarchy.
type folder struct {
	path string // of the prefix
	root string // where the hierarchy is mounted
}

func (f folder) of(group string) string { return filepath.Join(f.path, group) }

func (f folder) create(group string) error {
	for range 100 {
		if err := os.MkdirAll(f.path, 0o755); err != nil {
			return fmt.Errorf("create control group: %w", err)
		}
		err := os.Mkdir(f.of(group), 0o755)
		if !errors.Is(err, fs.ErrNotExist) { // else: someone tidied the prefix
			return err
		}
	}
	return fmt.Errorf("create control group %s: the prefix keeps vanishing", group)
}

func (f folder) list() ([]string, error) {
	dirs, err := os.ReadDir(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list control groups: %w", err)
	}
	var names []string
	for _, d := range dirs {
		if d.IsDir() {
			names = append(names, d.Name())
		}
	}
	return names, nil
}

// remove takes the group and what was made below it away. A group whose last
// process is just going is busy for a moment.
func (f folder) remove(group string) error {
	var err error
	for wait := time.Millisecond; wait < 2*time.Second; wait *= 2 {
		if err = removeTree(f.of(group)); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(wait)
	}
	if err != nil {
		return fmt.Errorf("remove control group %s: %w", group, err)
	}
	return nil
}

// removeTree removes a folder of a cgroup hierarchy: its files go with it.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !gone(err) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// gone tells that a file of a group could not be read because the group, or
// the process in it, is no more.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH)
}

// tidy removes the folders of the prefix as far as they are empty.
func (f folder) tidy() {
	for dir := f.path; dir != f.root && strings.HasPrefix(dir, f.root); dir = filepath.Dir(dir) {
		if unix.Rmdir(dir) != nil {
			return
		}
	}
}

// pids lists the processes of the group and of all groups below it.
func (f folder) pids(group string) ([]int, error) {
	var all []int
	err := filepath.WalkDir(f.of(group), func(path string, d fs.DirEntry, err error) error {
		if gone(err) {
			return nil
		}
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if gone(err) || errors.Is(err, unix.EOPNOTSUPP) { // the latter: a threaded group, listed by its parent
			return nil
		}
		if err != nil {
			return err
		}
		for line := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
				all = append(all, pid)
			}
		}
		return nil
	})
	return all, err
}

// signalEach sends sig to every pid that is still what it was: stays is asked
// again while a descriptor keeps the pid from being given to another process.
func signalEach(pids []int, sig unix.Signal, stays func(pid int) bool) error {
	var errs []error
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == unix.ESRCH || err == unix.EINVAL {
			continue
		}
		if err != nil { // a kernel before 5.3
			if stays(pid) {
				errs = append(errs, ignoreGone(unix.Kill(pid, sig)))
			}
			continue
		}
		if stays(pid) {
			errs = append(errs, ignoreGone(unix.PidfdSendSignal(fd, sig, nil, 0)))
		}
		unix.Close(fd)
	}
	return errors.Join(errs...)
}

func ignoreGone(err error) error {
	if err == unix.ESRCH {
		return nil
	}
	return err
}

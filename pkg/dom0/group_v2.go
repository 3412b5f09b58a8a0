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

	"golang.org/x/sys/unix"
)

// unified is cgroup v2, wherever it is mounted.
type unified struct{ folder }

func (u *unified) name() string { return "cgroup2" }

// entry starts a process straight inside the group. A kernel without
// cgroup.kill (5.14) may not know that either, so there the shim joins.
func (u *unified) entry(group string) (entry, error) {
	dir := u.of(group)
	if unix.Access(filepath.Join(dir, "cgroup.kill"), unix.F_OK) != nil {
		return entry{join: []string{filepath.Join(dir, "cgroup.procs")}}, nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return entry{}, fmt.Errorf("open control group: %w", err)
	}
	return entry{dir: f}, nil
}

func (u *unified) alive(group string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(u.of(group), "cgroup.events"))
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at control group: %w", err)
	}
	return populated(b), nil
}

func populated(events []byte) bool {
	return strings.Contains("\n"+string(events), "\npopulated 1\n")
}

func (u *unified) signal(group string, sig unix.Signal) error {
	pids, err := u.pids(group)
	if err != nil {
		return err
	}
	return signalEach(pids, sig, func(pid int) bool { return u.holds(group, pid) })
}

// holds tells whether the process is in the group now.
func (u *unified) holds(group string, pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return false
	}
	want := "/" + strings.TrimPrefix(u.of(group), u.root+"/")
	for line := range strings.SplitSeq(string(b), "\n") {
		path, ok := strings.CutPrefix(line, "0::")
		if ok && (strings.HasSuffix(path, want) || strings.Contains(path, want+"/")) {
			return true
		}
	}
	return false
}

// kill uses cgroup.kill, which no fork outruns. Without it, it kills until
// nobody is left.
func (u *unified) kill(group string) error {
	err := writeControl(filepath.Join(u.of(group), "cgroup.kill"), "1")
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		if gone(err) {
			return nil
		}
		return err
	}
	for range 1000 {
		if alive, err := u.alive(group); err != nil || !alive {
			return err
		}
		if err := u.signal(group, unix.SIGKILL); err != nil {
			return err
		}
	}
	return nil
}

// wait sleeps on cgroup.events, whose change wakes a poll.
func (u *unified) wait(ctx context.Context, group string) error {
	f, err := os.Open(filepath.Join(u.of(group), "cgroup.events"))
	if gone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watch control group: %w", err)
	}
	defer f.Close()
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch control group: %w", err)
	}
	defer unix.Close(wake)
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-done // it still uses the descriptor
		}
	}()
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if gone(err) {
			return nil
		}
		if n > 0 && !populated(buf[:n]) {
			return nil
		}
		if n == 0 {
			return fmt.Errorf("watch control group %s: %w", group, err)
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}, {Fd: int32(wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(time.Minute/time.Millisecond)); err != nil && err != unix.EINTR {
			return fmt.Errorf("watch control group %s: %w", group, err)
		}
	}
}

// limit bounds memory (bytes) and processes of a group where the controllers
// were given to us, and tells whether the processes are bounded. The sandbox
// has other limits as well.
func (u *unified) limit(group string, memory, pids int64) (bounded bool) {
	has, err := os.ReadFile(filepath.Join(u.path, "cgroup.controllers"))
	if err != nil {
		return false
	}
	for _, c := range []struct {
		name, file string
		value      int64
	}{{"memory", "memory.max", memory}, {"pids", "pids.max", pids}} {
		if !hasOption(strings.Join(strings.Fields(string(has)), ","), c.name) {
			continue
		}
		err := writeControl(filepath.Join(u.path, "cgroup.subtree_control"), "+"+c.name)
		if err == nil {
			err = writeControl(filepath.Join(u.of(group), c.file), strconv.FormatInt(c.value, 10))
		}
		bounded = bounded || err == nil && c.name == "pids"
	}
	return bounded
}

// writeControl writes to a file of a hierarchy in one write and never makes one.
func writeControl(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

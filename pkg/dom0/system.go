package dom0

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/fault"
)

// Options configure a System. The zero value works.
type Options struct {
	// Log gets what no caller can be told: left-over pipes, lost controllers.
	// Nil: nothing is logged.
	Log logrus.FieldLogger

	// SandboxExe is the program that is started to prepare namespaces: any that
	// imports this package. Empty: this program, even when its file was
	// replaced meanwhile.
	SandboxExe string

	// CgroupPrefix is the folder of all groups below the root of the
	// hierarchy. Empty: "patchd". Two daemons on one machine need two.
	CgroupPrefix string

	// Hide lists folders and files that a sandbox must not see: state
	// directories. /run is always hidden.
	Hide []string

	// AllowNoCgroup runs programs also where no hierarchy can be used: groups
	// are then found by a mark in the environment, which a program can drop.
	AllowNoCgroup bool
}

// System is the real Dom0. It needs root. All methods may be called at the
// same time.
type System struct {
	log    logrus.FieldLogger
	exe    string
	hide   []string
	groups hierarchy // nil: none can be used
	pids   *folder   // the v1 controller that bounds a sandbox; nil: there is none

	// patience is how long output is still read after every process of the
	// group has ended: only one that left the group can hold the pipe by then.
	patience time.Duration

	attach sync.Mutex // one loop device at a time: fewer lost races

	mu      sync.Mutex
	closed  bool
	busy    map[string]bool       // groups that a Run or Spawn of ours is filling
	reapers map[*process]struct{} // spawned children that still live
	wg      sync.WaitGroup        // their goroutines
	serial  int
}

var _ Dom0 = (*System)(nil)

// New looks at the machine and changes nothing on it. Of this process it
// changes two things: the core limit becomes 0, so that neither it nor what it
// starts writes secrets into a dump, and descriptors it inherited close on
// exec, so that no patch gets them.
func New(o Options) (*System, error) {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return nil, fmt.Errorf("set core limit: %w", err)
	}
	if err := closeOnExec(3); err != nil {
		return nil, fmt.Errorf("mark descriptors: %w", err)
	}
	s := &System{
		log:      o.Log,
		exe:      o.SandboxExe,
		hide:     o.Hide,
		patience: 2 * time.Second,
		busy:     map[string]bool{},
		reapers:  map[*process]struct{}{},
	}
	if s.log == nil {
		quiet := logrus.New()
		quiet.Out = io.Discard
		s.log = quiet
	}
	if s.exe == "" {
		s.exe = "/proc/self/exe"
	}
	prefix := o.CgroupPrefix
	if prefix == "" {
		prefix = "patchd"
	}
	for _, part := range strings.Split(prefix, "/") {
		if err := ValidateGroup(part); err != nil {
			return nil, fmt.Errorf("control group prefix: %w", err)
		}
	}
	h, pids, err := detect(prefix, o.AllowNoCgroup)
	if err != nil && !errors.Is(err, ErrNoGroups) {
		return nil, err
	}
	if err == nil {
		s.groups, s.pids = h, pids
		s.log.WithField("hierarchy", h.name()).Debug("control groups")
	}
	return s, nil
}

// Close forgets the processes that were spawned: they go on. It waits for what
// this System runs in the background. No call may follow it.
func (s *System) Close() error {
	s.mu.Lock()
	s.closed = true
	for p := range s.reapers {
		p.abandon()
	}
	s.mu.Unlock()
	s.wg.Wait()
	if s.groups != nil {
		s.groups.tidy()
	}
	if s.pids != nil {
		s.pids.tidy()
	}
	return nil
}

// Hierarchy names what groups are made of: "cgroup2", "freezer", "environment"
// or "none".
func (s *System) Hierarchy() string {
	if s.groups == nil {
		return "none"
	}
	return s.groups.name()
}

// effect passes the fault points around f; undo runs when f worked and the
// point after it says that the effect failed.
func effect(name string, f func() error, undo func()) error {
	if err := fault.Point("dom0." + name); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	err := fault.Point("dom0." + name + ".done")
	if err != nil && undo != nil {
		undo()
	}
	return err
}

// SyncFS implements Dom0 by syncfs(2).
func (s *System) SyncFS(ctx context.Context, path string) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return effect("syncfs", func() error {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("sync filesystem: %w", err)
		}
		defer f.Close()
		if err := unix.Syncfs(int(f.Fd())); err != nil {
			return fmt.Errorf("sync filesystem of %s: %w", path, err)
		}
		return nil
	}, nil)
}

// Space implements Dom0 by statfs(2). The blocks kept back for root count as
// free only when this process may use any such reserve.
func (s *System) Space(path string) (Space, error) {
	var st unix.Statfs_t
	if err := retryEINTR(func() error { return unix.Statfs(path, &st) }); err != nil {
		return Space{}, fmt.Errorf("statfs %s: %w", path, err)
	}
	unit := st.Frsize
	if unit == 0 {
		unit = st.Bsize
	}
	free := st.Bavail
	if mayUseReserve() {
		free = st.Bfree
	}
	return Space{Total: int64(st.Blocks) * unit, Free: int64(free) * unit, ReadOnly: st.Flags&unix.ST_RDONLY != 0}, nil
}

func mayUseReserve() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// BootID implements Dom0.
func (s *System) BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// closeOnExec marks every descriptor from first on.
func closeOnExec(first int) error {
	err := unix.CloseRange(uint(first), 1<<32-1, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		return nil
	}
	files, err := os.ReadDir("/proc/self/fd") // a kernel before 5.11
	for _, f := range files {
		if fd, err := strconv.Atoi(f.Name()); err == nil && fd >= first {
			unix.CloseOnExec(fd)
		}
	}
	return err
}

// pause waits for d or until ctx ends, and tells whether it lasted.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

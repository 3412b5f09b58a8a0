package dom0

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// sandboxSpec says what a sandbox is made of.
type sandboxSpec struct {
	Image string
	Hide  []string
	// Processes bounds those of nobody on the whole machine.
	Processes uint64
}

const (
	// stage is where the tree of a sandbox is put together: on a tmpfs that
	// covers the host's /tmp in our own mount namespace.
	stage = "/tmp"
	root  = stage + "/root"
	// imageDir is where the program sees its image.
	imageDir = "/tmp/image"

	nobody = 65534

	sandboxGroupMemory = 1 << 30 // bytes, where the memory controller is ours
	sandboxGroupPids   = 256     // where a controller of their number is ours

	// The limit of processes by user holds for all sandboxes together: one
	// that forks without end would starve the others. So it only has to bound
	// a sandbox where nothing else does.
	sandboxUserPids        = 256
	sandboxUserPidsBounded = 8192
)

// sandboxLimits bound each process of a sandbox. Memory is bounded by DATA,
// which counts what can be written: runtimes such as Go's reserve far more
// address space than they use, and do not start with an AS of 512 MiB.
var sandboxLimits = []struct {
	resource int
	value    uint64
}{
	{unix.RLIMIT_DATA, 512 << 20},
	{unix.RLIMIT_AS, 4 << 30},
	{unix.RLIMIT_FSIZE, 16 << 20},
	{unix.RLIMIT_NOFILE, 256},
	{unix.RLIMIT_MEMLOCK, 64 << 10},
	{unix.RLIMIT_MSGQUEUE, 0},
	{unix.RLIMIT_CORE, 0},
}

// sandbox runs the program as the second process of the namespaces this shim
// was started in, and returns how it ended. The shim, process 1, keeps its
// rights: the program, another user, cannot touch it, and all processes end with it.
func (s *shimSpec) sandbox(life *os.File) (said shimStatus, step string, err error) {
	// Process 1 must outlive the TERM that is meant for the program. Caught
	// signals, unlike ignored ones, are not inherited.
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	go func() { // ends with this process
		life.Read(make([]byte, 1))
		os.Exit(1) // whoever started us is gone, and with process 1 everything goes
	}()
	if err := s.join(); err != nil {
		return said, "control group", err
	}
	if step, err := s.Sandbox.build(); err != nil {
		return said, step, err
	}
	if err := giveStreams(); err != nil {
		return said, "streams", err
	}
	if err := lockDown(s.Sandbox.Processes); err != nil {
		return said, "lock down", err
	}
	pid, err := s.fork()
	if err != nil {
		return said, "exec", err
	}
	said = reapAll(pid)
	unix.Unmount(root+imageDir, 0) // now, so that the loop device is gone when Run returns
	return said, "", nil
}

// fork starts the program as nobody below the new root. A process below
// another root can make no user namespace, and so win no capability back.
func (s *shimSpec) fork() (int, error) {
	files := make([]uintptr, s.Files)
	for i := range files {
		files[i] = uintptr(i)
	}
	path := filepath.Join(imageDir, filepath.Clean(s.Path))
	return syscall.ForkExec(path, append([]string{path}, s.Args...), &syscall.ProcAttr{
		Dir:   filepath.Join(imageDir, filepath.Clean(s.Dir)),
		Env:   s.Env,
		Files: files,
		Sys: &syscall.SysProcAttr{
			Chroot:     root,
			Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{}},
		},
	})
}

// giveStreams lets nobody open /dev/stdout and the like again where they are
// pipes: those belong to whoever made them.
func giveStreams() error {
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFIFO {
			continue
		}
		if err := unix.Fchown(fd, nobody, nobody); err != nil {
			return err
		}
	}
	return nil
}

// build puts the tree of the sandbox together below root.
func (b *sandboxSpec) build() (step string, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return "private mounts", err
	}
	dev, err := attachImage(context.Background(), b.Image, true)
	if err != nil {
		return "attach", err
	}
	defer dev.Close()
	hide := existing(append([]string{"/run"}, b.Hide...))
	if err := readOnlyRoot(); err != nil {
		return "read-only root", err
	}
	if err := fill(root); err != nil {
		return "private folders", err
	}
	if err := cover(hide); err != nil {
		return "hide", err
	}
	image := Mount{Source: dev.Path(), Target: root + imageDir, Type: "ext4", ReadOnly: true, Options: "noload"}
	if err := mount(image); err != nil {
		return "mount", err
	}
	return "", nil
}

// readOnlyRoot makes a copy of the whole tree at root, where nothing can be
// written and no device is one.
func readOnlyRoot() error {
	if err := unix.Mount("stage", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=64k,mode=0755"); err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("copy of the tree: %w", err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	err := unix.MountSetattr(unix.AT_FDCWD, root, unix.AT_RECURSIVE, &attr)
	if err == unix.ENOSYS {
		return remountEach() // a kernel before 5.12
	}
	if err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}

// remountEach sets mount by mount what mount_setattr sets at once.
func remountEach() error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV)
		if hasOption(m.Options, "noexec") {
			flags |= unix.MS_NOEXEC
		}
		if err := unix.Mount("", m.Mountpoint, "", flags, ""); err != nil && !hidden(m, mounts) {
			return fmt.Errorf("remount %s read-only: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// hidden tells whether a later mount covers m, so that its path leads elsewhere.
func hidden(m *mountinfo.Info, mounts []*mountinfo.Info) bool {
	for _, o := range mounts {
		if o.ID != m.ID && (o.Mountpoint == m.Mountpoint || strings.HasPrefix(m.Mountpoint, o.Mountpoint+"/")) && o.ID > m.ID {
			return true
		}
	}
	return false
}

// fill gives the tree a /tmp that can be written, its own /proc, and a /dev
// with the five devices that every program may use.
func fill(root string) error {
	if err := unix.Mount("tmp", root+"/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=16m,nr_inodes=4096,mode=1777"); err != nil {
		return fmt.Errorf("/tmp: %w", err)
	}
	if err := os.Mkdir(root+imageDir, 0o755); err != nil {
		return err
	}
	quiet := uintptr(unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount("proc", root+"/proc", "proc", quiet, "hidepid=2"); err != nil {
		return fmt.Errorf("/proc: %w", err)
	}
	dev := root + "/dev"
	if err := unix.Mount("dev", dev, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=64k,mode=0755"); err != nil {
		return fmt.Errorf("/dev: %w", err)
	}
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9} {
		path := filepath.Join(dev, name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))); err != nil {
			return fmt.Errorf("/dev/%s: %w", name, err)
		}
		if err := os.Chmod(path, 0o666); err != nil {
			return err
		}
	}
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink(to, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	return unix.Mount("", dev, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, "")
}

// existing resolves the paths that are there to what they really name.
func existing(paths []string) []string {
	var real []string
	for _, p := range paths {
		if p, err := filepath.EvalSymlinks(p); err == nil && filepath.IsAbs(p) && p != "/" {
			real = append(real, p)
		}
	}
	return real
}

// cover puts an empty folder or file over each path. What lies in a folder that
// is covered or replaced already is gone from sight.
func cover(paths []string) error {
	for _, p := range paths {
		st, err := os.Lstat(root + p)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		flags := uintptr(unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
		if st.IsDir() {
			err = unix.Mount("hidden", root+p, "tmpfs", flags, "size=4k,mode=0755")
		} else {
			err = unix.Mount(root+"/dev/null", root+p, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

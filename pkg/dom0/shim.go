package dom0

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The shim is this program, started again under another name to do between
// fork and exec what Go cannot: it joins control groups, arranges the mounts of
// its new namespace, and then becomes the program, or the first process of a
// sandbox. What to do comes by a descriptor, so that no file is left; how it
// went goes back through a pipe that closes on exec.

// shimName is argument 0 of the shim; argument 1 is the number of its first
// descriptor: specification, status, life line.
const shimName = "patchd-shim"

// maxSpec bounds a specification: JSON may take six bytes for one.
const maxSpec = 6*maxCmd + 1<<16

// shimSpec says what the shim is to do.
type shimSpec struct {
	Path, Dir     string
	Args, Env     []string
	Files         int      // how many descriptors from 0 on the program gets
	Join          []string // cgroup.procs and tasks files
	PrivateMounts bool
	Sandbox       *sandboxSpec
}

func (s *System) shimSpec(c Cmd, e entry, dir string, env []string) shimSpec {
	spec := shimSpec{
		Path: c.Path, Dir: dir, Args: c.Args, Env: env,
		Files: 3 + len(c.ExtraFiles), Join: e.join, PrivateMounts: c.PrivateMounts,
	}
	if c.Sandbox != nil {
		spec.Sandbox = &sandboxSpec{Image: c.Sandbox.Image, Hide: s.hide, Processes: sandboxUserPids}
		if e.bounded {
			spec.Sandbox.Processes = sandboxUserPidsBounded
		}
	}
	return spec
}

func (s shimSpec) cloneFlags() uintptr {
	var flags uintptr
	if s.PrivateMounts {
		flags = unix.CLONE_NEWNS
	}
	if s.Sandbox != nil {
		flags = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
	}
	return flags
}

// shimStatus is what the shim says: that it failed, or, from a sandbox, how the
// program ended. A shim that became the program says nothing.
type shimStatus struct {
	Failed bool
	Step   string
	Text   string
	Errno  int

	Ended     bool
	ExitCode  int
	Signal    int
	Straggler bool
}

// failure makes the error of the parent out of what the shim said.
func (s shimStatus) failure(path string) error {
	err := errors.New(s.Text)
	if s.Errno != 0 {
		err = syscall.Errno(s.Errno)
		if s.Text != err.Error() {
			err = fmt.Errorf("%.500s (%w)", s.Text, err)
		}
	}
	return &StartError{Step: s.Step, Path: path, Err: err}
}

// shimLink is the parent's side.
type shimLink struct {
	child  []*os.File
	status *os.File
	life   *os.File // nil without a sandbox: closing it ends the sandbox
}

func newShimLink(spec shimSpec, life bool) (l *shimLink, err error) {
	l = &shimLink{}
	defer func() {
		if err != nil {
			l.closeChild()
			l.closeParent()
		}
	}()
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	fd, err := unix.MemfdCreate("patchd-shim", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	mem := os.NewFile(uintptr(fd), "specification")
	l.child = append(l.child, mem)
	if _, err := mem.Write(text); err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	if _, err := mem.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("shim: %w", err)
	}
	theirs, ours, err := pipe(true)
	if err != nil {
		return nil, err
	}
	l.child, l.status = append(l.child, theirs), ours
	if !life {
		return l, nil
	}
	if theirs, ours, err = pipe(false); err != nil {
		return nil, err
	}
	l.child, l.life = append(l.child, theirs), ours
	return l, nil
}

func (l *shimLink) closeChild() {
	for _, f := range l.child {
		f.Close()
	}
	l.child = nil
}

func (l *shimLink) closeParent() {
	if l == nil {
		return
	}
	if l.status != nil {
		l.status.Close()
	}
	if l.life != nil {
		l.life.Close()
	}
}

// read takes what the shim said until its end of the pipe closes.
func (l *shimLink) read(deadline time.Time) (shimStatus, error) {
	var said shimStatus
	if err := l.status.SetReadDeadline(deadline); err != nil {
		return said, fmt.Errorf("shim: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(l.status, 1<<16))
	if err != nil {
		return said, fmt.Errorf("shim does not answer: %w", err)
	}
	if len(text) == 0 {
		return said, nil
	}
	if err := json.Unmarshal(text, &said); err != nil {
		return said, fmt.Errorf("shim answered %.100q: %w", text, err)
	}
	return said, nil
}

// init turns this process into the shim when it was started as one. Every
// program that can start a shim can so be one: it cannot be forgotten in a
// main or TestMain, where the tests would start themselves over and over. And
// it comes before the initialisation of most other packages, which costs more
// than all that the shim does.
func init() { MaybeShim() }

// MaybeShim does not return in a process that was started as the shim. To
// import this package is enough: init calls it.
func MaybeShim() {
	if len(os.Args) != 2 || os.Args[0] != shimName {
		return
	}
	runtime.LockOSThread() // some of what follows belongs to a thread
	os.Exit(shim(os.Args[1]))
}

// shim is the life of the shim; it returns its exit status.
func shim(arg string) int {
	base, err := strconv.Atoi(arg)
	if err != nil || base < 3 || base > 1000 {
		fmt.Fprintln(os.Stderr, "patchd-shim is started by patchd only")
		return 2
	}
	spec, err := readSpec(base)
	if err != nil {
		fmt.Fprintln(os.Stderr, "patchd-shim is started by patchd only:", err)
		return 2
	}
	status := os.NewFile(uintptr(base+1), "status")
	var said shimStatus
	var step string
	if err = closeOnExec(base); err != nil {
		step = "mark descriptors"
	} else if spec.Sandbox != nil {
		said, step, err = spec.sandbox(os.NewFile(uintptr(base+2), "life line"))
	} else {
		step, err = spec.become()
	}
	if err != nil {
		said = shimStatus{Failed: true, Step: step, Text: err.Error()}
		var errno syscall.Errno
		if errors.As(err, &errno) {
			said.Errno = int(errno)
		}
	}
	answer, err := json.Marshal(said)
	if err == nil {
		_, err = status.Write(answer)
	}
	if err != nil || said.Failed {
		return 1
	}
	return 0
}

func readSpec(fd int) (spec shimSpec, err error) {
	f := os.NewFile(uintptr(fd), "specification")
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSpec))
	if err != nil {
		return spec, err
	}
	return spec, json.Unmarshal(text, &spec)
}

// join enters the control groups.
func (s *shimSpec) join() error {
	for _, file := range s.Join {
		if err := writeControl(file, "0"); err != nil {
			return err
		}
	}
	return nil
}

// become turns the shim into the program; it returns only on failure.
func (s *shimSpec) become() (step string, err error) {
	if err := s.join(); err != nil {
		return "control group", err
	}
	if s.PrivateMounts {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return "private mounts", err
		}
	}
	if err := unix.Chdir(s.Dir); err != nil {
		return "folder", err
	}
	return "exec", syscall.Exec(s.Path, append([]string{s.Path}, s.Args...), s.Env)
}

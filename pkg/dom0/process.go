package dom0

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a child of ours.
type process struct {
	pid  int
	shim *shimLink // nil: the program was started straight
	poll *os.File  // the pidfd; nil on kernels before 5.4

	ended  chan struct{} // closed once status holds the end
	status unix.WaitStatus
	lost   error // why the end was not learned

	stop context.CancelFunc // for the fallback without a pidfd
	ctx  context.Context
	once sync.Once
}

// errAbandoned ends the wait for a process that we no longer care for.
var errAbandoned = errors.New("no longer waited for")

// start starts c with the given standard streams inside a group. The caller
// runs wait in a goroutine of its own.
func (s *System) start(c Cmd, e entry, std []*os.File) (p *process, err error) {
	var files []uintptr
	for _, f := range std {
		files = append(files, f.Fd())
	}
	for _, f := range c.ExtraFiles {
		files = append(files, f.Fd())
	}
	sys := &syscall.SysProcAttr{Setsid: true}
	if e.dir != nil {
		sys.UseCgroupFD, sys.CgroupFD = true, int(e.dir.Fd())
	}
	attr := &syscall.ProcAttr{Dir: c.Dir, Env: slices.Concat(c.Env, e.env), Sys: sys}
	if attr.Dir == "" {
		attr.Dir = "/"
	}
	argv := append([]string{c.Path}, c.Args...)
	path := c.Path
	var link *shimLink
	if c.PrivateMounts || c.Sandbox != nil || len(e.join) > 0 {
		spec := s.shimSpec(c, e, attr.Dir, attr.Env)
		if link, err = newShimLink(spec, c.Sandbox != nil); err != nil {
			return nil, err
		}
		defer link.closeChild()
		path, argv = s.exe, []string{shimName, fmt.Sprint(len(files))}
		for _, f := range link.child {
			files = append(files, f.Fd())
		}
		attr.Env, attr.Dir = e.env, "/"
		sys.Cloneflags = spec.cloneFlags()
	}
	p = &process{pid: -1, shim: link, ended: make(chan struct{})}
	p.ctx, p.stop = context.WithCancel(context.Background())
	pidfd := -1
	sys.PidFD = &pidfd
	attr.Files = files
	p.pid, err = forkExec(path, argv, attr)
	runtime.KeepAlive(std)
	runtime.KeepAlive(c.ExtraFiles)
	if err != nil {
		p.stop()
		link.closeParent()
		return nil, &StartError{Step: "exec", Path: c.Path, Err: err}
	}
	p.adopt(pidfd)
	return p, nil
}

// adopt makes the pidfd something a goroutine can wait for without a thread.
func (p *process) adopt(pidfd int) {
	if pidfd < 0 {
		return
	}
	if unix.SetNonblock(pidfd, true) != nil {
		unix.Close(pidfd)
		return
	}
	p.poll = os.NewFile(uintptr(pidfd), "pidfd")
}

// forkExec starts a program with umask 022. The umask belongs to a thread that
// has left the others' filesystem attributes and ends with this call.
func forkExec(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends here
		if err = unix.Unshare(unix.CLONE_FS); err != nil {
			err = fmt.Errorf("unshare: %w", err)
			return
		}
		unix.Umask(0o022)
		pid, err = syscall.ForkExec(path, argv, attr)
	}()
	<-done
	return pid, err
}

// wait learns the end of the process and closes p.ended. It returns early when
// the process is abandoned.
func (p *process) wait() {
	defer close(p.ended)
	defer p.stop()
	reap := func() bool {
		pid, err := unix.Wait4(p.pid, &p.status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			return false
		}
		if err != nil {
			p.lost = fmt.Errorf("wait for process %d: %w", p.pid, err)
			return true
		}
		return pid == p.pid
	}
	if p.poll != nil {
		defer p.poll.Close()
		conn, err := p.poll.SyscallConn()
		if err == nil {
			err = conn.Read(func(uintptr) bool { return reap() })
		}
		if err == nil {
			return
		}
		if errors.Is(err, os.ErrClosed) {
			p.lost = errAbandoned
			return
		}
	}
	for !reap() {
		if !pause(p.ctx, 20*time.Millisecond) {
			p.lost = errAbandoned
			return
		}
	}
}

// abandon makes wait return soon. The process goes on.
func (p *process) abandon() {
	p.once.Do(func() {
		p.stop()
		if p.poll != nil {
			p.poll.Close()
		}
	})
}

// result is how the process ended, as the kernel says.
func (p *process) result() Result {
	if p.status.Signaled() {
		return Result{ExitCode: -1, Signal: int(p.status.Signal())}
	}
	return Result{ExitCode: p.status.ExitStatus()}
}

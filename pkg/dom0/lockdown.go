package dom0

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// lockDown takes from this thread, and from what it starts as another user,
// every way to more rights. The rlimits hold for the whole process; processes
// is the one of their number.
func lockDown(processes uint64) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP+8; c++ { // a newer kernel may know more
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err == unix.EINVAL {
			break
		} else if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil && err != unix.EINVAL {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	if err := dropInheritable(); err != nil {
		return fmt.Errorf("clear inheritable capabilities: %w", err)
	}
	// A session keyring of its own: the daemon's may hold keys. Kernels can
	// be built without.
	if _, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err != nil && err != unix.ENOSYS {
		return fmt.Errorf("new keyring: %w", err)
	}
	writeControl("/proc/self/oom_score_adj", "1000") // first to go when memory is short
	for _, l := range sandboxLimits {
		if err := lower(l.resource, l.value); err != nil {
			return fmt.Errorf("limit %d: %w", l.resource, err)
		}
	}
	if err := lower(unix.RLIMIT_NPROC, processes); err != nil {
		return fmt.Errorf("limit of processes: %w", err)
	}
	unix.Umask(0o022)
	return nil
}

// lower sets a limit, unless a lower one holds already.
func lower(resource int, value uint64) error {
	var now unix.Rlimit
	if err := unix.Getrlimit(resource, &now); err != nil {
		return err
	}
	hard := min(now.Max, value)
	return unix.Setrlimit(resource, &unix.Rlimit{Cur: hard, Max: hard})
}

// dropInheritable empties the inheritable set. The permitted set stays: it is
// what lets process 1 become nobody in the child, where it is then lost.
func dropInheritable() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return err
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return unix.Capset(&hdr, &data[0])
}

// reapAll waits for the program, ends what it left behind and waits for that
// too, as process 1 of a namespace must.
func reapAll(program int) shimStatus {
	said := shimStatus{Ended: true}
	over := false
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return said // ECHILD: nobody is left
		}
		switch {
		case pid == program:
			over = true
			said.ExitCode = ws.ExitStatus()
			if ws.Signaled() {
				said.Signal = int(ws.Signal())
			}
			time.AfterFunc(settleTime, func() { unix.Kill(-1, unix.SIGKILL) })
		case over && ws.Signaled() && ws.Signal() == unix.SIGKILL:
			said.Straggler = true
		}
	}
}

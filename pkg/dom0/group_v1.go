package dom0

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// frozen is the freezer of cgroup v1: what is frozen can neither fork nor end,
// so all of it can be signalled.
type frozen struct {
	folder
	// systemd is the hierarchy by which systemd of that age finds the
	// processes of a service: to outlive the service, leave it as well.
	systemd *folder
}

func (v *frozen) name() string { return "freezer" }

func (v *frozen) create(group string) error {
	if err := v.folder.create(group); err != nil {
		return err
	}
	if v.systemd == nil {
		return nil
	}
	if err := os.MkdirAll(v.systemd.of(group), 0o755); err != nil {
		return fmt.Errorf("create control group: %w", err)
	}
	return nil
}

func (v *frozen) entry(group string) (entry, error) {
	e := entry{join: []string{filepath.Join(v.of(group), "cgroup.procs")}}
	if v.systemd != nil {
		e.join = append(e.join, filepath.Join(v.systemd.of(group), "cgroup.procs"))
	}
	return e, nil
}

func (v *frozen) alive(group string) (bool, error) {
	pids, err := v.pids(group)
	if err != nil {
		return false, fmt.Errorf("look at control group: %w", err)
	}
	return len(pids) > 0, nil
}

// signal freezes, signals and thaws. What does not freeze in time (a process
// in state D) is signalled all the same.
func (v *frozen) signal(group string, sig unix.Signal) error {
	state := filepath.Join(v.of(group), "freezer.state")
	if err := writeControl(state, "FROZEN"); err != nil {
		if gone(err) {
			return nil
		}
		return err
	}
	for wait := 100 * time.Microsecond; wait < 200*time.Millisecond; wait *= 2 {
		b, err := os.ReadFile(state)
		if err != nil || strings.TrimSpace(string(b)) == "FROZEN" {
			break
		}
		time.Sleep(wait)
	}
	defer v.thaw(group)
	pids, err := v.pids(group)
	if err != nil {
		return err
	}
	return signalEach(pids, sig, func(int) bool { return true })
}

// thaw lets the group go on, and every group below it that a program froze.
func (v *frozen) thaw(group string) {
	filepath.WalkDir(v.of(group), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			writeControl(filepath.Join(path, "freezer.state"), "THAWED")
		}
		return nil
	})
}

func (v *frozen) kill(group string) error { return v.signal(group, unix.SIGKILL) }

// wait polls: this hierarchy tells nobody.
func (v *frozen) wait(ctx context.Context, group string) error {
	for d := time.Millisecond; ; d = min(2*d, 50*time.Millisecond) {
		if alive, err := v.alive(group); err != nil || !alive {
			return err
		}
		if !pause(ctx, d) {
			return context.Cause(ctx)
		}
	}
}

func (v *frozen) remove(group string) error {
	if err := v.folder.remove(group); err != nil {
		return err
	}
	if v.systemd == nil {
		return nil
	}
	return v.systemd.remove(group)
}

func (v *frozen) tidy() {
	v.folder.tidy()
	if v.systemd != nil {
		v.systemd.tidy()
	}
}

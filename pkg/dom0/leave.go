package dom0

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// LeaveGroup takes this process out of the groups of its own prefix. It is for
// a daemon that a patch has started: what is left of the patch is killed when
// it ends, and the daemon must not be. left tells whether it was in one. A
// group made of the environment ("environment") cannot be left.
func (s *System) LeaveGroup() (left bool, err error) {
	var folders []folder
	switch h := s.groups.(type) {
	case *unified:
		folders = append(folders, h.folder)
	case *frozen:
		folders = append(folders, h.folder)
		if h.systemd != nil {
			folders = append(folders, *h.systemd)
		}
	}
	if s.pids != nil {
		folders = append(folders, *s.pids)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false, fmt.Errorf("leave the control group: %w", err)
	}
	var errs []error
	for _, f := range folders {
		if !within(string(own), "/"+filepath.Base(f.path)+"/") {
			continue
		}
		left = true
		err := writeControl(filepath.Join(f.root, "cgroup.procs"), strconv.Itoa(os.Getpid()))
		if err != nil {
			errs = append(errs, fmt.Errorf("leave the control group: %w", err))
		}
	}
	return left, errors.Join(errs...)
}

// within tells whether a line of /proc/self/cgroup names a group below dir.
func within(cgroups, dir string) bool {
	for line := range strings.SplitSeq(cgroups, "\n") {
		if parts := strings.SplitN(line, ":", 3); len(parts) == 3 && strings.Contains(parts[2]+"/", dir) {
			return true
		}
	}
	return false
}

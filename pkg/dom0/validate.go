package dom0

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// StartError says that a program could not be started. Step is "exec" when
// the program itself was refused by the kernel (absent, not executable, not a
// program), "mount" when the filesystem in the image of a sandbox could not be
// mounted; both are the fault of what was to be run. Any other step, "attach"
// for one, is the fault of this machine.
type StartError struct {
	Step string
	Path string
	Err  error // usually a syscall.Errno: errors.Is(err, fs.ErrNotExist) works
}

func (e *StartError) Error() string {
	return fmt.Sprintf("start %s: %s: %v", e.Path, e.Step, e.Err)
}

// Unwrap gives the cause.
func (e *StartError) Unwrap() error { return e.Err }

// maxCmd bounds path, arguments and environment of a program together, in
// bytes; the kernel takes 2 MiB at most.
const maxCmd = 2 << 20

// Validate tells what is wrong with m: a relative path, no type.
func (m Mount) Validate() error {
	switch {
	case m.Type == "":
		return fmt.Errorf("mount %s: no filesystem type", m.Target)
	case !filepath.IsAbs(m.Target):
		return fmt.Errorf("mount: target %q is not absolute", m.Target)
	case m.Source == "":
		return fmt.Errorf("mount %s: no source", m.Target)
	case len(m.Options) >= 4096:
		return fmt.Errorf("mount %s: options of %d bytes", m.Target, len(m.Options))
	case strings.ContainsRune(m.Source+m.Target+m.Type+m.Options, 0):
		return fmt.Errorf("mount %q: zero byte", m.Target)
	}
	return nil
}

// Validate tells what is wrong with c, as far as c alone shows it.
func (c Cmd) Validate() error {
	if !filepath.IsAbs(c.Path) {
		return fmt.Errorf("run: path %q is not absolute", c.Path)
	}
	if c.Dir != "" && !filepath.IsAbs(c.Dir) {
		return fmt.Errorf("run %s: folder %q is not absolute", c.Path, c.Dir)
	}
	if c.Timeout < 0 || c.Grace < 0 {
		return fmt.Errorf("run %s: negative time", c.Path)
	}
	if len(c.ExtraFiles) > 64 {
		return fmt.Errorf("run %s: %d extra files", c.Path, len(c.ExtraFiles))
	}
	if c.Sandbox != nil && !filepath.IsAbs(c.Sandbox.Image) {
		return fmt.Errorf("run %s: image %q is not absolute", c.Path, c.Sandbox.Image)
	}
	size := len(c.Path) + len(c.Dir)
	for _, list := range [][]string{{c.Path, c.Dir}, c.Args, c.Env} {
		for _, s := range list {
			if strings.ContainsRune(s, 0) {
				return fmt.Errorf("run %s: zero byte in an argument", c.Path)
			}
			size += len(s)
		}
	}
	if size > maxCmd {
		return fmt.Errorf("run %s: %d bytes of arguments", c.Path, size)
	}
	if c.Group == "" {
		return nil
	}
	return ValidateGroup(c.Group)
}

// ValidateSpawn tells what is wrong with c for Spawn: what holds for Run, and
// that nothing is asked that needs a living parent.
func (c Cmd) ValidateSpawn() error {
	switch {
	case c.Group == "":
		return fmt.Errorf("spawn %s: no group", c.Path)
	case c.Timeout != 0:
		return fmt.Errorf("spawn %s: a timeout needs a parent that lives", c.Path)
	case c.Sandbox != nil:
		return fmt.Errorf("spawn %s: a sandbox dies with its parent", c.Path)
	}
	return c.Validate()
}

// ValidateGroup tells whether name can name a control group: one path element
// of letters, digits, "-", "_" and ".", not beginning with ".", 128 bytes at most.
func ValidateGroup(name string) error {
	if name == "" || len(name) > 128 || name[0] == '.' {
		return fmt.Errorf("group %q: bad length or dot", name)
	}
	for _, r := range name {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		case r == '-', r == '_', r == '.':
		default:
			return fmt.Errorf("group %q: %q is not allowed", name, r)
		}
	}
	return nil
}

// ErrNoGroups says that this machine offers neither cgroup v2 nor the v1
// freezer, and that Options.AllowNoCgroup was not set.
var ErrNoGroups = errors.New("neither cgroup v2 nor the v1 freezer can be used: processes could escape; mount cgroup2 or allow running without")

// ErrGroupBusy says that a program still lives in the control group that a new
// one was to run in.
var ErrGroupBusy = errors.New("control group is in use")

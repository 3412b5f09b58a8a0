package dom0

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// marked is the last resort: a process belongs to the group whose name it
// carries in its environment, which children inherit. A program that clears
// its environment escapes.
type marked struct{ prefix string }

const mark = "PATCHD_GROUP="

func (m *marked) name() string { return "environment" }

func (m *marked) create(string) error { return nil }

func (m *marked) entry(group string) (entry, error) {
	return entry{env: []string{mark + m.prefix + "/" + group}}, nil
}

// alive looks more than once: a process may be forked behind the back of a look.
func (m *marked) alive(group string) (bool, error) {
	found := false
	for range 3 {
		err := m.each(func(_ int, g string) bool {
			found = g == group
			return !found
		})
		if found || err != nil {
			return found, err
		}
	}
	return false, nil
}

func (m *marked) signal(group string, sig unix.Signal) error {
	var pids []int
	err := m.each(func(pid int, g string) bool {
		if g == group {
			pids = append(pids, pid)
		}
		return true
	})
	stays := func(pid int) bool {
		g, ok := m.groupOf(pid)
		return ok && g == group
	}
	return errors.Join(err, signalEach(pids, sig, stays))
}

func (m *marked) kill(group string) error {
	for range 1000 {
		if alive, err := m.alive(group); err != nil || !alive {
			return err
		}
		if err := m.signal(group, unix.SIGKILL); err != nil {
			return err
		}
	}
	return nil
}

func (m *marked) wait(ctx context.Context, group string) error {
	for d := time.Millisecond; ; d = min(2*d, 100*time.Millisecond) {
		if alive, err := m.alive(group); err != nil || !alive {
			return err
		}
		if !pause(ctx, d) {
			return context.Cause(ctx)
		}
	}
}

func (m *marked) remove(string) error { return nil }

func (m *marked) tidy() {}

func (m *marked) list() ([]string, error) {
	var names []string
	err := m.each(func(_ int, g string) bool {
		names = append(names, g)
		return true
	})
	slices.Sort(names)
	return slices.Compact(names), err
}

// each calls f for every marked process until f says no.
func (m *marked) each(f func(pid int, group string) bool) error {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("look for processes: %w", err)
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if g, ok := m.groupOf(pid); ok && !f(pid, g) {
			return nil
		}
	}
	return nil
}

// groupOf reads the mark of one process. In the middle of an exec it has no
// environment for a moment; a zombie never has one again.
func (m *marked) groupOf(pid int) (string, bool) {
	dir := "/proc/" + strconv.Itoa(pid)
	env := readSome(dir + "/environ")
	for try := 0; len(env) == 0 && try < 200 && inExec(dir); try++ {
		time.Sleep(time.Millisecond)
		env = readSome(dir + "/environ")
	}
	for kv := range bytes.SplitSeq(env, []byte{0}) {
		if path, ok := strings.CutPrefix(string(kv), mark+m.prefix+"/"); ok && ValidateGroup(path) == nil {
			return path, true
		}
	}
	return "", false
}

// inExec tells whether a process has a program and neither arguments nor
// environment yet. Kernel threads and zombies have no program.
func inExec(dir string) bool {
	if _, err := os.Readlink(dir + "/exe"); err != nil {
		return false
	}
	return len(readSome(dir+"/cmdline")) == 0
}

// readSome reads a file of /proc; what cannot be read is empty.
func readSome(path string) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCmd))
	if err != nil {
		return nil
	}
	return b
}

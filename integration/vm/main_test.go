//go:build vm

package vm

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/dom0"
)

func TestMain(m *testing.M) {
	flag.Parse()
	lab.Main(m)
}

// sequences bounds the random sequences of the suite: how many, and of how many
// calls. A program takes 50 times as long to start as outside.
func sequences(t *testing.T, checks, steps string) {
	t.Helper()
	must(t, flag.Set("rapid.checks", checks))
	must(t, flag.Set("rapid.steps", steps))
}

// system is the real dom0.
func system(t *testing.T) *dom0.System {
	t.Helper()
	d, err := dom0.New(dom0.Options{})
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
}

// run runs a program of the guest and gives what it wrote.
func run(t testing.TB, command ...string) string {
	t.Helper()
	out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", command, err, out)
	}
	return strings.TrimSpace(string(out))
}

// shell runs a line of shell.
func shell(line string) error {
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", line, err, out)
	}
	return nil
}

// eventually tries f until it succeeds, for 90 s at most.
func eventually(t *testing.T, what string, f func() error) time.Duration {
	t.Helper()
	begin := time.Now()
	for {
		err := f()
		if err == nil {
			return time.Since(begin)
		}
		if time.Since(begin) > 90*time.Second {
			t.Fatalf("%s: not within 90 s: %v", what, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// disk is a loop device on a sparse file of size bytes; it goes with t.
func disk(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	dev := run(t, "losetup", "--find", "--show", path)
	t.Cleanup(func() { run(t, "losetup", "--detach", dev) })
	return dev
}

// within fails the test unless f ends in time, and gives how long it took.
func within(t *testing.T, what string, limit time.Duration, f func()) time.Duration {
	t.Helper()
	start := time.Now()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatalf("%s did not end within %s", what, limit)
	}
	return time.Since(start)
}

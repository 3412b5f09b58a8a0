package dom0

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// shims gives c straight and through the shim: both must behave alike.
func shims(c Cmd) map[string]Cmd {
	private := c
	private.PrivateMounts = true
	return map[string]Cmd{"straight": c, "private mounts": private}
}

func TestProgramGetsWhatCmdSaysAndNothingElse(t *testing.T) {
	s := newSystem(t, Options{})
	dir := t.TempDir()
	script := `pwd; umask; ulimit -c; cat; tr '\0' ';' < /proc/$$/environ; echo; ps -o sid= -p $$ | tr -d ' '; echo $$; exec ls -x /proc/self/fd`
	for name, c := range shims(Cmd{Path: "/bin/sh", Args: []string{"-c", script}, Env: []string{"A=b", "PATH=/usr/bin:/bin"}, Dir: dir, Group: "g"}) {
		t.Run(name, func(t *testing.T) {
			c.Stdin = strings.NewReader("from stdin\n")
			r, out := run(t, s, c)
			lines := strings.Split(out, "\n")
			want := []string{dir, "0022", "0", "from stdin", "A=b;PATH=/usr/bin:/bin;"}
			if r != (Result{}) || len(lines) < 8 || strings.Join(lines[:5], "\n") != strings.Join(want, "\n") {
				t.Fatalf("%+v %q", r, out)
			}
			if lines[5] != lines[6] {
				t.Errorf("not a session of its own: %q %q", lines[5], lines[6])
			}
			if lines[7] != "0  1  2  3" { // 3 is the folder itself
				t.Errorf("descriptors %q", lines[7])
			}
		})
	}
}

func TestNilStreamsAreDevNull(t *testing.T) {
	s := newSystem(t, Options{})
	for name, c := range shims(sh("cat && test -z \"$(env | grep -v -e PWD -e PATH -e _ -e SHLVL)\" && echo lost && pwd")) {
		c.Env = nil
		r, err := s.Run(t.Context(), c)
		if err != nil || r != (Result{}) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

func TestExtraFilesAreDescriptorThreeAndOn(t *testing.T) {
	s := newSystem(t, Options{})
	for name, c := range shims(sh("echo three >&3; echo four >&4")) {
		t.Run(name, func(t *testing.T) {
			var files []*os.File
			for range 2 {
				f, err := os.Create(filepath.Join(t.TempDir(), "f"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				files = append(files, f)
				c.ExtraFiles = append(c.ExtraFiles, f)
			}
			if r, out := run(t, s, c); r.ExitCode != 0 {
				t.Fatalf("%+v %s", r, out)
			}
			for i, want := range []string{"three\n", "four\n"} {
				if got, err := os.ReadFile(files[i].Name()); err != nil || string(got) != want {
					t.Errorf("%q, %v", got, err)
				}
			}
		})
	}
}

func TestWhatCannotStartIsAStartError(t *testing.T) {
	s := newSystem(t, Options{})
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("not a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{"/absent": os.ErrNotExist, "/etc/passwd": os.ErrPermission, text: unix.ENOEXEC} {
		for name, c := range shims(Cmd{Path: path, Group: "g"}) {
			_, runErr := s.Run(t.Context(), c)
			_, spawnErr := s.Spawn(t.Context(), c)
			for _, err := range []error{runErr, spawnErr} {
				var start *StartError
				if !errors.As(err, &start) || start.Step != "exec" || !errors.Is(err, want) {
					t.Errorf("%s, %s: %v", path, name, err)
				}
			}
		}
	}
}

func TestContextEndsTheProgram(t *testing.T) {
	s := newSystem(t, Options{})
	why := errors.New("task cancelled")
	for name, c := range shims(sh("trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.01; done")) {
		ctx, cancel := context.WithCancelCause(t.Context())
		var out bytes.Buffer
		c.Group, c.Grace = "g", time.Minute
		c.Stdout = writerFunc(func(p []byte) (int, error) {
			cancel(why) // as soon as it says up
			return out.Write(p)
		})
		r, err := s.Run(ctx, c)
		if !errors.Is(err, why) || r != (Result{ExitCode: 7}) || out.String() != "up\nbye\n" {
			t.Errorf("%s: %+v, %v, %q", name, r, err, out.String())
		}
		cancel(nil)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestAFailingWriterDoesNotStopTheProgram(t *testing.T) {
	s := newSystem(t, Options{})
	c := sh("head -c 1000000 /dev/zero; echo done >&2")
	var stderr bytes.Buffer
	c.Stdout = writerFunc(func([]byte) (int, error) { return 0, io.ErrShortWrite })
	c.Stderr = &stderr
	r, err := s.Run(t.Context(), c)
	if err != nil || r != (Result{}) || stderr.String() != "done\n" {
		t.Errorf("%+v, %v, %q", r, err, stderr.String())
	}
}

func TestEqualWritersShareOnePipe(t *testing.T) {
	s := newSystem(t, Options{})
	_, out := run(t, s, sh("for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done"))
	if out != "o1\ne1\no2\ne2\no3\ne3\no4\ne4\no5\ne5\n" {
		t.Errorf("%q", out)
	}
	if same(writerFunc(nil), writerFunc(nil)) {
		t.Error("two writers that cannot be compared are one")
	}
}

// capped keeps the first n bytes.
type capped struct {
	n    int
	kept bytes.Buffer
	all  int64
}

func (c *capped) Write(p []byte) (int, error) {
	c.all += int64(len(p))
	c.kept.Write(p[:min(len(p), c.n-c.kept.Len())])
	return len(p), nil
}

func TestEndlessOutputIsBoundedInMemoryAndTime(t *testing.T) {
	s := newSystem(t, Options{})
	image := newImage(t, map[string]string{"patch": "#!/bin/sh\nyes | head -c 10G\n"})
	for name, c := range map[string]Cmd{
		"program": {Path: "/bin/sh", Args: []string{"-c", "yes | head -c 10G"}, Env: []string{"PATH=/usr/bin:/bin"}, Group: "g"},
		"sandbox": {Path: "/patch", Env: []string{"PATH=/usr/bin:/bin"}, Sandbox: &Sandbox{Image: image}},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			out := &capped{n: 16 << 10}
			c.Stdout, c.Timeout, c.Grace = out, 500*time.Millisecond, 5*time.Second
			r, err := s.Run(t.Context(), c)
			if err != nil || !r.TimedOut {
				t.Errorf("%+v, %v", r, err)
			}
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 4<<20 || out.all < 1<<20 {
				t.Errorf("%d bytes allocated for %d bytes of output", grown, out.all)
			}
		})
	}
}

func TestAHeldPipeDoesNotHoldRun(t *testing.T) {
	s := newSystem(t, Options{})
	s.patience = 100 * time.Millisecond
	u, ok := s.groups.(*unified)
	if !ok {
		return // the script below knows only how to leave a group of cgroup v2
	}
	// The child leaves the control group, as only root can, and keeps stdout.
	c := sh(fmt.Sprintf("(echo $(exec sh -c 'echo $PPID') > %s/cgroup.procs; exec sleep 1000) & echo $!; sleep 0.1", u.root))
	c.Group = "g"
	var out bytes.Buffer
	c.Stdout = &out
	began := time.Now()
	r, err := s.Run(t.Context(), c)
	if took := time.Since(began); err != nil || took > 10*time.Second {
		t.Errorf("%+v, %v after %v", r, err, took)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(out.String()))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Errorf("the child did not escape: %v", err)
	}
}

func TestABlockedStdinDoesNotHoldRun(t *testing.T) {
	s := newSystem(t, Options{})
	s.patience = 100 * time.Millisecond
	r, w := io.Pipe()
	defer w.Close()
	c := sh("exit 4")
	c.Stdin = r
	res, err := s.Run(t.Context(), c)
	if err != nil || res != (Result{ExitCode: 4}) {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestAHundredRunsAtOnce(t *testing.T) {
	s := newSystem(t, Options{})
	before := openFiles(t)
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			var out bytes.Buffer
			c := sh("(exec ls -x /proc/self/fd); exit " + strconv.Itoa(i))
			c.Group, c.PrivateMounts = fmt.Sprintf("g%d", i), i%2 == 0
			c.Stdout = &out
			r, err := s.Run(context.Background(), c)
			if err != nil || r != (Result{ExitCode: i}) {
				t.Errorf("%d: %+v, %v", i, r, err)
			}
			if out.String() != "0  1  2  3\n" {
				t.Errorf("%d: descriptors %s", i, out.String())
			}
		})
	}
	wg.Wait()
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func TestARunInABusyGroupIsRefused(t *testing.T) {
	s := newSystem(t, Options{})
	c := sh("exec sleep 1000")
	c.Group = "g"
	pid, err := s.Spawn(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Run(t.Context(), c); !errors.Is(err, ErrGroupBusy) {
		t.Errorf("%v", err)
	}
	if err := s.Kill(t.Context(), "g", 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the killed child is reaped", func() error {
		if err := unix.Kill(pid, 0); err != syscall.ESRCH {
			return fmt.Errorf("process %d is still there: %w", pid, err)
		}
		return nil
	})
}

func TestEnforcedResultsOfSignals(t *testing.T) {
	s := newSystem(t, Options{})
	for name, c := range shims(sh("kill -SEGV $$")) {
		if r, _ := run(t, s, c); r != (Result{ExitCode: -1, Signal: 11}) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func BenchmarkRun(b *testing.B) {
	s := newSystem(b, Options{})
	for name, c := range shims(Cmd{Path: "/bin/true", Group: "bench"}) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := s.Run(b.Context(), c); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

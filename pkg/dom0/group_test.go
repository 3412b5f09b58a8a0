package dom0

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// hierarchies runs a test on every kind of group that this machine offers; the
// mark in the environment works everywhere.
func hierarchies(t *testing.T, f func(t *testing.T, s *System)) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	var v1, v2 []*mountinfo.Info
	for _, m := range mounts {
		switch m.FSType {
		case "cgroup":
			v1 = append(v1, m)
		case "cgroup2":
			v2 = append(v2, m)
		}
	}
	prefix := fmt.Sprintf("patchd-test-%d/nested", os.Getpid())
	tried := map[string]bool{}
	for _, mounts := range [][]*mountinfo.Info{v2, v1, nil} {
		h, err := choose(mounts, prefix, true)
		if err != nil {
			t.Fatal(err)
		}
		if tried[h.name()] {
			continue
		}
		tried[h.name()] = true
		t.Run(h.name(), func(t *testing.T) {
			s := newSystem(t, Options{})
			s.groups = h
			f(t, s)
		})
	}
}

func TestDetection(t *testing.T) {
	dir := t.TempDir()
	info := func(kind, options string) *mountinfo.Info {
		return &mountinfo.Info{FSType: kind, VFSOptions: options, Mountpoint: dir}
	}
	for name, c := range map[string]struct {
		mounts []*mountinfo.Info
		none   bool
		want   string
	}{
		"v2 wins":                {[]*mountinfo.Info{info("cgroup", "rw,freezer"), info("cgroup2", "rw")}, true, "cgroup2"},
		"a freezer":              {[]*mountinfo.Info{info("cgroup", "rw,cpu"), info("cgroup", "rw,freezer")}, false, "freezer"},
		"v1 without freezer":     {[]*mountinfo.Info{info("cgroup", "rw,cpu")}, true, "environment"},
		"none, and that is fine": {nil, true, "environment"},
		"none, and that is not":  {nil, false, ""},
		"cannot be written":      {[]*mountinfo.Info{{FSType: "cgroup2", Mountpoint: "/proc/self/absent"}}, false, ""},
	} {
		h, err := choose(c.mounts, "p", c.none)
		if c.want == "" {
			if !errors.Is(err, ErrNoGroups) {
				t.Errorf("%s: %v", name, err)
			}
		} else if err != nil || h.name() != c.want {
			t.Errorf("%s: %v, %v", name, h, err)
		}
	}
}

func TestWithoutAnyHierarchyGroupsAreRefused(t *testing.T) {
	s := newSystem(t, Options{})
	s.groups = nil
	c := sh("exit 0")
	c.Group = "g"
	_, run := s.Run(t.Context(), c)
	_, spawn := s.Spawn(t.Context(), c)
	_, alive := s.Alive("g")
	for _, err := range []error{run, spawn, alive, s.Kill(t.Context(), "g", 0)} {
		if !errors.Is(err, ErrNoGroups) {
			t.Errorf("%v", err)
		}
	}
	if s.Hierarchy() != "none" {
		t.Error(s.Hierarchy())
	}
}

func TestASetsidChildDies(t *testing.T) {
	hierarchies(t, func(t *testing.T, s *System) {
		c := sh("setsid sh -c 'setsid sleep 1000 & sleep 1000' & echo $!; sleep 0.1; exit 5")
		c.Group = "g"
		r, out := run(t, s, c)
		if r != (Result{ExitCode: 5, Straggler: true}) {
			t.Errorf("%+v", r)
		}
		gonePID(t, out)
	})
}

// gonePID waits until the process whose number is in text is gone or a zombie
// that only its parent can clear away.
func gonePID(t *testing.T, text string) {
	t.Helper()
	stat := "/proc/" + strings.TrimSpace(text) + "/stat"
	eventually(t, "process dies", func() error {
		b, err := os.ReadFile(stat)
		if err != nil || strings.Contains(string(b), ") Z ") {
			return nil
		}
		return fmt.Errorf("%s", b)
	})
}

func TestALateReaderIsNoStraggler(t *testing.T) {
	hierarchies(t, func(t *testing.T, s *System) {
		c := Cmd{Path: "/bin/bash", Args: []string{"-c", "exec > >(sleep 0.03; cat); echo last words"}, Env: []string{"PATH=/usr/bin:/bin"}, Group: "g"}
		if r, out := run(t, s, c); r != (Result{}) || out != "last words\n" {
			t.Errorf("%+v %q", r, out)
		}
	})
}

func TestTermReachesTheWholeGroup(t *testing.T) {
	hierarchies(t, func(t *testing.T, s *System) {
		c := sh("setsid sh -c 'trap \"echo child; exit\" TERM; echo up; while :; do sleep 0.01; done' & trap '' TERM; wait; echo main; exit 6")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var out strings.Builder
		c.Group, c.Grace = "g", time.Minute
		c.Stdout = writerFunc(func(p []byte) (int, error) {
			cancel() // as soon as the child is up
			return out.Write(p)
		})
		r, err := s.Run(ctx, c)
		if !errors.Is(err, context.Canceled) || r != (Result{ExitCode: 6}) || out.String() != "up\nchild\nmain\n" {
			t.Errorf("%+v, %v, %q", r, err, out.String())
		}
	})
}

func TestForkingAwayDoesNotEscape(t *testing.T) {
	hierarchies(t, func(t *testing.T, s *System) {
		// Every process replaces itself all the time: no list of pids is ever right.
		if s.groups.name() == "environment" {
			return // it can: that is why this one has to be allowed
		}
		c := sh("hop() { trap '' TERM; sleep 0.001; hop & }; for i in 1 2 3 4 5 6 7 8; do hop & done; exec sleep 1000")
		c.Group, c.Timeout, c.Grace = "g", 300*time.Millisecond, 50*time.Millisecond
		r, _ := run(t, s, c)
		if !r.TimedOut {
			t.Errorf("%+v", r)
		}
		if alive, err := s.Alive("g"); alive || err != nil {
			t.Errorf("%v, %v", alive, err)
		}
	})
}

func TestNestedGroupsAreKilledAndRemoved(t *testing.T) {
	hierarchies(t, func(t *testing.T, s *System) {
		var dir string
		switch h := s.groups.(type) {
		case *unified:
			dir = h.of("g")
		case *frozen:
			dir = h.of("g")
		default:
			return // nothing to nest in
		}
		c := sh(fmt.Sprintf("mkdir -p %[1]s/a/b && sleep 1000 & sleep 0.05; setsid sleep 1000 & echo $! > %[1]s/a/b/cgroup.procs; echo $!", dir))
		c.Group = "g"
		r, out := run(t, s, c)
		if r != (Result{Straggler: true}) {
			t.Errorf("%+v %s", r, out)
		}
		gonePID(t, out)
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("group is still there: %v", err)
		}
	})
}

func TestAFrozenProgramIsKilledToo(t *testing.T) {
	hierarchies(t, func(t *testing.T, s *System) {
		c := sh("exec sleep 1000")
		c.Group = "g"
		if _, err := s.Spawn(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		var err error
		switch h := s.groups.(type) {
		case *unified:
			err = writeControl(filepath.Join(h.of("g"), "cgroup.freeze"), "1")
		case *frozen:
			err = writeControl(filepath.Join(h.of("g"), "freezer.state"), "FROZEN")
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Kill(t.Context(), "g", 20*time.Millisecond); err != nil {
			t.Error(err)
		}
	})
}

func TestAnEmptyLeftOverGroupIsUsedAgain(t *testing.T) {
	hierarchies(t, func(t *testing.T, s *System) {
		c := sh("exit 0")
		c.Group = "g"
		for range 3 {
			if _, err := s.Spawn(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			if err := s.WaitEmpty(t.Context(), "g"); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Kill(t.Context(), "g", 0); err != nil {
			t.Error(err)
		}
	})
}

// startHelper starts this test binary as a process that is not ours to wait
// for by dom0, and returns when it has said "ready" and what it said before.
func startHelper(t *testing.T, args ...string) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", append([]string{"helper"}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	var said strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		said.Write(buf[:n])
		if before, ok := strings.CutSuffix(said.String(), "ready\n"); ok {
			return cmd, before
		}
		if err != nil {
			t.Fatalf("helper said %q: %v", said.String(), err)
		}
	}
}

// helperSpawn spawns a program and waits for its own death.
func helperSpawn(prefix string) error {
	s, err := New(Options{CgroupPrefix: prefix})
	if err != nil {
		return err
	}
	c := sh("exec sleep 1000")
	c.Group, c.PrivateMounts = "orphan", true
	if _, err := s.Spawn(context.Background(), c); err != nil {
		return err
	}
	fmt.Println("ready")
	select {}
}

func TestASpawnedProgramOutlivesItsParent(t *testing.T) {
	s := newSystem(t, Options{})
	parent, _ := startHelper(t, "spawn", fmt.Sprintf("patchd-test-%d", os.Getpid()))
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	parent.Wait()
	if alive, err := s.Alive("orphan"); !alive || err != nil {
		t.Errorf("%v, %v", alive, err)
	}
	ended := make(chan error)
	go func() { ended <- s.WaitEmpty(t.Context(), "orphan") }()
	if err := s.Kill(t.Context(), "orphan", time.Minute); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestCloseDoesNotEndWhatWasSpawned(t *testing.T) {
	s := newSystem(t, Options{})
	other, err := New(Options{CgroupPrefix: fmt.Sprintf("patchd-test-%d", os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	c := sh("exec sleep 1000")
	c.Group = "g"
	pid, err := other.Spawn(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Spawn(t.Context(), sh("exit 0")); err == nil {
		t.Error("a closed System spawns")
	}
	if alive, err := s.Alive("g"); !alive || err != nil {
		t.Errorf("%v, %v", alive, err)
	}
	if err := s.Kill(t.Context(), "g", 0); err != nil {
		t.Error(err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, 0, nil); err != nil { // nobody else does now
		t.Error(err)
	}
}

func TestPidsAreNotMistaken(t *testing.T) {
	asked := 0
	err := signalEach([]int{os.Getpid(), 1 << 30}, unix.SIGKILL, func(int) bool {
		asked++
		return false // it is somebody else's by now
	})
	if err != nil || asked != 1 {
		t.Errorf("%v, asked %d times", err, asked)
	}
}

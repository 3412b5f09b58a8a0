package dom0

import (
	"bytes"
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
	"github.com/sirupsen/logrus"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "helper" {
		os.Exit(helper(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// newSystem gives a System with groups of its own, and checks at the end that
// it left nothing behind.
func newSystem(t testing.TB, o Options) *System {
	t.Helper()
	o.CgroupPrefix = fmt.Sprintf("patchd-test-%d", os.Getpid())
	if o.Log == nil {
		log := logrus.New()
		log.Out = testWriter{t}
		o.Log = log
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		groups, err := s.Groups()
		if err != nil || len(groups) > 0 {
			t.Errorf("groups left: %v, %v", groups, err)
		}
		for _, g := range groups {
			s.Kill(context.Background(), g, 0)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		eventually(t, "loop devices and mounts of the test vanish", func() error { return leaks(t) })
	})
	return s
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// leaks names loop devices and mounts that belong to files of this test.
func leaks(t testing.TB) error {
	name, _, _ := strings.Cut(t.Name(), "/")
	var errs []error
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(b), name) {
			errs = append(errs, fmt.Errorf("%s: %s", f, b))
		}
	}
	mounts, err := mountinfo.GetMounts(nil)
	for _, m := range mounts {
		if strings.Contains(m.Mountpoint, name) {
			errs = append(errs, fmt.Errorf("mounted: %s", m.Mountpoint))
		}
	}
	return errors.Join(append(errs, err)...)
}

// eventually waits for what the kernel does in its own time, 10 s at most.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	limit, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		if !pause(limit, 2*time.Millisecond) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// newImage makes an ext4 image with the given files in it, mode 0755.
func newImage(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	from := filepath.Join(dir, "content")
	if err := os.Mkdir(from, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(from, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "a.img") // the folder is named after the test
	out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-d", from, image, "8M").CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	return image
}

func sh(script string) Cmd {
	return Cmd{Path: "/bin/sh", Args: []string{"-c", script}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}
}

// run runs c and gives its output.
func run(t testing.TB, s *System, c Cmd) (Result, string) {
	t.Helper()
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	r, err := s.Run(t.Context(), c)
	if err != nil {
		t.Fatalf("run: %v; output %q", err, out.String())
	}
	return r, out.String()
}

// helper is this test binary as another program.
func helper(args []string) int {
	var err error
	switch args[0] {
	case "spawn":
		err = helperSpawn(args[1])
	case "hold":
		err = helperHold(args[1], args[2])
	case "sandbox":
		err = helperSandbox(args[1], args[2])
	case "effects":
		err = helperEffects(args[1], args[2])
	case "remount":
		err = helperRemount()
	default:
		err = fmt.Errorf("no helper %q", args[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func TestSpaceIsTheRoomOfTheFilesystem(t *testing.T) {
	s := newSystem(t, Options{})
	sp, err := s.Space(t.TempDir())
	if err != nil || sp.Total <= 0 || sp.Free <= 0 || sp.Free > sp.Total {
		t.Fatalf("%+v, %v", sp, err)
	}
	if _, err := s.Space("/absent"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("absent path: %v", err)
	}
}

func TestBootIDIsAUUID(t *testing.T) {
	s := newSystem(t, Options{})
	id, err := s.BootID()
	if err != nil || len(id) != 36 {
		t.Fatalf("%q, %v", id, err)
	}
}

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/integration/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// TestScripts runs the stories in testdata/script against the real patchd. A
// story has signer.gpg and signer.key, a key pair of gpg, in its folder, and
// these commands beside those of testscript:
//
//	daemon [FLAG…]          start a daemon on $PATCHD_STATE_DIR, set HTTP and HTTPS;
//	                        with another $PATCHD_STATE_DIR another one
//	stop                    end that of $PATCHD_STATE_DIR
//	exits N PROG [ARG…]     run a program, which must exit with N
//	interrupt GLOB PROG …   run it, and send SIGINT once a file matches GLOB
//	tty FILE PROG …         run it on a terminal; what is in FILE is typed, a line
//	                        at each prompt (- types nothing)
//	set NAME PATH           set a variable from the JSON in stdout, as .0.uuid
//	json PATH WANT          compare a value in that JSON
func TestScripts(t *testing.T) {
	key := lab.DefaultKey(t)
	secret := key.GPG(t, nil, "--export-secret-keys")
	binary := lab.Binary(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			bin := filepath.Join(env.WorkDir, ".bin")
			env.Setenv("PATH", bin+string(os.PathListSeparator)+env.Getenv("PATH"))
			env.Setenv("PATCHD_STATE_DIR", filepath.Join(env.WorkDir, "state"))
			env.Setenv("XDG_STATE_HOME", filepath.Join(env.WorkDir, ".local"))
			env.Setenv("FINGERPRINT", key.Fingerprint)
			daemons := scriptDaemons{}
			env.Values[daemonKey{}] = daemons
			env.Defer(daemons.stop)
			return errors.Join(
				os.Mkdir(bin, 0o755),
				os.Symlink(binary, filepath.Join(bin, "patchd")),
				os.WriteFile(filepath.Join(env.WorkDir, "signer.gpg"), key.Public, 0o644),
				os.WriteFile(filepath.Join(env.WorkDir, "signer.key"), secret, 0o600),
			)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"daemon": startDaemon, "stop": stopDaemon, "exits": exits, "interrupt": interrupt, "tty": onTTY,
			"set": setFromJSON, "json": checkJSON,
		},
	})
}

type daemonKey struct{}

// scriptDaemons are the daemons of one story, by state directory.
type scriptDaemons map[string]*scriptDaemon

func (ds scriptDaemons) stop() {
	for _, d := range ds {
		d.stop()
	}
}

// daemonOf is the daemon of the state directory that the story uses now.
func daemonOf(ts *testscript.TestScript) *scriptDaemon {
	ds, dir := ts.Value(daemonKey{}).(scriptDaemons), ts.Getenv("PATCHD_STATE_DIR")
	if ds[dir] == nil {
		ds[dir] = &scriptDaemon{}
	}
	return ds[dir]
}

// scriptDaemon is one of them.
type scriptDaemon struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func (d *scriptDaemon) stop() {
	if d.cmd == nil {
		return
	}
	d.cmd.Process.Signal(syscall.SIGTERM)
	<-d.done
	d.cmd = nil
}

// command is a program in the folder and with the variables of a story.
func command(ts *testscript.TestScript, args []string) *exec.Cmd {
	path := args[0]
	if path == "patchd" {
		path = filepath.Join(ts.Getenv("WORK"), ".bin", "patchd")
	}
	cmd := exec.Command(path, args[1:]...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = os.Environ()
	for _, name := range []string{"PATCHD_STATE_DIR", "PATCHD_SERVER", "PATCHD_PIN", "PATCHD_PASSWORD", "PATCHD_OUTPUT", "PATCHD_ROOT_PASSWORD", "PATCHD_CONFIG", "PATCHD_LISTEN", "XDG_STATE_HOME"} {
		if v := ts.Getenv(name); v != "" {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	return cmd
}

func startDaemon(ts *testscript.TestScript, _ bool, args []string) {
	d, patches := daemonOf(ts), "patches"
	if name := filepath.Base(ts.Getenv("PATCHD_STATE_DIR")); name != "state" {
		patches += "-" + name
	}
	serve := []string{"patchd", "serve", "--patch-dir", ts.MkAbs(patches), "--log-format", "json", "--tls-listen", "127.0.0.1:0",
		"--listen", "127.0.0.1:0", "--bad-password-delay", "10ms", "--grace-timeout", "1s"}
	cmd := command(ts, append(serve, args...))
	cmd.Env = append(cmd.Env, "PATCHD_ROOT_PASSWORD=story password")
	logs, err := cmd.StderrPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	d.cmd, d.done = cmd, make(chan struct{})
	ready := make(chan map[string]string, 1)
	var said []byte
	go func() {
		defer close(d.done)
		var all bytes.Buffer
		lines := bufio.NewScanner(io.TeeReader(logs, &all))
		for lines.Scan() {
			var line map[string]string
			if json.Unmarshal(lines.Bytes(), &line) == nil && line["msg"] == "patchd is ready" {
				select {
				case ready <- line:
				default: // it has opened again in another role
				}
			}
		}
		cmd.Wait()
		said = all.Bytes()
		close(ready)
	}()
	line, ok := <-ready
	if !ok {
		ts.Fatalf("the daemon did not become ready: %s", said)
	}
	ts.Setenv("HTTP", line["http"])
	ts.Setenv("HTTPS", line["tls"])
}

func stopDaemon(ts *testscript.TestScript, _ bool, _ []string) {
	daemonOf(ts).stop()
}

func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%s exited with %d, not %d", strings.Join(args[1:], " "), got, want)
	}
}

func interrupt(ts *testscript.TestScript, _ bool, args []string) {
	cmd := command(ts, args[1:])
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	if strings.Contains(strings.Join(args, " "), " - ") || args[len(args)-1] == "-" {
		r, w, err := os.Pipe() // a standard input that says something and does not end
		ts.Check(err)
		defer r.Close()
		defer w.Close()
		b, err := os.ReadFile(ts.MkAbs("hello.xsupdate"))
		ts.Check(err)
		_, err = w.Write(b[:100])
		ts.Check(err)
		cmd.Stdin = r
	}
	ts.Check(cmd.Start())
	for range 1000 {
		if found, _ := filepath.Glob(ts.MkAbs(args[0])); len(found) > 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Check(cmd.Process.Signal(os.Interrupt))
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != exitFailed {
		ts.Fatalf("interrupted, %v exited with %d", args[1:], code)
	}
}

// onTTY runs a program on a terminal of 120 columns; what it shows there is
// its standard error.
func onTTY(ts *testscript.TestScript, neg bool, args []string) {
	master, slave, err := openTTY()
	ts.Check(err)
	defer master.Close()
	cmd := command(ts, args[1:])
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, ts.Stdout(), slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	ts.Check(cmd.Start())
	ts.Check(slave.Close())
	var typed []string
	if args[0] != "-" {
		typed = strings.SplitAfter(ts.ReadFile(args[0]), "\n")
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			ts.Stderr().Write(b[:n])
			if err != nil {
				return // the last one on the terminal has gone
			}
			if len(typed) > 0 && bytes.HasSuffix(b[:n], []byte(": ")) {
				fmt.Fprint(master, typed[0])
				typed = typed[1:]
			}
		}
	})
	err = cmd.Wait()
	wg.Wait()
	if (err != nil) != neg {
		ts.Fatalf("%v: %v", args[1:], err)
	}
}

func openTTY() (master, slave *os.File, err error) {
	if master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0),
		unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 30, Col: 120}))
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
	}
	return master, slave, err
}

// first gives the first object in a list whose field is want.
func first(list []any, field, want string) any {
	for _, v := range list {
		if m, ok := v.(map[string]any); ok && m[field] == want {
			return v
		}
	}
	return nil
}

// value finds .a.0.b in the JSON that a program has printed last. Of a list,
// .status=pending is the first object that says so, and .length how long it is.
func value(ts *testscript.TestScript, path string) string {
	var v any
	if err := json.Unmarshal([]byte(ts.ReadFile("stdout")), &v); err != nil {
		ts.Fatalf("the standard output is not one JSON value: %v", err)
	}
	for _, key := range strings.Split(path, ".")[1:] {
		switch x := v.(type) {
		case map[string]any:
			var ok bool
			if v, ok = x[key]; !ok {
				ts.Fatalf("%s: there is no %q", path, key)
			}
		case []any:
			if key == "length" {
				v = len(x)
				continue
			}
			if field, want, ok := strings.Cut(key, "="); ok {
				v = first(x, field, want)
				continue
			}
			i, err := strconv.Atoi(key)
			if err != nil || i >= len(x) {
				ts.Fatalf("%s: the list has no %q", path, key)
			}
			v = x[i]
		default:
			ts.Fatalf("%s: %v has no %q", path, v, key)
		}
	}
	return strings.TrimSuffix(fmt.Sprint(v), "\n")
}

func setFromJSON(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[0], value(ts, args[1]))
}

func checkJSON(ts *testscript.TestScript, neg bool, args []string) {
	if got := value(ts, args[0]); (got == args[1]) == neg {
		ts.Fatalf("%s is %q", args[0], got)
	}
}

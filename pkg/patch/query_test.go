package patch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestQuery(t *testing.T) {
	broken := errors.New("no memory")
	for name, c := range map[string]struct {
		stdout, stderr string
		res            dom0.Result
		err            error
		code, text     string
	}{
		"good":                {stdout: goodInfo + "\n", stderr: "hello"},
		"good with straggler": {stdout: goodInfo, res: dom0.Result{Straggler: true}},
		"silent":              {code: xapi.InvalidPatch, text: "nothing"},
		"rubbish":             {stdout: "\x00\xff", code: xapi.InvalidPatch, text: "UTF-8"},
		"failed":              {stderr: "oh no", res: dom0.Result{ExitCode: 1}, code: xapi.InvalidPatch, text: "exit status 1: oh no"},
		"bad line endings":    {stderr: "oh no", res: dom0.Result{ExitCode: 2}, code: xapi.InvalidPatchWithLog, text: "Bad line endings?"},
		"killed":              {res: dom0.Result{ExitCode: -1, Signal: 9}, code: xapi.InvalidPatch, text: "signal 9"},
		"hanging":             {stderr: "still here", res: dom0.Result{ExitCode: -1, Signal: 15, TimedOut: true}, code: xapi.InvalidPatchWithLog, text: "did not end within 10s and was killed: still here"},
		"printing much":       {stdout: goodInfo + strings.Repeat("\n", 64<<10), code: xapi.InvalidPatch, text: "more than 65536 bytes"},
		"not a program":       {err: fmt.Errorf("run: %w", &dom0.StartError{Step: "exec", Path: "/patch", Err: syscall.ENOEXEC}), code: xapi.InvalidPatch, text: "cannot be run"},
		"not a filesystem":    {err: &dom0.StartError{Step: "mount", Path: "/patch", Err: syscall.EINVAL}, code: xapi.InvalidPatch, text: "cannot be run"},
		"this host is broken": {err: broken, code: xapi.InternalError, text: "no memory"},
		"no namespaces here":  {err: &dom0.StartError{Step: "unshare", Path: "/patch", Err: syscall.EPERM}, code: xapi.InternalError, text: "unshare"},
	} {
		t.Run(name, func(t *testing.T) {
			var groups []string
			d := runner{run: func(_ context.Context, cmd dom0.Cmd) (dom0.Result, error) {
				if err := cmd.Validate(); err != nil {
					t.Error(err)
				}
				if cmd.Sandbox == nil || cmd.Sandbox.Image != "/srv/x.img" || cmd.Timeout != 10*time.Second || cmd.Path != "/patch" || strings.Join(cmd.Args, " ") != "info" {
					t.Errorf("%+v", cmd)
				}
				groups = append(groups, cmd.Group)
				for _, b := range []byte(c.stdout) {
					if n, err := cmd.Stdout.Write([]byte{b}); n != 1 || err != nil {
						t.Fatal(n, err)
					}
				}
				if n, err := cmd.Stderr.Write([]byte(c.stderr)); n != len(c.stderr) || err != nil {
					t.Fatal(n, err)
				}
				return c.res, c.err
			}}
			i, err := Query(context.Background(), d, "/srv/x.img", 0)
			if c.code == "" {
				if err != nil || i.NameLabel != "XS1" {
					t.Error(i, err)
				}
				return
			}
			if e := xapi.AsError(err); err == nil || e.Code != c.code || len(e.Params) != 1 || !strings.Contains(e.Params[0], c.text) {
				t.Errorf("%+v, %v", i, err)
			}
			if c.err != nil && !errors.Is(err, c.err) {
				t.Error("the cause is lost")
			}
		})
	}
}

func TestQueryCancelled(t *testing.T) {
	own := xapi.NewError(xapi.TaskCancelled, "OpaqueRef:x")
	ctx, cancel := context.WithCancelCause(context.Background())
	d := runner{run: func(context.Context, dom0.Cmd) (dom0.Result, error) {
		cancel(own)
		return dom0.Result{ExitCode: -1, Signal: 9}, nil
	}}
	if _, err := Query(ctx, d, "/x", time.Second); !errors.Is(err, own) {
		t.Error(err)
	}
}

func TestCappedOutput(t *testing.T) {
	h, l := &head{most: 10}, &tail{most: 10}
	for _, part := range []string{"abc", "", "defghijklmn", strings.Repeat("x", 100), "end"} {
		for _, w := range []interface{ Write([]byte) (int, error) }{h, l} {
			if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
				t.Fatal(n, err)
			}
		}
	}
	if h.String() != "abcdefghij" || !h.cut {
		t.Error(h.String())
	}
	if !bytes.Equal(l.data, []byte("xxxxxxxend")) {
		t.Errorf("%q", l.data)
	}
}

package patch

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/xapi"
)

// imageOf makes an ext4 image with the payload as `patch` in it.
func imageOf(t *testing.T, payload string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(writeFile(t, dir+"/tree/patch", []byte(payload)), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("mkfs.ext4", "-q", "-d", dir+"/tree", dir+"/image", "8M").CombinedOutput()
	if err != nil {
		t.Fatal(err, string(out))
	}
	return dir + "/image"
}

// The same as TestQuery, with real programs in the real sandbox.
func TestQueryInTheSandbox(t *testing.T) {
	d, err := dom0.New(dom0.Options{CgroupPrefix: "patchd-patch-test", AllowNoCgroup: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() }) // after the parallel tests
	out := t.TempDir() + "/built"
	if _, err := Build(context.Background(), BuildOptions{Dir: patchFolder(t), Out: out, SecretKey: secretKey(t, keyA)}); err != nil {
		t.Fatal(err)
	}
	_, built := payloadOf(t, out, ringOf(t, keyA))
	for name, c := range map[string]struct {
		payload    string
		code, text string
	}{
		"built":                {string(built), "", ""},
		"printing on stderr":   {"#!/bin/sh\necho noise >&2\ncat <<'E'\n" + goodInfo + "\nE\n", "", ""},
		"leaving one behind":   {"#!/bin/sh\nsleep 1000 &\ncat <<'E'\n" + goodInfo + "\nE\n", "", ""},
		"hanging":              {"#!/bin/sh\necho waiting >&2\nsleep 1000\n", xapi.InvalidPatchWithLog, "did not end within 1s and was killed: waiting"},
		"hanging and forking":  {"#!/bin/sh\nfor i in 1 2 3 4; do setsid sleep 1000 & done\ntrap '' TERM\nwhile :; do sleep 1; done\n", xapi.InvalidPatchWithLog, "did not end"},
		"printing without end": {"#!/bin/sh\nyes\n", xapi.InvalidPatchWithLog, "did not end"},
		"printing much":        {"#!/bin/sh\nhead -c 100000000 /dev/zero\n", xapi.InvalidPatch, "more than"},
		"writing beside":       {"#!/bin/sh\ntouch \"$0.x\" /x || exit 5\n", xapi.InvalidPatch, "exit status 5"},
		"carriage returns":     {"#!/bin/sh\r\necho\r\n", xapi.InvalidPatch, "cannot be run"},
		"not a program":        {"hello", xapi.InvalidPatch, "cannot be run"},
		"empty":                {"", xapi.InvalidPatch, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			timeout := 20 * time.Second
			if strings.Contains(c.text, "did not end") {
				timeout = time.Second
			}
			i, err := Query(context.Background(), d, imageOf(t, c.payload), timeout)
			if c.code == "" {
				if err != nil || i.UUID != "0a1b2c3d-0000-4000-8000-00000000000f" {
					t.Error(i, err)
				}
				return
			}
			if e := xapi.AsError(err); err == nil || e.Code != c.code || !strings.Contains(strings.Join(e.Params, " "), c.text) {
				t.Errorf("%+v, %v", i, err)
			}
		})
	}
}

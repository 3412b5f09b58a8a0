package integration

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// TestSecurity_info_sandbox uploads signed patches whose `info` does what it
// should not. Each upload ends with a code, soon, and leaves nothing.
func TestSecurity_info_sandbox(t *testing.T) {
	t.Parallel() // it waits most of the time
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	called := make(chan struct{}, 100)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
			called <- struct{}{}
		}
	}()
	port := ln.Addr().(*net.TCPAddr).Port
	outside := t.TempDir()
	os.Chmod(outside, 0o777)
	canary := filepath.Join(h.StateDir, "trusted-keys", "planted")
	word := "patchd-sandbox-canary"
	cases := map[string]struct {
		script string
		bash   bool
	}{
		"hangs":                      {script: "sleep 1000"},
		"hangs and heeds no signal":  {script: "trap '' TERM INT HUP; while :; do sleep 1; done"},
		"stops itself":               {script: "kill -STOP $$"},
		"forks without end":          {script: `f() { f | f & }; f; sleep 100`, bash: true},
		"leaves processes":           {script: "(setsid sh -c 'exec -a " + word + " sleep 1000' >/dev/null 2>&1 &) ; echo '<info/>'", bash: true},
		"prints 10 GB":               {script: "head -c 10000000000 /dev/zero"},
		"prints 10 GB of errors":     {script: "head -c 10000000000 /dev/zero >&2"},
		"fills /tmp":                 {script: "head -c 10000000000 /dev/zero > /tmp/x; exit 1"},
		"takes all memory":           {script: "x=$(head -c 4000000000 /dev/zero | tr '\\0' x); exit 1"},
		"writes outside":             {script: fmt.Sprintf("touch %s/x %s /etc/x-%s /var/x-%s /root/x-%s /x-%s /dev/shm/x-%s; exit 1", outside, canary, word, word, word, word, word)},
		"calls home":                 {script: fmt.Sprintf("exec 3<>/dev/tcp/127.0.0.1/%d && echo LEAK got through; exit 1", port), bash: true},
		"reads secrets":              {script: fmt.Sprintf("cat %s/pool-secret %s/root-password %s/tls/* /etc/shadow /proc/%d/environ && echo LEAK; ls %s/* && echo LEAK; exit 1", h.StateDir, h.StateDir, h.StateDir, h.Pid(), h.StateDir)},
		"speaks to the socket":       {script: fmt.Sprintf("ls -l %s/patchd.sock && echo LEAK; exit 1", h.StateDir)},
		"kills the daemon":           {script: fmt.Sprintf("kill -9 %d && echo LEAK; kill -9 -1; exit 1", h.Pid())},
		"mounts":                     {script: "mount -t proc proc /mnt && echo LEAK; mount -o remount,rw / && echo LEAK; unshare -m true; exit 1"},
		"makes devices":              {script: "mknod /tmp/d b 7 0 && dd if=/tmp/d count=1 of=/dev/null && echo LEAK; head -c 1 /dev/loop0 && echo LEAK; head -c1 /dev/mem && echo LEAK; exit 1"},
		"turns knobs":                {script: "echo 1 > /proc/sys/vm/drop_caches && echo LEAK; echo c > /proc/sysrq-trigger && echo LEAK; exit 1"},
		"leaves its control group":   {script: "for f in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do echo $$ > $f && echo LEAK; done; exit 1"},
		"changes the clock and name": {script: "date -s 2001-01-01 && echo LEAK; hostname " + word + " && echo LEAK-name; exit 1"},
		"traces the daemon":          {script: fmt.Sprintf("ls -l /proc/%d/fd && echo LEAK; exit 1", h.Pid())},
	}
	var wg sync.WaitGroup // not t.Parallel: most of them only wait
	for name, c := range cases {
		p := &lab.Patch{InfoScript: c.script}
		if c.bash {
			p.Interpreter = "/bin/bash"
		}
		signed := p.Signed(t)
		wg.Go(func() {
			began := time.Now()
			a, err := s.Put("/pool_patch_upload", nil, bytes.NewReader(signed), int64(len(signed)))
			switch e := a.Err(); {
			case err != nil:
				t.Errorf("%s: %v", name, err)
			case e == nil || e.Code != xapi.InvalidPatch && e.Code != xapi.InvalidPatchWithLog:
				t.Errorf("%s: %d %.500s", name, a.Status, a.Body)
			case strings.Contains(e.Error(), "LEAK"):
				t.Errorf("%s: it came through: %.2000s", name, e)
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("%s: the upload took %s", name, took)
			}
		})
	}
	wg.Wait()
	h.CheckNothingLeft()
	if n := len(s.All("pool_patch")) + len(s.All("VDI")); n > 0 {
		t.Errorf("%d records are left", n)
	}
	if pids := processes(word); len(pids) > 0 {
		t.Errorf("processes are left: %v", pids)
	}
	for _, path := range []string{canary, outside + "/x", "/etc/x-" + word, "/var/x-" + word, "/root/x-" + word, "/x-" + word, "/dev/shm/x-" + word} {
		if exists(path) {
			t.Errorf("%s was written", path)
		}
	}
	if len(called) > 0 {
		t.Error("it called home")
	}
	if name, _ := os.Hostname(); name == word {
		t.Error("the host has another name")
	}
	s.MustUpload(&lab.Patch{}) // and a good one still goes through
}

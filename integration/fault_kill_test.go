package integration

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// A8: kill -9 from outside at random moments, of the daemon, of the runner and
// of the patch itself, while patches are uploaded and applied.
func TestA8_SoakKillAtRandomMoments(t *testing.T) {
	t.Parallel()
	n, r := soak(t, 8)
	v := newVictim(t, lab.Options{Dir: xfsFS(t, 2*gib)})
	for i := range n {
		victims := []string{"daemon", "daemon", "runner", "patch", "both"}[r.Intn(5)]
		delay := time.Duration(r.Intn(400)) * time.Millisecond
		var wg sync.WaitGroup
		for range 2 {
			k := v.fresh(lab.Patch{Pad: r.Intn(4 << 20), Apply: "sleep 0.1", Precheck: "sleep 0.05"})
			variant := r.Intn(4)
			wg.Go(func() {
				if v.upload(k, variant%2 == 0) == nil {
					v.applyOnce(k, ways[variant])
				}
			})
		}
		time.Sleep(delay)
		where := fmt.Sprintf("round %d: kill of the %s after %s", i, victims, delay)
		v.killSome(victims)
		wg.Wait()
		if v.dead() {
			v.up()
		}
		v.look(t, where)
	}
	v.finish(t)
}

// applyOnce applies k like a client that minds nothing.
func (v *victim) applyOnce(k *told, way string) { _ = v.apply(k, way) }

// killSome ends processes by KILL, found by what they are.
func (v *victim) killSome(what string) {
	v.T.Helper()
	if what == "runner" || what == "both" {
		for _, k := range v.patches {
			k.killed = true
		}
		for _, pid := range processes("runner\x00--groups\x00" + v.GroupPrefix()) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	if what == "patch" {
		for _, k := range v.patches {
			k.spoilt = true
		}
		for _, pid := range v.groupMembers("patch-*") {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	if what == "daemon" || what == "both" {
		v.Kill()
	}
}

// groupMembers lists the processes in control groups of this host.
func (v *victim) groupMembers(group string) (pids []int) {
	var files []string
	for _, pattern := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
		found, _ := filepath.Glob(pattern + v.GroupPrefix() + "/" + group + "/cgroup.procs")
		files = append(files, found...)
	}
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for _, word := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// SIGTERM in the middle of an apply: the daemon ends within seconds, the runner
// goes on, and the next start follows it. The task ends properly.
func TestA8_TermInTheMiddleOfAnApply(t *testing.T) {
	t.Parallel()
	for _, way := range ways {
		t.Run(way, func(t *testing.T) {
			h := lab.Start(t, lab.Options{})
			s := h.Root()
			gate := filepath.Join(t.TempDir(), "gate")
			effect := gate + ".effect"
			p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf(
				"touch %[1]s.begun; while [ ! -e %[1]s ]; do sleep 0.02; done; echo once >> %[2]s; echo went on", gate, effect)})
			params := []any{p}
			if strings.HasSuffix(way, ".apply") {
				params = append(params, s.Host())
			}
			done := make(chan any, 1)
			go func() {
				v, err := s.Try(way, params...)
				if err != nil {
					v = err
				}
				done <- v
			}()
			until(t, "the apply to begin", func() bool { return exists(gate + ".begun") })
			var task string
			for ref, rec := range s.All("task") {
				if rec["status"] == "pending" {
					task = ref
				}
			}
			begun := time.Now()
			h.Down()
			if took := time.Since(begun); took > 8*time.Second {
				t.Errorf("it took %s to end", took)
			}
			<-done
			if n := len(processes("runner\x00--groups\x00" + h.GroupPrefix())); n == 0 {
				t.Error("the runner has ended with the daemon")
			}
			h.Up()
			if rec := s.Call("task.get_record", task).(map[string]any); rec["status"] != "pending" {
				t.Errorf("the task, while the runner is at work: %v", rec)
			}
			// One that would change the host at the same time waits.
			other := s.MustUpload(&lab.Patch{Apply: "echo other >> " + effect})
			second := s.Call("Async.pool_patch.apply", other, s.Host()).(string)
			time.Sleep(300 * time.Millisecond)
			if exists(effect) {
				t.Error("two patches are being applied at once")
			}
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			rec := s.Wait(task)
			if rec["status"] != "success" || strings.Contains(way, "pool_apply") == strings.Contains(rec["result"].(string), "went on") {
				t.Errorf("%v", rec)
			}
			if rec := s.Wait(second); rec["status"] != "success" {
				t.Errorf("%v", rec)
			}
			if b, _ := os.ReadFile(effect); string(b) != "once\nother\n" {
				t.Errorf("%q", b)
			}
		})
	}
}

// A client that goes away in the middle of an upload leaves nothing; neither
// does SIGTERM.
func TestA8_TermInTheMiddleOfAnUpload(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	task := s.Call("task.create", "upload", "").(string)
	signed := (&lab.Patch{Pad: 4 << 20}).Signed(t)
	// Not by a client that takes the early answer for the end.
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "PUT /pool_patch_upload?task_id=%s&session_id=%s HTTP/1.1\r\nHost: lab\r\nContent-Length: %d\r\n\r\n", task, s.Ref, len(signed))
	if _, err := conn.Write(signed[:len(signed)/2]); err != nil {
		t.Fatal(err)
	}
	until(t, "the part volume", func() bool {
		parts, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "*.*.*"))
		return len(parts) > 0
	})
	begun := time.Now()
	h.Down()
	if took := time.Since(begun); took > 8*time.Second {
		t.Errorf("it took %s to end", took)
	}
	h.Up()
	if rec := s.Wait(task); rec["status"] != "failure" {
		t.Errorf("%v", rec)
	}
	h.CheckNothingLeft()
	if n := len(s.All("VDI")) + len(s.All("pool_patch")); n != 0 {
		t.Errorf("%d objects", n)
	}
}

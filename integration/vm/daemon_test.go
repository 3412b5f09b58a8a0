//go:build vm

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// host starts the real daemon, as it came with the disk.
func host(t *testing.T) *lab.Host {
	t.Helper()
	return lab.Start(t, lab.Options{Binary: os.Getenv("PATCHD_BIN")})
}

// newSR makes an SR and lets uploads go there.
func newSR(s *lab.Session, kind, name string, shared bool, config map[string]string) string {
	s.H.T.Helper()
	ref := s.Call("SR.create", s.Host(), config, "0", name, "", kind, "user", shared, map[string]string{}).(string)
	pool, _ := s.One("pool")
	s.Call("pool.set_default_SR", pool, ref)
	return ref
}

// marks is a patch that leaves a file on the host.
func marks(t *testing.T) (*lab.Patch, string) {
	path := filepath.Join(t.TempDir(), "applied")
	return &lab.Patch{Apply: "echo done >" + path, Pad: 300 << 10}, path
}

// TestDaemonOnLVM and TestDaemonOnNFS: upload, apply, kill -9, start, apply.
func TestDaemonOnLVM(t *testing.T) {
	wholeLife(t, "lvm", false, map[string]string{"device": disk(t, 1<<30)})
}

func TestDaemonOnNFS(t *testing.T) {
	dir := exported(t, 600<<20, "no_root_squash", xfs...)
	wholeLife(t, "nfs", true, map[string]string{"server": server, "serverpath": dir, "options": patient})
}

func wholeLife(t *testing.T, kind string, shared bool, config map[string]string) {
	h := host(t)
	s := h.Root()
	ref := newSR(s, kind, "the tested one", shared, config)
	first, mark := marks(t)
	patch := s.MustUpload(first)
	if got := s.All("VDI"); len(got) != 1 {
		t.Fatalf("there are %d VDIs", len(got))
	}
	for _, rec := range s.All("VDI") {
		if rec["SR"] != ref {
			t.Errorf("the patch went to SR %v", rec["SR"])
		}
		t.Logf("VDI of %v bytes takes %v", rec["virtual_size"], rec["physical_utilisation"])
	}
	s.Call("pool_patch.apply", patch, s.Host())
	if _, err := os.Stat(mark); err != nil {
		t.Errorf("the patch left no mark: %v", err)
	}
	second, mark2 := marks(t)
	patch2 := s.MustUpload(second)

	h.Kill()
	h.Up()
	s = h.Root()
	s.Call("pool_patch.apply", patch2, s.Host())
	if _, err := os.Stat(mark2); err != nil {
		t.Errorf("after the kill the patch left no mark: %v", err)
	}
	for _, p := range []string{patch, patch2} {
		s.Call("pool_patch.pool_clean", p)
	}
	for _, it := range s.All("VDI") {
		if it["SR"] == ref {
			t.Errorf("a VDI is left: %v", it)
		}
	}
	pool, _ := s.One("pool")
	s.Call("pool.set_default_SR", pool, "OpaqueRef:NULL")
	for _, p := range s.Call("SR.get_PBDs", ref).([]any) {
		s.Call("PBD.unplug", p)
	}
	s.Call("SR.destroy", ref)
}

// TestDaemonOverASilentServer: with the NFS server away calls to its SR fail in
// time and by name, all others are answered at once, the daemon starts, and
// the SR is back when the server is.
func TestDaemonOverASilentServer(t *testing.T) {
	const label = "the shared one"
	for _, gone := range silences {
		t.Run(gone.name, func(t *testing.T) {
			dir := exported(t, 600<<20, "no_root_squash", xfs...)
			h := host(t)
			s := h.Root()
			ref := newSR(s, "nfs", label, true, map[string]string{"server": server, "serverpath": dir, "options": hasty})
			p, mark := marks(t)
			patch := s.MustUpload(p)
			for _, line := range gone.away {
				must(t, shell(line))
			}
			answers := func(what string) {
				t.Helper()
				for _, call := range []string{"SR.get_all_records", "VDI.get_all_records", "host.get_all_records", "message.get_all_records"} {
					if took := within(t, call, 20*time.Second, func() { s.Call(call) }); took > 5*time.Second {
						t.Errorf("%s: %s took %s", what, call, took)
					}
				}
				took := within(t, "patchd status", time.Minute, func() {
					if out, errs, code := h.CLI("status"); code != 0 {
						t.Errorf("%s: status: %d %s%s", what, code, out, errs)
					}
				})
				t.Logf("%s: patchd status: %s", what, took.Round(time.Millisecond))
			}
			refused := make(chan error, 3)
			for _, call := range []func() error{
				func() error { _, err := s.Try("SR.scan", ref); return err },
				func() error { a := s.Upload((&lab.Patch{}).Signed(t)); return orStatus(a) },
				func() error { _, err := s.Try("pool_patch.apply", patch, s.Host()); return err },
			} {
				go func() {
					begin := time.Now()
					err := call()
					t.Logf("refused after %s: %v", time.Since(begin).Round(time.Millisecond), err)
					refused <- err
				}()
			}
			answers("while calls wait")
			for range cap(refused) {
				select {
				case err := <-refused:
					if err == nil || !strings.Contains(err.Error(), label) {
						t.Errorf("a call to an SR without its server: %v", err)
					}
				case <-time.After(60 * time.Second):
					t.Fatal("a call to an SR without its server does not end")
				}
			}
			if _, err := os.Stat(mark); err == nil {
				t.Error("the patch ran")
			}
			answers("afterwards")

			h.Kill()
			took := within(t, "start", 90*time.Second, func() { h.Up() })
			t.Logf("started without the server: %s", took.Round(time.Millisecond))
			s = h.Root()
			answers("after a start")
			if plugged(s, ref) {
				t.Error("the SR counts as plugged")
			}
			found := ""
			for _, m := range s.All("message") {
				found += fmt.Sprint(m["name"], " ", m["body"], "\n")
			}
			if !strings.Contains(found, "PBD_PLUG_FAILED_ON_SERVER_START") || !strings.Contains(found, label) {
				t.Errorf("no message tells that the SR could not be plugged: %s", found)
			}
			_, err := s.Try("SR.scan", ref)
			if !xapi.Is(err, xapi.SRNotAttached) {
				t.Errorf("scan of an SR that is not plugged: %v", err)
			}

			for _, line := range gone.back {
				must(t, shell(line))
			}
			took = eventually(t, "the SR being plugged again", func() error {
				if !plugged(s, ref) {
					return fmt.Errorf("not yet")
				}
				return nil
			})
			t.Logf("plugged again after %s", took.Round(time.Millisecond))
			s.Call("pool_patch.apply", patch, s.Host())
			if _, err := os.Stat(mark); err != nil {
				t.Errorf("the patch left no mark: %v", err)
			}
		})
	}
}

func plugged(s *lab.Session, sr string) bool {
	s.H.T.Helper()
	for _, p := range s.Call("SR.get_PBDs", sr).([]any) {
		if s.Call("PBD.get_currently_attached", p) != true {
			return false
		}
	}
	return true
}

// orStatus is the refusal of an upload, also one without a code.
func orStatus(a lab.Answer) error {
	if e := a.Err(); e != nil {
		return e
	}
	if a.Status >= 400 {
		return fmt.Errorf("HTTP %d %s", a.Status, a.Body)
	}
	return nil
}

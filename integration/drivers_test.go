package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// loopsOf lists the loop devices bound to files below dir.
func loopsOf(t testing.TB, dir string) (all []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir+"/") {
			all = append(all, f+": "+strings.TrimSpace(string(b)))
		}
	}
	return all
}

// mountsBelow lists what is mounted below dir.
func mountsBelow(t testing.TB, dir string) (all []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir+"/") {
			all = append(all, f[4])
		}
	}
	return all
}

// makeSR makes an SR by the command line and gives its ref.
func makeSR(s *lab.Session, typ, config string) (ref, uuid string) {
	s.H.T.Helper()
	out, errs, code := s.H.CLI("sr", "create", "--name", "the "+typ, "--type", typ, "--device-config", config)
	if code != 0 {
		s.H.T.Fatalf("sr create: %d %s", code, errs)
	}
	uuid = strings.TrimSpace(out)
	return s.Call("SR.get_by_uuid", uuid).(string), uuid
}

// Every driver that makes its own filesystem, from the command line to the
// last loop device: made, shown, probed, filled, run from, through a kill of the
// daemon while a patch runs, and destroyed.
func TestDriversEndToEnd(t *testing.T) {
	t.Parallel()
	for typ, clones := range map[string]bool{"ext": false, "xfs": true, "btrfs": true} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			image := filepath.Join(dir, "sr.disk")
			h := lab.Start(t, lab.Options{})
			s := h.Root()
			ref, uuid := makeSR(s, typ, "device="+image+",size=400MiB")
			looksRight(s, ref, typ, image, clones)
			if out, errs, code := h.CLI("sr", "set-default", uuid); code != 0 {
				t.Fatalf("%s %s", out, errs)
			}
			runThroughAKill(t, s, ref, filepath.Join(h.StateDir, "mnt", uuid))
			s = h.Root()

			// A second SR on the same image is refused, and told why.
			_, errs, code := h.CLI("sr", "create", "--name", "twice", "--type", typ, "--device-config", "device="+image)
			if code == 0 || !strings.Contains(errs, uuid) {
				t.Errorf("a second SR on one image: %d %s", code, errs)
			}
			for p := range s.All("pool_patch") {
				s.Call("VDI.destroy", vdiOf(s, p))
			}
			if _, errs, code := h.CLI("sr", "destroy", uuid); code != 0 {
				t.Fatalf("sr destroy: %s", errs)
			}
			if left := append(mountsBelow(t, h.StateDir), loopsOf(t, dir)...); len(left) > 0 || exists(image) || exists(filepath.Join(h.StateDir, "mnt", uuid)) {
				t.Errorf("left: %v; the image is there: %v", left, exists(image))
			}
		})
	}
}

// looksRight: the records, the probe and the command line say what the SR is.
func looksRight(s *lab.Session, ref, typ, image string, clones bool) {
	t := s.H.T
	t.Helper()
	uuid := s.Call("SR.get_uuid", ref).(string)
	out, _, code := s.H.CLI("sr", "show", uuid, "-o", "json")
	var shown struct {
		Type         string            `json:"type"`
		DeviceConfig map[string]string `json:"device_config"`
		Features     []string          `json:"features"`
		Free         string            `json:"free"`
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil || code != 0 {
		t.Fatalf("sr show: %v %s", err, out)
	}
	if shown.Type != typ || shown.DeviceConfig["device"] != image || number(t, shown.Free) < 100*mib || contains(shown.Features, "VDI_CLONE") != clones {
		t.Errorf("sr show says %s", out)
	}
	known := false
	for _, rec := range s.All("SM") {
		known = known || rec["type"] == typ && rec["configuration"].(map[string]any)["device"] != nil
	}
	if !known {
		t.Errorf("no SM record of type %s", typ)
	}
	probed := s.Call("SR.probe", s.Host(), map[string]string{"device": image}, typ, map[string]string{}).(string)
	if !strings.Contains(probed, uuid) {
		t.Errorf("probe says %s", probed)
	}
}

// runThroughAKill applies a patch from the SR, then one during which the daemon
// is killed, then one during which it is stopped: the mount of the SR is taken
// over each time, and the patch ends well.
func runThroughAKill(t *testing.T, s *lab.Session, ref, mount string) {
	t.Helper()
	h, effect := s.H, filepath.Join(t.TempDir(), "effect")
	first := s.MustUpload(&lab.Patch{Pad: 3 << 20, Apply: "echo ran >> " + effect})
	if got := s.Call("VDI.get_SR", vdiOf(s, first)); got != ref {
		t.Errorf("the upload went to %v", got)
	}
	if _, err := apply(s, first); err != nil || lines(effect) != 1 {
		t.Fatalf("%v, ran %d times", err, lines(effect))
	}
	for i, stop := range []func(){h.Kill, h.Down} {
		fifo := filepath.Join(t.TempDir(), "fifo")
		run(t, "mkfifo", fifo)
		p := &lab.Patch{Apply: "echo begun >> " + effect + "\nread go < " + fifo + "\necho ran >> " + effect}
		patch := s.MustUpload(p)
		task := s.Call("Async.pool_patch.apply", patch, s.Host()).(string)
		until(t, "the patch to begin", func() bool { return lines(effect) == 2+2*i })
		stop()
		h.Up()
		s = h.Root()
		if len(mountsBelow(t, filepath.Dir(mount))) != 1 {
			t.Errorf("mounted: %v", mountsBelow(t, filepath.Dir(mount)))
		}
		if err := os.WriteFile(fifo, []byte("go\n"), 0); err != nil {
			t.Fatal(err)
		}
		if rec := s.Wait(task); rec["status"] != "success" {
			t.Errorf("the apply ended as %v: %v", rec["status"], rec["error_info"])
		}
		if lines(effect) != 3+2*i {
			t.Errorf("%d lines of effect, want %d", lines(effect), 3+2*i)
		}
	}
	if left, _ := filepath.Glob(mount + "/work.*"); len(left) > 0 {
		t.Errorf("left on the SR: %v", left)
	}
}

// An SR on a device that holds something is refused, and what is there stays.
func TestADeviceInUseIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image := filepath.Join(dir, "precious.disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 320*mib); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-F", "-L", "precious", image)
	sum := fileSum(t, image)
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	for _, typ := range []string{"ext", "xfs", "btrfs"} {
		_, err := s.Try("SR.create", s.Host(), map[string]string{"device": image}, "0", "x", "", typ, "user", false, map[string]string{})
		if text := hasCode(t, err, "SR_DEVICE_IN_USE"); len(text) != 1 || !strings.Contains(text[0], "precious") || !strings.Contains(text[0], "wipefs") {
			t.Errorf("%s: %q", typ, text)
		}
	}
	if fileSum(t, image) != sum {
		t.Error("the device was changed")
	}
	if len(s.All("SR")) != 1 {
		t.Error("a refused SR has a record")
	}
}

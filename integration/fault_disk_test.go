package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/integration/lab"
)

// filler takes the room of a filesystem from outside.
type filler struct {
	t    testing.TB
	path string
	mu   sync.Mutex
	n    int
}

func newFiller(t testing.TB, dir string) *filler {
	return &filler{t: t, path: filepath.Join(dir, "filler")}
}

// leave takes everything but so many bytes.
func (f *filler) leave(rest int64) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	file, err := os.Create(fmt.Sprint(f.path, f.n))
	if err != nil {
		f.t.Error(err)
		return
	}
	defer file.Close()
	size := free(f.t, f.path[:strings.LastIndex(f.path, "/")]) - rest
	for step := size; step >= 4096; { // what others take meanwhile is passed over
		err := unix.Fallocate(int(file.Fd()), 0, 0, step)
		if err == nil {
			return
		}
		if !errors.Is(err, unix.ENOSPC) {
			f.t.Error(err)
			return
		}
		step -= max(step/16, 4096)
	}
}

// full takes all there is, to the last block.
func (f *filler) full() {
	f.t.Helper()
	f.leave(0)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	file, err := os.Create(fmt.Sprint(f.path, f.n))
	if err != nil {
		return // not even a name
	}
	defer file.Close()
	for b := make([]byte, 4096); ; {
		if _, err := file.Write(b); err != nil {
			return
		}
	}
}

// empty gives all of it back.
func (f *filler) empty() {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	files, _ := filepath.Glob(f.path + "*")
	for _, name := range files {
		if err := os.Remove(name); err != nil {
			f.t.Error(err)
		}
	}
}

// diskVictim is a host whose state and SR lie on a filesystem of 1.5 GiB.
func diskVictim(t testing.TB) (*victim, *filler) {
	t.Helper()
	dir := ext4FS(t, 1536*mib)
	v := newVictim(t, lab.Options{Dir: dir})
	until(t, "the reserve", func() bool { return exists(filepath.Join(v.StateDir, "reserve")) })
	return v, newFiller(t, dir)
}

// recovers starts the daemon if it has ended, with the disk still full: it
// starts on its reserve, or says what to do. With room it works again.
func (v *victim) recovers(t testing.TB, f *filler) {
	t.Helper()
	if v.dead() {
		v.let("", "")
		v.Launch()
		if err := v.Ready(time.Minute); err != nil {
			t.Logf("with a full disk: %v", err)
		} else if _, err := v.s.Try("pool_patch.get_all"); err != nil {
			t.Errorf("it runs, and answers %v", err)
		}
	}
	if !strings.Contains(v.Log(), "Make room on the filesystem") && !strings.Contains(v.Log(), "make room on the filesystem") {
		t.Error("the log does not say what to do")
	}
	f.empty()
	if v.dead() {
		v.up()
	}
	v.look(t, "a full disk")
	v.Restart()
	if !exists(filepath.Join(v.StateDir, "reserve")) {
		t.Error("there is no reserve again")
	}
	v.look(t, "a restart after that")
	v.finish(t)
}

// A8: the disk is filled from outside while nothing happens.
func TestA8_DiskFullWhileIdle(t *testing.T) {
	t.Parallel()
	v, f := diskVictim(t)
	v.works(t)
	f.full()
	k := v.fresh(lab.Patch{})
	if err := v.upload(k, false); err == nil || heard(err) == no {
		hasCode(t, err, "OUT_OF_SPACE")
	}
	if v.dead() {
		t.Log("it has ended")
	}
	v.Kill() // whatever it did: a start meets the full disk
	v.recovers(t, f)
}

// A8: the disk is filled from outside while patches are uploaded.
func TestA8_DiskFullWhileUploading(t *testing.T) {
	t.Parallel()
	v, f := diskVictim(t)
	k := v.fresh(lab.Patch{Pad: 96 << 20})
	done := make(chan error, 1)
	go func() { done <- v.upload(k, true) }()
	until(t, "the upload to begin", func() bool {
		parts, _ := filepath.Glob(filepath.Join(v.StateDir, "sr", "*.*.*"))
		return len(parts) > 0
	})
	f.full()
	err := <-done
	t.Logf("the upload: %v", err)
	if heard(err) == no {
		hasCode(t, err, "OUT_OF_SPACE")
	}
	v.Kill()
	v.recovers(t, f)
}

// A8: the disk is filled from outside while a patch is applied.
func TestA8_DiskFullWhileApplying(t *testing.T) {
	t.Parallel()
	v, f := diskVictim(t)
	gate := filepath.Join(v.dir, "gate")
	k := v.fresh(lab.Patch{Pad: 1 << 20, Apply: fmt.Sprintf(
		"touch %[1]s.begun; while [ ! -e %[1]s ]; do sleep 0.02; done; head -c 3000000 /dev/zero > $PATCHD_SCRATCH/more || exit 9", gate)})
	if err := v.upload(k, false); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		done <- v.apply(k, "pool_patch.apply")
		close(done)
	}()
	until(t, "the apply to begin", func() bool { return exists(gate + ".begun") })
	f.full()
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.spoilt, k.killed = true, true // it has no room for its work
	select {
	case err := <-done:
		t.Logf("the apply: %v", err)
	case <-time.After(20 * time.Second):
		t.Log("the apply waits for room")
	}
	v.Kill()
	v.recovers(t, f)
	<-done
}

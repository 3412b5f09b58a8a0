package upload

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/patchd/patchd/pkg/delta"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// onXFS gives e a default SR on a filesystem that clones.
func (e *tusEnv) onXFS() {
	e.t.Helper()
	dir := e.t.TempDir()
	image, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	script := `truncate -s 1G "$1" && mkfs.xfs -q "$1" && mkdir "$2" && mount -o loop "$1" "$2"`
	if out, err := exec.Command("sh", "-ec", script, "sh", image, mnt).CombinedOutput(); err != nil {
		e.t.Fatalf("xfs: %v\n%s", err, out)
	}
	e.root.Cleanup(func() {
		if err := e.pool.DetachStorage(context.Background()); err != nil {
			e.root.Error(err)
		}
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			e.root.Errorf("umount: %v\n%s", err, out)
		}
	})
	e.root.Cleanup(e.handler.Close)
	ref, err := e.pool.SRCreate(e.t.Context(), pool.SRSpec{
		Host: e.pool.Self, Type: "file", NameLabel: "XFS", DeviceConfig: map[string]string{"location": filepath.Join(mnt, "sr")},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	if err := e.pool.SetDefaultSR(e.t.Context(), ref); err != nil {
		e.t.Fatal(err)
	}
	e.sr = ref
}

// deltaOf is the difference of a message to a payload.
func deltaOf(t *testing.T, message, base []byte) []byte {
	t.Helper()
	ix, err := delta.BuildIndex(bytes.NewReader(base), int64(len(base)))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	f := delta.File{Source: patch.NewSegments(bytes.NewReader(message)), Size: int64(len(message)), Sum: sha256.Sum256(message)}
	if err := delta.Encode(&out, f, ix); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestTusDelta(t *testing.T) {
	for name, prepare := range map[string]func(*tusEnv){"a fresh image": func(*tusEnv) {}, "a clone": (*tusEnv).onXFS} {
		t.Run(name, func(t *testing.T) {
			e := newTusEnv(t)
			prepare(e)
			base := xapi.NewUUID()
			old := noise(program(base, 8*mib))
			message := sign(t, old, "-z", "0")
			e.finished(e.send(e.create(len(message)), 0, message), base, old, len(message))

			uuid := xapi.NewUUID()
			payload := bytes.Clone(old)
			copy(payload, program(uuid, 0))
			copy(payload[5*mib:], bytes.Repeat([]byte("new"), 20000))
			message = sign(t, payload, "-z", "0")
			d := deltaOf(t, message, old)
			if len(d) > len(message)/10 {
				t.Fatalf("a delta of %d bytes", len(d))
			}
			before := e.used()
			location := e.create(len(d), "encoding", "delta", "base", string(base), "size", strconv.Itoa(len(message)),
				"payload_size", strconv.Itoa(len(payload)))
			half := len(d) / 2
			if a := e.send(location, 0, d[:half]); a.status != 204 {
				t.Fatalf("%d %s", a.status, a.text)
			}
			e.restart()
			if at := e.head(location).offset(t); at != int64(half) {
				t.Fatalf("offset %d after the restart, want %d", at, half)
			}
			e.finished(e.send(location, int64(half), d[half:]), uuid, payload, len(message))
			if added := e.used() - before; name == "a clone" && added > 4*mib {
				t.Errorf("%d bytes were added to the SR", added)
			}
			e.clean(2)

			// The base goes while the upload waits.
			location = e.create(len(d), "encoding", "delta", "base", string(base), "size", strconv.Itoa(len(message)))
			_, rec := e.patchOf(base)
			if err := e.pool.VDIDestroy(t.Context(), rec.VDI); err != nil {
				t.Fatal(err)
			}
			if a := e.send(location, 0, d); a.status != 404 || a.problem.Code != xapi.CannotFindPatch {
				t.Errorf("without its base: %d %s", a.status, a.text)
			}
			e.store.View(func(v *store.View) error {
				if n := v.Count(pool.ClassIntent); n > 0 {
					t.Errorf("%d intents are left", n)
				}
				return nil
			})
		})
	}
}

// noise makes the padding of a program such that no part is like another.
func noise(p []byte) []byte {
	script := bytes.LastIndex(p, []byte("exit 0\n")) + 7
	sum := sha256.Sum256([]byte("seed"))
	for at := script; at < len(p); at += copy(p[at:], sum[:]) {
		sum = sha256.Sum256(sum[:])
	}
	return p
}

// used is what the SR's filesystem takes.
func (e *tusEnv) used() int64 {
	e.t.Helper()
	repo, err := e.pool.Repository(e.sr)
	if err != nil {
		e.t.Fatal(err)
	}
	// What was written has its room only when it is on the disk.
	if out, err := exec.Command("sync").CombinedOutput(); err != nil {
		e.t.Fatalf("sync: %v\n%s", err, out)
	}
	st, err := repo.Stat(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	return st.PhysicalUtilisation
}

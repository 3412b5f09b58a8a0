package file_test

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
}

// attached gives a fresh SR and its folder.
func attached(t *testing.T) (sr.Repository, string) {
	t.Helper()
	d, c := newSR(t.TempDir())
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	t.Cleanup(func() { r.Detach(t.Context()) })
	return r, c.Device["location"]
}

func TestAVolumeIsOneSparseFileNamedByItsUUID(t *testing.T) {
	r, dir := attached(t)
	vdi := xapi.NewUUID()
	_, err := r.Create(t.Context(), sr.Live(vdi), 40<<20)
	must(t, err)
	path := filepath.Join(dir, string(vdi)+".img")
	fi, err := os.Lstat(path)
	must(t, err)
	if fi.Size() != 40<<20 || !fi.Mode().IsRegular() || fi.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v, %d bytes", path, fi.Mode(), fi.Size())
	}
	if got, err := r.Path(t.Context(), sr.Live(vdi)); err != nil || got != path {
		t.Errorf("path is %q, %v; want %q", got, err, path)
	}
}

func TestForeignFilesAreNeitherListedNorTouched(t *testing.T) {
	r, dir := attached(t)
	u := string(xapi.NewUUID())
	foreign := []string{"readme.txt", u, u + ".vhd", "x" + u + ".img", strings.ToUpper(u) + ".img", "part." + u + ".img", ".patchd-sr.bak", "a.b.c.d.e.img"}
	for _, name := range foreign {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte("foreign"), 0o600))
	}
	link, folder, pipe := xapi.NewUUID(), xapi.NewUUID(), xapi.NewUUID()
	target := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(target, []byte("secret"), 0o600))
	must(t, os.Symlink(target, filepath.Join(dir, string(link)+".img")))
	must(t, os.Mkdir(filepath.Join(dir, string(folder)+".img"), 0o700))
	must(t, unix.Mkfifo(filepath.Join(dir, string(pipe)+".img"), 0o600))
	list, err := r.Scan(t.Context())
	must(t, err)
	if len(list) != 0 {
		t.Errorf("scan shows %v", list)
	}
	for _, id := range []xapi.UUID{link, folder, pipe} {
		n := sr.Live(id)
		if _, err := r.Open(t.Context(), n, sr.ReadWrite); !xapi.Is(err, xapi.VDINotAvailable) {
			t.Errorf("open of something that is no file: %v", err)
		}
		if _, err := r.Path(t.Context(), n); !xapi.Is(err, xapi.VDINotAvailable) {
			t.Errorf("path of something that is no file: %v", err)
		}
		if err := r.Destroy(t.Context(), n); err == nil {
			t.Error("destroyed something that is no volume")
		}
	}
	if b, err := os.ReadFile(target); err != nil || string(b) != "secret" {
		t.Errorf("a link was followed: %q, %v", b, err)
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	if want := len(foreign) + 3 + 1; len(entries) != want {
		t.Errorf("%d entries are left, want %d", len(entries), want)
	}
}

func TestAWrongFolderIsRefused(t *testing.T) {
	ctx := t.Context()
	d, c := newSR(t.TempDir())
	dir := c.Device["location"]

	must(t, os.Mkdir(dir, 0o700))
	if _, err := d.Attach(ctx, c); !xapi.Is(err, xapi.SRBackendFailure) || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("attach of an empty folder (its filesystem is not mounted): %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "somebody's file"), nil, 0o600))
	if err := d.Create(ctx, c); !xapi.Is(err, xapi.SRDeviceInUse) {
		t.Errorf("create in a folder with files: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "somebody's file")))
	must(t, os.Mkdir(filepath.Join(dir, "lost+found"), 0o700))
	must(t, d.Create(ctx, c))

	must(t, os.WriteFile(filepath.Join(dir, ".patchd-sr"), []byte("something else"), 0o600))
	if _, err := d.Attach(ctx, c); !xapi.Is(err, xapi.SRBackendFailure) {
		t.Errorf("attach with a marker nobody knows: %v", err)
	}
	if err := d.Create(ctx, c); !xapi.Is(err, xapi.SRDeviceInUse) {
		t.Errorf("create with a marker nobody knows: %v", err)
	}
}

func TestLocationTricksAreRefused(t *testing.T) {
	ctx := t.Context()
	base := t.TempDir()
	d, c := newSR(base)
	real := c.Device["location"]
	must(t, d.Create(ctx, c))

	at := func(path string) sr.Config {
		return sr.Config{SR: c.SR, Device: map[string]string{"location": path}}
	}
	must(t, os.Symlink(real, filepath.Join(base, "link")))
	must(t, os.Symlink(base, filepath.Join(base, "up")))
	must(t, os.WriteFile(filepath.Join(base, "file"), nil, 0o600))
	must(t, os.MkdirAll(filepath.Join(base, "open", "mine"), 0o755))
	must(t, os.Chmod(filepath.Join(base, "open"), 0o777))
	must(t, os.MkdirAll(filepath.Join(base, "owned", "mine"), 0o755))
	must(t, os.Chown(filepath.Join(base, "owned"), 12345, 0))
	for name, path := range map[string]string{
		"a link":                     filepath.Join(base, "link"),
		"a link on the way":          filepath.Join(base, "up", filepath.Base(real)),
		"a file":                     filepath.Join(base, "file"),
		"below a file":               filepath.Join(base, "file", "sr"),
		"inside another SR":          filepath.Join(real, "nested"),
		"a parent that is not there": filepath.Join(base, "no", "sr"),
		"below what anybody writes":  filepath.Join(base, "open", "mine", "sr"),
		"below what somebody owns":   filepath.Join(base, "owned", "mine", "sr"),
	} {
		if err := d.Create(ctx, at(path)); !xapi.Is(err, xapi.ValueNotSupported) {
			t.Errorf("create at %s: %v", name, err)
		}
		if r, err := d.Attach(ctx, at(path)); err == nil {
			r.Detach(ctx)
			t.Errorf("attached at %s", name)
		}
	}
	must(t, os.Chmod(real, 0o777))
	if _, err := d.Attach(ctx, c); !xapi.Is(err, xapi.ValueNotSupported) || !strings.Contains(err.Error(), "chmod go-w") {
		t.Errorf("attach of a folder anybody can write to: %v", err)
	}
	must(t, os.Chmod(real, 0o755))
	slash, err := d.Attach(ctx, at(real+"/"))
	must(t, err)
	must(t, slash.Detach(ctx))
}

func TestDestroyLeavesForeignFiles(t *testing.T) {
	ctx := t.Context()
	d, c := newSR(t.TempDir())
	dir := c.Device["location"]
	must(t, d.Create(ctx, c))
	must(t, os.WriteFile(filepath.Join(dir, "notes"), []byte("mine"), 0o600))
	must(t, d.Destroy(ctx, c))
	if b, err := os.ReadFile(filepath.Join(dir, "notes")); err != nil || string(b) != "mine" {
		t.Errorf("a foreign file is gone: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "notes")))
	must(t, d.Create(ctx, c))
	must(t, d.Destroy(ctx, c))
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder of a destroyed SR is left: %v", err)
	}
}

func TestKeepFreeIsAskedForTheFolder(t *testing.T) {
	ctx := t.Context()
	d, c := newSR(t.TempDir())
	must(t, d.Create(ctx, c))
	asked := ""
	c.KeepFree = func(path string) int64 { asked = path; return math.MinInt64 }
	r, err := d.Attach(ctx, c)
	must(t, err)
	defer r.Detach(ctx)
	st, err := r.Stat(ctx)
	must(t, err)
	if asked != c.Device["location"] || st.Free <= 0 || st.Free > st.PhysicalSize {
		t.Errorf("asked for %q, room %+v", asked, st)
	}
}

// A filesystem that is in use by an attached SR cannot be unmounted under it.
func TestAnAttachedSRHoldsItsFilesystem(t *testing.T) {
	if os.Geteuid() != 0 {
		return
	}
	mounted := filesystem{name: "tmpfs"}.mount(t)
	d, c := newSR(mounted)
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	if err := unix.Unmount(mounted, 0); err != unix.EBUSY {
		t.Errorf("unmount under an attached SR: %v", err)
	}
	must(t, r.Detach(t.Context()))
}

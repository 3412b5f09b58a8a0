package file

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// What a filesystem without O_TMPFILE or RENAME_NOREPLACE (NFS) gets instead.
func TestFallbacks(t *testing.T) {
	dir := t.TempDir()
	folder, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	text := func(s string) func(*os.File) error {
		return func(f *os.File) error { _, err := f.WriteString(s); return err }
	}
	want := func(name, content string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != content {
			t.Errorf("%s holds %q, %v; want %q", name, b, err, content)
		}
	}
	for _, make := range []func(*os.File, string, keeping, func(*os.File) error) error{fresh, freshNamed} {
		if err := make(folder, "a", durable, text("one")); err != nil {
			t.Fatal(err)
		}
		if err := make(folder, "a", durable, text("two")); !errors.Is(err, os.ErrExist) {
			t.Errorf("made over an existing file: %v", err)
		}
		want("a", "one")
		broken := errors.New("broken")
		if err := make(folder, "b", passing, func(*os.File) error { return broken }); !errors.Is(err, broken) {
			t.Errorf("a failing fill: %v", err)
		}
		if _, err := os.Stat(filepath.Join(dir, "b")); !os.IsNotExist(err) {
			t.Error("a failing fill left a file")
		}
		if err := unlink(folder, "a", durable); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"from": "bytes", "other": "others"} {
		if err := fresh(folder, name, durable, text(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := relink(folder, "from", "other"); !errors.Is(err, os.ErrExist) {
		t.Errorf("renamed over another file: %v", err)
	}
	want("other", "others")
	// Broken off between its two steps.
	if err := os.Link(filepath.Join(dir, "from"), filepath.Join(dir, "to")); err != nil {
		t.Fatal(err)
	}
	if err := relink(folder, "from", "to"); err != nil {
		t.Fatal(err)
	}
	want("to", "bytes")
	if _, err := os.Stat(filepath.Join(dir, "from")); !os.IsNotExist(err) {
		t.Error("the old name is left")
	}
	if err := rename(folder, "from", "to"); err != nil {
		t.Errorf("renaming what was renamed: %v", err)
	}
}

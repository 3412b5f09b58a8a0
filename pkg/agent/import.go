package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// queryTimeout bounds `info`.
const queryTimeout = 10 * time.Second

// Inspect verifies a signed file of the patch-dir and asks it who it is. The
// record names the file; nothing is stored. The image it is asked in lies in
// the journal's filesystem, and is gone afterwards.
func (a *Agent) Inspect(ctx context.Context, name string) (rec pool.Patch, err error) {
	dir, err := os.OpenRoot(a.PatchDir)
	if err != nil {
		return rec, err
	}
	defer dir.Close()
	if !plainName(name) {
		return rec, xapi.NewError(xapi.InvalidValue, "name", cleanText([]byte(name)))
	}
	f, err := dir.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would wait for its writer
	if err != nil {
		return rec, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return rec, err
	}
	if !st.Mode().IsRegular() {
		return rec, fmt.Errorf("%s is not a regular file", name)
	}
	if err := os.MkdirAll(a.JobsDir, 0o700); err != nil {
		return rec, err
	}
	image, err := os.CreateTemp(a.JobsDir, ".import-*")
	if err != nil {
		return rec, err
	}
	defer func() { err = errors.Join(err, image.Close(), os.Remove(image.Name())) }()
	size := vdi.Size(st.Size())
	if err := image.Truncate(size); err != nil {
		return rec, err
	}
	got, err := a.intake(ctx, f, image, size)
	if err != nil {
		return rec, err
	}
	info, err := patch.Query(ctx, a.Dom0, image.Name(), queryTimeout)
	if err != nil {
		return rec, err
	}
	rec = PatchRecord(info)
	rec.Size, rec.Filename = st.Size(), name
	rec.Digest, rec.PayloadSize = got.Digest, got.Payload
	rec.Signature, rec.SignatureKind, rec.Signer = got.Signature.Packet, string(got.Signature.Kind), got.Signature.Signer
	return rec, nil
}

// Place puts a file into the patch-dir under a fresh name, unless it lies
// there already, and gives its name.
func (a *Agent) Place(path string) (name string, err error) {
	if filepath.Dir(filepath.Clean(path)) == filepath.Clean(a.PatchDir) {
		return filepath.Base(path), nil
	}
	src, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer src.Close()
	if st, err := src.Stat(); err != nil || !st.Mode().IsRegular() {
		return "", errors.Join(err, fmt.Errorf("%s is not a regular file", path))
	}
	if err := os.MkdirAll(a.PatchDir, 0o755); err != nil {
		return "", err
	}
	if err := fault.Point("agent.place"); err != nil {
		return "", err
	}
	name = string(xapi.NewUUID())
	tmp := filepath.Join(a.PatchDir, "."+name)
	dst, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o440)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(dst, src)
	if err = errors.Join(err, dst.Sync(), dst.Close()); err == nil {
		err = os.Rename(tmp, filepath.Join(a.PatchDir, name))
	}
	if err != nil {
		return "", errors.Join(err, os.Remove(tmp))
	}
	if err := syncDir(a.PatchDir); err != nil {
		return "", err
	}
	return name, fault.Point("agent.place.done")
}

// Unplace takes back what Place made; a file that lay there before stays.
func (a *Agent) Unplace(path, name string) error {
	if filepath.Clean(path) == filepath.Join(a.PatchDir, name) {
		return nil
	}
	return os.Remove(filepath.Join(a.PatchDir, name))
}

// plainName tells whether a file name can stand in a record and a log line.
func plainName(name string) bool {
	return utf8.ValidString(name) && !strings.ContainsFunc(name, unicode.IsControl)
}

// Files lists the names in the patch-dir that may be classic patch files: no
// folders, no hidden files, no left-over `.run` files.
func (a *Agent) Files() ([]string, error) {
	entries, err := os.ReadDir(a.PatchDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() && plainName(e.Name()) && !strings.HasPrefix(e.Name(), ".") && !strings.HasSuffix(e.Name(), ".run") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// A stampfile is <patch-dir>/applied/<patch uuid>, mode 0440, with the XML
// that `info` printed: the host's own memory that it has the patch. A roll-up
// patch may drop the stampfiles of what it contains there.

// maxStamp bounds a stampfile, in bytes.
const maxStamp = 64 << 10

// appliedDir is where the stampfiles lie.
func appliedDir(patchDir string) string { return filepath.Join(patchDir, "applied") }

func writeStamp(patchDir string, id xapi.UUID, xml string) error {
	if err := fault.Point("stamp.write"); err != nil {
		return err
	}
	if err := os.MkdirAll(appliedDir(patchDir), 0o755); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(appliedDir(patchDir), string(id)), []byte(xml), 0o440); err != nil {
		return err
	}
	return fault.Point("stamp.write.done")
}

func removeStamp(patchDir string, id xapi.UUID) error {
	err := os.Remove(filepath.Join(appliedDir(patchDir), string(id)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// stampTime is when the stampfile of a patch was written; ok is false when
// there is none.
func stampTime(patchDir string, id xapi.UUID) (at time.Time, ok bool) {
	st, err := os.Lstat(filepath.Join(appliedDir(patchDir), string(id)))
	if err != nil || !st.Mode().IsRegular() {
		return time.Time{}, false
	}
	return st.ModTime(), true
}

// readStamps reads all stampfiles. Those that make no sense are named in bad
// and left alone.
func readStamps(patchDir string) (stamps []pool.Stamp, bad map[string]error, err error) {
	dir, err := os.OpenRoot(appliedDir(patchDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()
	names, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return nil, nil, err
	}
	bad = map[string]error{}
	for _, n := range names {
		if !xapi.UUID(n.Name()).Valid() || !n.Type().IsRegular() {
			continue // not a stampfile: nothing that patchd or a roll-up writes
		}
		s, err := readStamp(dir, n.Name())
		if err != nil {
			bad[n.Name()] = err
			continue
		}
		stamps = append(stamps, s)
	}
	return stamps, bad, nil
}

func readStamp(dir *os.Root, name string) (s pool.Stamp, err error) {
	f, err := dir.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return s, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return s, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxStamp))
	if err != nil {
		return s, err
	}
	info, err := patch.ParseInfo(b)
	if err != nil {
		return s, err
	}
	if string(info.UUID) != name {
		return s, errors.New("names another patch: " + string(info.UUID))
	}
	return pool.Stamp{Applied: st.ModTime(), Patch: PatchRecord(info)}, nil
}

// PatchRecord is the part of a patch's record that its `info` gives.
func PatchRecord(i patch.Info) pool.Patch {
	return pool.Patch{
		UUID: i.UUID, NameLabel: i.NameLabel, NameDescription: i.NameDescription, Version: i.Version,
		AfterApplyGuidance: i.Guidance, ScratchSize: i.ScratchSize, InfoXML: i.XML,
		VDI: xapi.NullRef, OtherConfig: map[string]string{},
	}
}

// stampDigest reads a stampfile back from disk: its SHA-256, lower-case hexadecimal,
// and what it says. One that makes no sense says nothing.
func stampDigest(patchDir string, id xapi.UUID) (digest string, s pool.Stamp, err error) {
	f, err := os.OpenFile(filepath.Join(appliedDir(patchDir), string(id)), os.O_RDONLY|syscall.O_NONBLOCK, 0) // the patch may have put anything there
	if err != nil {
		return "", s, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStamp))
	if err != nil {
		return "", s, err
	}
	sum := sha256.Sum256(b)
	if info, err := patch.ParseInfo(b); err == nil {
		s.Patch = PatchRecord(info)
	}
	return hex.EncodeToString(sum[:]), s, nil
}

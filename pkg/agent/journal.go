package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// Entry is one journaled job: entry.json.
type Entry struct {
	Assignment pool.Assignment `json:"assignment"`
	Plan       Plan            `json:"plan"`
	Work       sr.Name         `json:"work"` // the work volume in Plan.Target
	Created    time.Time       `json:"created"`
}

func (e Entry) uuid() xapi.UUID { return e.Assignment.Job.UUID }

// Result is how a run ended: result.json.
type Result struct {
	Output string   `json:"output"`
	Error  []string `json:"error,omitempty"` // code and parameters; empty on success
	Why    string   `json:"why,omitempty"`   // the error with its cause, for the log of this host
	// Checked tells that digest and signature of the image held.
	Checked bool `json:"checked"`
	// Begun tells that `apply` was started.
	Begun    bool      `json:"begun"`
	Cleanup  string    `json:"cleanup,omitempty"` // what could not be cleaned up
	Finished time.Time `json:"finished"`
}

func (r Result) err() *xapi.Error {
	if len(r.Error) == 0 {
		return nil
	}
	return xapi.NewError(r.Error[0], r.Error[1:]...)
}

// The files of a journal folder.
const (
	fileEntry    = "entry.json"
	fileRun      = "run.json"
	fileBegun    = "begun"
	fileOutput   = "output"
	fileProgress = "progress"
	fileResult   = "result.json"
	fileLog      = "runner.log"
	fileImage    = "image"
	fileMap      = "map" // the block map of the golden image
	dirMount     = "mnt"
)

// journal is the folder of all journaled jobs of this host.
type journal struct{ dir string }

func (j journal) path(id xapi.UUID, name ...string) string {
	return filepath.Join(append([]string{j.dir, string(id)}, name...)...)
}

// begin writes the entry durably; what it announces may follow.
func (j journal) begin(e Entry) error {
	if err := fault.Point("journal.begin"); err != nil {
		return err
	}
	if err := os.MkdirAll(j.path(e.uuid(), dirMount), 0o700); err != nil {
		return err
	}
	if err := syncDir(j.dir); err != nil {
		return err
	}
	if err := writeJSON(j.path(e.uuid(), fileEntry), e); err != nil {
		return err
	}
	return fault.Point("journal.begin.done")
}

// order writes durably what the runner shall do.
func (j journal) order(id xapi.UUID, run Run) error {
	if err := fault.Point("journal.run"); err != nil {
		return err
	}
	if err := writeJSON(j.path(id, fileRun), run); err != nil {
		return err
	}
	return fault.Point("journal.run.done")
}

// payload is the digest of the payload that a job's runner was told to run.
func (j journal) payload(id xapi.UUID) (string, error) {
	var run Run
	err := readJSON(j.path(id, fileRun), &run)
	return run.Digest, err
}

// end removes the folder of a job: nothing of it is left to be done.
func (j journal) end(id xapi.UUID) error {
	if err := fault.Point("journal.end"); err != nil {
		return err
	}
	// The entry goes last: while it is there the rest can be cleaned up again.
	dir := j.path(id)
	names, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, n := range names {
		if n.Name() == fileEntry {
			continue
		}
		if err := os.Remove(filepath.Join(dir, n.Name())); err != nil {
			return err
		}
	}
	if err := fault.Point("journal.end.entry"); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := syncDir(j.dir); err != nil {
		return err
	}
	return fault.Point("journal.end.done")
}

// entries lists what is journaled. A folder without an entry never had an
// effect, for the entry is written first: it is removed. Entries that cannot be
// read are named in bad and left alone.
func (j journal) entries() (good []Entry, bad map[xapi.UUID]error, err error) {
	names, err := os.ReadDir(j.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, os.MkdirAll(j.dir, 0o700)
	}
	if err != nil {
		return nil, nil, err
	}
	bad = map[xapi.UUID]error{}
	for _, n := range names {
		id := xapi.UUID(n.Name())
		if !id.Valid() || !n.IsDir() {
			continue
		}
		var e Entry
		err := readJSON(j.path(id, fileEntry), &e)
		switch {
		case err == nil && e.uuid() == id:
			good = append(good, e)
		case errors.Is(err, fs.ErrNotExist):
			if err := os.RemoveAll(j.path(id)); err != nil {
				return nil, nil, err
			}
		case err == nil:
			bad[id] = fmt.Errorf("it is about job %.64q", e.uuid())
		default:
			bad[id] = err
		}
	}
	return good, bad, nil
}

// result reads result.json; ok is false when there is none yet.
func (j journal) result(id xapi.UUID) (r Result, ok bool, err error) {
	err = readJSON(j.path(id, fileResult), &r)
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	return r, err == nil, err
}

func (j journal) begun(id xapi.UUID) bool {
	_, err := os.Stat(j.path(id, fileBegun))
	return err == nil
}

// maxJSON bounds what is read back from a journal file, in bytes.
const maxJSON = 4 << 20

func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxJSON))
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFile(path, b, 0o600)
}

// writeFile makes a file durable with its content or not at all: a temporary
// name, write, sync, rename, sync of the folder.
func writeFile(path string, b []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

package main

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// begun is an upload that was begun: where it goes on.
type begun struct {
	Location string    `json:"location"` // path on the server
	Task     string    `json:"task"`
	Name     string    `json:"name"` // of the file
	Expires  time.Time `json:"expires"`
	// Base is the uuid of the patch that a delta is made to, "" for a whole
	// file; Sum is the SHA-256 of the delta, hexadecimal.
	Base string `json:"base,omitempty"`
	Sum  string `json:"sum,omitempty"`
}

// memory keeps the uploads of this user that were begun, in one file.
type memory struct {
	path string
}

// maxMemory bounds the file, in bytes.
const maxMemory = 4 << 20

// newMemory names the file; it need not be there.
func newMemory() (memory, error) {
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil {
			return memory{}, err
		}
		dir = filepath.Join(home, ".local", "state")
	}
	return memory{filepath.Join(dir, "patchd", "uploads.json")}, nil
}

// uploadKey names an upload: the same file to the same SR of the same pool.
func uploadKey(pool, sum, sr string) string { return pool + "/" + sum + "/" + sr }

// recall gives the upload of that key; ok is false when there is none.
func (m memory) recall(key string) (b begun, ok bool) {
	all, err := m.read()
	if err != nil {
		return b, false
	}
	b, ok = all[key]
	return b, ok && time.Now().Before(b.Expires)
}

// remember keeps an upload, durably.
func (m memory) remember(key string, b begun) error {
	return m.change(func(all map[string]begun) { all[key] = b })
}

// forget drops an upload that has ended. What is not there needs no writing.
func (m memory) forget(key string) error {
	all, err := m.read()
	if _, ok := all[key]; err == nil && !ok {
		return nil
	}
	return m.change(func(all map[string]begun) { delete(all, key) })
}

// read reads the file. What is no JSON is as nothing: it is only a memory.
func (m memory) read() (map[string]begun, error) {
	f, err := os.Open(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]begun{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMemory))
	if err != nil {
		return nil, err
	}
	all := map[string]begun{}
	if json.Unmarshal(b, &all) != nil || all == nil {
		return map[string]begun{}, nil
	}
	return all, nil
}

// change writes the file anew, under a lock of its folder, without what has
// expired.
func (m memory) change(f func(all map[string]begun)) (err error) {
	dir := filepath.Dir(m.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	all, err := m.read()
	if err != nil {
		return err
	}
	f(all)
	for key, b := range all {
		if time.Now().After(b.Expires) {
			delete(all, key)
		}
	}
	text, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(replaceFile(m.path, append(text, '\n')), lock.Sync())
}

// replaceFile writes a file that is either as before or wholly new.
func replaceFile(path string, text []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, path)
}

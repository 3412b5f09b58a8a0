package server

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// stateDir is the folder of all that patchd remembers.
type stateDir struct {
	dir  string
	lock *os.File
}

func (s stateDir) path(names ...string) string {
	return filepath.Join(append([]string{s.dir}, names...)...)
}

// openStateDir makes the folder and takes its lock. A second daemon is told
// who the first one is.
func openStateDir(dir string) (stateDir, error) {
	s := stateDir{dir: dir}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return s, err
	}
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return s, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		b := make([]byte, 64)
		n, _ := f.ReadAt(b, 0)
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return s, fmt.Errorf("another patchd (process %s) uses the state directory %s: stop it first, or name another --state-dir", strings.TrimSpace(string(b[:n])), dir)
		}
		return s, err
	}
	if err := errors.Join(f.Truncate(0)); err != nil {
		f.Close()
		return s, err
	}
	// The pid is for the text of the error above; a full disk must not stop us.
	fmt.Fprintf(f, "%d\n", os.Getpid())
	s.lock = f
	return s, nil
}

func (s stateDir) close() error { return s.lock.Close() }

// reserveSize is kept allocated, so that a full disk can be given some room to
// start on.
const reserveSize = 64 << 20

// useReserve gives the reserve free when the disk is full, and makes it when
// there is room again. It tells whether the disk is full.
func (s stateDir) useReserve(d dom0.Dom0, log logrus.FieldLogger) (full bool, err error) {
	space, err := d.Space(s.dir)
	if err != nil {
		return false, err
	}
	path := s.path("reserve")
	st, err := os.Stat(path)
	have := err == nil && st.Size() >= reserveSize
	switch {
	case space.Free < reserveSize/2 && have:
		log.WithField("path", s.dir).Errorf("the disk is full: %d MiB kept for this case are given free. Make room on the filesystem that holds %s", reserveSize>>20, s.dir)
		return true, os.Remove(path)
	case space.Free < reserveSize/2:
		return true, nil
	case have || space.Free < 4*reserveSize:
		return false, nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, reserveSize); err != nil {
		log.WithError(err).Warn("no reserve could be allocated in the state directory")
		return false, os.Remove(path)
	}
	return false, nil
}

// keepFree is the room that must stay on the filesystem of the state
// directory: the database must never meet a full disk.
func (s stateDir) keepFree(d dom0.Dom0) func(path string) int64 {
	return func(path string) int64 {
		if !sameFilesystem(s.dir, path) {
			return 0
		}
		space, err := d.Space(s.dir)
		if err != nil {
			return minKeepFree
		}
		return max(minKeepFree, space.Total/50)
	}
}

// roomLeft is how many bytes may be written beside the database; 0 when that
// cannot be told.
func (s stateDir) roomLeft(d dom0.Dom0) int64 {
	space, err := d.Space(s.dir)
	if err != nil {
		return 0
	}
	return max(0, space.Free-s.keepFree(d)(s.dir))
}

const minKeepFree = 256 << 20

func sameFilesystem(a, b string) bool {
	var sa, sb syscall.Stat_t
	if syscall.Stat(a, &sa) != nil {
		return false
	}
	for ; syscall.Stat(b, &sb) != nil; b = filepath.Dir(b) {
		if b == "/" || b == "." {
			return false
		}
	}
	return sa.Dev == sb.Dev
}

// text reads a small file, or makes it durably with what fresh gives.
func (s stateDir) text(name string, fresh func() string) (string, error) {
	b, err := os.ReadFile(s.path(name))
	if err == nil && len(b) > 0 {
		return strings.TrimSpace(string(b)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	text := fresh()
	return text, s.write(name, []byte(text+"\n"))
}

func (s stateDir) write(name string, b []byte) error {
	tmp := s.path("." + filepath.Base(name) + ".new")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.path(name)); err != nil {
		return err
	}
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (s stateDir) hostUUID() (xapi.UUID, error) {
	text, err := s.text("host-uuid", func() string { return string(xapi.NewUUID()) })
	if err != nil {
		return "", err
	}
	return xapi.ParseUUID(text)
}

// poolSecret is three uuids joined by slashes.
func (s stateDir) poolSecret() (string, error) {
	return s.text("pool-secret", func() string {
		return strings.Join([]string{string(xapi.NewUUID()), string(xapi.NewUUID()), string(xapi.NewUUID())}, "/")
	})
}

// identity is this host's key and TLS certificate, made at the first start.
// Clients and other hosts pin its key.
func (s stateDir) identity(hostname string) (*trust.Identity, error) {
	return trust.Open(s.path("tls.pem"), hostname)
}

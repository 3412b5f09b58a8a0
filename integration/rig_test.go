package integration

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	mib     = int64(1 << 20)
	gib     = int64(1 << 30)
	nullRef = string(xapi.NullRef)
)

// wantCode fails the test unless err is exactly that error.
func wantCode(t testing.TB, err error, code string, params ...string) {
	t.Helper()
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != code || !slices.Equal(e.Params, params) {
		t.Errorf("got %v, want %s %q", err, code, params)
	}
}

// hasCode fails the test unless err has the code, and gives its parameters.
func hasCode(t testing.TB, err error, code string) []string {
	t.Helper()
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got %v, want %s", err, code)
	}
	return e.Params
}

// run executes a program of the test's own and fails when it fails.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	return lab.Run(t, name, args...)
}

// until waits for something to become true.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: not within 30 s", what)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// ext4FS is a filesystem whose files cannot be cloned, xfsFS one whose can.
func ext4FS(t testing.TB, size int64) string { t.Helper(); return lab.Ext4(t, size) }
func xfsFS(t testing.TB, size int64) string  { t.Helper(); return lab.XFS(t, size) }

// used is how many bytes are taken on the filesystem of path.
func used(t testing.TB, path string) int64 {
	t.Helper()
	var st syscall.Statfs_t
	run(t, "sync", "-f", path)
	if err := syscall.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

func free(t testing.TB, path string) int64 {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// image is the file of a VDI on the SR that the first start made.
func image(s *lab.Session, vdiRef string) string {
	s.H.T.Helper()
	uuid := s.Call("VDI.get_uuid", vdiRef).(string)
	return filepath.Join(s.H.StateDir, "sr", uuid+".img")
}

func vdiOf(s *lab.Session, patch string) string {
	s.H.T.Helper()
	return s.Call("pool_patch.get_VDI", patch).(string)
}

func fileSum(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// allocated is the room a file takes, in bytes.
func allocated(t testing.TB, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := vdi.Allocated(f)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func number(t testing.TB, v any) int64 {
	t.Helper()
	n, err := strconv.ParseInt(fmt.Sprint(v), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// lines counts the lines of a file; an absent one has none.
func lines(path string) int {
	b, _ := os.ReadFile(path)
	return bytes.Count(b, []byte("\n"))
}

// apply applies the patch to the only host.
func apply(s *lab.Session, patch string) (string, error) {
	s.H.T.Helper()
	out, err := s.Try("pool_patch.apply", patch, s.Host())
	text, _ := out.(string)
	return text, err
}

func precheck(s *lab.Session, patch string) (string, error) {
	s.H.T.Helper()
	out, err := s.Try("pool_patch.precheck", patch, s.Host())
	text, _ := out.(string)
	return text, err
}

// uploadErr uploads signed bytes that are to be refused, gives the refusal, and
// checks that nothing was made.
func uploadErr(s *lab.Session, signed []byte) error {
	s.H.T.Helper()
	return refused(s, func() lab.Answer { return s.Upload(signed) })
}

// refused runs an upload that is to fail and checks that it left nothing.
func refused(s *lab.Session, upload func() lab.Answer) error {
	s.H.T.Helper()
	patches, vdis := len(s.All("pool_patch")), len(s.All("VDI"))
	a := upload()
	if n := len(s.All("pool_patch")); n != patches {
		s.H.T.Errorf("%d records where %d were", n, patches)
	}
	if n := len(s.All("VDI")); n != vdis {
		s.H.T.Errorf("%d VDIs where %d were", n, vdis)
	}
	s.H.CheckNothingLeft()
	if e := a.Err(); e != nil {
		return e
	}
	return fmt.Errorf("HTTP %d: %.300s", a.Status, a.Body)
}

// newSR makes a file SR in a folder and gives its ref.
func newSR(s *lab.Session, name, dir string) string {
	s.H.T.Helper()
	return s.Call("SR.create", s.Host(), map[string]string{"location": dir}, "0", name, "", "file", "user", false, map[string]string{}).(string)
}

// pbdOf is the PBD that links the host to an SR.
func pbdOf(s *lab.Session, sr string) string {
	s.H.T.Helper()
	pbds := s.Call("SR.get_PBDs", sr).([]any)
	if len(pbds) != 1 {
		s.H.T.Fatalf("SR %s has %d PBDs", sr, len(pbds))
	}
	return pbds[0].(string)
}

// children finds processes by a word of their command line.
func processes(word string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		if err == nil && strings.Contains(string(b), word) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(d)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// rawRequest sends bytes as they are and half-closes the connection.
func rawRequest(h *lab.Host, head string, body []byte, limit time.Duration) (a lab.Answer, err error) {
	c, err := net.Dial("tcp", strings.TrimPrefix(h.URL, "http://"))
	if err != nil {
		return a, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	if _, err := io.WriteString(c, head); err != nil {
		return a, err
	}
	c.Write(body) // an early answer may have closed the connection
	c.(*net.TCPConn).CloseWrite()
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return lab.Answer{Status: res.StatusCode, Body: b, Header: res.Header}, err
}

// endProcess ends the process whose pid a file holds, and waits for its end.
func endProcess(t testing.TB, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Error(err)
		return
	}
	pid := int(number(t, strings.TrimSpace(string(b))))
	syscall.Kill(pid, syscall.SIGTERM)
	until(t, "process "+strconv.Itoa(pid)+" to end", func() bool {
		return syscall.Kill(pid, 0) != nil || processState(pid) == "Z"
	})
}

func processState(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	state, _, _ := strings.Cut(rest, " ")
	return state
}

// answers tells whether a daemon listens and is ready.
func answers(h *lab.Host) bool {
	res, err := h.HTTP.Get(h.URL + "/healthz")
	if err != nil {
		return false
	}
	res.Body.Close()
	return res.StatusCode == http.StatusOK
}

func defaultSR(s *lab.Session) string {
	s.H.T.Helper()
	_, pool := s.One("pool")
	return pool["default_SR"].(string)
}

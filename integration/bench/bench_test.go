//go:build bench

// Package bench measures the whole system.
package bench

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// The targets are ratios to a baseline that runs in turn with what is
// measured, in the same process tree, so that the machine's moods cancel out.

const (
	benchRounds = 5
	gib         = int64(1) << 30
)

// row is one line of the table.
type row struct {
	what, baseline string
	target         float64 // a ratio, or an absolute figure where baseline is ""
	got, base      []time.Duration
	figure         float64 // an absolute figure
	unit           string
}

func median(d []time.Duration) time.Duration {
	s := slices.Clone(d)
	slices.Sort(s)
	return s[len(s)/2]
}

// ratio is the median of the ratios pair by pair.
func (r row) ratio() float64 {
	var rs []float64
	for i := range r.got {
		rs = append(rs, float64(r.got[i])/float64(r.base[i]))
	}
	slices.Sort(rs)
	return rs[len(rs)/2]
}

func printRows(t *testing.T, rows []row) {
	fmt.Printf("\n%-44s %-36s %10s %10s %8s %8s\n", "WHAT", "BASELINE", "MEDIAN", "BASELINE", "RATIO", "TARGET")
	for _, r := range rows {
		met := ""
		value := r.figure
		if r.baseline != "" {
			value = r.ratio()
			fmt.Printf("%-44s %-36s %10s %10s %8.2f %8.2f", r.what, r.baseline, median(r.got).Round(time.Millisecond), median(r.base).Round(time.Millisecond), value, r.target)
		} else {
			fmt.Printf("%-44s %-36s %7.1f %-2s %10s %8s %8.1f", r.what, "-", r.figure, r.unit, "", "", r.target)
		}
		if value > r.target {
			met = "  MISSED"
			t.Errorf("%s: %.2f, the target is %.2f", r.what, value, r.target)
		}
		fmt.Println(met)
	}
}

// noise is n bytes that do not compress, the same for the same seed.
func noise(seed byte, n int64) io.Reader {
	block, err := aes.NewCipher(append(make([]byte, 15), seed))
	if err != nil {
		panic(err)
	}
	return io.LimitReader(cipher.StreamReader{S: cipher.NewCTR(block, make([]byte, 16)), R: zeros{}}, n)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// signedFile makes a signed patch of about n bytes in dir, without holding it.
func signedFile(t *testing.T, p *lab.Patch, dir string, n int64) (path string, size int64) {
	t.Helper()
	path = filepath.Join(dir, string(p.UUID)+".xsupdate")
	key := lab.DefaultKey(t)
	cmd := exec.Command("gpg", "--batch", "--yes", "--quiet", "--sign", "-z", "0", "--digest-algo", "SHA256", "--output", path)
	cmd.Env = append(os.Environ(), "GNUPGHOME="+key.Home())
	cmd.Stdin = io.MultiReader(strings.NewReader(string(p.Payload())), noise(1, n))
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, st.Size()
}

// rawServer is the baseline: a PUT into a raw file, io.Copy and fsync.
func rawServer(t *testing.T, dir string) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f, err := os.Create(filepath.Join(dir, "raw"))
		if err == nil {
			defer f.Close()
			if _, err = io.Copy(f, r.Body); err == nil {
				err = f.Sync()
			}
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
	}))
	t.Cleanup(s.Close)
	return s
}

// curlPut times one PUT by curl.
func curlPut(t *testing.T, url, cookie, path string) time.Duration {
	t.Helper()
	start := time.Now()
	out, err := exec.Command("curl", "-sS", "-f", "-T", path, "-b", cookie, "-o", "/dev/null", "-w", "%{http_code}", url).CombinedOutput()
	took := time.Since(start)
	if err != nil || string(out) != "201" {
		t.Fatalf("curl: %v %s", err, out)
	}
	return took
}

func TestMain(m *testing.M) { lab.Main(m) }

// TestBench prints the table.
func TestBench(t *testing.T) {
	dir := t.TempDir()
	h := lab.Start(t, lab.Options{Dir: dir})
	s := h.Root()
	rows := []row{benchUpload(t, h, s, dir)}
	rows = append(rows, benchMemory(t, h, s, dir))
	printRows(t, rows)
}

func benchUpload(t *testing.T, h *lab.Host, s *lab.Session, dir string) row {
	p := &lab.Patch{}
	p.Payload()
	path, _ := signedFile(t, p, dir, gib)
	defer os.Remove(path)
	raw := rawServer(t, dir)
	r := row{what: "PUT of 1 GiB: signature, SHA-256, fsync", baseline: "PUT into a raw file, io.Copy, fsync", target: 1.2}
	for range benchRounds + 1 {
		r.base = append(r.base, curlPut(t, raw.URL+"/raw", "x=y", path))
		os.Remove(filepath.Join(dir, "raw"))
		r.got = append(r.got, curlPut(t, h.URL+"/pool_patch_upload", "session_id="+s.Ref, path))
		s.Call("pool_patch.destroy", s.Call("pool_patch.get_by_uuid", string(p.UUID)))
	}
	r.got, r.base = r.got[1:], r.base[1:] // the first round warms up
	return r
}

// benchMemory uploads 8 GiB to a fresh daemon and reads its peak.
func benchMemory(t *testing.T, h *lab.Host, s *lab.Session, dir string) row {
	p := &lab.Patch{}
	p.Payload()
	path, _ := signedFile(t, p, dir, 8*gib)
	defer os.Remove(path)
	h.Restart()
	s = h.Root()
	curlPut(t, h.URL+"/pool_patch_upload", "session_id="+s.Ref, path)
	return row{what: "resident memory, upload of 8 GiB", target: 200, unit: "MB", figure: float64(peakRSS(t, h.Pid())) / 1e6}
}

// peakRSS is VmHWM of a process, in bytes.
func peakRSS(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

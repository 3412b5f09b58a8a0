//go:build bench

package bench

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

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

// signedFile makes a signed patch of the payload of p followed by rest, without
// holding it in memory.
func (b *bench) signedFile(p *lab.Patch, rest ...io.Reader) (path string) {
	b.Helper()
	payload := string(p.Payload())
	path = filepath.Join(b.dir, string(p.UUID)+".xsupdate")
	cmd := exec.Command("gpg", "--batch", "--yes", "--quiet", "--sign", "-z", "0", "--digest-algo", "SHA256", "--output", path)
	cmd.Env = append(os.Environ(), "GNUPGHOME="+lab.DefaultKey(b).Home())
	cmd.Stdin = io.MultiReader(append([]io.Reader{strings.NewReader(payload)}, rest...)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		b.Fatal(err)
	}
	return path
}

func (b *bench) size(path string) int64 {
	b.Helper()
	st, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	return st.Size()
}

// run runs a program and fails the benchmark when it fails.
func (b *bench) run(name string, args ...string) string {
	b.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		b.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// curlPut makes one PUT by curl and times it.
func (b *bench) curlPut(url, session, path string, more ...string) time.Duration {
	b.Helper()
	args := append([]string{"-sS", "-f", "-T", path, "-b", "session_id=" + session, "-o", "/dev/null", "-w", "%{http_code}", url}, more...)
	var out []byte
	var err error
	took := timed(func() { out, err = exec.Command("curl", args...).CombinedOutput() })
	if err != nil || string(out) != "201" {
		b.Fatalf("curl: %v %s", err, out)
	}
	return took
}

// destroyPatch removes a patch and its image.
func destroyPatch(s *lab.Session, p *lab.Patch) {
	s.Call("pool_patch.destroy", s.Call("pool_patch.get_by_uuid", string(p.UUID)))
}

// loopSR makes an SR of that type on an image file of its own.
func (b *bench) loopSR(s *lab.Session, typ string, size int64) (ref string) {
	b.Helper()
	image := filepath.Join(b.dir, typ+"-"+strconv.FormatInt(time.Now().UnixNano(), 36)+".disk")
	f, err := os.Create(image)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		b.Fatal(err)
	}
	f.Close()
	return s.Call("SR.create", s.Host(), map[string]string{"device": image}, "0", "bench "+typ, "", typ, "user", false, map[string]string{}).(string)
}

// mountOf is where the SR is mounted on this machine.
func mountOf(h *lab.Host, s *lab.Session, sr string) string {
	return filepath.Join(h.StateDir, "mnt", s.Call("SR.get_uuid", sr).(string))
}

// setDefault makes uploads go to the SR.
func setDefault(s *lab.Session, sr string) {
	pool, _ := s.One("pool")
	s.Call("pool.set_default_SR", pool, sr)
}

// peakRSS is VmHWM of a process, in bytes.
func peakRSS(t testing.TB, pid int) int64 {
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

// counter is a TCP proxy that counts what the client sends.
type counter struct {
	URL  string
	sent atomic.Int64
	back atomic.Int64

	ln    net.Listener
	to    string
	mu    sync.Mutex
	conns map[net.Conn]bool
}

// newCounter listens in front of the daemon.
func newCounter(t testing.TB, h *lab.Host) *counter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &counter{URL: "http://" + ln.Addr().String(), ln: ln, to: strings.TrimPrefix(h.URL, "http://"), conns: map[net.Conn]bool{}}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { c.serve(in) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		c.cut()
		serving.Wait()
	})
	return c
}

// cut ends every connection.
func (c *counter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.conns {
		conn.Close()
	}
}

func (c *counter) track(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns[conn] = true
}

func (c *counter) serve(in net.Conn) {
	c.track(in)
	defer in.Close()
	out, err := net.Dial("tcp", c.to)
	if err != nil {
		return
	}
	c.track(out)
	defer out.Close()
	in.(*net.TCPConn).SetReadBuffer(256 << 10)
	out.(*net.TCPConn).SetWriteBuffer(256 << 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		pipe(in, out, &c.back)
	}()
	pipe(out, in, &c.sent)
	<-done
}

// pipe copies until either side ends, and tells the other side.
func pipe(dst, src net.Conn, n *atomic.Int64) {
	buf := make([]byte, 64<<10)
	for {
		k, err := src.Read(buf)
		n.Add(int64(k))
		if k > 0 {
			if _, werr := dst.Write(buf[:k]); werr != nil {
				src.Close()
				return
			}
		}
		if err != nil {
			if err == io.EOF {
				dst.(*net.TCPConn).CloseWrite()
			} else {
				dst.Close()
			}
			return
		}
	}
}

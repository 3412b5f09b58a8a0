package integration

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// counter passes connections on to a host and counts the bytes of each way.
type counter struct {
	addr         string
	password     string // file
	sent, gotten atomic.Int64
	cut          atomic.Int64 // sent bytes after which a connection breaks, once; 0: never
}

func countTo(t testing.TB, h *lab.Host) *counter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &counter{addr: ln.Addr().String(), password: filepath.Join(t.TempDir(), "password")}
	if err := os.WriteFile(c.password, []byte(lab.Password), 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	to := strings.TrimPrefix(h.URL, "http://")
	wg.Go(func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				client.Close()
				continue
			}
			end := sync.OnceFunc(func() { client.Close(); server.Close() })
			wg.Go(func() { defer end(); c.pass(server, client, &c.sent) })
			wg.Go(func() { defer end(); c.pass(client, server, &c.gotten) })
		}
	})
	return c
}

func (c *counter) pass(to, from net.Conn, count *atomic.Int64) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
		total := count.Add(int64(n))
		if at := c.cut.Load(); count == &c.sent && at > 0 && total > at && c.cut.CompareAndSwap(at, 0) {
			return
		}
	}
}

// upload runs the command over the counter; it gives what was sent and gotten.
func (c *counter) upload(h *lab.Host, args ...string) (sent, gotten int64, stdout, stderr string, code int) {
	h.T.Helper()
	s, g := c.sent.Load(), c.gotten.Load()
	stdout, stderr, code = h.CLI(append([]string{"patch", "upload", "--server", "http://" + c.addr, "--password-file", c.password}, args...)...)
	return c.sent.Load() - s, c.gotten.Load() - g, strings.TrimSpace(stdout), stderr, code
}

// revision is a patch with that data behind its script.
func revision(t testing.TB, dir, version string, data []byte) (p *lab.Patch, path string) {
	t.Helper()
	p = &lab.Patch{Label: "revised", Version: version, Apply: "echo revision " + version}
	path = filepath.Join(dir, version+".xsupdate")
	if err := os.WriteFile(path, lab.DefaultKey(t).Sign(t, append(p.Payload(), data...)), 0o644); err != nil {
		t.Fatal(err)
	}
	return p, path
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func replaced(b []byte, at, remove int, insert []byte) []byte {
	return append(append(bytes.Clone(b[:at]), insert...), b[at+remove:]...)
}

// A revision costs what is new in it, on SRs that clone and on those that do not,
// and is the signed file to the byte.
func TestARevisionSendsWhatIsNew(t *testing.T) {
	t.Parallel()
	for name, fs := range map[string]func(testing.TB, int64) string{"copies": ext4FS, "clones": xfsFS} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := lab.Start(t, lab.Options{Dir: fs(t, 2*gib)})
			c := countTo(t, h)
			dir := t.TempDir()
			const size = 24 << 20
			data := random(size)
			_, path := revision(t, dir, "1", data)
			sent, _, first, stderr, code := c.upload(h, path)
			if code != 0 || sent < size || sent > size+size/50 {
				t.Fatalf("the first revision: %d, %d bytes sent, %s", code, sent, stderr)
			}
			for _, r := range []struct {
				version string
				data    []byte
				base    string
				most    int64
			}{
				{"2", replaced(data, size/3, size/100, random(size/100)), "auto", size/100 + 1<<20},
				{"3", replaced(data, 4096, 0, random(1024)), first, 1 << 20},
				{"4", random(size), "auto", size + size/50},
			} {
				p, path := revision(t, dir, r.version, r.data)
				sent, gotten, stdout, stderr, code := c.upload(h, path, "--base", r.base)
				if code != 0 || stdout != string(p.UUID) || stderr != "" {
					t.Fatalf("revision %s: %d %s %s", r.version, code, stdout, stderr)
				}
				if sent > r.most || gotten > size/1000+64<<10 {
					t.Errorf("revision %s: %d bytes sent, %d are right; %d gotten", r.version, sent, r.most, gotten)
				}
				// The digest in the record is that of this file.
				sent, _, stdout, stderr, code = c.upload(h, path)
				if code != 0 || sent > 64<<10 || stdout != string(p.UUID) || !strings.Contains(stderr, "has "+r.version+".xsupdate already") {
					t.Errorf("revision %s again: %d bytes sent, %d %s %s", r.version, sent, code, stdout, stderr)
				}
				if out, stderr, code := h.CLI("patch", "apply", string(p.UUID)); code != 0 || strings.TrimSpace(out) != "revision "+r.version {
					t.Errorf("apply of revision %s: %d %q %s", r.version, code, out, stderr)
				}
			}
		})
	}
}

// An upload goes on over broken connections and dead servers, and sends little
// twice; whole files and deltas alike.
func TestUploadsGoOnOverInterruptions(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	c := countTo(t, h)
	dir := t.TempDir()
	const size = 24 << 20
	data := random(size)
	for _, r := range []struct {
		version string
		data    []byte
		least   int64 // sent
		most    int64
	}{
		{"1", data, size, size + 2<<20},
		{"2", append(random(size/3), data[size/3:]...), size / 3, size/3 + 3<<20},
	} {
		p, path := revision(t, dir, r.version, r.data)
		c.cut.Store(c.sent.Load() + size/8)
		sent, _, stdout, stderr, code := c.upload(h, path)
		if code != 0 || stdout != string(p.UUID) || c.cut.Load() != 0 {
			t.Fatalf("revision %s: %d %s %s", r.version, code, stdout, stderr)
		}
		if sent < r.least || sent > r.most {
			t.Errorf("revision %s: %d bytes sent, at most %d are right", r.version, sent, r.most)
		}
	}
}

// ^C and kill -9 of the client: the same command goes on where it was.
func TestTheSameCommandGoesOn(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	c := countTo(t, h)
	const size = 24 << 20
	p, path := revision(t, t.TempDir(), "1", random(size))
	c.cut.Store(c.sent.Load() + size/2)
	_, _, _, stderr, code := c.upload(h, path, "--retry-for", "0s")
	if code != 3 || !strings.Contains(stderr, "the same command goes on from there until") {
		t.Fatalf("%d %s", code, stderr)
	}
	memory := filepath.Join(filepath.Dir(h.StateDir), "user", "patchd", "uploads.json")
	var begun map[string]struct{ Location, Name string }
	if b, err := os.ReadFile(memory); err != nil || json.Unmarshal(b, &begun) != nil || len(begun) != 1 {
		t.Fatalf("%s, %v", b, err)
	}
	h.Kill()
	h.Up()
	sent, _, stdout, stderr, code := c.upload(h, path)
	if code != 0 || stdout != string(p.UUID) || stderr != "" || sent > size/2+2<<20 {
		t.Errorf("%d %s %s, %d bytes sent", code, stdout, stderr, sent)
	}
	if b, err := os.ReadFile(memory); err != nil || strings.Contains(string(b), "location") {
		t.Errorf("it is remembered still: %s, %v", b, err)
	}
}

// A base whose image is not what it was is no base: it is said, and auto sends
// everything.
func TestADamagedBaseIsNoBase(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	c := countTo(t, h)
	dir := t.TempDir()
	data := random(8 << 20)
	_, path := revision(t, dir, "1", data)
	_, _, first, stderr, code := c.upload(h, path)
	if code != 0 {
		t.Fatal(stderr)
	}
	_, path = revision(t, dir, "2", replaced(data, 1<<20, 0, []byte("x")))
	if sent, _, _, stderr, code := c.upload(h, path, "--base", first); code != 0 || sent > 1<<20 {
		t.Fatalf("%d bytes sent, %s", sent, stderr)
	}
	flip(t, h, first, data[5<<20:5<<20+64])
	p, path := revision(t, dir, "3", replaced(data, 2<<20, 0, []byte("y")))
	_, _, _, stderr, code = c.upload(h, path, "--base", first)
	if code != 1 || !strings.Contains(stderr, "VDI_CONTENT_CHANGED") {
		t.Fatalf("%d %s", code, stderr)
	}
	if _, _, stdout, stderr, code := c.upload(h, path, "--base", "none"); code != 0 || stdout != string(p.UUID) {
		t.Errorf("%d %s", code, stderr)
	}
}

// flip changes a byte of the image of a patch, where some bytes of it stand.
func flip(t testing.TB, h *lab.Host, uuid string, mark []byte) {
	t.Helper()
	s := h.Root()
	rec := s.Call("pool_patch.get_record", s.Call("pool_patch.get_by_uuid", uuid)).(map[string]any)
	vdi := s.Call("VDI.get_uuid", rec["VDI"]).(string)
	f, err := os.OpenFile(filepath.Join(h.StateDir, "sr", vdi+".img"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(all, mark)
	if at < 0 {
		t.Fatal("the bytes are not found in the image")
	}
	if _, err := f.WriteAt([]byte{^mark[0]}, int64(at)); err != nil {
		t.Fatal(err)
	}
}

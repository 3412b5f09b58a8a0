//go:build bench

package bench

import (
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// upload runs `patchd patch upload` through the counter.
func (b *bench) upload(h *lab.Host, c *counter, args ...string) *exec.Cmd {
	b.Helper()
	cmd := exec.Command(lab.Binary(b), append([]string{"--server", c.URL, "--user", "root", "--output", "json", "patch", "upload"}, args...)...)
	cmd.Env = append(os.Environ(), "PATCHD_PASSWORD="+lab.Password, "XDG_STATE_HOME="+b.folder("client"))
	return cmd
}

// benchDelta uploads second revisions of a patch of 1 GiB.
func benchDelta(b *bench) []row {
	h := lab.Start(b, lab.Options{Dir: b.dir})
	s := h.Root()
	c := newCounter(b, h)
	first := &lab.Patch{Label: "bench delta"}
	b.curlPut(h.URL+"/pool_patch_upload", s.Ref, b.signedFile(first, noise(1, gib)))
	sent := func(rest ...io.Reader) float64 {
		p := &lab.Patch{Label: "bench delta"}
		path := b.signedFile(p, rest...)
		defer os.Remove(path)
		c.sent.Store(0)
		if out, err := b.upload(h, c, "--base", string(first.UUID), path).CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
		destroyPatch(s, p)
		return float64(c.sent.Load()) / float64(gib)
	}
	changed := row{name: "DeltaChanged", what: "second revision of 1 GiB, 1 % of it changed: bytes sent", baseline: "1 GiB", target: 0.03}
	inserted := row{name: "DeltaInserted", what: "the same with 1 KiB inserted near the start", baseline: "1 GiB", target: 0.05}
	for i := range benchRounds {
		at := int64(i+1) * gib / 7
		whole := func() io.Reader { return noise(1, gib) }
		changed.figures = append(changed.figures, sent(
			io.LimitReader(whole(), at), noise(byte(10+i), gib/100), skip(whole(), at+gib/100)))
		early := int64(i+1) * 3000
		inserted.figures = append(inserted.figures, sent(
			io.LimitReader(whole(), early), noise(byte(20+i), 1024), skip(whole(), early)))
	}
	return []row{changed, inserted}
}

// skip is r without its first n bytes.
func skip(r io.Reader, n int64) io.Reader {
	if _, err := io.CopyN(io.Discard, r, n); err != nil {
		panic(err)
	}
	return r
}

// benchResume uploads 1 GiB while client and daemon are killed at random, 20
// times, and counts what was sent.
func benchResume(b *bench) []row {
	h := lab.Start(b, lab.Options{Dir: b.dir})
	c := newCounter(b, h)
	r := row{name: "Resume20", what: "upload of 1 GiB killed 20 times at random: bytes sent", baseline: "its size", target: 1.05}
	random := rand.New(rand.NewPCG(1, 2))
	for range benchRounds {
		p := &lab.Patch{}
		path := b.signedFile(p, noise(1, gib))
		r.figures = append(r.figures, b.killed(h, c, path, random))
		destroyPatch(h.Root(), p)
		os.Remove(path)
	}
	return []row{r}
}

// killed uploads path, with 20 kills spread over its bytes, and gives what was
// sent by its size.
func (b *bench) killed(h *lab.Host, c *counter, path string, random *rand.Rand) float64 {
	b.Helper()
	size := b.size(path)
	c.sent.Store(0)
	cmd := b.upload(h, c, path)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	for kill := range int64(20) {
		// One kill in each twentieth of the bytes.
		at := size/20*kill + random.Int64N(size/20)
		for limit := time.Now().Add(2 * time.Minute); c.sent.Load() < at; time.Sleep(time.Millisecond) {
			if time.Now().After(limit) {
				b.Fatalf("the upload stands still at %d of %d bytes", c.sent.Load(), size)
			}
		}
		if kill%2 == 0 {
			cmd.Process.Kill()
			cmd.Wait() //nolint:errcheck // it was killed
			cmd = b.upload(h, c, path)
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
		} else {
			h.Kill()
			h.Up()
		}
	}
	if err := cmd.Wait(); err != nil {
		b.Fatalf("upload: %v\n%s", err, strings.TrimSpace(h.Log()))
	}
	return float64(c.sent.Load()) / float64(size)
}

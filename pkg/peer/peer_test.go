package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// shelfOf is Images with one image, or none.
type shelfOf struct {
	t       *testing.T
	m       *vdi.Map
	path    string
	damaged atomic.Int64
}

func (s *shelfOf) OpenImages(_ context.Context, digest string) ([]vdi.Stored, error) {
	if s == nil || s.path == "" || digest != s.m.Digest() {
		return nil, nil
	}
	f, err := os.Open(s.path)
	if err != nil {
		return nil, err
	}
	return []vdi.Stored{{Map: s.m, File: f, Close: func() { f.Close() }, Damaged: func(int64) { s.damaged.Add(1) }}}, nil
}

// host is a node that listens on an address of its own.
type host struct {
	*Node
	Source
	bad  atomic.Int64 // what Bad heard
	wire *http.Transport
}

// ticketOf is a ticket that holds for anybody.
func ticketOf(digest string) []byte { return []byte("may read " + digest) }

var addresses atomic.Int32

// newHost starts a host; wrap may change what it answers.
func newHost(t *testing.T, name string, images Images, wrap func(http.Handler) http.Handler, change ...func(*Options)) *host {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	h := &host{wire: &http.Transport{MaxIdleConnsPerHost: 4}}
	o := Options{
		Images: images, Log: log, GiveUp: 20 * time.Second,
		Reader: func(r *http.Request) string { a, _, _ := net.SplitHostPort(r.RemoteAddr); return a },
		Verify: func(ticket []byte, reader, digest string) error {
			if !bytes.Equal(ticket, ticketOf(digest)) {
				return errors.New("it is for another image")
			}
			return nil
		},
		Client: func(Source) *http.Client { return &http.Client{Transport: h.wire} },
		Bad:    func(context.Context, Source, string, int64) { h.bad.Add(1) },
	}
	for _, f := range change {
		f(&o)
	}
	h.Node = New(o)
	at := fmt.Sprintf("127.0.77.%d", addresses.Add(1))
	h.wire.DialContext = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(at)}}).DialContext
	l, err := net.Listen("tcp", at+":0")
	if err != nil {
		t.Fatal(err)
	}
	handler := http.Handler(h.Node)
	if wrap != nil {
		handler = wrap(handler)
	}
	srv := &http.Server{Handler: handler}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close(); h.wire.CloseIdleConnections() })
	h.Source = Source{Host: xapi.NewUUID(), Name: name, URL: "http://" + l.Addr().String()}
	return h
}

// image makes a file with data in some of its blocks, the last of which is short.
func image(t *testing.T, blocks int) *shelfOf {
	t.Helper()
	s := &shelfOf{t: t, path: filepath.Join(t.TempDir(), "golden")}
	f, err := os.Create(s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := int64(2*blocks)*vdi.MapBlock + 4096
	rnd := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, vdi.MapBlock)
	for i := range blocks {
		rnd.Read(buf) //nolint:errcheck // it never fails
		at := int64(2*i) * vdi.MapBlock
		if i == blocks-1 {
			at, buf = int64(2*blocks)*vdi.MapBlock, buf[:4096]
		}
		if _, err := f.WriteAt(buf, at); err != nil {
			t.Fatal(err)
		}
	}
	if s.m, err = vdi.BuildMap(t.Context(), f, size); err != nil {
		t.Fatal(err)
	}
	if len(s.m.Blocks) != blocks {
		t.Fatalf("the map has %d blocks, not %d", len(s.m.Blocks), blocks)
	}
	return s
}

// bytesOf is how many bytes the blocks of a map have.
func bytesOf(m *vdi.Map) (n int64) {
	for _, b := range m.Blocks {
		_, length := m.Span(b.Index)
		n += length
	}
	return n
}

// target is an empty file for an image.
func target(t *testing.T, m *vdi.Map) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "copy"))
	if err == nil {
		err = f.Truncate(m.Size)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func from(m *vdi.Map, sources ...Source) PullOptions {
	return PullOptions{Sources: func(context.Context) ([]Source, []byte, error) { return sources, ticketOf(m.Digest()), nil }}
}

// wantWhole fails unless f is the image, with holes where it has zeros.
func wantWhole(t *testing.T, f *os.File, m *vdi.Map) {
	t.Helper()
	if err := m.Verify(context.Background(), f, nil); err != nil {
		t.Errorf("the copy is not the image: %v", err)
	}
	taken, err := vdi.Allocated(f)
	if err != nil || taken > bytesOf(m)+vdi.MapBlock {
		t.Errorf("the copy takes %d bytes, %v; its blocks are %d", taken, err, bytesOf(m))
	}
}

func (h *host) mustPull(t *testing.T, m *vdi.Map, o PullOptions) *os.File {
	t.Helper()
	f := target(t, m)
	if _, err := h.Pull(t.Context(), m, f, o); err != nil {
		t.Fatalf("pull: %v", err)
	}
	wantWhole(t, f, m)
	return f
}

func TestAnImageComesFromOneHost(t *testing.T) {
	golden := image(t, 40)
	seed := newHost(t, "seed", golden, nil)
	me := newHost(t, "me", nil, nil)
	m, err := me.FetchMap(t.Context(), golden.m.Digest(), []Source{seed.Source}, ticketOf(golden.m.Digest()))
	if err != nil || !m.Equal(golden.m) {
		t.Fatalf("the map: %v", err)
	}
	var seen, total int64
	o := from(m, seed.Source)
	o.Progress = func(d, all int64) {
		if d < seen {
			t.Errorf("progress goes back from %d to %d", seen, d)
		}
		seen, total = d, all
	}
	me.mustPull(t, m, o)
	if want := bytesOf(m); seen != want || total != want || seed.Stats().BytesSent != want {
		t.Errorf("progress %d of %d, sent %d; want %d", seen, total, seed.Stats().BytesSent, want)
	}
}

// tracker is what a coordinator knows: who has the image and who fetches it.
type tracker struct {
	mu   sync.Mutex
	seed Source
	at   map[xapi.UUID]Source
}

func (k *tracker) options(m *vdi.Map, me *host) PullOptions {
	return PullOptions{Sources: func(context.Context) ([]Source, []byte, error) {
		k.mu.Lock()
		defer k.mu.Unlock()
		list := []Source{k.seed}
		for _, s := range k.at {
			if s.Host != me.Host {
				list = append(list, s)
			}
		}
		s := me.Source
		s.Partial = true
		k.at[s.Host] = s
		return list, ticketOf(m.Digest()), nil
	}}
}

func TestEightHostsTakeTheImageFromEachOther(t *testing.T) {
	golden := image(t, 48)
	m := golden.m
	seed := newHost(t, "seed", golden, nil)
	seed.Reserved = true
	k := &tracker{seed: seed.Source, at: map[xapi.UUID]Source{}}
	var wg sync.WaitGroup
	for i := range 8 {
		h, f := newHost(t, fmt.Sprint("host ", i), nil, nil), target(t, m)
		wg.Go(func() {
			if _, err := h.Pull(t.Context(), m, f, k.options(m, h)); err != nil {
				t.Errorf("host %d: %v", i, err)
				return
			}
			wantWhole(t, f, m)
		})
	}
	wg.Wait()
	ratio := float64(seed.Stats().BytesSent) / float64(bytesOf(m))
	t.Logf("the seed sent %.2f times the image", ratio)
	if ratio < 1 || ratio >= 2 {
		t.Errorf("the seed sent %.2f times the image", ratio)
	}
}

// corrupt changes a byte of every answer with blocks.
func corrupt(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(&spoiler{w}, r)
	})
}

type spoiler struct{ http.ResponseWriter }

func (s *spoiler) Unwrap() http.ResponseWriter { return s.ResponseWriter }
func (s *spoiler) Write(b []byte) (int, error) {
	if len(b) < 4096 {
		return s.ResponseWriter.Write(b)
	}
	b = bytes.Clone(b)
	b[100] ^= 1
	return s.ResponseWriter.Write(b)
}

func TestAPeerThatSendsWrongBytesIsNamedAndAvoided(t *testing.T) {
	golden := image(t, 24)
	m := golden.m
	liar, seed := newHost(t, "liar", golden, corrupt), newHost(t, "seed", golden, nil)
	seed.Reserved = true
	var named []string
	var mu sync.Mutex
	me := newHost(t, "me", nil, nil, func(o *Options) {
		o.Bad = func(_ context.Context, s Source, digest string, block int64) {
			mu.Lock()
			defer mu.Unlock()
			if _, ok := m.Sum(block); !ok || digest != m.Digest() {
				t.Errorf("block %d of %s is none", block, digest)
			}
			named = append(named, s.Name)
		}
	})
	me.mustPull(t, m, from(m, liar.Source, seed.Source))
	if len(named) == 0 || strings.Trim(strings.Join(named, ""), "liar") != "" {
		t.Errorf("named: %q", named)
	}
	if n := int(me.Stats().BlocksBad); n != len(named) || n > lanes {
		t.Errorf("%d wrong blocks came, %d were told of: it was to be avoided", n, len(named))
	}
	if liar.Stats().BytesSent > 4*lanes*vdi.MapBlock {
		t.Errorf("the liar was asked for %d bytes", liar.Stats().BytesSent)
	}

	f := target(t, m)
	me.GiveUp = 300 * time.Millisecond
	_, err := me.Pull(t.Context(), m, f, from(m, liar.Source))
	if err == nil || !strings.Contains(err.Error(), "liar ("+string(liar.Host)+") has sent a wrong block") {
		t.Errorf("only the liar is there: %v", err)
	}
	if n, err := vdi.Allocated(f); err != nil || n > 0 {
		t.Errorf("%d bytes were written, %v", n, err)
	}
}

func TestPeersThatFail(t *testing.T) {
	golden := image(t, 24)
	m := golden.m
	hang := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	}
	dies := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.RawQuery, "blocks=") {
				next.ServeHTTP(&cutter{ResponseWriter: w, left: 700 << 10}, r)
			}
		})
	}
	lies := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("have") == "1" {
				b := newBits(len(m.Blocks))
				b.fill(len(m.Blocks))
				w.Write(b.encode(len(m.Blocks)))
				return
			}
			blocks, _ := parseList(r.URL.Query().Get("blocks"))
			answer(w, http.StatusConflict, refusal{Missing: blocks})
		})
	}
	nonsense := func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") })
	}
	refuses := func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusForbidden, "X", "no") })
	}
	for name, wrap := range map[string]func(http.Handler) http.Handler{
		"hangs": hang, "dies midway": dies, "lies about what it has": lies, "answers nonsense": nonsense, "refuses the ticket": refuses,
	} {
		for _, partial := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, partial %v", name, partial), func(t *testing.T) {
				t.Parallel()
				bad, seed := newHost(t, "bad", golden, wrap), newHost(t, "seed", golden, nil)
				bad.Partial, seed.Reserved = partial, true
				me := newHost(t, "me", nil, nil, func(o *Options) { o.Stall = time.Second })
				me.mustPull(t, m, from(m, bad.Source, seed.Source))
				if me.bad.Load() != 0 {
					t.Error("no wrong block came, but one was told of")
				}
			})
		}
	}
}

// cutter ends the connection after some bytes.
type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(b []byte) (int, error) {
	if c.left -= len(b); c.left < 0 {
		panic(http.ErrAbortHandler)
	}
	return c.ResponseWriter.Write(b)
}

func TestWhenAllSourcesAreGoneTheyAreNamed(t *testing.T) {
	golden := image(t, 8)
	m := golden.m
	a, b := newHost(t, "first", nil, nil), newHost(t, "second", golden, nil)
	b.Source.URL = "http://127.0.77.250:1"
	me := newHost(t, "me", nil, nil, func(o *Options) { o.GiveUp = 500 * time.Millisecond })
	_, err := me.Pull(t.Context(), m, target(t, m), from(m, a.Source, b.Source))
	if err == nil {
		t.Fatal("nobody has the image, and it was pulled")
	}
	for _, want := range []string{"8 of 8 blocks", "first (" + string(a.Host), "nothing of this image is here", "second (" + string(b.Host), "refused"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	_, err = me.Pull(t.Context(), m, target(t, m), PullOptions{Sources: func(context.Context) ([]Source, []byte, error) {
		return nil, nil, errors.New("the coordinator is away")
	}})
	if err == nil || !strings.Contains(err.Error(), "the coordinator is away") || !strings.Contains(err.Error(), "no host") {
		t.Errorf("without a coordinator: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("not wanted any more")
	cancel(cause)
	if _, err := me.Pull(ctx, m, target(t, m), from(m, a.Source)); !errors.Is(err, cause) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestAPullIsResumed(t *testing.T) {
	golden := image(t, 32)
	m := golden.m
	f := target(t, m)
	all, err := os.ReadFile(golden.path)
	if err != nil {
		t.Fatal(err)
	}
	// Half of it is there, one block is wrong, and something lies where zeros belong.
	for at := int64(0); at < 32*vdi.MapBlock; at += 2 * vdi.MapBlock {
		if _, err := f.WriteAt(all[at:at+vdi.MapBlock], at); err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []int64{2*vdi.MapBlock + 7, 5*vdi.MapBlock + 9} {
		if _, err := f.WriteAt([]byte("wrong"), at); err != nil {
			t.Fatal(err)
		}
	}
	seed, me := newHost(t, "seed", golden, nil), newHost(t, "me", nil, nil)
	o := from(m, seed.Source)
	o.Resume = true
	moved, err := me.Pull(t.Context(), m, f, o)
	if err != nil {
		t.Fatal(err)
	}
	wantWhole(t, f, m)
	if want := bytesOf(m) - 15*vdi.MapBlock; moved != want || seed.Stats().BytesSent != want {
		t.Errorf("%d bytes moved, %d were sent; want %d", moved, seed.Stats().BytesSent, want)
	}
	if moved, err := me.Pull(t.Context(), m, f, o); moved != 0 || err != nil {
		t.Errorf("a whole image: %d, %v", moved, err)
	}
}

func TestADamagedImageIsNotServed(t *testing.T) {
	golden, other := image(t, 6), image(t, 6)
	m := golden.m
	f, err := os.OpenFile(golden.path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("bad disk"), 2*vdi.MapBlock)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	seed, good := newHost(t, "damaged", golden, nil), newHost(t, "good", other, nil)
	good.Reserved = true
	me := newHost(t, "me", nil, nil)
	me.mustPull(t, m, from(m, seed.Source, good.Source))
	if golden.damaged.Load() == 0 {
		t.Error("nobody was told of the damage")
	}
	if me.bad.Load() != 0 {
		t.Error("the damaged block was sent")
	}
}

func TestHostileRequests(t *testing.T) {
	golden := image(t, 20)
	digest := golden.m.Digest()
	seed := newHost(t, "seed", golden, nil)
	other := fmt.Sprintf("%x", sha256.Sum256([]byte("another")))
	for name, c := range map[string]struct {
		path   string
		ticket []byte
		want   int
	}{
		"no map":                 {PathBlocks + "?have=1", ticketOf(digest), 400},
		"a map that is none":     {PathBlocks + "?have=1&map=../../etc", ticketOf(digest), 400},
		"upper case":             {PathBlocks + "?have=1&map=" + strings.ToUpper(digest), ticketOf(digest), 400},
		"neither have nor list":  {PathBlocks + "?map=" + digest, ticketOf(digest), 400},
		"no ticket":              {PathBlocks + "?have=1&map=" + digest, nil, 403},
		"no ticket for the map":  {PathMap + "?map=" + digest, nil, 403},
		"another image's ticket": {PathBlocks + "?have=1&map=" + digest, ticketOf(other), 403},
		"a large ticket":         {PathBlocks + "?have=1&map=" + digest, bytes.Repeat([]byte("x"), maxTicket), 403},
		"an image not here":      {PathBlocks + "?have=1&map=" + other, ticketOf(other), 404},
		"a huge range":           {PathBlocks + "?map=" + digest + "&blocks=0-9223372036854775807", ticketOf(digest), 400},
		"many ranges":            {PathBlocks + "?map=" + digest + "&blocks=" + strings.Repeat("0-15,", 40) + "0", ticketOf(digest), 400},
		"17 blocks":              {PathBlocks + "?map=" + digest + "&blocks=0,2,4,6,8,10,12,14,16,18,20,22,24,26,28,30,32", ticketOf(digest), 400},
		"backwards":              {PathBlocks + "?map=" + digest + "&blocks=5-3", ticketOf(digest), 400},
		"negative":               {PathBlocks + "?map=" + digest + "&blocks=-3", ticketOf(digest), 400},
		"a block of zeros":       {PathBlocks + "?map=" + digest + "&blocks=1", ticketOf(digest), 400},
		"a block beyond":         {PathBlocks + "?map=" + digest + "&blocks=99999", ticketOf(digest), 400},
		"a good request":         {PathBlocks + "?map=" + digest + "&blocks=4,0", ticketOf(digest), 200},
	} {
		resp, err := get(t.Context(), seed.Client(seed.Source), seed.URL+c.path, c.ticket)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.want || err != nil {
			t.Errorf("%s: %d %.80q, %v; want %d", name, resp.StatusCode, body, err, c.want)
		}
		if c.want == 200 {
			all, _ := os.ReadFile(golden.path)
			if want := append(bytes.Clone(all[4<<20:5<<20]), all[:1<<20]...); !bytes.Equal(body, want) {
				t.Errorf("%s: %d bytes came that are not the blocks in the order asked", name, len(body))
			}
		}
	}
	resp, err := http.Post(seed.URL+PathBlocks+"?map="+digest, "", nil)
	if err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %v %v", resp, err)
	}
}

func TestTooManyReadersAreSentAway(t *testing.T) {
	golden := image(t, 16)
	digest := golden.m.Digest()
	seed := newHost(t, "seed", golden, nil, func(o *Options) { o.Readers = 1 })
	seed.readers <- struct{}{} // somebody reads
	for range maxWaiting {
		seed.waiting <- struct{}{} // and many wait
	}
	resp, err := get(t.Context(), seed.Client(seed.Source), seed.URL+PathBlocks+"?blocks=0&map="+digest, ticketOf(digest))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || seed.Stats().Refused != 1 {
		t.Errorf("%d %q, %+v", resp.StatusCode, resp.Header.Get("Retry-After"), seed.Stats())
	}
	me := newHost(t, "me", nil, nil)
	done := make(chan error, 1)
	f := target(t, golden.m)
	go func() { _, err := me.Pull(t.Context(), golden.m, f, from(golden.m, seed.Source)); done <- err }()
	for seed.Stats().Refused < 2 {
		time.Sleep(time.Millisecond)
	}
	for range maxWaiting {
		<-seed.waiting
	}
	<-seed.readers
	if err := <-done; err != nil {
		t.Error(err)
	}
	wantWhole(t, f, golden.m)
}

func TestBits(t *testing.T) {
	for _, n := range []int{1, 7, 8, 63, 64, 65, 1000} {
		b := newBits(n)
		b.fill(n)
		raw := b.encode(n)
		back, err := decodeBits(raw, n)
		if err != nil {
			t.Fatal(err)
		}
		for start := range n {
			seen := map[int]bool{}
			for _, at := range pick(len(back), start, n, func(i int) uint64 { return back[i] }) {
				seen[at] = true
			}
			if len(seen) != n {
				t.Fatalf("of %d bits %d are picked from %d on", n, len(seen), start)
			}
		}
		if _, err := decodeBits(append(raw, 0), n); err == nil {
			t.Error("a set of bits that is too long is taken")
		}
	}
	if list, err := parseList(formatList([]int64{3, 17, 18, 19, 1})); err != nil || fmt.Sprint(list) != "[3 17 18 19 1]" {
		t.Errorf("%v %v", list, err)
	}
}

package integration

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/vdi"
)

// C6: a host whose copy is damaged on its disk, and one that lies, are found
// out at the first block, named, and asked no more; the apply succeeds.
func TestC6_WrongBytes(t *testing.T) {
	t.Parallel()
	p := lab.PoolHere(t, 4, nil)
	p.JoinAll()
	first, flipped, liar, victim := p.Hosts[0], p.Hosts[1], p.Hosts[2], p.Hosts[3]
	s := first.Root()
	host := s.HostRef(victim)

	w := p.Work(lab.Patch{Pad: 8 << 20, Label: "damaged on a disk"})
	ref := s.MustUpload(w.Patch)
	first.Must("patch", "stage", string(w.UUID), flipped.UUID())
	flipAll(t, replica(t, flipped))
	s.Call("pool_patch.apply", ref, host)
	everywhere(t, s, w, victim)
	if said := flipped.Log(); !strings.Contains(said, "a block that another host asks for cannot be had") {
		t.Errorf("the damage is not noticed:\n%s", said)
	}
	s.Call("pool_patch.pool_clean", ref)
	until(t, "the replica to be gone", func() bool { return len(images(t, flipped)) == 0 })

	w = p.Work(lab.Patch{Pad: 8 << 20, Label: "a host that lies"})
	ref = s.MustUpload(w.Patch)
	first.Must("patch", "stage", string(w.UUID), liar.UUID())
	liar.Down()
	lies := lieAs(t, liar, replica(t, liar))
	_, end := agentWith(t, identityOf(t, liar), liar, first)
	until(t, "the liar to be connected", func() bool { return connected(s, liar) })
	s.Call("pool_patch.apply", ref, host)
	everywhere(t, s, w, victim)
	asked := lies.Load()
	if asked == 0 {
		t.Error("nobody has asked the host that lies")
	}
	if asked > 4 {
		t.Errorf("it was asked %d times, with a few requests at once", asked)
	}
	if said := victim.Log(); !strings.Contains(said, "a host has given a wrong block") || !strings.Contains(said, liar.UUID()) {
		t.Errorf("the liar is not named:\n%s", said)
	}
	named := false
	for _, m := range s.All("message") {
		named = named || strings.Contains(m["body"].(string), liar.UUID())
	}
	if !named {
		t.Errorf("no message names the liar: %v", s.All("message"))
	}
	end()
}

// connected tells whether the coordinator has a link to the host.
func connected(s *lab.Session, h *lab.Host) bool {
	s.H.T.Helper()
	ref := s.HostRef(h)
	for _, st := range s.Call("patchd.host_states").([]any) {
		if st := st.(map[string]any); st["ref"] == ref {
			return st["connected"] == "true"
		}
	}
	return false
}

func images(t testing.TB, h *lab.Host) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(h.StateDir, "sr", "*.img"))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// replica is the file of the only disk image in the local SR of a host.
func replica(t testing.TB, h *lab.Host) string {
	t.Helper()
	all := images(t, h)
	if len(all) != 1 {
		t.Fatalf("the SR has the images %v", all)
	}
	return all[0]
}

// flipAll changes one byte in every mebibyte of an image that has data there.
func flipAll(t testing.TB, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := 1000; at < len(b); at += 1 << 20 {
		if b[at] == 0 {
			continue
		}
		if _, err := f.WriteAt([]byte{b[at] ^ 1}, int64(at)); err != nil {
			t.Fatal(err)
		}
	}
}

// lieAs serves, with the key and the address of a host that is down, wrong bytes
// for every block of the image, and counts how often.
func lieAs(t testing.TB, h *lab.Host, image string) *atomic.Int64 {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m, err := vdi.BuildMap(t.Context(), f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	id := identityOf(t, h)
	ln, err := net.Listen("tcp", strings.TrimPrefix(h.TLSURL, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	_, hosts := trust.Split(ln, trust.ServerConfig(trust.ClientConfig(id, nil), id), 10*time.Second, func(error) {})
	lies := &atomic.Int64{}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch q := r.URL.Query(); {
		case strings.HasSuffix(r.URL.Path, "/map"):
			_ = m.Encode(w) // the client may be gone
		case q.Get("have") == "1":
			all := make([]byte, (len(m.Blocks)+7)/8)
			for i := range m.Blocks {
				all[i/8] |= 1 << (i % 8)
			}
			_, _ = w.Write(all) // the client may be gone
		default:
			lies.Add(1)
			_, _ = w.Write(make([]byte, lengthOf(m, q.Get("blocks")))) // the client may be gone
		}
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(hosts) // until Close
	}()
	t.Cleanup(func() { server.Close(); <-done })
	return lies
}

// lengthOf is how many bytes the blocks of a list such as 3,17-20 have.
func lengthOf(m *vdi.Map, list string) (n int64) {
	for _, part := range strings.Split(list, ",") {
		from, to, both := strings.Cut(part, "-")
		if !both {
			to = from
		}
		a, err1 := strconv.ParseInt(from, 10, 64)
		b, err2 := strconv.ParseInt(to, 10, 64)
		if err1 != nil || err2 != nil {
			return 0
		}
		for ; a <= b; a++ {
			_, length := m.Span(a)
			n += length
		}
	}
	return n
}

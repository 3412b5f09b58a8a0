package srtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// LifeCycle: a VDI as pkg/sr tells it, from part to live to gone.
func (s Suite) LifeCycle(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	vdi := xapi.NewUUID()
	p := sr.Part(owner, vdi)
	v, err := r.Create(ctx, p, 1<<30)
	must(t, err)
	if v.Name != p || v.VirtualSize != 1<<30 || v.PhysicalUtilisation > mib {
		t.Errorf("a fresh volume of 1 GiB is %+v", v)
	}
	must(t, put(ctx, r, p, pattern(1, 3*mib), 7*mib))
	must(t, r.Rename(ctx, p, sr.Live(vdi)))
	wantNames(t, r, sr.Live(vdi))
	list, err := r.Scan(ctx)
	must(t, err)
	if got := list[0]; got.VirtualSize != 1<<30 || got.PhysicalUtilisation < 3*mib || got.PhysicalUtilisation > 64*mib {
		t.Errorf("scan says %+v of a volume with 3 MiB of data", got)
	}
	path, err := r.Path(ctx, sr.Live(vdi))
	must(t, err)
	f, err := os.Open(path)
	must(t, err)
	b := make([]byte, 3*mib)
	_, err = f.ReadAt(b, 7*mib)
	must(t, errors.Join(err, f.Close()))
	if !bytes.Equal(b, pattern(1, 3*mib)) {
		t.Error("the path does not show what was written")
	}
	must(t, r.Destroy(ctx, sr.Live(vdi)))
	wantNames(t, r)
}

// Create: zeros at first, an existing name is left alone, sizes that make no sense are refused.
func (s Suite) Create(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	n := live()
	_, err := r.Create(ctx, n, 5*mib+512)
	must(t, err)
	must(t, holds(ctx, r, n, 5*mib+512, make([]byte, 5*mib+512)))
	must(t, put(ctx, r, n, []byte("mine"), 0))
	if _, err := r.Create(ctx, n, mib); !isExist(err) {
		t.Errorf("create over an existing volume: %v, want os.ErrExist", err)
	}
	if b, err := get(ctx, r, n, 4, 0); err != nil || string(b) != "mine" {
		t.Errorf("the existing volume was touched: %q, %v", b, err)
	}
	for _, size := range []int64{0, -1, -1 << 63} {
		_, err := r.Create(ctx, part(), size)
		wantCode(t, fmt.Sprintf("create of %d bytes", size), err, xapi.InvalidValue)
	}
	wantNames(t, r, n)
}

// Absent: what is not there is VDI_NOT_AVAILABLE, and does not come to be.
func (s Suite) Absent(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	n := live()
	_, open := r.Open(ctx, n, sr.ReadWrite)
	_, path := r.Path(ctx, n)
	errs := map[string]error{"open": open, "path": path, "resize": r.Resize(ctx, n, mib), "rename": r.Rename(ctx, n, live())}
	if sr.Has(r.Features(), sr.VDIClone) {
		_, errs["clone"] = r.Clone(ctx, n, live())
	}
	for verb, err := range errs {
		wantCode(t, verb, err, xapi.VDINotAvailable)
	}
	wantNames(t, r)
}

// Open: a volume opened for reading cannot be written, and writing never lengthens it.
func (s Suite) Open(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	n := part()
	filled(t, r, n, mib, []byte("end"))
	f, err := r.Open(ctx, n, sr.ReadOnly)
	must(t, err)
	if _, err := f.WriteAt([]byte("no"), 0); err == nil {
		t.Error("wrote through a descriptor that is for reading")
	}
	must(t, f.Close())
	a, err := r.Open(ctx, n, sr.ReadWrite)
	must(t, err)
	b, err := r.Open(ctx, n, sr.ReadOnly)
	must(t, err)
	_, err = a.WriteAt([]byte("seen"), 4096)
	must(t, err)
	got := make([]byte, 4)
	if _, err := b.ReadAt(got, 4096); err != nil || string(got) != "seen" {
		t.Errorf("another descriptor reads %q, %v", got, err)
	}
	must(t, errors.Join(a.Close(), b.Close()))
	must(t, holds(ctx, r, n, mib, []byte("end")))
}

// Descriptors: an open descriptor stays valid when its volume is renamed and destroyed.
func (s Suite) Descriptors(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	from, to := part(), live()
	filled(t, r, from, mib, pattern(3, 4096))
	f, err := r.Open(ctx, from, sr.ReadWrite)
	must(t, err)
	defer f.Close()
	must(t, r.Rename(ctx, from, to))
	_, err = f.WriteAt([]byte("later"), 0)
	must(t, err)
	must(t, f.Sync())
	if b, err := get(ctx, r, to, 5, 0); err != nil || string(b) != "later" {
		t.Errorf("the renamed volume holds %q, %v", b, err)
	}
	must(t, r.Destroy(ctx, to))
	b := make([]byte, 4096)
	if _, err := f.ReadAt(b, mib-4096); err != nil || !bytes.Equal(b, pattern(3, 4096)) {
		t.Errorf("a destroyed volume is not readable through its descriptor: %v", err)
	}
}

// Rename: atomic, never over another volume, and success when it was done before.
func (s Suite) Rename(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	a, b, c := part(), live(), live()
	filled(t, r, a, mib, []byte("aaa"))
	filled(t, r, c, 2*mib, []byte("ccc"))
	must(t, r.Rename(ctx, a, b))
	must(t, r.Rename(ctx, a, b))
	must(t, r.Rename(ctx, b, b))
	if err := r.Rename(ctx, b, c); !isExist(err) {
		t.Errorf("rename over another volume: %v, want os.ErrExist", err)
	}
	must(t, holds(ctx, r, b, mib, []byte("aaa")))
	must(t, holds(ctx, r, c, 2*mib, []byte("ccc")))
	wantNames(t, r, b, c)
}

// Destroy: an absent volume is success.
func (s Suite) Destroy(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	a, b := live(), live()
	filled(t, r, a, mib, []byte("x"))
	filled(t, r, b, mib, []byte("y"))
	must(t, r.Destroy(ctx, a))
	must(t, r.Destroy(ctx, a))
	must(t, r.Destroy(ctx, work()))
	wantNames(t, r, b)
}

// Resize: longer keeps the bytes and adds zeros, shorter is refused.
func (s Suite) Resize(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	n := live()
	filled(t, r, n, mib, pattern(4, 4096))
	must(t, r.Resize(ctx, n, mib))
	must(t, r.Resize(ctx, n, 4*mib))
	must(t, holds(ctx, r, n, 4*mib, make([]byte, 3*mib)))
	if b, err := get(ctx, r, n, 4096, mib-4096); err != nil || !bytes.Equal(b, pattern(4, 4096)) {
		t.Errorf("resize lost bytes: %v", err)
	}
	for _, size := range []int64{4*mib - 1, 0, -1} {
		wantCode(t, fmt.Sprintf("resize to %d", size), r.Resize(ctx, n, size), xapi.InvalidValue)
	}
	must(t, holds(ctx, r, n, 4*mib, make([]byte, 3*mib)))
}

// CloneIsolation: clones and source never see each other's writes (S1-14).
func (s Suite) CloneIsolation(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	if !sr.Has(r.Features(), sr.VDIClone) {
		return
	}
	src := live()
	filled(t, r, src, 4*mib, pattern(6, 4*mib))
	a, b := work(), work()
	for _, n := range []sr.Name{a, b} {
		_, err := r.Clone(ctx, src, n)
		must(t, err)
	}
	if _, err := r.Clone(ctx, src, a); !isExist(err) {
		t.Errorf("clone over an existing volume: %v, want os.ErrExist", err)
	}
	must(t, put(ctx, r, a, []byte("only in a"), mib))
	must(t, put(ctx, r, src, []byte("only in src"), 2*mib))
	must(t, holds(ctx, r, b, 4*mib, pattern(6, 4*mib)))
	if got, err := get(ctx, r, src, 9, mib); err != nil || string(got) == "only in a" {
		t.Errorf("a write into a clone reached its source (%v)", err)
	}
	if got, err := get(ctx, r, a, 11, 2*mib); err != nil || string(got) == "only in src" {
		t.Errorf("a write into the source reached a clone (%v)", err)
	}
	must(t, r.Resize(ctx, a, 8*mib))
	must(t, r.Destroy(ctx, src))
	must(t, holds(ctx, r, b, 4*mib, pattern(6, 4*mib)))
}

// Copy: a copy has every byte and no hole more or less, and leaves nothing when it fails.
func (s Suite) Copy(t *testing.T) {
	from, to := s.attached(t), s.attached(t)
	ctx := t.Context()
	src, same, far := live(), live(), live()
	filled(t, from, src, 256*mib, pattern(7, 3*mib))
	must(t, put(ctx, from, src, pattern(8, 8192), 100*mib))
	must(t, sr.Copy(ctx, from, same, from, src, nil))
	must(t, sr.Copy(ctx, to, far, from, src, nil))
	for n, r := range map[sr.Name]sr.Repository{same: from, far: to} {
		must(t, holds(ctx, r, n, 256*mib, pattern(7, 3*mib)))
		if b, err := get(ctx, r, n, 8192, 100*mib); err != nil || !bytes.Equal(b, pattern(8, 8192)) {
			t.Errorf("copy differs: %v", err)
		}
	}
	list, err := to.Scan(ctx)
	must(t, err)
	if list[0].PhysicalUtilisation > 32*mib {
		t.Errorf("the copy of a sparse volume takes %d bytes", list[0].PhysicalUtilisation)
	}
	if err := sr.Copy(ctx, to, far, from, src, nil); err == nil {
		t.Error("copied over an existing volume")
	}
	must(t, holds(ctx, to, far, 256*mib, pattern(7, 3*mib)))
	cancelled, cancel := context.WithCancel(ctx)
	err = sr.Copy(cancelled, to, part(), from, src, func(int64, int64) { cancel() })
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled copy says %v", err)
	}
	if err != nil {
		wantNames(t, to, far)
	}
}

// Cancelled: with a context that has ended no call changes anything.
func (s Suite) Cancelled(t *testing.T) {
	d, c := s.New(t)
	r := attach(t, d, c)
	n := live()
	filled(t, r, n, mib, pattern(9, 4096))
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the reason")
	cancel(why)
	errs := everyCall(ctx, r, n)
	_, errs["probe"] = d.Probe(ctx, c)
	_, errs["attach"] = d.Attach(ctx, c)
	errs["make"], errs["remove"] = d.Create(ctx, c), d.Destroy(ctx, c)
	for verb, err := range errs {
		if !errors.Is(err, why) {
			t.Errorf("%s with a cancelled context: %v, want its cause", verb, err)
		}
	}
	wantNames(t, r, n)
	must(t, holds(t.Context(), r, n, mib, pattern(9, 4096)))
}

// Races: calls at the same time neither mix up volumes nor win twice.
func (s Suite) Races(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	const n = 16
	errs := together(n, func(i int) error {
		p, l, data := part(), live(), pattern(byte(i), 8192)
		if _, err := r.Create(ctx, p, mib); err != nil {
			return err
		}
		return errors.Join(put(ctx, r, p, data, mib-8192), r.Rename(ctx, p, l), holds(ctx, r, l, mib, data), r.Destroy(ctx, l))
	})
	must(t, errors.Join(errs...))
	wantNames(t, r)

	contested := live()
	wins := 0
	for _, err := range together(n, func(int) error { _, err := r.Create(ctx, contested, mib); return err }) {
		if err == nil {
			wins++
		} else if !isExist(err) {
			t.Errorf("create of a taken name: %v", err)
		}
	}
	if wins != 1 {
		t.Errorf("%d of %d made the same volume", wins, n)
	}
	target := live()
	parts := make([]sr.Name, n)
	for i := range parts {
		parts[i] = part()
		filled(t, r, parts[i], mib, []byte{byte(i)})
	}
	wins = 0
	for _, err := range together(n, func(i int) error { return r.Rename(ctx, parts[i], target) }) {
		if err == nil {
			wins++
		}
	}
	if wins != 1 || len(names(t, r)) != n+1 {
		t.Errorf("%d renames to one name won, %d volumes are there, want 1 and %d", wins, len(names(t, r)), n+1)
	}
}

// together runs f n times at once.
func together(n int, f func(i int) error) []error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { <-start; errs[i] = f(i) })
	}
	close(start)
	wg.Wait()
	return errs
}

// Model: random sequences of calls against a map from names to one byte of content.
func (s Suite) Model(t *testing.T) {
	if s.Quick {
		return
	}
	m := &model{r: s.attached(t), names: []sr.Name{live(), live(), part(), part(), work()}}
	rapid.Check(t, func(t *rapid.T) {
		m.t, m.last = t, map[sr.Name]byte{}
		t.Repeat(map[string]func(*rapid.T){
			"create":  m.create,
			"write":   m.write,
			"rename":  m.rename,
			"clone":   m.clone,
			"destroy": func(*rapid.T) { m.destroy(m.pick()) },
			"":        m.compare,
		})
		for _, n := range m.names {
			m.destroy(n)
		}
	})
}

// model is what a repository must hold: the last byte of each volume.
type model struct {
	r     sr.Repository
	names []sr.Name
	t     *rapid.T
	last  map[sr.Name]byte
}

func (m *model) pick() sr.Name { return rapid.SampledFrom(m.names).Draw(m.t, "name") }

func (m *model) has(n sr.Name) bool { _, there := m.last[n]; return there }

// expect fails unless err says whether the call was right.
func (m *model) expect(what string, ok bool, err error) {
	if ok != (err == nil) {
		m.t.Fatalf("%s: error %v, want success %v", what, err, ok)
	}
}

func (m *model) create(t *rapid.T) {
	n := m.pick()
	_, err := m.r.Create(t.Context(), n, mib)
	m.expect("create", !m.has(n), err)
	if !m.has(n) {
		m.last[n] = 0
	}
}

func (m *model) write(t *rapid.T) {
	n, b := m.pick(), rapid.Byte().Draw(t, "byte")
	m.expect("write", m.has(n), put(t.Context(), m.r, n, []byte{b}, mib-1))
	if m.has(n) {
		m.last[n] = b
	}
}

func (m *model) rename(t *rapid.T) {
	a, b := m.pick(), m.pick()
	ok := m.has(a) && (!m.has(b) || a == b) || !m.has(a) && m.has(b)
	m.expect("rename", ok, m.r.Rename(t.Context(), a, b))
	if m.has(a) && !m.has(b) {
		m.last[b] = m.last[a]
		delete(m.last, a)
	}
}

func (m *model) clone(t *rapid.T) {
	a, b := m.pick(), m.pick()
	ok := m.has(a) && !m.has(b) && sr.Has(m.r.Features(), sr.VDIClone)
	_, err := m.r.Clone(t.Context(), a, b)
	m.expect("clone", ok, err)
	if ok {
		m.last[b] = m.last[a]
	}
}

func (m *model) destroy(n sr.Name) {
	m.expect("destroy", true, m.r.Destroy(m.t.Context(), n))
	delete(m.last, n)
}

func (m *model) compare(t *rapid.T) {
	list, err := m.r.Scan(t.Context())
	if err != nil || len(list) != len(m.last) {
		t.Fatalf("scan shows %v (%v), the model has %v", list, err, m.last)
	}
	for _, v := range list {
		if got, err := get(t.Context(), m.r, v.Name, 1, mib-1); !m.has(v.Name) || err != nil || got[0] != m.last[v.Name] {
			t.Fatalf("volume %s holds %v (%v), want %d", v.Name, got, err, m.last[v.Name])
		}
	}
}

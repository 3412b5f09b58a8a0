// Package srtest is the conformance suite of storage drivers: what pkg/sr
// says in prose, as tests that every driver runs.
//
//	func TestConformance(t *testing.T) {
//		srtest.Run(t, srtest.Suite{New: func(t *testing.T) (sr.Driver, sr.Config) { … }})
//	}
package srtest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// Suite says how to make what is tested. Its methods are the tests.
type Suite struct {
	// New gives a driver and the configuration of an SR that does not exist
	// yet, at a place of its own that goes when t ends. Required.
	New func(t *testing.T) (sr.Driver, sr.Config)
	// Small is New for an SR that holds no more than 512 MiB, to be filled. Optional.
	Small func(t *testing.T) (sr.Driver, sr.Config)
	// Hostile are device_configs that the driver must refuse by a code,
	// whatever it is asked to do with them.
	Hostile []map[string]string
	// Quick leaves out the random sequences: for the second storage below one
	// driver that differs in nothing they look at.
	Quick bool
	// Double says that the driver only plays one that clones: its clones take
	// the room of copies.
	Double bool
	// Volatile says that a volume's bytes need not survive being detached.
	Volatile bool
}

// Run runs the whole suite.
func Run(t *testing.T, s Suite) {
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"Info", s.Info}, {"Config", s.Config}, {"MakeAndRemove", s.MakeAndRemove}, {"OneSRPerPlace", s.OneSRPerPlace},
		{"Reattach", s.Reattach}, {"AfterDetach", s.AfterDetach},
		{"LifeCycle", s.LifeCycle}, {"Create", s.Create}, {"HostileNames", s.HostileNames}, {"Absent", s.Absent},
		{"Open", s.Open}, {"Descriptors", s.Descriptors}, {"Rename", s.Rename}, {"Destroy", s.Destroy}, {"Resize", s.Resize},
		{"Claims", s.Claims}, {"CloneRoom", s.CloneRoom}, {"Maps", s.Maps}, {"CloneIsolation", s.CloneIsolation}, {"Copy", s.Copy},
		{"Cancelled", s.Cancelled}, {"Races", s.Races}, {"KeepFree", s.KeepFree}, {"Full", s.Full}, {"Model", s.Model},
	} {
		t.Run(test.name, test.run)
	}
}

// Owner is the owner of all working volumes in the suite.
var owner = sr.Owner{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Job: xapi.NewUUID()}

func live() sr.Name { return sr.Live(xapi.NewUUID()) }
func part() sr.Name { return sr.Part(owner, xapi.NewUUID()) }
func work() sr.Name { return sr.Work(owner, xapi.NewUUID()) }

const mib = 1 << 20

// attached gives a fresh SR, attached; it is detached and removed with t.
func (s Suite) attached(t *testing.T) sr.Repository {
	t.Helper()
	d, c := s.New(t)
	return attach(t, d, c)
}

func attach(t *testing.T, d sr.Driver, c sr.Config) sr.Repository {
	t.Helper()
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	t.Cleanup(func() { r.Detach(context.Background()) })
	return r
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
}

// wantCode fails the test unless err has the code.
func wantCode(t testing.TB, what string, err error, code string) {
	t.Helper()
	if !xapi.Is(err, code) {
		t.Errorf("%s: error %v, want %s", what, err, code)
	}
}

// pattern gives n bytes that depend on seed.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// put writes data at an offset of a volume and syncs.
func put(ctx context.Context, r sr.Repository, n sr.Name, data []byte, at int64) error {
	f, err := r.Open(ctx, n, sr.ReadWrite)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, at)
	return errors.Join(err, f.Sync(), f.Close())
}

// get reads n bytes at an offset of a volume.
func get(ctx context.Context, r sr.Repository, name sr.Name, n int, at int64) ([]byte, error) {
	f, err := r.Open(ctx, name, sr.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, n)
	_, err = f.ReadAt(b, at)
	return b, err
}

// filled makes a volume of size bytes with data at its end.
func filled(t testing.TB, r sr.Repository, n sr.Name, size int64, data []byte) {
	t.Helper()
	_, err := r.Create(t.Context(), n, size)
	must(t, err)
	must(t, put(t.Context(), r, n, data, size-int64(len(data))))
}

// holds tells what is wrong with the size or the last bytes of a volume.
func holds(ctx context.Context, r sr.Repository, n sr.Name, size int64, data []byte) error {
	f, err := r.Open(ctx, n, sr.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if end != size {
		return fmt.Errorf("volume %s has %d bytes, want %d", n, end, size)
	}
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, size-int64(len(data))); err != nil {
		return err
	}
	if !bytes.Equal(got, data) {
		return fmt.Errorf("volume %s does not hold what was written", n)
	}
	return nil
}

// names lists what Scan shows.
func names(t testing.TB, r sr.Repository) []sr.Name {
	t.Helper()
	list, err := r.Scan(t.Context())
	must(t, err)
	out := []sr.Name{}
	for _, v := range list {
		out = append(out, v.Name)
	}
	return out
}

func wantNames(t testing.TB, r sr.Repository, want ...sr.Name) {
	t.Helper()
	got := names(t, r)
	byString := func(a, b sr.Name) int { return bytes.Compare([]byte(a.String()), []byte(b.String())) }
	if !slices.IsSortedFunc(got, byString) {
		t.Errorf("scan is not sorted: %v", got)
	}
	slices.SortFunc(want, byString)
	if !slices.Equal(got, want) {
		t.Errorf("scan shows %v, want %v", got, want)
	}
}

// Info: the SM record is complete, and every SR has the features it promises.
func (s Suite) Info(t *testing.T) {
	d, c := s.New(t)
	i := d.Info()
	for what, text := range map[string]string{"Type": i.Type, "Label": i.Label, "Description": i.Description, "Vendor": i.Vendor, "Version": i.Version} {
		if text == "" {
			t.Errorf("Info().%s is empty", what)
		}
	}
	for _, key := range i.Required {
		if i.Config[key] == "" {
			t.Errorf("required key %q is not explained in Config", key)
		}
	}
	r := attach(t, d, c)
	for _, f := range append(slices.Clone(i.Features), sr.VDICreate, sr.VDIDelete) {
		if !sr.Has(r.Features(), f) {
			t.Errorf("the repository lacks %s, which every SR of this kind has", f)
		}
	}
	text, err := d.Probe(t.Context(), c)
	must(t, err)
	if !bytes.Contains([]byte(text), []byte(c.SR)) {
		t.Errorf("probe does not name the SR %s: %s", c.SR, text)
	}
}

// Config: unknown, missing and hostile device_config is refused everywhere.
func (s Suite) Config(t *testing.T) {
	d, c := s.New(t)
	bad := slices.Clone(s.Hostile)
	unknown := map[string]string{"no_such_key": "x"}
	for k, v := range c.Device {
		unknown[k] = v
	}
	bad = append(bad, unknown)
	if len(d.Info().Required) > 0 {
		bad = append(bad, nil)
	}
	for _, device := range bad {
		c := sr.Config{SR: c.SR, Device: device}
		_, probeErr := d.Probe(t.Context(), c)
		_, attachErr := d.Attach(t.Context(), c)
		for verb, err := range map[string]error{"probe": probeErr, "create": d.Create(t.Context(), c), "attach": attachErr, "destroy": d.Destroy(t.Context(), c)} {
			var coded *xapi.Error
			if !errors.As(err, &coded) {
				t.Errorf("%s with device_config %.200q: error %v, want one with a code", verb, device, err)
			}
		}
	}
}

// MakeAndRemove: creating and destroying an SR can be repeated, attaching
// needs one, and one that holds a volume stays.
func (s Suite) MakeAndRemove(t *testing.T) {
	d, c := s.New(t)
	ctx := t.Context()
	if _, err := d.Attach(ctx, c); err == nil {
		t.Fatal("attached an SR that was never created")
	}
	if text, err := d.Probe(ctx, c); err != nil || bytes.Contains([]byte(text), []byte(c.SR)) {
		t.Errorf("probe of nothing: %q, %v", text, err)
	}
	must(t, d.Destroy(ctx, c))
	must(t, d.Create(ctx, c))
	must(t, d.Create(ctx, c))
	r, err := d.Attach(ctx, c)
	must(t, err)
	n := part()
	_, err = r.Create(ctx, n, mib)
	must(t, err)
	wantCode(t, "destroy of an SR with a volume", d.Destroy(ctx, c), xapi.SRNotEmpty)
	must(t, d.Create(ctx, c))
	wantNames(t, r, n)
	must(t, r.Destroy(ctx, n))
	must(t, r.Detach(ctx))
	must(t, d.Destroy(ctx, c))
	must(t, d.Destroy(ctx, c))
	if _, err := d.Attach(ctx, c); err == nil {
		t.Error("attached an SR that was destroyed")
	}
}

// OneSRPerPlace: what belongs to another SR is never created over, attached or destroyed.
func (s Suite) OneSRPerPlace(t *testing.T) {
	d, c := s.New(t)
	ctx := t.Context()
	r := attach(t, d, c)
	n := live()
	filled(t, r, n, mib, pattern(1, 4096))
	other := c
	other.SR = xapi.NewUUID()
	if err := d.Create(ctx, other); err == nil {
		// A place that holds many SRs keeps them apart.
		o, err := d.Attach(ctx, other)
		must(t, err)
		defer o.Detach(context.Background())
		wantNames(t, o)
	} else {
		wantCode(t, "create over another SR", err, xapi.SRDeviceInUse)
		if _, err := d.Attach(ctx, other); err == nil {
			t.Error("attached the place of another SR")
		}
		must(t, d.Destroy(ctx, other)) // it is not there; what is there stays
		if _, err := d.Probe(ctx, c); err != nil {
			t.Errorf("probe after destroying what is not there: %v", err)
		}
		again, err := d.Attach(ctx, c)
		must(t, err)
		must(t, again.Detach(ctx))
	}
	must(t, holds(ctx, r, n, mib, pattern(1, 4096)))
}

// Reattach: detaching changes nothing.
func (s Suite) Reattach(t *testing.T) {
	d, c := s.New(t)
	ctx := t.Context()
	r := attach(t, d, c)
	a, b := live(), part()
	filled(t, r, a, 3*mib, pattern(1, 5000))
	filled(t, r, b, mib, pattern(2, 100))
	must(t, r.Detach(ctx))
	must(t, r.Detach(ctx))
	r, err := d.Attach(ctx, c)
	must(t, err)
	defer r.Detach(context.Background())
	wantNames(t, r, a, b)
	if !s.Volatile {
		must(t, holds(ctx, r, a, 3*mib, pattern(1, 5000)))
		must(t, holds(ctx, r, b, mib, pattern(2, 100)))
	}
}

// AfterDetach: a call that comes too late is refused and reaches nothing.
func (s Suite) AfterDetach(t *testing.T) {
	r := s.attached(t)
	n := live()
	filled(t, r, n, mib, []byte("x"))
	must(t, r.Detach(t.Context()))
	for verb, err := range everyCall(t.Context(), r, n) {
		if err == nil {
			t.Errorf("%s after detach did not fail", verb)
		}
	}
}

// everyCall makes each call once about volume n, which exists.
func everyCall(ctx context.Context, r sr.Repository, n sr.Name) map[string]error {
	_, stat := r.Stat(ctx)
	_, scan := r.Scan(ctx)
	_, create := r.Create(ctx, part(), mib)
	f, open := r.Open(ctx, n, sr.ReadOnly)
	if open == nil {
		f.Close()
	}
	_, path := r.Path(ctx, n)
	_, clone := r.Clone(ctx, n, work())
	return map[string]error{
		"stat": stat, "scan": scan, "create": create, "open": open, "path": path, "clone": clone,
		"resize": r.Resize(ctx, n, 2*mib), "rename": r.Rename(ctx, n, live()), "destroy": r.Destroy(ctx, n),
	}
}

// HostileNames: a name that is not made of uuids is refused by every method.
func (s Suite) HostileNames(t *testing.T) {
	r := s.attached(t)
	ctx := t.Context()
	u := xapi.NewUUID()
	for _, n := range []sr.Name{
		{}, sr.Live(""), sr.Live("../../etc/passwd"), sr.Live(u + "/.."), sr.Live(u + "\x00"), sr.Live(xapi.UUID(bytes.ToUpper([]byte(u)))),
		{Kind: "evil", VDI: u, Owner: owner}, {Kind: sr.KindPart, VDI: u}, {Kind: "../part", VDI: u, Owner: owner},
		sr.Part(sr.Owner{Pool: "..", Host: u, Job: u}, u), sr.Work(sr.Owner{Pool: u, Host: u, Job: "."}, u),
	} {
		for verb, err := range everyCall(ctx, r, n) {
			if verb != "stat" && verb != "scan" && verb != "create" && err == nil {
				t.Errorf("%s of volume %q did not fail", verb, n)
			}
		}
		if _, err := r.Create(ctx, n, mib); err == nil {
			t.Errorf("created volume %q", n)
		}
	}
	for _, v := range names(t, r) {
		must(t, r.Destroy(ctx, v)) // what everyCall created itself
	}
}

// KeepFree: what must stay free is not counted as free, and stops new volumes.
func (s Suite) KeepFree(t *testing.T) {
	d, c := s.New(t)
	ctx := t.Context()
	open := attach(t, d, c)
	before, err := open.Stat(ctx)
	must(t, err)
	if before.Free <= 0 || before.PhysicalSize < before.Free || before.PhysicalUtilisation < 0 {
		t.Fatalf("room of a fresh SR makes no sense: %+v", before)
	}
	n := live()
	filled(t, open, n, mib, []byte("there"))
	for name, keep := range map[string]func(path string) int64{
		"all":         func(string) int64 { return math.MaxInt64 },
		"exactly all": func(path string) int64 { return sizeBelow(path, before.PhysicalSize) },
	} {
		c.KeepFree = keep
		tight, err := d.Attach(ctx, c)
		must(t, err)
		st, err := tight.Stat(ctx)
		must(t, err)
		if st.Free != 0 {
			t.Errorf("%s kept free: %d bytes are free", name, st.Free)
		}
		_, err = tight.Create(ctx, part(), mib)
		wantCode(t, "create in a full SR", err, xapi.OutOfSpace)
		if sr.Has(tight.Features(), sr.VDIClone) {
			_, err = tight.Clone(ctx, n, work())
			wantCode(t, "clone in a full SR", err, xapi.OutOfSpace)
		}
		must(t, holds(ctx, tight, n, mib, []byte("there")))
		must(t, tight.Detach(ctx))
	}
	wantNames(t, open, n)
	must(t, open.Destroy(ctx, n))
}

// sizeBelow is the size of the filesystem that holds path, or otherwise.
func sizeBelow(path string, otherwise int64) int64 {
	var fs unix.Statfs_t
	if path == "" || unix.Statfs(path, &fs) != nil {
		return otherwise
	}
	return int64(fs.Blocks) * int64(cmp.Or(fs.Frsize, fs.Bsize))
}

// Full: a small SR is written until it is full; that is told by its code, takes
// nothing else down, and ends when a volume goes.
func (s Suite) Full(t *testing.T) {
	if s.Small == nil {
		return
	}
	d, c := s.Small(t)
	ctx := t.Context()
	r := attach(t, d, c)
	kept, big := live(), part()
	filled(t, r, kept, mib, pattern(1, 4096))
	_, err := r.Create(ctx, big, 1<<30)
	must(t, err)
	f, err := r.Open(ctx, big, sr.ReadWrite)
	must(t, err)
	block := pattern(2, mib)
	for i := int64(0); i < 512; i++ {
		if _, err = f.WriteAt(block, i*mib); err != nil {
			break
		}
		st, serr := r.Stat(ctx)
		must(t, serr)
		if st.Free <= 0 {
			break
		}
	}
	if err != nil && !sr.NoSpace(err) {
		t.Fatalf("write into a full SR: %v", err)
	}
	f.Close()
	wantCode(t, "copy into a full SR", sr.Copy(ctx, r, part(), r, big, nil), xapi.OutOfSpace)
	must(t, holds(ctx, r, kept, mib, pattern(1, 4096)))
	must(t, r.Destroy(ctx, big))
	_, err = r.Create(ctx, big, mib)
	must(t, err)
	wantNames(t, r, kept, big)
}

// isExist tells whether err says that a name is taken.
func isExist(err error) bool { return errors.Is(err, os.ErrExist) }

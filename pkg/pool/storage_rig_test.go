package pool

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/sr/memory"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// rig is a pool over a real embedded store, with a folder for SRs, one driver
// in memory that clones, and one point that every effect of a driver passes.
type rig struct {
	*Pool
	t     testing.TB
	dir   string
	mem   *memory.Driver
	uuid  xapi.UUID               // of the host; "": always the same one
	point func(name string) error // nil: nothing happens
}

func newRig(t testing.TB) *rig {
	t.Helper()
	return newRigOf(t, "")
}

// newRigOf is a rig of another host.
func newRigOf(t testing.TB, uuid xapi.UUID) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), mem: &memory.Driver{Clones: true}, uuid: uuid}
	r.open(filepath.Join(r.dir, "db"))
	return r
}

// open opens store and pool as a start of the daemon does, but for the repair.
func (r *rig) open(db string) {
	r.t.Helper()
	s, err := store.Open(r.t.Context(), store.Options{Dir: db, Indexes: append(Indexes(), task.Indexes()...)})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { s.Close() })
	r.start(s)
}

// start begins a new life of the daemon on the same store.
func (r *rig) start(s *store.Store) {
	r.t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	pass := func(name string) error {
		if r.point == nil {
			return nil
		}
		return r.point(name)
	}
	uuid := cmp.Or(r.uuid, "11111111-1111-4111-8111-111111111111")
	p, err := Open(r.t.Context(), Options{
		Store: s, Log: log, HostUUID: uuid, Hostname: "host", PatchDir: filepath.Join(r.dir, "patches"),
		Drivers: []sr.Driver{sr.FaultyDriverAt(&file.Driver{}, pass), sr.FaultyDriverAt(r.mem, pass)},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.Pool = p
	r.t.Cleanup(func() { p.DetachStorage(context.Background()) })
}

// restart is what a kill and the next start do to everything but the store.
func (r *rig) restart() {
	r.t.Helper()
	r.must(r.DetachStorage(context.Background()))
	r.point = nil
	r.start(r.Store)
	r.must(r.RepairStorage(r.t.Context()))
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatalf("unexpected error: %v", err)
	}
}

func (r *rig) wantCode(what string, err error, code string, params ...string) {
	r.t.Helper()
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != code {
		r.t.Errorf("%s: error %v, want %s", what, err, code)
		return
	}
	if len(params) > 0 && !slices.Equal(e.Params, params) {
		r.t.Errorf("%s: parameters %q, want %q", what, e.Params, params)
	}
}

func (r *rig) fileSpec(name string) SRSpec {
	return SRSpec{
		Host: r.Self, Type: "file", NameLabel: name, ContentType: "user",
		DeviceConfig: map[string]string{"location": filepath.Join(r.dir, name)},
	}
}

func (r *rig) memorySpec(name string) SRSpec {
	return SRSpec{Host: r.Self, Type: "memory", NameLabel: name, DeviceConfig: map[string]string{"tag": name}}
}

func (r *rig) sr(spec SRSpec) xapi.Ref {
	r.t.Helper()
	ref, err := r.SRCreate(r.t.Context(), spec)
	r.must(err)
	return ref
}

// filled makes a VDI with data at its beginning.
func (r *rig) filled(sr xapi.Ref, size int64, data []byte) xapi.Ref {
	r.t.Helper()
	ref, err := r.NewVDI(r.t.Context(), NewVDI{SR: sr, VDI: VDI{NameLabel: "disk"}, VirtualSize: size, Fill: write(data)})
	r.must(err)
	return ref
}

func write(data []byte) func(context.Context, *os.File, string) error {
	return func(_ context.Context, f *os.File, _ string) error { _, err := f.WriteAt(data, 0); return err }
}

// mapped fills a VDI with data at its beginning and gives its block map.
func mapped(n *NewVDI, data []byte) {
	var m *vdi.Map
	n.Fill = func(ctx context.Context, f *os.File, _ string) (err error) {
		if _, err = f.WriteAt(data, 0); err == nil {
			m, err = vdi.BuildMap(ctx, f, n.VirtualSize)
		}
		return err
	}
	n.Map = func() *vdi.Map { return m }
}

// golden makes a VDI with a patch in it, and its block map.
func (r *rig) golden(sr xapi.Ref, data []byte) (vdi, patch xapi.Ref) {
	r.t.Helper()
	n := NewVDI{
		SR: sr, VDI: VDI{NameLabel: "patch", ReadOnly: true}, VirtualSize: 1 << 20,
		Commit: func(tx *store.Tx, vdi xapi.Ref) (err error) {
			patch, err = r.IntroducePatch(tx, Patch{UUID: xapi.NewUUID(), NameLabel: "p", VDI: vdi, AfterApplyGuidance: []xapi.Guidance{}})
			return err
		},
	}
	mapped(&n, data)
	vdi, err := r.NewVDI(r.t.Context(), n)
	r.must(err)
	return vdi, patch
}

func get[T any](r *rig, class string, ref xapi.Ref) T {
	r.t.Helper()
	var rec T
	r.must(r.Store.View(func(v *store.View) (err error) {
		rec, err = store.Get[T](v, class, ref)
		return err
	}))
	return rec
}

func (r *rig) count(class string) (n int) {
	r.must(r.Store.View(func(v *store.View) error { n = v.Count(class); return nil }))
	return n
}

// holds fails unless a VDI begins with data.
func (r *rig) holds(vdi xapi.Ref, data []byte) {
	r.t.Helper()
	f, release, err := r.VDIFile(r.t.Context(), vdi, sr.ReadOnly)
	r.must(err)
	defer release()
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		r.t.Errorf("VDI holds %.32q, %v; want %.32q", got, err, data)
	}
}

// volumes lists what an attached SR holds.
func (r *rig) volumes(ref xapi.Ref) []sr.Name {
	r.t.Helper()
	repo, err := r.Repository(ref)
	r.must(err)
	list, err := repo.Scan(r.t.Context())
	r.must(err)
	names := []sr.Name{}
	for _, v := range list {
		names = append(names, v.Name)
	}
	return names
}

// wantTidy fails unless records and storage agree: no intent, no part, every
// VDI has its volume, and its map if it claims one, and every volume its VDI, no patch names a VDI that is gone.
func (r *rig) wantTidy(when string) {
	r.t.Helper()
	if n := r.count(ClassIntent); n != 0 {
		r.t.Errorf("%s: %d intents are left", when, n)
	}
	recorded := map[xapi.Ref]map[sr.Name]bool{}
	r.must(r.Store.View(func(v *store.View) error {
		vdis, err := store.All[VDI](v, ClassVDI)
		for ref, rec := range vdis {
			if recorded[rec.SR] == nil {
				recorded[rec.SR] = map[sr.Name]bool{}
			}
			recorded[rec.SR][sr.Live(rec.UUID)] = true
			if rec.Map != "" {
				recorded[rec.SR][sr.Live(rec.UUID).Map()] = true
			}
			if _, there := v.Get(ClassSR, rec.SR); !there {
				r.t.Errorf("%s: VDI %s is in an SR that is gone", when, ref)
			}
		}
		if err != nil {
			return err
		}
		patches, err := store.All[Patch](v, ClassPatch)
		for _, rec := range patches {
			if _, there := vdis[rec.VDI]; !there && !rec.VDI.IsNull() {
				r.t.Errorf("%s: patch %s names a VDI that is gone", when, rec.UUID)
			}
		}
		return err
	}))
	for ref := range r.storage.attached() {
		names := r.volumes(ref)
		for _, n := range names {
			if !recorded[ref][n] {
				r.t.Errorf("%s: volume %s has no record", when, n)
			}
		}
		if len(names) != len(recorded[ref]) {
			r.t.Errorf("%s: %d volumes, want %d", when, len(names), len(recorded[ref]))
		}
	}
}

// finish is JobFinish by the host that holds the newest claim, with a proof of what
// worked.
func (r *rig) finish(ctx context.Context, ref xapi.Ref, o Outcome) error {
	if job, err := r.Job(ref); err == nil {
		o.Attempt = job.Attempt
		if job.Kind == JobApply && o.Err == nil {
			o.Proof = proofOf(r.Pool, job.Patch)
		}
	}
	return r.JobFinish(ctx, ref, o)
}

// proofOf is what an honest host shows for a patch.
func proofOf(p *Pool, ref xapi.Ref) *Proof {
	rec, err := p.patch(ref)
	if err != nil {
		return nil
	}
	sum := sha256.Sum256([]byte(rec.InfoXML))
	return &Proof{Stamp: hex.EncodeToString(sum[:]), Payload: rec.Digest, UUID: rec.UUID, Version: rec.Version}
}

package pool

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// noise gives bytes that are the same in every run.
func noise(seed uint64, n int64) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// mapped makes a VDI with a block map whose data lies at its begin, with a hole
// of a few blocks behind it.
func (r *rig) mapped(ref xapi.Ref, name string, data []byte) xapi.Ref {
	r.t.Helper()
	size := (int64(len(data))+vdi.MapBlock-1)/vdi.MapBlock*vdi.MapBlock + 4*vdi.MapBlock
	var m *vdi.Map
	made, err := r.NewVDI(r.t.Context(), NewVDI{
		SR: ref, VDI: VDI{NameLabel: name, ReadOnly: true}, VirtualSize: size,
		Fill: func(ctx context.Context, f *os.File, _ string) (err error) {
			if _, err = f.WriteAt(data, 0); err == nil {
				m, err = vdi.BuildMap(ctx, f, size)
			}
			return err
		},
		Map: func() *vdi.Map { return m },
	})
	r.must(err)
	return made
}

// volume opens a volume of a VDI behind the pool's back.
func (r *rig) volume(ref xapi.Ref, name func(xapi.UUID) sr.Name) *os.File {
	r.t.Helper()
	rec := get[VDI](r, ClassVDI, ref)
	repo, err := r.Repository(rec.SR)
	r.must(err)
	f, err := repo.Open(r.t.Context(), name(rec.UUID), sr.ReadWrite)
	r.must(err)
	return f
}

func mapOf(id xapi.UUID) sr.Name { return sr.Live(id).Map() }

// flip changes one byte behind the pool's back.
func (r *rig) flip(ref xapi.Ref, name func(xapi.UUID) sr.Name, off int64) {
	r.t.Helper()
	f := r.volume(ref, name)
	defer f.Close()
	b := make([]byte, 1)
	_, err := f.ReadAt(b, off)
	r.must(err)
	b[0] ^= 0x10
	_, err = f.WriteAt(b, off)
	r.must(err)
}

// drop destroys a volume behind the pool's back.
func (r *rig) drop(ref xapi.Ref, name func(xapi.UUID) sr.Name) {
	r.t.Helper()
	rec := get[VDI](r, ClassVDI, ref)
	repo, err := r.Repository(rec.SR)
	r.must(err)
	r.must(repo.Destroy(r.t.Context(), name(rec.UUID)))
}

func (r *rig) contents(ref xapi.Ref) []byte {
	r.t.Helper()
	f := r.volume(ref, sr.Live)
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
	r.must(err)
	return b
}

// messages gives the messages there are: name and text.
func (r *rig) messages() (all []string) {
	r.must(r.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassMessage) {
			var m Message
			r.must(it.Decode(&m))
			all = append(all, m.Name+": "+m.Body)
		}
		return nil
	}))
	return all
}

// verifies checks an image, and that report, record and messages agree.
func (r *rig) verifies(what string, ref xapi.Ref, damaged int64, text string) {
	r.t.Helper()
	report, err := r.VDIVerify(r.t.Context(), ref)
	r.must(err)
	rec := get[VDI](r, ClassVDI, ref)
	if report.Damaged != damaged || (report.Damage != "") != (text != "") || !strings.Contains(report.Damage, text) {
		r.t.Errorf("%s: %+v, want %d blocks and %q", what, report, damaged, text)
	}
	if rec.Damage != report.Damage || !rec.Checked.Equal(report.Checked) || rec.Checked.IsZero() {
		r.t.Errorf("%s: record %q %s, report %+v", what, rec.Damage, rec.Checked, report)
	}
	told := r.messages()
	if text == "" && len(told) > 0 {
		r.t.Errorf("%s: messages %q", what, told)
	}
	if text != "" && (len(told) != 1 || !strings.HasPrefix(told[0], MessageVDIDamaged+": ") || !strings.Contains(told[0], string(rec.UUID)) || !strings.Contains(told[0], text)) {
		r.t.Errorf("%s: messages %q", what, told)
	}
}

func TestVerifyFindsEveryDamage(t *testing.T) {
	for _, kind := range []string{"file", "memory"} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t)
			where := r.sr(r.fileSpec("a"))
			if kind == "memory" {
				where = r.sr(r.memorySpec("m"))
			}
			data := noise(1, 2*vdi.MapBlock+5)
			ref := r.mapped(where, "golden", data)
			rec := get[VDI](r, ClassVDI, ref)
			r.verifies("fresh", ref, 0, "")
			for what, off := range map[string]int64{"first byte": 0, "last byte": int64(len(data)) - 1, "hole": rec.VirtualSize - 1} {
				r.flip(ref, sr.Live, off)
				r.verifies(what, ref, 1, "one block of 1 MiB")
				r.flip(ref, sr.Live, off)
				r.verifies(what+", undone", ref, 0, "")
			}
			r.flip(ref, mapOf, 30)
			r.verifies("map", ref, 0, DamagedMap)
			r.flip(ref, mapOf, 30)
			f := r.volume(ref, sr.Live)
			defer f.Close()
			r.must(f.Truncate(rec.VirtualSize - 1))
			r.verifies("shorter", ref, 1, "bytes long")
			r.must(f.Truncate(rec.VirtualSize + vdi.MapBlock))
			r.verifies("longer", ref, 1, "bytes long")
			r.must(f.Truncate(rec.VirtualSize))
			r.drop(ref, mapOf)
			r.verifies("no map", ref, 0, DamagedMap)
			r.drop(ref, sr.Live)
			_, err := r.VDIVerify(t.Context(), ref)
			r.wantCode("no image", err, xapi.VDIMissing)
		})
	}
}

func TestVerifyRefusesWhatHasNoMapAndEndsWhenCancelled(t *testing.T) {
	r := newRig(t)
	where := r.sr(r.memorySpec("m"))
	plain := r.filled(where, 1<<20, []byte("x"))
	_, err := r.VDIVerify(t.Context(), plain)
	r.wantCode("plain VDI", err, xapi.OperationNotAllowed)
	r.wantCode("repair of a plain VDI", r.VDIRepair(t.Context(), plain), xapi.OperationNotAllowed)
	ref := r.mapped(where, "golden", noise(1, 1000))
	before := get[VDI](r, ClassVDI, ref).Checked
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(xapi.NewError(xapi.TaskCancelled))
	if _, err := r.VDIVerify(ctx, ref); err == nil {
		t.Error("a cancelled check has a result")
	}
	if rec := get[VDI](r, ClassVDI, ref); !rec.Checked.Equal(before) {
		t.Error("a cancelled check is recorded")
	}
}

func TestOneMessageForADamageAsLongAsItStands(t *testing.T) {
	r := newRig(t)
	ref := r.mapped(r.sr(r.memorySpec("m")), "golden", noise(1, 3*vdi.MapBlock))
	r.flip(ref, sr.Live, 0)
	r.must(r.VDIDamaged(t.Context(), ref, "the payload has another digest"))
	first := r.messages()
	r.must(r.VDIDamaged(t.Context(), ref, "something else"))
	if now := r.messages(); len(now) != 1 || now[0] != first[0] || !strings.Contains(now[0], "another digest") {
		t.Errorf("messages %q", now)
	}
	r.verifies("looked at", ref, 1, "one block of 1 MiB")
	var id xapi.Ref
	r.must(r.Store.View(func(v *store.View) error { id = v.List(ClassMessage)[0].Ref; return nil }))
	r.must(r.MessageDestroy(t.Context(), id))
	_, err := r.VDIVerify(t.Context(), ref)
	r.must(err)
	if now := r.messages(); len(now) != 0 {
		t.Errorf("what an admin has dealt with comes back: %q", now)
	}
	r.flip(ref, sr.Live, vdi.MapBlock)
	r.verifies("more damage", ref, 2, "2 blocks of 1 MiB")
	r.must(r.VDIDestroy(t.Context(), ref))
	if now := r.messages(); len(now) != 0 {
		t.Errorf("the image is gone, and still: %q", now)
	}
}

func TestRepairTakesBlocksWhereverTheyAre(t *testing.T) {
	r := newRig(t)
	a, b := r.sr(r.fileSpec("a")), r.sr(r.memorySpec("m"))
	data := noise(1, 4*vdi.MapBlock+7)
	ref := r.mapped(a, "golden", data)
	// An earlier revision: the same blocks elsewhere, but for one.
	older := bytes.Clone(data[:4*vdi.MapBlock])
	copy(older[vdi.MapBlock:], noise(2, vdi.MapBlock))
	older = append(noise(3, vdi.MapBlock), older...)
	old := r.mapped(b, "older", older)
	want := r.contents(ref)

	for _, off := range []int64{5, 2 * vdi.MapBlock, int64(len(want)) - 1} {
		r.flip(ref, sr.Live, off)
	}
	r.verifies("damaged", ref, 3, "3 blocks of 1 MiB are damaged")
	r.must(r.VDIRepair(t.Context(), ref))
	r.good("from an earlier revision", ref, want)

	r.flip(ref, sr.Live, 0)
	r.flip(ref, sr.Live, vdi.MapBlock) // which the other one does not have
	r.wantCode("no source", r.VDIRepair(t.Context(), ref), xapi.VDIContentChanged, string(ref),
		"one block of 1 MiB is damaged: number 1; no VDI of the SRs plugged here has good ones, so plug an SR that holds a copy and repair again, or destroy the VDI and upload the patch again")
	if rec := get[VDI](r, ClassVDI, ref); !strings.HasPrefix(rec.Damage, "one block of 1 MiB") {
		t.Errorf("what could be mended was not: %q", rec.Damage)
	}
	if told := r.messages(); len(told) != 1 || !strings.HasPrefix(told[0], MessageVDIDamaged) {
		t.Errorf("messages %q", told)
	}
	r.mapped(b, "twin", data)
	r.must(r.VDIRepair(t.Context(), ref))
	r.good("from a twin", ref, want)
	r.must(r.VDIRepair(t.Context(), ref))
	r.good("repaired twice", ref, want)
	if !bytes.Equal(r.contents(old)[:len(older)], older) {
		t.Error("a source was changed")
	}
}

// good fails unless an image is want, known to be good, and nothing is left.
func (r *rig) good(what string, ref xapi.Ref, want []byte) {
	r.t.Helper()
	if !bytes.Equal(r.contents(ref), want) {
		r.t.Errorf("%s: the image is another", what)
	}
	rec := get[VDI](r, ClassVDI, ref)
	if rec.Damage != "" || rec.Checked.IsZero() {
		r.t.Errorf("%s: %q, checked %s", what, rec.Damage, rec.Checked)
	}
	if told := r.messages(); len(told) != 1 || !strings.HasPrefix(told[0], MessageVDIRepaired) {
		r.t.Errorf("%s: messages %q", what, told)
	}
	if m, err := r.VDIMap(r.t.Context(), ref); err != nil || m.Digest() != rec.Map {
		r.t.Errorf("%s: map %v", what, err)
	}
	for _, n := range r.volumes(rec.SR) {
		if n.Kind != sr.KindLive && n.Kind != sr.KindMap {
			r.t.Errorf("%s: %s is left", what, n)
		}
	}
}

func TestRepairMakesTheMapAgain(t *testing.T) {
	r := newRig(t)
	a, b := r.sr(r.fileSpec("a")), r.sr(r.memorySpec("m"))
	data := noise(1, 2*vdi.MapBlock)
	ref := r.mapped(a, "golden", data)
	want := r.contents(ref)
	r.drop(ref, mapOf)
	r.verifies("no map", ref, 0, DamagedMap)
	r.must(r.VDIRepair(t.Context(), ref))
	r.good("from the image", ref, want)

	r.flip(ref, mapOf, 60)
	r.flip(ref, sr.Live, 60)
	r.wantCode("both damaged", r.VDIRepair(t.Context(), ref), xapi.VDIContentChanged)
	r.mapped(b, "twin", data)
	r.verifies("both damaged", ref, 0, DamagedMap)
	r.must(r.VDIRepair(t.Context(), ref))
	r.good("from a twin", ref, want)
}

func TestARepairThatDiesIsBegunAgain(t *testing.T) {
	r := newRig(t)
	a, b := r.sr(r.fileSpec("a")), r.sr(r.memorySpec("m"))
	data := noise(1, 2*vdi.MapBlock)
	ref := r.mapped(a, "golden", data)
	r.mapped(b, "twin", data)
	want := r.contents(ref)
	r.flip(ref, mapOf, 60)
	r.flip(ref, sr.Live, 60)
	r.verifies("damaged", ref, 0, DamagedMap)
	for n := 1; ; n++ {
		calls := 0
		r.point = func(string) error {
			if calls++; calls == n {
				return os.ErrDeadlineExceeded
			}
			return nil
		}
		err := r.VDIRepair(t.Context(), ref)
		r.point = nil
		if err == nil {
			if n < 5 {
				t.Fatalf("call %d failed and nobody said so", n)
			}
			break
		}
		if rec := get[VDI](r, ClassVDI, ref); rec.Damage == "" {
			t.Fatalf("call %d: the damage is forgotten", n)
		}
		if n > 200 {
			t.Fatal("it never ends well")
		}
	}
	r.good("in the end", ref, want)
}

func TestRepairIsAlone(t *testing.T) {
	r := newRig(t)
	ref := r.mapped(r.sr(r.memorySpec("m")), "golden", noise(1, 100))
	release, err := r.UseVDI(ref)
	r.must(err)
	r.wantCode("while it is read", r.VDIRepair(t.Context(), ref), xapi.VDIInUse, string(ref), "repair")
	release()
}

// scrubbing runs Scrub until the test ends.
func (r *rig) scrubbing(o ScrubOptions) {
	ctx, stop := context.WithCancel(r.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { r.Scrub(ctx, o) })
	r.t.Cleanup(func() { stop(); wg.Wait() })
}

// until waits for a state of the records.
func (r *rig) until(what string, ok func(v *store.View) bool) {
	r.t.Helper()
	ctx, stop := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer stop()
	if err := r.Store.Until(ctx, func(v *store.View) (bool, error) { return ok(v), nil }); err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
}

func checkedAfter(ref xapi.Ref, at time.Time) func(*store.View) bool {
	return func(v *store.View) bool {
		rec, err := store.Get[VDI](v, ClassVDI, ref)
		return err == nil && rec.Checked.After(at)
	}
}

func TestScrubLooksAtEveryImageAgainAndAgain(t *testing.T) {
	r := newRig(t)
	a, b := r.sr(r.fileSpec("a")), r.sr(r.memorySpec("m"))
	first := r.mapped(a, "first", noise(1, 2*vdi.MapBlock))
	r.filled(a, 1<<20, []byte("no map"))
	r.flip(first, sr.Live, 3)
	r.scrubbing(ScrubOptions{Interval: 20 * time.Millisecond, Rate: 1 << 30})
	r.until("the first one is found damaged", func(v *store.View) bool {
		rec, err := store.Get[VDI](v, ClassVDI, first)
		return err == nil && rec.Damage != "" && v.Count(ClassMessage) == 1
	})
	second := r.mapped(b, "second", noise(2, vdi.MapBlock))
	r.must(r.changeVDI(t.Context(), second, func(rec *VDI) { rec.Checked = time.Time{} }))
	r.until("one that comes later", checkedAfter(second, time.Time{}))
	r.flip(first, sr.Live, 3)
	r.until("the damage is gone", func(v *store.View) bool {
		rec, err := store.Get[VDI](v, ClassVDI, first)
		return err == nil && rec.Damage == "" && v.Count(ClassMessage) == 0
	})
	now := r.Now()
	r.until("again", checkedAfter(second, now))
	r.drop(second, sr.Live)
	r.until("one that is gone", func(v *store.View) bool {
		rec, err := store.Get[VDI](v, ClassVDI, second)
		return err == nil && rec.Missing
	})
}

func TestScrubGivesWay(t *testing.T) {
	r := newRig(t)
	where := r.sr(r.fileSpec("a"))
	ref := r.mapped(where, "golden", noise(1, 8*vdi.MapBlock))
	// At this rate it takes hours: what follows takes place while it reads.
	r.scrubbing(ScrubOptions{Interval: time.Millisecond, Rate: 1000})
	busy := func() bool {
		r.storage.mu.Lock()
		defer r.storage.mu.Unlock()
		return len(r.storage.looks[ref]) > 0
	}
	for end := time.Now().Add(20 * time.Second); !busy(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the scrub does not begin")
		}
	}
	release, err := r.UseVDI(ref)
	r.must(err)
	release()
	r.must(r.VDIDestroy(t.Context(), ref))
	pbd := func() (ref xapi.Ref) {
		r.must(r.Store.View(func(v *store.View) error { ref = v.Refs(ClassPBD, "SR", string(where))[0]; return nil }))
		return ref
	}()
	r.must(r.PBDUnplug(t.Context(), pbd))
	r.wantTidy("at the end")
}

func TestScrubIsOffWithoutAnInterval(t *testing.T) {
	newRig(t).Scrub(t.Context(), ScrubOptions{}) // it returns
}

func TestDoctorShowsDamageAndStrayMaps(t *testing.T) {
	r := newRig(t)
	where := r.sr(r.fileSpec("a"))
	ref := r.mapped(where, "golden", noise(1, 100))
	other := r.mapped(where, "other", noise(2, 100))
	r.flip(ref, sr.Live, 3)
	_, err := r.VDIVerify(t.Context(), ref)
	r.must(err)
	r.must(r.changeVDI(t.Context(), other, func(rec *VDI) { rec.Checked = time.Time{} }))
	repo, err := r.Repository(where)
	r.must(err)
	stray := sr.Live(xapi.NewUUID()).Map()
	_, err = repo.Create(t.Context(), stray, 4096)
	r.must(err)
	found, err := r.Examine(t.Context())
	r.must(err)
	text := fmt.Sprint(found)
	for _, want := range []string{"patchd vdi repair " + string(get[VDI](r, ClassVDI, ref).UUID), stray.String(), "images never checked", string(get[VDI](r, ClassVDI, other).UUID)} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not told: %s", want, text)
		}
	}
	if strings.Contains(text, "working data") {
		t.Errorf("a map passes for working data: %s", text)
	}
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// operation is one call that changes storage, on a fresh SR with one VDI and
// one patch in it. want says what must be true when it has succeeded; when it
// fails, everything must be as before.
type operation struct {
	name string
	run  func(r *rig, s scene) error
}

// scene is what an operation finds.
type scene struct {
	sr, other          xapi.Ref
	vdi, golden, patch xapi.Ref
}

func (r *rig) scene(n string) scene {
	r.t.Helper()
	s := scene{sr: r.sr(r.fileSpec("a" + n)), other: r.sr(r.memorySpec("b" + n))}
	s.vdi = r.filled(s.sr, 1<<20, []byte("content"))
	s.golden, s.patch = r.golden(s.sr, []byte("golden"))
	return s
}

var operations = []operation{
	{"NewVDI", func(r *rig, s scene) error {
		_, err := r.NewVDI(r.t.Context(), NewVDI{SR: s.sr, VirtualSize: 1 << 20, Fill: write([]byte("x"))})
		return err
	}},
	{"VDI.clone on an SR that copies", func(r *rig, s scene) error {
		_, err := r.VDIClone(r.t.Context(), s.golden, nil)
		return err
	}},
	{"VDI.copy to another SR and back", func(r *rig, s scene) error {
		far, err := r.VDICopy(r.t.Context(), s.vdi, s.other, "", "")
		if err == nil {
			_, err = r.VDIClone(r.t.Context(), far, nil)
		}
		return err
	}},
	{"VDI.pool_migrate", func(r *rig, s scene) error {
		_, err := r.VDIPoolMigrate(r.t.Context(), s.golden, s.other, nil)
		return err
	}},
	{"VDI.destroy", func(r *rig, s scene) error { return r.VDIDestroy(r.t.Context(), s.golden) }},
	{"VDI.copy of a patch, which is then written to", func(r *rig, s scene) error {
		ref, err := r.VDICopy(r.t.Context(), s.golden, s.other, "", "")
		if err != nil {
			return err
		}
		_, release, err := r.VDIFile(r.t.Context(), ref, sr.ReadWrite)
		if err == nil {
			release()
		}
		return err
	}},
	{"VDI.snapshot of a patch on an SR that clones", func(r *rig, s scene) error {
		far, err := r.VDICopy(r.t.Context(), s.golden, s.other, "", "")
		if err == nil {
			_, err = r.VDISnapshot(r.t.Context(), far, nil)
		}
		return err
	}},
	{"a draft that is discarded", func(r *rig, s scene) error {
		d, err := r.NewDraft(r.t.Context(), NewVDI{SR: s.sr, VirtualSize: 1 << 20}, DraftOptions{})
		if err != nil {
			return err
		}
		return d.Discard(r.t.Context())
	}},
	{"VDI.resize", func(r *rig, s scene) error { return r.VDIResize(r.t.Context(), s.vdi, 2<<20) }},
	{"SR.create", func(r *rig, s scene) error {
		_, err := r.SRCreate(r.t.Context(), r.memorySpec("new"))
		return err
	}},
	{"SR.destroy", func(r *rig, s scene) error { return r.SRDestroy(r.t.Context(), s.other) }},
	{"SR.scan", func(r *rig, s scene) error { return r.SRScan(r.t.Context(), s.sr) }},
}

// Every operation with effect 0 failing, then effect 1, and so on until no
// effect is left to fail: a failed call left everything as it was, or was
// completed after all; a restart finds nothing to repair but what the call said.
func TestEveryOperationFailingAtEveryEffectLeavesNothing(t *testing.T) {
	for i, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			r := newRig(t)
			s := r.scene(fmt.Sprint(i))
			for n := 0; ; n++ {
				left, at := n, ""
				r.point = func(name string) error {
					if left--; left == -1 {
						at = name
						return fmt.Errorf("failed at %s", name)
					}
					return nil
				}
				err := op.run(r, s)
				r.point = nil
				when := fmt.Sprintf("effect %d (%s) failed, error %v", n, at, err)
				r.wantTidy(when)
				if at == "" {
					r.must(err)
					break
				}
				if err == nil && !strings.HasSuffix(at, ".done") && at != "sr.destroy" && at != "sr.remove" {
					t.Errorf("%s: the failure was hidden", when)
				}
				if err == nil {
					s = r.scene(fmt.Sprint(i, "x", n)) // the call has happened
				} else {
					r.holds(s.golden, []byte("golden"))
					r.holds(s.vdi, []byte("content"))
				}
			}
		})
	}
}

// The same where nothing works any more from effect n on, as when the storage
// goes away: what cannot be undone then is undone at the next start.
func TestEveryOperationWithStorageGoneIsUndoneAtTheNextStart(t *testing.T) {
	for i, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			r := newRig(t)
			s := r.scene(fmt.Sprint(i))
			for n := 0; ; n++ {
				left, fired := n, false
				r.point = func(name string) error {
					if left--; left < 0 {
						fired = true
						return fmt.Errorf("the storage is gone: %s", name)
					}
					return nil
				}
				err := op.run(r, s)
				r.restart()
				r.wantTidy(fmt.Sprintf("storage gone at effect %d, error %v", n, err))
				if !fired {
					r.must(err)
					break
				}
				if err == nil || !r.alive(s) {
					s = r.scene(fmt.Sprint(i, "x", n))
				}
			}
		})
	}
}

// The same where the process dies at effect n: nothing of the call runs any
// more, no undo either, and the next start must make up for it.
func TestEveryOperationKilledAtEveryEffectIsUndoneAtTheNextStart(t *testing.T) {
	for i, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			r := newRig(t)
			s := r.scene(fmt.Sprint(i))
			for n := 0; ; n++ {
				left, died := n, true
				r.point = func(string) error {
					if left--; left == -1 {
						runtime.Goexit()
					}
					return nil
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					if err := op.run(r, s); err != nil {
						t.Errorf("nothing failed, but %v", err)
					}
					died = false
				})
				wg.Wait()
				r.restart()
				r.wantTidy(fmt.Sprintf("killed at effect %d", n))
				if !died {
					break
				}
				if r.alive(s) {
					r.holds(s.golden, []byte("golden"))
					r.holds(s.vdi, []byte("content"))
				} else {
					s = r.scene(fmt.Sprint(i, "x", n))
				}
			}
		})
	}
}

// alive tells whether all of a scene is still recorded: an operation that had
// passed its point of no return was completed by the repair.
func (r *rig) alive(s scene) (all bool) {
	r.must(r.Store.View(func(v *store.View) error {
		_, a := v.Get(ClassSR, s.other)
		_, b := v.Get(ClassVDI, s.vdi)
		_, c := v.Get(ClassVDI, s.golden)
		all = a && b && c
		return nil
	}))
	return all
}

// A call cancelled at any effect, while it runs, leaves nothing or is complete.
func TestEveryOperationCancelledAtEveryEffectLeavesNothing(t *testing.T) {
	r := newRig(t)
	s := r.scene("c")
	for n := 0; ; n++ {
		ctx, cancel := context.WithCancelCause(t.Context())
		left, fired := n, false
		r.point = func(string) error {
			if left--; left == -1 {
				fired = true
				cancel(xapi.NewError(xapi.TaskCancelled, "task"))
			}
			return nil
		}
		ref, err := r.VDICopy(ctx, s.vdi, s.other, "", "")
		r.point = nil
		r.wantTidy(fmt.Sprintf("cancelled at effect %d, error %v", n, err))
		if err != nil {
			r.wantCode("cancelled copy", err, xapi.TaskCancelled)
		} else {
			r.holds(ref, []byte("content"))
		}
		cancel(nil)
		if !fired {
			return
		}
	}
}

// What Fill or Commit refuses is taken back, and their codes come out.
func TestNewVDIGivesTheErrorsOfItsParts(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	code := xapi.NewError(xapi.PatchAlreadyExists, "u")
	for name, n := range map[string]NewVDI{
		"fill":   {Fill: func(context.Context, *os.File, string) error { return code }},
		"commit": {Commit: func(*store.Tx, xapi.Ref) error { return code }},
	} {
		n.SR, n.VirtualSize = ref, 1<<20
		_, err := r.NewVDI(t.Context(), n)
		r.wantCode(name, err, xapi.PatchAlreadyExists, "u")
		r.wantTidy(name)
	}
	_, err := r.NewVDI(t.Context(), NewVDI{SR: ref, VirtualSize: 1 << 20, Fill: func(_ context.Context, f *os.File, _ string) error { return f.Truncate(4096) }})
	if err == nil {
		t.Error("a fill that changed the size was accepted")
	}
	r.wantTidy("a fill that changed the size")
	_, err = r.NewVDI(t.Context(), NewVDI{SR: ref, VirtualSize: 1 << 20, Room: 1 << 60})
	rec := get[SR](r, ClassSR, ref)
	r.wantCode("without room", err, xapi.OutOfSpace, "sr ("+string(rec.UUID)+")")
	r.wantTidy("without room")
	if rec := get[SR](r, ClassSR, ref); rec.VirtualAllocation != 0 {
		t.Errorf("virtual_allocation is %d after failures", rec.VirtualAllocation)
	}
}

// The answer of the last transaction is lost: the VDI is there, and is not
// taken away again.
func TestALostAnswerOfTheCommitLosesNoVDI(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	repo, err := r.Repository(ref)
	r.must(err)
	d := &Draft{p: r.Pool, repo: repo, ref: xapi.NewRef(), in: Intent{SR: ref, Ref: xapi.NewRef(), VDI: xapi.NewUUID()}}
	_, err = repo.Create(t.Context(), sr.Live(d.in.VDI), 4096)
	r.must(err)
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		tx.Put(ClassVDI, d.in.Ref, fullVDI(VDI{}, ref, d.in.VDI))
		return nil
	}))
	born, err := d.unmake(t.Context())
	if !born || err != nil {
		t.Errorf("born %v, %v", born, err)
	}
	r.wantTidy("after a lost answer")
	if len(r.volumes(ref)) != 1 {
		t.Error("the volume is gone")
	}
}

// A commit that comes after the undo began does not bring the VDI to life.
func TestALateCommitIsRefused(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	_, err := r.NewVDI(t.Context(), NewVDI{SR: ref, VirtualSize: 4096, Fill: func(ctx context.Context, _ *os.File, _ string) error {
		dead, err := r.Pool.deadIntents()
		if err != nil || len(dead) != 0 {
			return errors.Join(errors.New("an intent that is looked after counts as dead"), err)
		}
		return r.Store.Update(ctx, func(tx *store.Tx) error {
			for _, it := range tx.List(ClassIntent) {
				var in Intent
				if err := it.Decode(&in); err != nil {
					return err
				}
				in.Undo = true
				tx.Put(ClassIntent, it.Ref, in)
			}
			return nil
		})
	}})
	if err == nil || !strings.Contains(err.Error(), "undone meanwhile") {
		t.Errorf("late commit: %v", err)
	}
	r.wantTidy("after a late commit")
}

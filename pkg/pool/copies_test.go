package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// tasks is the task manager of one life of the daemon.
func (r *rig) tasks() *task.Manager {
	log := logrus.New()
	log.SetOutput(io.Discard)
	m := task.NewManager(r.Store, nil, log)
	r.t.Cleanup(m.Stop)
	return m
}

// large makes a golden VDI of some blocks.
func (r *rig) large(on xapi.Ref) xapi.Ref {
	r.t.Helper()
	n := NewVDI{SR: on, VDI: VDI{NameLabel: "patch", ReadOnly: true}, VirtualSize: draftSize}
	data := make([]byte, 2<<20+5)
	copy(data, "golden")
	data[len(data)-1] = 1
	mapped(&n, data)
	ref, err := r.NewVDI(r.t.Context(), n)
	r.must(err)
	return ref
}

// copying runs VDI.copy as a task and gives its text.
func (r *rig) copying(m *task.Manager, task1, vdi, to xapi.Ref) (string, error) {
	return m.Run(r.t.Context(), task1, func(ctx context.Context, _ *task.Handle) (string, error) {
		ref, err := r.VDICopy(ctx, vdi, to, "", "")
		return "<value>" + string(ref) + "</value>", err
	})
}

func (r *rig) newTask(m *task.Manager) xapi.Ref {
	r.t.Helper()
	ref, err := m.Create(r.t.Context(), task.Spec{Label: "VDI.copy"})
	r.must(err)
	return ref
}

// nextLife starts the daemon again: storage, copies that go on, tasks.
func (r *rig) nextLife() *task.Manager {
	r.t.Helper()
	r.restart()
	return r.resume()
}

func (r *rig) resume() *task.Manager {
	r.t.Helper()
	m := r.tasks()
	var wg sync.WaitGroup
	r.must(r.ResumeCopies(r.t.Context(), func(ref xapi.Ref, work func(context.Context) (string, error)) error {
		wg.Go(func() {
			_, _ = m.Run(r.t.Context(), ref, func(ctx context.Context, _ *task.Handle) (string, error) {
				text, err := work(ctx)
				return "<value>" + text + "</value>", err
			})
		})
		return nil
	}))
	r.must(m.Repair(r.t.Context(), r.OwnsTask))
	wg.Wait()
	return m
}

// outcome gives what a task came to: the VDI it made, or its failure.
func (r *rig) outcome(m *task.Manager, ref xapi.Ref) (xapi.Ref, error) {
	r.t.Helper()
	rec, err := m.Get(ref)
	r.must(err)
	if !rec.Status.Finished() {
		r.t.Fatalf("the task is %s", rec.Status)
	}
	if err := rec.Err(); err != nil {
		return "", err
	}
	return xapi.Ref(strings.TrimSuffix(strings.TrimPrefix(rec.Result, "<value>"), "</value>")), nil
}

// A copy killed at effect 0, 1, 2 … is completed by the next start, under the
// same task; before it is on record it is a failure that left nothing.
func TestACopyKilledAtEveryEffectGoesOn(t *testing.T) {
	r := newRig(t)
	from, to := r.sr(r.memorySpec("from")), r.sr(r.fileSpec("to"))
	golden := r.large(from)
	resumed := 0
	for n, died := 0, true; died; n++ {
		m := r.tasks()
		ref := r.newTask(m)
		left := n
		r.point = func(string) error {
			if left--; left == -1 {
				runtime.Goexit()
			}
			return nil
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := r.copying(m, ref, golden, to)
			r.must(err)
			died = false
		})
		wg.Wait()
		when := fmt.Sprintf("killed at effect %d", n)
		m = r.nextLife()
		r.wantTidy(when)
		made, err := r.outcome(m, ref)
		if err != nil {
			if made != "" || len(r.volumes(to)) != 0 || n > 4 {
				t.Errorf("%s: %v, left %v", when, err, r.volumes(to))
			}
			continue
		}
		resumed++
		rec := get[VDI](r, ClassVDI, made)
		if rec.Map != get[VDI](r, ClassVDI, golden).Map || rec.ReadOnly || rec.SR != to || get[SR](r, ClassSR, to).VirtualAllocation != draftSize {
			t.Errorf("%s: the copy is %+v", when, rec)
		}
		r.wantVerified(made)
		r.must(r.VDIDestroy(t.Context(), made))
	}
	if resumed < 5 {
		t.Errorf("%d copies went on", resumed)
	}
}

// dieInCopy kills a copy when its part volume is about to get its name.
func (r *rig) dieInCopy(m *task.Manager, golden, to xapi.Ref) (of xapi.Ref) {
	r.t.Helper()
	of = r.newTask(m)
	r.point = func(name string) error {
		if name == "sr.rename" {
			runtime.Goexit()
		}
		return nil
	}
	var wg sync.WaitGroup
	wg.Go(func() { r.copying(m, of, golden, to) })
	wg.Wait()
	r.point = nil
	return of
}

// A copy that nobody waits for any more does not go on.
func TestAKilledCopyThatIsNotWantedAnyMoreIsUndone(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	from, to := r.sr(r.memorySpec("from")), r.sr(r.fileSpec("to"))
	for what, end := range map[string]func(xapi.Ref, xapi.Ref){
		"cancelled": func(of, _ xapi.Ref) { r.must(r.tasks().Cancel(ctx, of)) },
		"destroyed": func(of, _ xapi.Ref) { r.must(r.tasks().Complete(ctx, of, "", errors.New("ended"))) },
	} {
		golden := r.large(from)
		of := r.dieInCopy(r.tasks(), golden, to)
		end(of, golden)
		m := r.nextLife()
		if _, err := r.outcome(m, of); err == nil {
			t.Errorf("%s: the task ended well", what)
		}
		r.wantTidy(what)
		if left := r.volumes(to); len(left) != 0 {
			t.Errorf("%s: left %v", what, left)
		}
	}
}

// A copy whose source was spoilt while the daemon was down, or whose SR is not
// there, fails with a reason and leaves nothing.
func TestAKilledCopyThatCannotGoOnFails(t *testing.T) {
	r := newRig(t)
	from, to := r.sr(r.fileSpec("from")), r.sr(r.memorySpec("to"))
	image := func(ref xapi.Ref, suffix string) string {
		return filepath.Join(r.dir, "from", string(get[VDI](r, ClassVDI, ref).UUID)+suffix)
	}
	for what, c := range map[string]struct {
		spoil func(golden xapi.Ref) error
		code  string
	}{
		"a byte is wrong": {func(g xapi.Ref) error { return flip(image(g, ".img"), 6) }, xapi.VDIContentChanged},
		"the map is gone": {func(g xapi.Ref) error { return os.Remove(image(g, ".map")) }, xapi.VDIContentChanged},
		"the SR is away":  {func(xapi.Ref) error { return errors.Join(r.PBDUnplug(t.Context(), r.pbdOf(from))) }, xapi.SRNotAttached},
	} {
		golden := r.large(from)
		of := r.dieInCopy(r.tasks(), golden, to)
		r.restart()
		// The part must not pass for good before its source was looked at.
		repo, err := r.Repository(to)
		r.must(err)
		for _, n := range r.volumes(to) {
			r.must(repo.Destroy(t.Context(), n))
		}
		r.must(c.spoil(golden))
		_, err = r.outcome(r.resume(), of)
		r.wantCode(what, err, c.code)
		if what == "the SR is away" {
			r.must(errors.Join(r.PBDPlug(t.Context(), r.pbdOf(from)), r.Sweep(t.Context())))
		}
		if left := r.volumes(to); len(left) != 0 || r.count(ClassIntent) != 0 {
			t.Errorf("%s: left %v and %d intents", what, left, r.count(ClassIntent))
		}
		r.must(r.VDIDestroy(t.Context(), golden))
	}
	r.wantTidy("at the end")
}

// flip changes one byte of a file.
func flip(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := []byte{0}
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	b[0]++
	_, err = f.WriteAt(b, at)
	return err
}

// SIGTERM: the copy stops at once and goes on at the next start.
func TestACopyThatIsStoppedGoesOn(t *testing.T) {
	r := newRig(t)
	from, to := r.sr(r.memorySpec("from")), r.sr(r.fileSpec("to"))
	golden := r.large(from)
	m := r.tasks()
	of := r.newTask(m)
	stopped := make(chan struct{})
	_, err := m.Run(t.Context(), of, func(ctx context.Context, _ *task.Handle) (string, error) {
		r.point = func(name string) error {
			if name == "sr.create.done" && ctx.Err() == nil {
				go func() { m.Stop(); close(stopped) }()
				<-ctx.Done()
			}
			return nil
		}
		_, err := r.VDICopy(ctx, golden, to, "", "")
		return "", err
	})
	if !errors.Is(err, task.ErrStopping) {
		t.Errorf("stopped: %v", err)
	}
	<-stopped
	r.point = nil
	made, err := r.outcome(r.nextLife(), of)
	r.must(err)
	r.wantVerified(made)
	r.wantTidy("at the end")
}

// A copy that has come true while its task was cut off is a success.
func TestACopyThatWasDoneWhenItsTaskWasCutOff(t *testing.T) {
	r := newRig(t)
	from, to := r.sr(r.memorySpec("from")), r.sr(r.fileSpec("to"))
	golden, plain := r.large(from), r.filled(from, 4096, []byte("plain"))
	for _, vdi := range []xapi.Ref{golden, plain} {
		m := r.tasks()
		of := r.newTask(m)
		var wg sync.WaitGroup
		wg.Go(func() {
			m.Run(t.Context(), of, func(ctx context.Context, _ *task.Handle) (string, error) {
				_, err := r.VDICopy(ctx, vdi, to, "", "")
				r.must(err)
				runtime.Goexit()
				return "", nil
			})
		})
		wg.Wait()
		made, err := r.outcome(r.nextLife(), of)
		r.must(err)
		if rec := get[VDI](r, ClassVDI, made); rec.SR != to {
			t.Errorf("the result is %+v", rec)
		}
	}
	r.wantTidy("at the end")
}

// A copy without a map is undone, and its task fails, as ever.
func TestAKilledCopyWithoutAMapIsUndone(t *testing.T) {
	r := newRig(t)
	from, to := r.sr(r.memorySpec("from")), r.sr(r.fileSpec("to"))
	plain := r.filled(from, 1<<20, []byte("plain"))
	of := r.dieInCopy(r.tasks(), plain, to)
	_, err := r.outcome(r.nextLife(), of)
	r.wantCode("the task", err, xapi.InternalError)
	r.wantTidy("at the end")
	if left := r.volumes(to); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// Whoever makes a VDI out of a golden one keeps its map: until it is written to.
func TestCopiesKeepTheMapUntilTheyAreWrittenTo(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	here, there := r.sr(r.memorySpec("here")), r.sr(r.fileSpec("there"))
	golden := r.large(here)
	other := r.filled(here, draftSize, []byte("other"))
	make := map[string]func() (xapi.Ref, error){
		"clone":        func() (xapi.Ref, error) { return r.VDIClone(ctx, golden, nil) },
		"snapshot":     func() (xapi.Ref, error) { return r.VDISnapshot(ctx, golden, nil) },
		"copy":         func() (xapi.Ref, error) { return r.VDICopy(ctx, golden, there, "", "") },
		"copy, here":   func() (xapi.Ref, error) { return r.VDICopy(ctx, golden, here, "", "") },
		"pool_migrate": func() (xapi.Ref, error) { moved := r.large(here); return r.VDIPoolMigrate(ctx, moved, there, nil) },
	}
	change := map[string]func(ref xapi.Ref) error{
		"import": func(ref xapi.Ref) error {
			_, release, err := r.VDIFile(ctx, ref, sr.ReadWrite)
			if err == nil {
				release()
			}
			return err
		},
		"resize":    func(ref xapi.Ref) error { return r.VDIResize(ctx, ref, 2*draftSize) },
		"copy into": func(ref xapi.Ref) error { _, err := r.VDICopy(ctx, other, "", "", ref); return err },
	}
	for how, made := range make {
		for what, write := range change {
			ref, err := made()
			r.must(err)
			r.wantVerified(ref)
			if rec := get[VDI](r, ClassVDI, ref); rec.Map != get[VDI](r, ClassVDI, golden).Map || rec.Checked.IsZero() {
				t.Errorf("%s: %+v", how, rec)
			}
			r.must(r.VDISetReadOnly(ctx, ref, false))
			r.must(write(ref))
			if rec := get[VDI](r, ClassVDI, ref); rec.Map != "" || !rec.Checked.IsZero() {
				t.Errorf("%s of a %s: %+v", what, how, rec)
			}
			r.wantTidy(what + " of a " + how)
			r.must(r.VDIDestroy(ctx, ref))
		}
	}
	r.wantVerified(golden)
}

// A VDI that is to be written to loses its map for good, whatever effect fails,
// and wherever it dies: no record claims a map that is wrong or gone.
func TestTheMapGoesFirst(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	on := r.sr(r.memorySpec("m"))
	golden := r.large(on)
	for n, died := 0, true; died; n++ {
		ref, err := r.VDIClone(ctx, golden, nil)
		r.must(err)
		left := n
		r.point = func(string) error {
			if left--; left == -1 {
				runtime.Goexit()
			}
			return nil
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			f, release, err := r.VDIFile(ctx, ref, sr.ReadWrite)
			r.must(err)
			_, err = f.WriteAt([]byte("change"), 0)
			r.must(err)
			release()
			died = false
		})
		wg.Wait()
		r.restart()
		r.wantTidy(fmt.Sprintf("killed at effect %d", n))
		if get[VDI](r, ClassVDI, ref).Map != "" {
			r.wantVerified(ref)
		}
		r.must(r.VDIDestroy(ctx, ref))
	}
}

// A damaged source fails its copies, with its own code, and nothing is left.
func TestCopiesOfADamagedVDIFail(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	from, to := r.sr(r.fileSpec("from")), r.sr(r.memorySpec("to"))
	golden := r.large(from)
	into := r.filled(to, draftSize, []byte("content"))
	r.must(flip(filepath.Join(r.dir, "from", string(get[VDI](r, ClassVDI, golden).UUID)+".img"), 6))
	_, err := r.VDICopy(ctx, golden, to, "", "")
	r.wantCode("copy", err, xapi.VDIContentChanged)
	if e := xapi.AsError(err); len(e.Params) != 2 || e.Params[0] != string(golden) {
		t.Errorf("parameters %q", e.Params)
	}
	_, err = r.VDIPoolMigrate(ctx, golden, to, nil)
	r.wantCode("pool_migrate", err, xapi.VDIContentChanged)
	_, err = r.VDICopy(ctx, golden, "", "", into)
	r.wantCode("copy into", err, xapi.VDIContentChanged)
	r.holds(into, []byte("content"))
	r.wantTidy("at the end")
}

// While a copy is made, its source stays, its SRs stay plugged; a cancel ends it.
func TestWhatHappensDuringACopy(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	from, to := r.sr(r.memorySpec("from")), r.sr(r.fileSpec("to"))
	golden := r.large(from)
	m := r.tasks()
	of := r.newTask(m)
	looked := false
	r.point = func(name string) error {
		if name != "sr.create.done" || looked {
			return nil
		}
		looked = true
		r.wantCode("destroy", r.VDIDestroy(ctx, golden), xapi.VDIInUse, string(golden), opDestroy)
		r.wantCode("unplug the source", r.PBDUnplug(ctx, r.pbdOf(from)), xapi.OtherOperationInProgress)
		r.wantCode("unplug the target", r.PBDUnplug(ctx, r.pbdOf(to)), xapi.OtherOperationInProgress)
		r.must(r.Sweep(ctx))
		r.must(m.Cancel(ctx, of))
		return nil
	}
	_, err := r.copying(m, of, golden, to)
	r.point = nil
	r.wantCode("cancelled", err, xapi.TaskCancelled)
	if !looked {
		t.Error("nobody looked")
	}
	r.wantTidy("at the end")
	r.wantVerified(golden)
}

// A full SR: a clear error, nothing left, and with room the next one succeeds.
func TestACopyIntoAFullSR(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	from := r.sr(r.fileSpec("from"))
	golden := r.large(from)
	r.mem.Capacity = 4 << 20
	to := r.sr(r.memorySpec("to"))
	full, err := r.NewDraft(ctx, NewVDI{SR: to, VirtualSize: draftSize, Room: 3 << 20}, r.aDay())
	r.must(err)
	_, err = r.VDICopy(ctx, golden, to, "", "")
	r.wantCode("copy", err, xapi.OutOfSpace, "to ("+string(get[SR](r, ClassSR, to).UUID)+")")
	r.must(full.Discard(ctx))
	r.wantTidy("after the refusal")
	made, err := r.VDICopy(ctx, golden, to, "", "")
	r.must(err)
	r.wantVerified(made)
}

// silent is an SR that does not answer until it is told to.
type silent struct {
	sr.Repository
	answer <-chan struct{}
}

func (s silent) Scan(ctx context.Context) ([]sr.Volume, error) {
	<-s.answer
	return s.Repository.Scan(ctx)
}

// An SR that does not answer keeps the sweep from no other.
func TestTheSweepDoesNotWaitForADeadSR(t *testing.T) {
	r := newRig(t)
	dead, good := r.sr(r.memorySpec("dead")), r.sr(r.fileSpec("good"))
	d := r.newDraft(good)
	r.must(d.SetNote(t.Context(), nil, r.Now()))
	r.must(d.Close())
	repo, err := r.Repository(dead)
	r.must(err)
	answer := make(chan struct{})
	r.storage.setRepository(dead, silent{repo, answer})
	swept := make(chan error)
	go func() { swept <- r.Sweep(t.Context()) }()
	rev := int64(0)
	for r.count(ClassIntent) > 0 {
		r.must(r.Store.View(func(v *store.View) error { rev = v.Revision(); return nil }))
		if r.count(ClassIntent) > 0 {
			r.must(r.Store.Wait(t.Context(), rev))
		}
	}
	select {
	case err := <-swept:
		t.Errorf("the dead SR answered: %v", err)
	default:
	}
	close(answer)
	r.must(<-swept)
	r.wantTidy("at the end")
}

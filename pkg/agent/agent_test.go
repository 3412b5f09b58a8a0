package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/dom0/dom0test"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

func wantCode(t *testing.T, err error, code string) *xapi.Error {
	t.Helper()
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("error %v, want %s", err, code)
	}
	return e
}

func TestApplyAndPrecheck(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	ref, rec := r.patch()
	r.verbs["precheck"] = says("looks good\n", 0)
	r.verbs["apply"] = func(_ context.Context, p *dom0test.Process) dom0.Result {
		fmt.Fprintln(p.Stdout, "did it in", p.Dir)
		for _, want := range []string{"PATCHD_VERB=apply", "PATCHD_MODE=live", "PATCHD_ROOT=/", "PATCHD_PATCH_UUID=" + string(rec.UUID)} {
			if !strings.Contains(strings.Join(p.Env, "\n"), want) {
				t.Errorf("no %s in %q", want, p.Env)
			}
		}
		return dom0.Result{}
	}
	if out, err := r.precheck(ref); err != nil || out != "looks good\n" {
		t.Fatalf("%q %v", out, err)
	}
	if r.effects != 0 || r.hostPatch(ref) != "absent" {
		t.Error("precheck applies")
	}
	if out, err := r.apply(ref); err != nil || !strings.HasPrefix(out, "did it in "+r.dir) {
		t.Fatalf("%q %v", out, err)
	}
	if !r.stamped(rec.UUID) || r.hostPatch(ref) != "applied" || r.effects != 1 {
		t.Errorf("stamp %v, %s, %d effects", r.stamped(rec.UUID), r.hostPatch(ref), r.effects)
	}
	if b, err := os.ReadFile(filepath.Join(appliedDir(r.agent.PatchDir), string(rec.UUID))); err != nil || string(b) != rec.InfoXML {
		t.Errorf("%s %v", b, err)
	}
	r.tidy("after an apply")
	_, err := r.apply(ref)
	wantCode(t, err, xapi.PatchAlreadyApplied)
}

func TestFailuresOfThePatch(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	ref, rec := r.patch()
	r.verbs["apply"] = says("no way", 3)
	_, err := r.apply(ref)
	if e := wantCode(t, err, xapi.PatchApplyFailed); !strings.Contains(e.Params[0], "no way") {
		t.Errorf("%v", e)
	}
	r.verbs["precheck"] = says("not here", 1)
	_, err = r.apply(ref)
	wantCode(t, err, xapi.InvalidPatchWithLog)
	if r.effects != 1 || r.stamped(rec.UUID) || r.hostPatch(ref) != "absent" {
		t.Errorf("%d effects, stamp %v, %s", r.effects, r.stamped(rec.UUID), r.hostPatch(ref))
	}
	r.verbs["precheck"] = nil
	r.agent.Timeouts.Apply = 30 * time.Millisecond
	r.verbs["apply"] = blocks(make(chan struct{}, 1), nil)
	_, err = r.apply(ref)
	if e := wantCode(t, err, xapi.PatchApplyFailed); !strings.Contains(e.Params[0], "did not end within 30ms") {
		t.Errorf("%v", e)
	}
	r.agent.Timeouts.Precheck = 30 * time.Millisecond
	r.verbs["precheck"] = blocks(make(chan struct{}, 1), nil)
	_, err = r.precheck(ref)
	wantCode(t, err, xapi.PrecheckFailedUnknownError)
	r.tidy("after failures")
}

func TestChangedPayloadIsNotRun(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	ref, rec := r.patch()
	r.payload[rec.UUID] = []byte("#!/bin/sh\nrm -rf /\n")
	_, err := r.apply(ref)
	wantCode(t, err, xapi.VDIContentChanged)
	if r.effects != 0 || r.hostPatch(ref) != "absent" {
		t.Error("it ran")
	}
	r.payload[rec.UUID] = nil
	r.tidy("after a refusal")
}

func TestCancel(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"precheck", "apply"} {
		r := newRig(t)
		r.begin()
		ref, _ := r.patch()
		begun := make(chan struct{}, 1)
		r.verbs[verb] = blocks(begun, nil)
		done := make(chan error, 1)
		go func() { _, err := r.apply(ref); done <- err }()
		<-begun
		r.must(r.pool.JobCancel(t.Context(), r.job()))
		err := <-done
		if e := wantCode(t, err, xapi.TaskCancelled); len(e.Params) != 1 {
			t.Errorf("%v", e)
		}
		r.tidy("after a cancel of " + verb)
		if r.hostPatch(ref) != "absent" {
			t.Errorf("cancelled in %s: %s", verb, r.hostPatch(ref))
		}
	}
}

// job is the only open job.
func (r *rig) job() xapi.Ref {
	r.t.Helper()
	jobs, _, err := r.pool.Jobs(r.pool.Self)
	r.must(err)
	if len(jobs) != 1 {
		r.t.Fatalf("%d open jobs", len(jobs))
	}
	return jobs[0].Ref
}

// A job that waits for its turn can be cancelled; two applies never overlap.
func TestOneApplyAtATime(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	first, _ := r.patch()
	second, _ := r.patch()
	begun, goOn := make(chan struct{}, 2), make(chan struct{})
	r.verbs["apply"] = blocks(begun, goOn)
	errs := make(chan error, 2)
	go func() { _, err := r.apply(first); errs <- err }()
	<-begun
	go func() { _, err := r.apply(second); errs <- err }()
	var waiting xapi.Ref
	for waiting == "" {
		jobs, _, err := r.pool.Jobs(r.pool.Self)
		r.must(err)
		for _, j := range jobs {
			if j.PatchRef == second {
				waiting = j.Ref
			}
		}
	}
	time.Sleep(50 * time.Millisecond)
	if len(begun) != 0 {
		t.Error("two at once")
	}
	r.must(r.pool.JobCancel(t.Context(), waiting))
	wantCode(t, <-errs, xapi.TaskCancelled)
	close(goOn)
	if err := <-errs; err != nil {
		t.Error(err)
	}
	r.tidy("after both")
}

// The agent ends while a patch runs; the next one follows it.
func TestFollowedAfterARestart(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	ref, rec := r.patch()
	begun, goOn := make(chan struct{}, 1), make(chan struct{})
	r.verbs["apply"] = blocks(begun, goOn)
	done := make(chan error, 1)
	go func() { _, err := r.apply(ref); done <- err }()
	<-begun
	r.reborn()
	if len(r.agent.applying) != 1 {
		t.Error("the runner that goes on has no turn")
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Error(err)
	}
	r.tidy("after it was followed")
	if r.effects != 1 || !r.stamped(rec.UUID) {
		t.Errorf("%d effects, stamp %v", r.effects, r.stamped(rec.UUID))
	}
}

// The runner dies at each of its effects.
func TestRunnerDies(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	for n := 1; ; n++ {
		ref, rec := r.patch()
		before := r.effects
		r.prepare = func(d *dom0test.Dom0) { d.CrashAt(n) }
		_, err := r.apply(ref)
		crashed := r.runners[len(r.runners)-1].Crashed()
		r.tidy(fmt.Sprintf("runner died at %d", n))
		state, ran := r.hostPatch(ref), r.effects-before
		switch {
		case !crashed:
			if err != nil || state != "applied" {
				t.Errorf("%d: %v, %s", n, err, state)
			}
			return
		case err == nil:
			t.Errorf("%d: it died and nobody says so", n)
		case ran > 0 && state != "unknown", ran == 0 && state == "applied", r.stamped(rec.UUID):
			t.Errorf("%d: ran %d times, %s, stamp %v", n, ran, state, r.stamped(rec.UUID))
		}
		if state == "unknown" {
			if msgs := r.messages(pool.MessageApplyUnknown); msgs == 0 {
				t.Error("no message says so")
			}
			r.must(r.pool.PatchSettle(t.Context(), ref, r.pool.Self, true))
			if r.hostPatch(ref) != "applied" || !r.stamped(rec.UUID) {
				t.Error("settled, and is not applied")
			}
		}
	}
}

func (r *rig) messages(name string) (n int) {
	r.must(r.store.View(func(v *store.View) error {
		for _, it := range v.List(pool.ClassMessage) {
			var m pool.Message
			if err := it.Decode(&m); err != nil {
				return err
			}
			if m.Name == name {
				n++
			}
		}
		return nil
	}))
	return n
}

// The agent dies at each of its effects on the machine, before and after.
func TestAgentDiesAtEffects(t *testing.T) {
	t.Parallel()
	for _, after := range []bool{false, true} {
		r := newRig(t)
		for n, more := 1, true; more; n++ {
			more = r.dies(t, fmt.Sprintf("effect %d, after %v", n, after), func() {
				at := len(r.machine.Calls()) + n
				if after {
					r.machine.CrashAfter(at)
				} else {
					r.machine.CrashAt(at)
				}
			})
		}
	}
}

// The agent dies at each thing it tells the coordinator, before and after.
func TestAgentDiesAtReports(t *testing.T) {
	t.Parallel()
	for _, after := range []bool{false, true} {
		r := newRig(t)
		for n, more := 1, true; more; n++ {
			more = r.dies(t, fmt.Sprintf("report %d, after %v", n, after), func() { r.gate.dieAt, r.gate.after = n, after })
		}
	}
}

// dies lets an agent work that is set to die, starts the next, and checks what
// must be true then. It tells whether the agent had died.
func (r *rig) dies(t *testing.T, where string, set func()) bool {
	t.Helper()
	r.end()
	r.machine.Restart()
	r.life()
	ref, rec := r.patch()
	before := r.effects
	set()
	r.begin()
	done := make(chan error, 1)
	go func() { _, err := r.apply(ref); done <- err }()
	var err error
	finished := false
	for !finished && !r.gate.isDead() {
		select {
		case err = <-done:
			finished = true
		case <-time.After(time.Millisecond):
		}
	}
	died := r.gate.isDead()
	r.reborn()
	if !finished {
		err = <-done
	}
	r.tidy(where)
	state, ran := r.hostPatch(ref), r.effects-before
	switch {
	case ran > 1:
		t.Errorf("%s: applied %d times", where, ran)
	case (state == "applied") != r.stamped(rec.UUID), (state == "applied") != (ran == 1), (err == nil) != (ran == 1):
		t.Errorf("%s: ran %d times, %s, stamp %v: %v", where, ran, state, r.stamped(rec.UUID), err)
	}
	return died
}

// Each effect of agent and runner fails once: the job ends with an error that
// has a code, or well, and nothing is left.
func TestEffectsFail(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, of := range []string{"agent", "runner", "reports"} {
		for n := 1; n <= 12; n++ {
			r.end()
			r.machine.Restart()
			r.life()
			ref, rec := r.patch()
			r.prepare = nil
			switch of {
			case "agent":
				r.machine.FailAt(len(r.machine.Calls())+n, errInjected)
			case "reports":
				r.gate.failAt = n
			default:
				r.prepare = func(d *dom0test.Dom0) { d.FailAt(n, errInjected) }
			}
			r.begin()
			_, err := r.apply(ref)
			where := fmt.Sprintf("%s fail at %d: %v", of, n, err)
			var coded *xapi.Error
			if err != nil && !errors.As(err, &coded) {
				t.Errorf("%s: no code", where)
			}
			r.tidy(where)
			if state := r.hostPatch(ref); (state == "applied") != r.stamped(rec.UUID) || (err == nil) != (state == "applied") {
				t.Errorf("%s: %s, stamp %v", where, state, r.stamped(rec.UUID))
			}
		}
	}
}

// What nobody waits for on a connection is taken up again, a bounded number of
// times; what somebody waited for is undone.
func TestResumes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ref, _ := r.patch()
	ctx, cancel := context.WithTimeout(pool.Resuming(t.Context()), 20*time.Second)
	defer cancel()
	r.prepare = func(d *dom0test.Dom0) { d.CrashAt(1) } // the runner dies before anything runs
	r.begin()
	_, err := r.pool.PatchApply(ctx, ref, r.pool.Self)
	if e := wantCode(t, err, xapi.InternalError); !strings.Contains(e.Params[0], "interrupted before it changed anything") {
		t.Errorf("%v", e)
	}
	if n := len(r.runners); n != maxAttempts {
		t.Errorf("%d attempts", n)
	}
	r.prepare = nil
	r.tidy("after the attempts")

	// Queued while no agent runs: it is begun by the next.
	r.end()
	done := make(chan error, 1)
	go func() { _, err := r.pool.PatchApply(ctx, ref, r.pool.Self); done <- err }()
	r.untilQueued()
	r.reborn()
	if err := <-done; err != nil {
		t.Error(err)
	}

	other, _ := r.patch()
	r.end()
	go func() { _, err := r.apply(other); done <- err }()
	r.untilQueued()
	r.reborn()
	wantCode(t, <-done, xapi.InternalError)

	// Who asked lives elsewhere: the job has waited.
	r.end()
	go func() { _, err := r.apply(other); done <- err }()
	r.untilQueued()
	r.keep = true
	r.reborn()
	if err := <-done; err != nil {
		t.Error(err)
	}
	r.tidy("at the end")
}

func (r *rig) untilQueued() {
	for range 1000 {
		if jobs, _, err := r.pool.Jobs(r.pool.Self); err == nil && len(jobs) == 1 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	r.t.Fatal("no job")
}

// Where there are no control groups a job is refused, and its task ends.
func TestWithoutControlGroups(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, op := range []string{"spawn", "kill"} {
		r.machine.FailOn(op, dom0.ErrNoGroups)
	}
	r.begin()
	ref, _ := r.patch()
	_, err := r.apply(ref)
	if wantCode(t, err, xapi.InternalError); r.hostPatch(ref) != "absent" {
		t.Error(r.hostPatch(ref))
	}
	r.tidy("at the end")
}

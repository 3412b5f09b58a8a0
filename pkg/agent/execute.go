package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// execution is one job on its way.
type execution struct {
	agent  *Agent
	id     xapi.UUID
	ctx    context.Context // ends when the job is cancelled or the agent stops
	stop   context.Context // ends when the agent stops
	cancel context.CancelCauseFunc
}

// stopping tells whether the daemon is going down: then jobs that run are left
// to their runner, and nothing is reported.
func (e *execution) stopping() bool { return e.stop.Err() != nil }

// work takes a queued job to its end.
func (e *execution) work(j pool.Assignment) {
	a := e.agent
	log := a.Log.WithField("job", e.id).WithField("patch", j.Patch.UUID).WithField("kind", j.Job.Kind)
	if err := e.turn(j.Job.Kind); err != nil {
		e.finishUnbegun(j, err)
		return
	}
	defer e.yield(j.Job.Kind)
	if j.Job.Cancel {
		e.finishUnbegun(j, xapi.NewError(xapi.TaskCancelled, string(j.Job.Task.OrNull())))
		return
	}
	entry := Entry{Assignment: j, Created: a.Now()}
	if err := e.launch(&entry); err != nil {
		log.WithError(err).Warn("the job could not be started")
		e.undo(entry, err)
		return
	}
	e.follow(entry)
}

// undo ends a job that could not be started and removes what was made for it.
func (e *execution) undo(entry Entry, err error) {
	a := e.agent
	if a.journal.begun(e.id) { // the runner had come that far before its start failed
		if serr := e.settle(entry); serr != nil {
			a.Log.WithError(serr).WithField("job", e.id).Error("the job could not be settled; the next start tries again")
		}
		return
	}
	cleanup := e.clean(entry)
	if cleanup != nil {
		e.reportCleanup(entry, cleanup)
	}
	if recorded := e.finishUnbegun(entry.Assignment, err); !recorded || cleanup != nil {
		return // the journal keeps it for the next start
	}
	if err := a.journal.end(e.id); err != nil {
		a.Log.WithError(err).WithField("job", e.id).Error("the journal of an ended job could not be removed; the next start tries again")
	}
}

// turn waits until this host may run one more job of that kind.
func (e *execution) turn(k pool.JobKind) error {
	select {
	case e.gate(k) <- struct{}{}:
		return nil
	case <-e.ctx.Done():
		return context.Cause(e.ctx)
	}
}

func (e *execution) yield(k pool.JobKind) { <-e.gate(k) }

func (e *execution) gate(k pool.JobKind) chan struct{} {
	if k == pool.JobApply {
		return e.agent.applying
	}
	return e.agent.prechecks
}

// finishUnbegun reports a job of which nothing has run. A daemon that goes
// down leaves it as it is: the next start resumes or ends it.
func (e *execution) finishUnbegun(j pool.Assignment, err error) (recorded bool) {
	if e.stopping() {
		return false
	}
	if cause := context.Cause(e.ctx); cause != nil && xapi.Is(cause, xapi.TaskCancelled) {
		err = cause
	}
	return e.finish(j, pool.Outcome{Err: xapi.AsError(err)}) == nil
}

func (e *execution) finish(j pool.Assignment, o pool.Outcome) error {
	ctx := context.WithoutCancel(e.stop)
	err := e.agent.Coordinator.JobFinish(ctx, j.Ref, o)
	if err != nil {
		e.agent.Log.WithError(err).WithField("job", e.id).Error("the end of the job could not be recorded; the journal keeps it")
	}
	return err
}

// launch journals the job, makes its private image, claims it and starts the
// runner.
func (e *execution) launch(entry *Entry) error {
	a, j := e.agent, entry.Assignment
	srs, facts, err := e.facts(j)
	if err != nil {
		return err
	}
	if entry.Plan, err = MakePlan(facts); err != nil {
		return err
	}
	entry.Work = sr.Work(sr.Owner{Pool: j.Pool, Host: j.Host, Job: e.id}, xapi.NewUUID())
	if err := a.journal.begin(*entry); err != nil {
		return fmt.Errorf("journal job %s: %w", e.id, err)
	}
	run, err := e.prepare(*entry, srs)
	if err != nil {
		return err
	}
	if err := a.journal.order(e.id, run); err != nil {
		return err
	}
	if _, err := a.Coordinator.JobClaim(e.ctx, j.Ref); err != nil {
		return err
	}
	return e.spawn()
}

// facts looks at the SRs plugged here.
func (e *execution) facts(j pool.Assignment) (map[xapi.Ref]sr.Repository, Facts, error) {
	attached, err := e.agent.Storage.AttachedSRs()
	if err != nil {
		return nil, Facts{}, err
	}
	f := Facts{Assignment: j}
	repos := map[xapi.Ref]sr.Repository{}
	for _, s := range attached {
		st, err := s.Repository.Stat(e.ctx)
		if err != nil {
			e.agent.Log.WithError(err).WithField("SR", s.UUID).Warn("an SR does not answer and is not used")
			continue
		}
		repos[s.Ref] = s.Repository
		f.SRs = append(f.SRs, SRFact{
			Ref: s.Ref, Shared: s.Shared, Free: st.Free,
			Clones: sr.Has(s.Repository.Features(), sr.VDIClone),
		})
	}
	return repos, f, nil
}

// prepare makes the private image and says what the runner shall do with it.
func (e *execution) prepare(entry Entry, repos map[xapi.Ref]sr.Repository) (Run, error) {
	a, p := e.agent, entry.Assignment.Patch
	run := Run{
		Kind: entry.Assignment.Job.Kind, Job: e.id, PatchRef: entry.Assignment.PatchRef, Patch: p.UUID,
		Host: a.SelfUUID, Check: true, Digest: p.Digest, KeysDir: a.KeysDir, Pinned: a.Pinned,
		Signature: patch.Signature{Kind: patch.SignatureKind(p.SignatureKind), Packet: p.Signature, Signer: p.Signer},
		PatchDir:  a.PatchDir, Timeouts: a.Timeouts,
	}
	dst := repos[entry.Plan.Target]
	var err error
	switch entry.Plan.Way {
	case WayClone:
		run.Check, err = e.clone(dst, entry)
	case WayCopy:
		src := repos[entry.Plan.Source]
		err = sr.Copy(e.ctx, dst, entry.Work, src, sr.Live(entry.Assignment.VDI.UUID), nil)
	case WayFetch:
		err = e.fetch(dst, entry, &run)
	}
	if err != nil {
		return run, err
	}
	if dst == nil {
		run.Image = a.journal.path(e.id, fileImage)
	} else if run.Image, err = dst.Path(e.ctx, entry.Work); err != nil {
		return run, err
	}
	if a.KeepFree != nil {
		// Room is planned with all of it; half is what a patch may not touch.
		run.KeepFree = a.KeepFree(run.Image) / 2
	}
	return run, nil
}

// clone makes the work volume of the golden one, and tells whether the bytes
// must be verified: not when they were, and the golden file has not changed
// since, before the clone nor while it was made.
func (e *execution) clone(repo sr.Repository, entry Entry) (check bool, err error) {
	golden := sr.Live(entry.Assignment.VDI.UUID)
	before, err := identify(e.ctx, repo, golden)
	if err != nil {
		return true, err
	}
	if _, err := repo.Clone(e.ctx, golden, entry.Work); err != nil {
		return true, err
	}
	after, err := identify(e.ctx, repo, golden)
	if err != nil || before != after {
		return true, err
	}
	p := entry.Assignment.Patch
	if !e.agent.checks.passed(before, p.Digest) {
		e.agent.checks.await(e.id, before, p.Digest)
		return true, nil
	}
	keys, err := patch.LoadKeyring(e.agent.KeysDir)
	if err != nil {
		return true, err
	}
	return keys.Trusts(p.Signer, e.agent.Now()) != nil, nil
}

// spawn starts the runner, outside of the daemon's own control group.
func (e *execution) spawn() error {
	a := e.agent
	if err := fault.Point("agent.spawn"); err != nil {
		return err
	}
	log, err := os.OpenFile(a.journal.path(e.id, "runner.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	_, err = a.Dom0.Spawn(e.ctx, dom0.Cmd{
		Path: a.Runner[0], Args: append(append([]string(nil), a.Runner[1:]...), a.journal.path(e.id)),
		Env: runnerEnvironment(), Dir: "/", Stdout: log, Stderr: log,
		Group: runnerGroup(e.id), PrivateMounts: true,
	})
	return err
}

// runnerEnvironment is the daemon's PATH and what steers fault injection in
// the builds that have it.
func runnerEnvironment() []string {
	env := []string{"PATH=" + os.Getenv("PATH")}
	if !fault.Enabled {
		return env
	}
	for mine, its := range map[string]string{
		"PATCHD_FAULT_RUNNER": "PATCHD_FAULT", "PATCHD_FAULT_RUNNER_PLAN": "PATCHD_FAULT_PLAN", "PATCHD_FAULT_TRACE": "PATCHD_FAULT_TRACE",
	} {
		if v := os.Getenv(mine); v != "" {
			env = append(env, its+"="+v)
		}
	}
	return env
}

// reportEvery is how often the progress of a running patch is looked at.
const reportEvery = time.Second

// follow waits for the runner to end, shows how it gets on, ends it when the
// job is cancelled, and settles the job.
func (e *execution) follow(entry Entry) {
	a := e.agent
	ended := make(chan error, 1)
	wait, stopWait := context.WithCancel(context.WithoutCancel(e.stop))
	defer stopWait()
	go func() { ended <- a.Dom0.WaitEmpty(wait, runnerGroup(e.id)) }()
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	cancelled := e.ctx.Done()
	var killing sync.WaitGroup
	defer killing.Wait()
	for {
		select {
		case err := <-ended:
			if err == nil {
				err = e.settle(entry)
			}
			if err != nil {
				a.Log.WithError(err).WithField("job", e.id).Error("the job could not be settled; the next start tries again")
			}
			return
		case <-tick.C:
			e.report(entry)
		case <-cancelled:
			if e.stopping() {
				stopWait()
				<-ended
				return // the runner goes on and is followed by the next start
			}
			cancelled = nil
			killing.Go(e.kill)
		}
	}
}

// kill ends the runner: it is asked to, ends the patch, and tells.
func (e *execution) kill() {
	a := e.agent
	ctx := context.WithoutCancel(e.stop)
	err := a.Dom0.Kill(ctx, runnerGroup(e.id), 2*a.Timeouts.Grace+5*time.Second)
	err = errors.Join(err, a.Dom0.Kill(ctx, patchGroup(e.id), 0))
	if err != nil {
		a.Log.WithError(err).WithField("job", e.id).Error("the processes of a cancelled job could not be ended")
	}
}

func (e *execution) report(entry Entry) {
	a := e.agent
	fraction, tail := 0.0, ""
	if b, err := os.ReadFile(a.journal.path(e.id, fileProgress)); err == nil {
		number, text, _ := strings.Cut(string(b), " ")
		fraction, _ = strconv.ParseFloat(number, 64)
		tail = text + "\n"
	}
	tail += tailOf(a.journal.path(e.id, fileOutput), 8<<10)
	if err := a.Coordinator.JobReport(e.stop, entry.Assignment.Ref, fraction, tail); err != nil && !e.stopping() {
		a.Log.WithError(err).WithField("job", e.id).Warn("progress could not be reported")
	}
}

// tailOf reads the last n bytes of a file that may still grow.
func tailOf(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	b := make([]byte, min(n, st.Size()))
	got, _ := f.ReadAt(b, max(0, st.Size()-n))
	return cleanText(b[:got])
}

// settle ends a job whose runner is gone, after a normal end as after a crash.
func (e *execution) settle(entry Entry) error {
	a, j := e.agent, entry.Assignment
	ctx := context.WithoutCancel(e.stop)
	defer a.checks.forget(e.id)
	if err := a.Dom0.Kill(ctx, patchGroup(e.id), a.Timeouts.Grace); err != nil {
		return err
	}
	outcome, again, err := e.outcome(entry)
	if err != nil {
		return err
	}
	if outcome.Err == nil && j.Job.Kind == pool.JobApply && !again {
		if err := writeStamp(a.PatchDir, j.Patch.UUID, j.Patch.InfoXML); err != nil {
			return fmt.Errorf("write the stampfile of patch %s: %w", j.Patch.UUID, err)
		}
	}
	cleanup := e.clean(entry)
	if again && cleanup == nil {
		if cleanup = a.journal.end(e.id); cleanup == nil {
			return a.Coordinator.JobRequeue(ctx, j.Ref)
		}
	}
	if again {
		outcome.Err = interrupted(j.Job)
	}
	if err := e.finish(j, outcome); err != nil {
		return err
	}
	if cleanup != nil {
		e.reportCleanup(entry, cleanup)
		return nil
	}
	if outcome.Unknown {
		e.reportUnknown(entry)
	}
	if j.Job.Kind == pool.JobApply && outcome.Err == nil {
		return errors.Join(a.ResyncStamps(ctx), a.journal.end(e.id))
	}
	return a.journal.end(e.id)
}

// outcome reads from the journal how a job ended. again tells that nothing of
// it ran and that it is to be taken once more.
func (e *execution) outcome(entry Entry) (o pool.Outcome, again bool, err error) {
	a, j := e.agent, entry.Assignment
	res, ok, err := a.journal.result(e.id)
	if err != nil {
		return o, false, err
	}
	begun := a.journal.begun(e.id)
	apply := j.Job.Kind == pool.JobApply
	if at, stamped := stampTime(a.PatchDir, j.Patch.UUID); apply && stamped && begun && !at.Before(entry.Created) {
		return pool.Outcome{Output: res.Output, At: at}, false, nil
	}
	switch {
	case ok:
		if res.Checked {
			a.checks.confirm(e.id)
		}
		if res.Cleanup != "" {
			a.Log.WithField("job", e.id).Error("the runner could not clean up: " + res.Cleanup)
		}
		return e.resultOutcome(res, j), false, nil
	case apply && begun:
		return pool.Outcome{Unknown: true, Err: xapi.NewError(xapi.PatchApplyFailed,
			"the runner died while the patch was being applied, and how far it came is unknown. "+
				"Look at the host, then say `patchd patch settle` or apply the patch again. Last output: "+
				tailOf(a.journal.path(e.id, fileOutput), maxText))}, false, nil
	}
	_, job, known := a.Coordinator.JobByUUID(e.id)
	if known && job.Resumes && job.Attempt < maxAttempts && !job.Cancel {
		return o, true, nil
	}
	return pool.Outcome{Err: interrupted(j.Job)}, false, nil
}

// maxAttempts bounds how often an interrupted job is taken up again.
const maxAttempts = 3

func (e *execution) resultOutcome(res Result, j pool.Assignment) pool.Outcome {
	o := pool.Outcome{Output: res.Output, Err: res.err(), At: res.Finished}
	if o.Err != nil && o.Err.Code == xapi.TaskCancelled {
		o.Err = xapi.NewError(xapi.TaskCancelled, string(j.Job.Task.OrNull()))
	}
	return o
}

// clean removes the private image; the journal folder stays until the outcome
// is recorded.
func (e *execution) clean(entry Entry) error {
	if entry.Plan.Target.IsNull() {
		return nil // the image lies in the journal folder and goes with it
	}
	attached, err := e.agent.Storage.AttachedSRs()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.stop), time.Minute)
	defer cancel()
	for _, s := range attached {
		if s.Ref == entry.Plan.Target {
			return s.Repository.Destroy(ctx, entry.Work)
		}
	}
	return fmt.Errorf("the SR %s that holds the job's image is not plugged", entry.Plan.Target)
}

func (e *execution) reportCleanup(entry Entry, err error) {
	a := e.agent
	a.Log.WithError(err).WithField("job", e.id).Error("what the job used could not be removed; the next start tries again")
	body := fmt.Sprintf("job %s of patch %s (%s): %v", e.id, entry.Assignment.Patch.NameLabel, entry.Assignment.Patch.UUID, err)
	if _, merr := a.Coordinator.MessageCreate(context.WithoutCancel(e.stop), pool.MessageCleanupFailed, 3, "Host", a.SelfUUID, body); merr != nil {
		a.Log.WithError(merr).Error("no message could be left")
	}
}

func (e *execution) reportUnknown(entry Entry) {
	a := e.agent
	body := fmt.Sprintf("patch %s (%s) was being applied when its runner died; see the task, then `patchd patch settle %s %s`",
		entry.Assignment.Patch.NameLabel, entry.Assignment.Patch.UUID, entry.Assignment.Patch.UUID, a.SelfUUID)
	if _, err := a.Coordinator.MessageCreate(context.WithoutCancel(e.stop), pool.MessageApplyUnknown, 2, "Host", a.SelfUUID, body); err != nil {
		a.Log.WithError(err).Error("no message could be left")
	}
}

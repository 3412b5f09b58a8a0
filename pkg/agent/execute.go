package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
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

	gate     chan struct{} // where the job holds its turn; nil: it holds none
	recorded bool          // the outcome is in the records
	reported bool          // that it could not be cleaned up was told
	attempt  int64         // the claim that this is the work of; 0 before it
}

// stopping tells whether the daemon is going down: then jobs that run are left
// to their runner, and nothing is reported.
func (e *execution) stopping() bool { return e.stop.Err() != nil }

// work takes a queued job to its end.
func (e *execution) work(j pool.Assignment) {
	a := e.agent
	log := a.Log.WithField("job", e.id).WithField("patch", j.Patch.UUID).WithField("kind", j.Job.Kind)
	entry := Entry{Assignment: j, Created: a.Now()}
	err := e.turn(j.Job.Kind)
	defer e.yield()
	if err == nil && j.Job.Cancel {
		err = xapi.NewError(xapi.TaskCancelled, string(j.Job.Task.OrNull()))
	}
	if err == nil {
		if err = e.launch(&entry); err == nil {
			e.follow(entry)
			return
		}
		log.WithError(err).Warn("the job could not be started")
	}
	e.conclude(func() error { return e.undo(entry, err) })
}

// turn waits until this host may run one more job of that kind.
func (e *execution) turn(k pool.JobKind) error {
	gate := e.agent.gate(k)
	select {
	case gate <- struct{}{}:
		e.gate = gate
		return nil
	case <-e.ctx.Done():
		return context.Cause(e.ctx)
	}
}

// yield lets the next job have its turn.
func (e *execution) yield() {
	if e.gate != nil {
		<-e.gate
		e.gate = nil
	}
}

func (a *Agent) gate(k pool.JobKind) chan struct{} {
	if k == pool.JobApply {
		return a.applying
	}
	return a.prechecks
}

// launch journals the job, makes its private image, claims it and starts the
// runner.
func (e *execution) launch(entry *Entry) error {
	a, j := e.agent, entry.Assignment
	entry.Work = sr.Work(sr.Owner{Pool: j.Pool, Host: j.Host, Job: e.id}, xapi.NewUUID())
	srs, facts, err := e.decide(entry)
	if err != nil {
		return err
	}
	if err := a.journal.begin(*entry); err != nil {
		return fmt.Errorf("journal job %s: %w", e.id, err)
	}
	where := facts.nameOf(entry.Plan.Target)
	run, err := e.prepare(*entry, srs)
	if err != nil {
		return inSR(where, err)
	}
	run.SR = where
	if err := a.journal.order(e.id, run); err != nil {
		return err
	}
	if e.attempt, err = a.Coordinator.JobClaim(e.ctx, j.Ref); err != nil {
		return err
	}
	return e.spawn()
}

// decide looks and plans. An image that is to be staged is staged, and then it is
// planned again: from there on it is one that is plugged here.
func (e *execution) decide(entry *Entry) (srs map[xapi.Ref]sr.Repository, facts Facts, err error) {
	for staged := false; ; staged = true {
		if srs, facts, err = e.facts(entry.Assignment); err != nil {
			return nil, facts, err
		}
		if entry.Plan, err = e.plan(facts, entry.Work.VDI); err != nil || entry.Plan.Way != WayStage {
			return srs, facts, err
		}
		if staged {
			return nil, facts, fmt.Errorf("the image of patch %s was staged and is not there", entry.Assignment.Patch.UUID)
		}
		if err := e.stage(entry.Assignment, entry.Plan); err != nil {
			return nil, facts, inSR(facts.nameOf(entry.Plan.Target), err)
		}
	}
}

// plan makes a plan whose room the pool has promised to the work volume. Where an
// SR has promised its room to others, the next one that would do is asked.
func (e *execution) plan(f Facts, work xapi.UUID) (Plan, error) {
	for {
		p, err := MakePlan(f)
		if err != nil || p.Target.IsNull() || p.Way == WayStage {
			return p, err
		}
		found, err := e.agent.Coordinator.JobPromise(e.ctx, f.Assignment.Ref, pool.Promise{
			SR: p.Target, Room: p.Room, Work: work, Clone: p.Way == WayClone, Free: f.free(p.Target),
		})
		if err != nil || found >= p.Room {
			return p, err
		}
		f.lower(p.Target, found)
	}
}

// inSR gives err the words of OUT_OF_SPACE ["SR name (uuid)"] when it says that
// the SR called where is full; an error with another code stays as it is.
func inSR(where string, err error) error {
	var known *xapi.Error
	if where == "" || !sr.NoSpace(err) || errors.As(err, &known) && known.Code != xapi.OutOfSpace {
		return err
	}
	return xapi.NewError(xapi.OutOfSpace, where).Because(err)
}

// facts looks at the SRs plugged here. Where the one that holds the patch clones
// the others are not asked: one of them may not answer for a while.
func (e *execution) facts(j pool.Assignment) (map[xapi.Ref]sr.Repository, Facts, error) {
	attached, err := e.agent.Storage.AttachedSRs()
	if err != nil {
		return nil, Facts{}, err
	}
	f := Facts{Assignment: j}
	if j.VDI != nil {
		if f.Replicas, err = e.agent.Storage.Replicas(j.VDI.Map); err != nil {
			return nil, Facts{}, err
		}
	}
	golden := func(s pool.AttachedSR) bool { return j.VDI != nil && s.Ref == j.VDI.SR }
	holds := func(s pool.AttachedSR) bool {
		return golden(s) || slices.ContainsFunc(f.Replicas, func(r pool.Replica) bool { return r.VDI.SR == s.Ref })
	}
	slices.SortStableFunc(attached, func(a, b pool.AttachedSR) int { return rank(golden(b), holds(b)) - rank(golden(a), holds(a)) })
	repos := map[xapi.Ref]sr.Repository{}
	var silent error // of an SR that holds the patch
	for _, s := range attached {
		st, err := s.Repository.Stat(e.ctx)
		if err != nil {
			if holds(s) {
				silent = errors.Join(silent, err)
			}
			e.agent.Log.WithError(err).WithField("SR", s.UUID).Warn("an SR does not answer and is not used")
			continue
		}
		fact := SRFact{
			Ref: s.Ref, Name: fmt.Sprintf("%s (%s)", s.NameLabel, s.UUID), Shared: s.Shared,
			Free: st.Free, Clones: sr.Has(s.Repository.Features(), sr.VDIClone),
		}
		repos[s.Ref] = s.Repository
		f.SRs = append(f.SRs, fact)
		if golden(s) && fact.Clones {
			break
		}
	}
	if silent != nil && j.Patch.Filename == "" && j.VDI.Map == "" {
		return nil, Facts{}, silent // there is no other way to the patch
	}
	return repos, f, nil
}

// rank orders SRs by what they hold.
func rank(golden, holds bool) int {
	switch {
	case golden:
		return 2
	case holds:
		return 1
	}
	return 0
}

// prepare makes the private image and says what the runner shall do with it.
func (e *execution) prepare(entry Entry, repos map[xapi.Ref]sr.Repository) (Run, error) {
	a, p := e.agent, entry.Assignment.Patch
	run := Run{
		Kind: entry.Assignment.Job.Kind, Job: e.id, PatchRef: entry.Assignment.PatchRef, Patch: p.UUID,
		Host: a.SelfUUID, Check: true, Digest: p.Digest, KeysDir: a.KeysDir, Pinned: a.Pinned, Attested: a.Attested,
		Signature: patch.Signature{Kind: patch.SignatureKind(p.SignatureKind), Packet: p.Signature, Signer: p.Signer},
		PatchDir:  a.PatchDir, Timeouts: a.Timeouts,
	}
	dst := repos[entry.Plan.Target]
	var err error
	switch entry.Plan.Way {
	case WayClone:
		run.VDIRef = entry.Plan.ImageRef
		if run.Check, err = e.clone(dst, entry); err == nil && run.Check {
			_, err = e.openMap(dst, entry, &run)
		}
	case WayCopy:
		run.VDIRef = entry.Plan.ImageRef
		err = e.copy(dst, repos[entry.Plan.Source], entry, &run)
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
	golden := sr.Live(entry.Plan.Image)
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
	if entry.Assignment.VDI.Damage != "" { // a disk that loses bytes changes no time of a file
		return true, nil
	}
	if !e.agent.checks.passed(before, p.Digest) {
		if before.settled(e.agent.Now()) {
			e.agent.checks.await(e.id, before, p.Digest)
		}
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
	log, err := os.OpenFile(a.journal.path(e.id, fileLog), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
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
	ended := make(chan error, 1)
	wait, stopWait := context.WithCancel(context.WithoutCancel(e.stop))
	defer stopWait()
	go func() { ended <- e.waitRunner(wait) }()
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	cancelled := e.ctx.Done()
	var killing sync.WaitGroup
	defer killing.Wait()
	for {
		select {
		case <-ended:
			e.conclude(func() error { return e.settle(entry) })
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

// waitRunner waits until the runner is gone; only the end of ctx is an error.
func (e *execution) waitRunner(ctx context.Context) error {
	for {
		err := e.agent.Dom0.WaitEmpty(ctx, runnerGroup(e.id))
		if err == nil || ctx.Err() != nil {
			return err
		}
		e.agent.Log.WithError(err).WithField("job", e.id).Error("the runner cannot be watched; it is tried again")
		if !pause(ctx, firstRetry) {
			return context.Cause(ctx)
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

package pool

import (
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// What a run does next is a pure function of its records and of what is known of
// its hosts: see Run.next. Doing it is in run_drive.go.

// hostFacts are what next must know of a host beside its RunHost.
type hostFacts struct {
	Gone  bool      // the host has left the pool
	Away  time.Time // since when it is away, as stored; zero: it is not
	Limbo bool      // it is not connected, and nobody has said yet that it is away
	Has   bool      // it has the patch
	Job   *Job      // of RunHost.Job; nil: there is none any more
}

// stepKind is what a runStep does.
type stepKind string

const (
	stepSet      stepKind = "set"      // write the host's new state
	stepStart    stepKind = "start"    // give the host a job, by the new state: precheck or apply
	stepCancel   stepKind = "cancel"   // ask the host to end its job
	stepWithdraw stepKind = "withdraw" // end a job that the host has not claimed
	stepState    stepKind = "state"    // put the run into a state
)

// runStep is one thing to be done for a run.
type runStep struct {
	kind  stepKind
	host  int     // index; not of stepState
	to    RunHost // of stepSet and stepStart
	state RunState
	why   string
}

// limboLook is how soon a host that is not connected is looked at again: either it
// comes back or its record says that it is away, and of the first there is no event.
const limboLook = 5 * time.Second

// minPrechecks is how many hosts run the precheck at once, or Policy.AtOnce when
// that is more.
const minPrechecks = 16

// next says what is to be done now; wake is when to ask again although nothing has
// changed, zero: never. First what has ended is written down; only when there is no
// such thing, and no state to change, is something begun.
func (r Run) next(hosts []RunHost, facts func(i int) hostFacts, now time.Time) (steps []runStep, wake time.Time) {
	for i := range hosts {
		if hosts[i].State.atWork() {
			h := r.bounded(hosts[i])
			steps = append(steps, r.follow(i, h, facts(i), now)...)
			wake = sooner(wake, later(h.Deadline, now))
		}
	}
	if len(steps) > 0 {
		return steps, wake
	}
	n := countOf(hosts)
	switch r.State {
	case RunStopping, RunCancelling:
		if n.working == 0 {
			return []runStep{r.ending(n)}, wake
		}
		return nil, wake
	case RunRunning:
	case RunPaused:
		if n.final == len(hosts) {
			return []runStep{{kind: stepState, state: RunDone}}, wake
		}
	default:
		return nil, wake
	}
	if why, yes := r.tooMany(hosts); yes {
		return []runStep{{kind: stepState, state: RunStopping, why: why}}, wake
	}
	if r.State == RunPaused {
		return nil, wake
	}
	if n.final == len(hosts) {
		return []runStep{{kind: stepState, state: RunDone}}, wake
	}
	begun, soon := r.begin(hosts, n, facts, now)
	return begun, sooner(wake, soon)
}

// ending is how a run ends of which nothing is at work any more.
func (r Run) ending(n runCount) runStep {
	switch {
	case r.State == RunStopping:
		return runStep{kind: stepState, state: RunStopped, why: r.Reason}
	case n.final == n.all && n.cancelled == 0:
		return runStep{kind: stepState, state: RunDone}
	}
	return runStep{kind: stepState, state: RunCancelled, why: r.Reason}
}

// runCount are the hosts of a run by what matters to next.
type runCount struct {
	all, final, working, cancelled int
	prechecking, applying          int
}

func countOf(hosts []RunHost) (n runCount) {
	n.all = len(hosts)
	for i := range hosts {
		switch s := hosts[i].State; {
		case s == HostPrechecking:
			n.prechecking++
		case s == HostApplying:
			n.applying++
		case s == HostCancelled:
			n.cancelled++
			n.final++
		case s.Final():
			n.final++
		}
	}
	n.working = n.prechecking + n.applying
	return n
}

// bounded gives a host that is at work the deadline that a cancel of its run sets.
func (r Run) bounded(h RunHost) RunHost {
	if r.State == RunCancelling && (h.Deadline.IsZero() || r.Since.Before(h.Deadline)) {
		h.Deadline = r.Since
	}
	return h
}

// follow says what becomes of a host that has a job.
func (r Run) follow(i int, h RunHost, f hostFacts, now time.Time) []runStep {
	set := func(to RunHost) []runStep { return []runStep{{kind: stepSet, host: i, to: to}} }
	switch {
	case f.Job == nil && f.Has:
		return set(h.in(HostApplied, now, "the record of its job is gone, and the host has the patch"))
	case f.Job == nil && h.State == HostPrechecking:
		return set(h.in(HostWaiting, now, "the record of its precheck is gone"))
	case f.Job == nil && f.Gone:
		return set(h.in(HostSkipped, now, "the host left the pool"))
	case f.Job == nil:
		return set(h.in(HostUnknown, now, "the record of its job is gone"))
	case f.Job.State == JobDone:
		return set(r.outcome(h, *f.Job, now))
	}
	claimed := f.Job.State != JobQueued
	late := !h.Deadline.IsZero() && !now.Before(h.Deadline)
	switch {
	case late && now.Before(h.Deadline.Add(cancelWait)) && (f.Job.Cancel || claimed):
		if f.Job.Cancel {
			return nil
		}
		return []runStep{{kind: stepCancel, host: i}}
	case late && claimed && h.State == HostApplying:
		return set(h.because(HostUnknown, now, xapi.NewError(xapi.Timeout, "the host does not tell how the apply ended"+awayText(f))))
	case late && claimed:
		return set(h.because(HostFailed, now, xapi.NewError(xapi.Timeout, "the host does not end its precheck"+awayText(f))))
	case late, !claimed && r.State == RunCancelling, !claimed && !f.Away.IsZero() && r.waitedFor(h, f, now):
		return []runStep{{kind: stepWithdraw, host: i, why: withdrawn(late, r, f)}}
	case r.State == RunCancelling && !f.Job.Cancel:
		return []runStep{{kind: stepCancel, host: i}}
	}
	return nil
}

// waitedFor tells whether a host that went away with a job it has not claimed was
// waited for long enough.
func (r Run) waitedFor(h RunHost, f hostFacts, now time.Time) bool {
	since := h.Since
	if f.Away.After(since) {
		since = f.Away
	}
	return now.Sub(since) >= seconds(r.Policy.WaitAway)
}

func withdrawn(late bool, r Run, f hostFacts) string {
	switch {
	case r.State == RunCancelling:
		return "the run was cancelled"
	case late:
		return "the host did not begin in time" + awayText(f)
	}
	return awayReason(f)
}

// outcome is how a job that has ended leaves its host.
func (r Run) outcome(h RunHost, job Job, now time.Time) RunHost {
	err := job.Err()
	switch {
	case err == nil && h.State == HostPrechecking:
		return h.in(HostReady, now, "its precheck has agreed; it waits for its turn")
	case err == nil:
		h = h.in(HostApplied, now, "")
		h.Error, h.Proof = nil, job.Proof
		return h
	case job.Withdrawn && r.State == RunCancelling, r.State == RunCancelling && xapi.Is(err, xapi.TaskCancelled):
		return h.because(HostCancelled, now, err)
	case job.Withdrawn:
		return h.because(HostAway, now, err)
	case job.Unknown:
		return h.because(HostUnknown, now, err)
	case xapi.Is(err, xapi.PatchAlreadyApplied):
		return h.in(HostHad, now, "it has the patch")
	case !h.Deadline.IsZero() && !now.Before(h.Deadline) && xapi.Is(err, xapi.TaskCancelled):
		return h.because(HostFailed, now, xapi.NewError(xapi.Timeout, fmt.Sprintf("the host took longer than %s", seconds(r.Policy.HostDeadline))))
	}
	h = h.because(HostFailed, now, err)
	if job.Kind == JobPrecheck {
		h.Reason = "the precheck of all hosts: " + h.Reason
	}
	return h
}

// begin says which hosts get a job now.
func (r Run) begin(hosts []RunHost, n runCount, facts func(i int) hostFacts, now time.Time) (steps []runStep, wake time.Time) {
	b := beginning{run: r, now: now}
	if !r.Policy.NoPrecheck {
		b.slots, b.state = max(minPrechecks, r.Policy.AtOnce)-n.prechecking, HostPrechecking
		b.settled = true
		for i := range hosts {
			if s := hosts[i].State; s == HostPrechecking || s == HostWaiting && !hosts[i].passedBy() {
				b.host(i, hosts[i], facts)
				b.settled = b.settled && s != HostPrechecking && b.absent
			}
		}
		if !b.settled || len(b.steps) > 0 {
			return b.steps, b.wake
		}
	}
	b.slots, b.state = r.Policy.AtOnce-n.applying, HostApplying
	wave := currentWave(hosts)
	for i := range hosts {
		if hosts[i].Wave == wave {
			b.host(i, hosts[i], facts)
		}
	}
	return b.steps, b.wake
}

// passedBy tells whether the precheck of all hosts no longer waits for the host.
func (h RunHost) passedBy() bool { return !h.Deadline.IsZero() }

// currentWave is the first wave with a host that has not come to its end.
func currentWave(hosts []RunHost) int {
	wave := -1
	for i := range hosts {
		if !hosts[i].State.Final() && (wave < 0 || hosts[i].Wave < wave) {
			wave = hosts[i].Wave
		}
	}
	return wave
}

// beginning collects what begin does.
type beginning struct {
	run     Run
	now     time.Time
	state   HostState // which job: HostPrechecking or HostApplying
	slots   int
	steps   []runStep
	wake    time.Time
	settled bool
	absent  bool // the last host is not there
}

// host begins the job of one host where there is room and the host is there.
func (b *beginning) host(i int, h RunHost, facts func(i int) hostFacts) {
	b.absent = false
	if h.State.Final() || h.State.atWork() || b.slots <= 0 {
		return
	}
	f := facts(i)
	set := func(to RunHost) { b.steps = append(b.steps, runStep{kind: stepSet, host: i, to: to}) }
	switch {
	case f.Gone:
		set(h.in(HostSkipped, b.now, "the host left the pool"))
	case f.Has:
		set(h.in(HostHad, b.now, "it has the patch"))
	case !f.Away.IsZero():
		b.absent = true
		b.away(h, f, set)
	case f.Limbo:
		b.wake = sooner(b.wake, b.now.Add(limboLook))
	default:
		b.slots--
		to := h.in(b.state, b.now, "")
		if d := b.run.Policy.HostDeadline; d > 0 {
			to.Deadline = b.now.Add(seconds(d))
		}
		if b.state == HostApplying {
			to.Attempts++
		}
		b.steps = append(b.steps, runStep{kind: stepStart, host: i, to: to})
	}
}

// away passes a host over that is away, at once or when it was waited for long
// enough. A pool_apply fails there, as it would on a host that refuses.
func (b *beginning) away(h RunHost, f hostFacts, set func(RunHost)) {
	wait := seconds(b.run.Policy.WaitAway)
	switch {
	case b.run.Classic:
		set(h.because(HostFailed, b.now, xapi.NewError(xapi.HostOffline, string(h.Host))))
	case wait == 0, h.passedBy() && !b.now.Before(h.Deadline):
		to := h.in(HostAway, b.now, awayReason(f))
		to.Error = []string{xapi.HostOffline, string(h.Host)}
		set(to)
	case !h.passedBy():
		to := h.in(HostWaiting, b.now, awayReason(f)+"; it is waited for")
		to.Deadline = b.now.Add(wait)
		set(to)
	default:
		b.wake = sooner(b.wake, h.Deadline)
	}
}

func awayReason(f hostFacts) string {
	return "away, not heard of since " + f.Away.UTC().Format("2006-01-02 15:04:05Z")
}

func awayText(f hostFacts) string {
	if f.Away.IsZero() {
		return ""
	}
	return ": it is " + awayReason(f)
}

// sooner is the earlier of two moments; zero is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// later is when a deadline matters next: itself, then the end of the time that a
// cancel may take.
func later(deadline, now time.Time) time.Time {
	if deadline.IsZero() || now.Before(deadline) {
		return deadline
	}
	return deadline.Add(cancelWait)
}

package pool

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/patchd/patchd/pkg/xapi"
)

// model plays the database and the hosts for Run.next.
type model struct {
	run   Run
	hosts []RunHost
	jobs  map[int]*Job
	away  []time.Time
	now   time.Time
	began []int // applies of each host
}

func newModel(pol Policy, n int) *model {
	m := &model{jobs: map[int]*Job{}, away: make([]time.Time, n), began: make([]int, n), now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	var refs []xapi.Ref
	for i := range n {
		refs = append(refs, xapi.Ref(fmt.Sprintf("OpaqueRef:%d", i)))
	}
	m.run = Run{Policy: pol, State: RunRunning, Begun: m.now, Since: m.now, Total: n}
	names, waves := pol.arrange(refs, refs[0])
	m.run.Waves = names
	for w, wave := range waves {
		for _, ref := range wave {
			m.hosts = append(m.hosts, RunHost{Host: ref, Wave: w, State: HostWaiting, Since: m.now})
		}
	}
	return m
}

func (m *model) facts(i int) hostFacts { return hostFacts{Away: m.away[i], Job: m.jobs[i]} }

// turn does what next says and tells what was begun.
func (m *model) turn() (begun []int, wake time.Time, any bool) {
	steps, wake := m.run.next(m.hosts, m.facts, m.now)
	for _, s := range steps {
		switch s.kind {
		case stepSet:
			m.hosts[s.host] = s.to
		case stepStart:
			m.hosts[s.host] = s.to
			kind := JobPrecheck
			if s.to.State == HostApplying {
				kind = JobApply
				m.began[s.host]++
			}
			m.jobs[s.host] = &Job{Kind: kind, State: JobQueued}
			begun = append(begun, s.host)
		case stepCancel:
			m.jobs[s.host].Cancel = true
		case stepWithdraw:
			j := m.jobs[s.host]
			j.State, j.Withdrawn, j.Error = JobDone, true, []string{xapi.HostOffline}
		case stepState:
			m.run.State, m.run.Since, m.run.Reason = s.state, m.now, s.why
		}
	}
	return begun, wake, len(steps) > 0
}

// Whatever hosts and admins do, a run keeps its policy and comes to an end.
func TestNextKeepsThePolicy(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 12).Draw(t, "hosts")
		pol, err := Policy{
			AtOnce: rapid.IntRange(1, 4).Draw(t, "at once"), Canary: rapid.IntRange(0, 3).Draw(t, "canary"),
			Waves:       rapid.SliceOfN(rapid.SampledFrom([]string{"1", "3", "10%", "50%", "100%"}), 0, 3).Draw(t, "waves"),
			Coordinator: rapid.SampledFrom([]string{CoordinatorFirst, CoordinatorLast, CoordinatorAny}).Draw(t, "coordinator"),
			StopAfter:   rapid.IntRange(0, 3).Draw(t, "stop after"), StopPercent: rapid.IntRange(0, 60).Draw(t, "percent"),
			NoPrecheck: rapid.Bool().Draw(t, "no precheck"), WaitAway: rapid.SampledFrom([]int64{0, 100}).Draw(t, "wait"), HostDeadline: 1000,
		}.Check()
		if err != nil {
			t.Fatal(err)
		}
		m := newModel(pol, n)
		if len(m.hosts) != n {
			t.Fatalf("%d hosts in waves, of %d", len(m.hosts), n)
		}
		for step := 0; !m.run.State.Ended(); step++ {
			state := m.run.State
			begun, wake, any := m.turn()
			check(t, m, state, begun)
			if !any {
				act(t, m, wake, step)
			}
			if step > 2000 {
				t.Fatalf("it does not end: %+v %+v", m.run, m.hosts)
			}
		}
		for i, h := range m.hosts {
			if shown, _ := h.Shown(m.run); !shown.Final() || m.began[i] > 1 || h.State.atWork() {
				t.Errorf("host %d ends as %s after %d applies", i, h.State, m.began[i])
			}
		}
		if m.run.State == RunDone && countOf(m.hosts).final != n {
			t.Errorf("a run that is done has left hosts: %+v", m.hosts)
		}
	})
}

func check(t *rapid.T, m *model, state RunState, begun []int) {
	if len(begun) > 0 && state != RunRunning {
		t.Fatalf("hosts %v were begun by a run that was %s", begun, state)
	}
	at := countOf(m.hosts)
	if at.applying > m.run.Policy.AtOnce {
		t.Fatalf("%d apply at once", at.applying)
	}
	if at.prechecking > max(minPrechecks, m.run.Policy.AtOnce) {
		t.Fatalf("%d precheck at once", at.prechecking)
	}
	for _, i := range begun {
		if m.hosts[i].State != HostApplying {
			continue
		}
		for j, h := range m.hosts {
			if h.Wave < m.hosts[i].Wave && !h.State.Final() {
				t.Fatalf("host %d of wave %d was begun before host %d of wave %d had ended", i, m.hosts[i].Wave, j, h.Wave)
			}
			if !m.run.Policy.NoPrecheck && h.State == HostPrechecking {
				t.Fatalf("host %d was touched while host %d was prechecking", i, j)
			}
		}
	}
	if _, many := m.run.tooMany(m.hosts); many && len(begun) > 0 {
		t.Fatalf("hosts %v were begun after too many had failed", begun)
	}
}

// act lets something happen.
func act(t *rapid.T, m *model, wake time.Time, step int) {
	i := rapid.IntRange(0, len(m.hosts)-1).Draw(t, "host")
	j := m.jobs[i]
	open := j != nil && j.State != JobDone && m.hosts[i].State.atWork()
	what := rapid.IntRange(0, 11).Draw(t, "what")
	if step > 500 {
		what = 11 // nothing more, but time
	}
	switch {
	case what < 6 && open && m.away[i].IsZero():
		if j.State == JobQueued {
			j.State = JobClaimed
			return
		}
		j.State = JobDone
		switch rapid.IntRange(0, 5).Draw(t, "outcome") {
		case 0:
			j.Error = []string{xapi.PatchApplyFailed}
		case 1:
			j.Error, j.Unknown = []string{xapi.PatchApplyFailed}, j.Kind == JobApply
		default:
			if j.Cancel {
				j.Error = []string{xapi.TaskCancelled}
			}
		}
	case what == 6:
		m.away[i] = m.now
	case what == 7:
		m.away[i] = time.Time{}
	case what == 8 && m.run.State == RunRunning:
		m.run.State, m.run.Since = RunPaused, m.now
	case what == 9 && m.run.State == RunPaused:
		m.run.State, m.run.Since = RunRunning, m.now
	case what == 10 && !m.run.State.Ended() && rapid.IntRange(0, 9).Draw(t, "cancel") == 0:
		m.run.State, m.run.Since = RunCancelling, m.now
	default:
		if m.run.State == RunPaused && step > 500 {
			m.run.State, m.run.Since = RunRunning, m.now
		}
		m.now = m.now.Add(time.Second)
		if !wake.IsZero() && wake.After(m.now) {
			m.now = wake
		}
	}
}

func TestNextFollowsAHost(t *testing.T) {
	t.Parallel()
	t0 := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	applying := RunHost{State: HostApplying, Since: t0, Deadline: t0.Add(time.Hour)}
	failed := []string{xapi.PatchApplyFailed, "x"}
	for name, c := range map[string]struct {
		run  RunState
		host RunHost
		f    hostFacts
		at   time.Duration
		kind stepKind // "": nothing
		to   HostState
	}{
		"it goes on":                     {RunRunning, applying, hostFacts{Job: &Job{State: JobClaimed}}, time.Minute, "", ""},
		"it has worked":                  {RunRunning, applying, hostFacts{Job: &Job{State: JobDone}}, time.Minute, stepSet, HostApplied},
		"it has failed":                  {RunRunning, applying, hostFacts{Job: &Job{State: JobDone, Error: failed}}, time.Minute, stepSet, HostFailed},
		"its end is unknown":             {RunRunning, applying, hostFacts{Job: &Job{State: JobDone, Error: failed, Unknown: true}}, time.Minute, stepSet, HostUnknown},
		"it is late":                     {RunRunning, applying, hostFacts{Job: &Job{State: JobClaimed}}, time.Hour, stepCancel, ""},
		"late, and cancelled":            {RunRunning, applying, hostFacts{Job: &Job{State: JobClaimed, Cancel: true}}, time.Hour, "", ""},
		"late, and does not end":         {RunRunning, applying, hostFacts{Job: &Job{State: JobClaimed, Cancel: true}}, time.Hour + cancelWait, stepSet, HostUnknown},
		"late, and never taken":          {RunRunning, applying, hostFacts{Job: &Job{State: JobQueued}}, time.Hour, stepWithdraw, ""},
		"late, and ended by that":        {RunRunning, applying, hostFacts{Job: &Job{State: JobDone, Error: []string{xapi.TaskCancelled}}}, time.Hour + time.Second, stepSet, HostFailed},
		"away before it took the job":    {RunRunning, applying, hostFacts{Away: t0.Add(time.Second), Job: &Job{State: JobQueued}}, time.Minute, stepWithdraw, ""},
		"away while it works":            {RunRunning, applying, hostFacts{Away: t0.Add(time.Second), Job: &Job{State: JobClaimed}}, time.Minute, "", ""},
		"withdrawn":                      {RunRunning, applying, hostFacts{Job: &Job{State: JobDone, Withdrawn: true, Error: failed}}, time.Minute, stepSet, HostAway},
		"cancelled by the run":           {RunCancelling, applying, hostFacts{Job: &Job{State: JobClaimed}}, time.Minute, stepCancel, ""},
		"cancelled, and ended":           {RunCancelling, applying, hostFacts{Job: &Job{State: JobDone, Error: []string{xapi.TaskCancelled}}}, time.Minute, stepSet, HostCancelled},
		"cancelled, and worked":          {RunCancelling, applying, hostFacts{Job: &Job{State: JobDone}}, time.Minute, stepSet, HostApplied},
		"the job is gone, it has it":     {RunRunning, applying, hostFacts{Has: true}, time.Minute, stepSet, HostApplied},
		"the job is gone, it has it not": {RunRunning, applying, hostFacts{}, time.Minute, stepSet, HostUnknown},
		"the host left the pool":         {RunRunning, applying, hostFacts{Gone: true}, time.Minute, stepSet, HostSkipped},
	} {
		run := Run{State: c.run, Since: t0.Add(time.Minute), Policy: Policy{AtOnce: 1, StopAfter: 1}}
		steps, _ := run.next([]RunHost{c.host}, func(int) hostFacts { return c.f }, t0.Add(c.at))
		switch {
		case c.kind == "" && len(steps) == 0:
		case len(steps) != 1 || steps[0].kind != c.kind || steps[0].to.State != c.to:
			t.Errorf("%s: %+v", name, steps)
		}
	}
}

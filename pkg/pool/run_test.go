package pool

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

var applyFailed = Outcome{Err: xapi.NewError(xapi.PatchApplyFailed, "the disk is full"), Output: "oops"}

func TestRunStopsAtTheSecondHostAndRetryFinishes(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 5)
	h.failing(1, JobApply, applyFailed)
	id := h.begin(Policy{})
	run, hosts := h.ended(id, RunStopped)
	h.want(run, hosts, HostApplied, HostFailed, HostSkipped, HostSkipped, HostSkipped)
	if got := h.began(); !slices.Equal(got, []int{0, 1}) {
		t.Errorf("applies were begun on %v", got)
	}
	for i, rh := range hosts[2:] {
		if rh.State != HostReady || rh.Attempts != 0 {
			t.Errorf("host %d was touched: %+v", i+2, rh)
		}
	}
	if !strings.Contains(run.Reason, "1 host failed") || !strings.Contains(hosts[1].Reason, "the disk is full") || hosts[0].Proof == nil {
		t.Errorf("%q, %+v", run.Reason, hosts)
	}
	lines, err := h.Why(t.Context(), h.hosts[3], h.patch)
	h.must(err)
	why := strings.Join(lines, "\n")
	for _, want := range []string{"host host4 (", ") lacks patch p", "not touched: the run stopped", "the run is stopped", "host host2 (", ") failed there: ", "the disk is full"} {
		if !strings.Contains(why, want) {
			t.Errorf("%q is not in:\n%s", want, why)
		}
	}
	if strings.Contains(why, "OpaqueRef") {
		t.Errorf("a ref for people:\n%s", why)
	}
	h.mended(1)
	h.must(h.RunRetry(t.Context(), id, nil))
	run, hosts = h.ended(id, RunDone)
	h.want(run, hosts, HostApplied, HostApplied, HostApplied, HostApplied, HostApplied)
	if got := h.began(); !slices.Equal(got, []int{0, 1, 1, 2, 3, 4}) {
		t.Errorf("applies were begun on %v", got)
	}
	if !get[Patch](h.rig, ClassPatch, h.patch).PoolApplied {
		t.Error("every host has it, and pool_applied is false")
	}
	h.wantCode("retry of what is done", h.RunRetry(t.Context(), id, nil), xapi.OperationNotAllowed)
	h.wantCode("a run that is none", h.RunRetry(t.Context(), "x", nil), xapi.UUIDInvalid)
}

func TestRunPrechecksAllHostsFirst(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 4)
	h.failing(3, JobPrecheck, Outcome{Err: xapi.NewError(xapi.PrecheckFailedVMRunning, string(h.patch))})
	run, hosts := h.ended(h.begin(Policy{AtOnce: 4}), RunStopped)
	h.want(run, hosts, HostSkipped, HostSkipped, HostSkipped, HostFailed)
	if len(h.began()) != 0 {
		t.Errorf("hosts were touched: %v", h.began())
	}
	lines, err := h.Why(t.Context(), h.hosts[3], h.patch)
	h.must(err)
	if why := strings.Join(lines, "\n"); !strings.Contains(why, "virtual machines are running (PATCH_PRECHECK_FAILED_VM_RUNNING)") {
		t.Error(why)
	}
	run, hosts = h.ended(h.begin(Policy{AtOnce: 4, NoPrecheck: true, StopAfter: 4}), RunDone)
	h.want(run, hosts, HostApplied, HostApplied, HostApplied, HostApplied)
}

func TestRunOrder(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		pol   Policy
		waves []int // the hosts in each, begun in any order within
		names []string
	}{
		"the coordinator first":      {Policy{AtOnce: 9}, []int{1, 7}, []string{"coordinator", "all others"}},
		"the coordinator last":       {Policy{AtOnce: 9, Coordinator: CoordinatorLast}, []int{7, 1}, []string{"all others", "coordinator"}},
		"canary, coordinator, waves": {Policy{AtOnce: 9, Canary: 2, Waves: []string{"25%", "1"}}, []int{2, 1, 2, 1, 2}, []string{"canary", "coordinator", "wave 1", "wave 2", "wave 3"}},
		"no difference":              {Policy{AtOnce: 9, Coordinator: CoordinatorAny}, []int{8}, []string{"all"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHerd(t, 8)
			id := h.begin(c.pol)
			run, hosts := h.ended(id, RunDone)
			if !slices.Equal(run.Waves, c.names) {
				t.Errorf("waves %v", run.Waves)
			}
			at := map[xapi.Ref]int{}
			sizes := make([]int, len(run.Waves))
			for _, rh := range hosts {
				at[rh.Host] = rh.Wave
				sizes[rh.Wave]++
			}
			if !slices.Equal(sizes, c.waves) {
				t.Errorf("waves of %v, want %v", sizes, c.waves)
			}
			last := 0
			for _, i := range h.began() {
				if at[h.hosts[i]] < last {
					t.Errorf("host %d of wave %d came after wave %d", i, at[h.hosts[i]], last)
				}
				last = at[h.hosts[i]]
			}
			if run.Waves[at[h.hosts[0]]] != "coordinator" && c.pol.Coordinator != CoordinatorAny {
				t.Errorf("the coordinator is in %s", run.Waves[at[h.hosts[0]]])
			}
		})
	}
}

func TestRunThresholds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		pol    Policy
		fails  []int
		want   RunState
		begins int
	}{
		"two may not fail":              {Policy{StopAfter: 2}, []int{1, 3}, RunStopped, 4},
		"one of two may fail":           {Policy{StopAfter: 2}, []int{1}, RunDone, 6},
		"less than half":                {Policy{StopPercent: 50}, []int{1, 2}, RunDone, 6},
		"half":                          {Policy{StopPercent: 50}, []int{1, 2, 3}, RunStopped, 4},
		"one of the canary stops":       {Policy{StopAfter: 5, Canary: 2}, []int{2}, RunStopped, 2},
		"the canary applies on its own": {Policy{Canary: 1, AtOnce: 6}, []int{1}, RunStopped, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHerd(t, 6)
			for _, i := range c.fails {
				h.failing(i, JobApply, applyFailed)
			}
			run, hosts := h.ended(h.begin(c.pol), c.want)
			if got := h.began(); len(got) != c.begins {
				t.Errorf("%d applies, want %d: %v %s", len(got), c.begins, h.states(run, hosts), run.Reason)
			}
		})
	}
}

func TestRunPauseResumeCancel(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 4)
	ctx := t.Context()
	letGo := h.hold(0)
	id := h.begin(Policy{})
	h.until(id, "the first host at work", func(_ Run, hosts []RunHost) bool { return hosts[0].State == HostApplying })
	_, err := h.RunStart(ctx, h.patch, Policy{Hosts: h.hosts[2:3]})
	h.wantCode("a second run", err, xapi.OtherOperationInProgress)
	if !strings.Contains(fmt.Sprint(err), string(id)) {
		t.Errorf("the refusal does not name the run: %v", err)
	}
	h.wantCode("pool_apply", h.PatchPoolApply(ctx, h.patch), xapi.OtherOperationInProgress)
	h.wantCode("destroy", h.PatchDestroy(ctx, h.patch), xapi.PatchIsApplied)
	h.must(h.RunPause(ctx, id, "root"))
	letGo()
	run, hosts := h.until(id, "the first host done", func(_ Run, hosts []RunHost) bool { return hosts[0].State == HostApplied })
	if run.State != RunPaused || hosts[1].State != HostReady {
		t.Errorf("%+v %+v", run, hosts)
	}
	lines, err := h.Why(ctx, h.hosts[1], h.patch)
	h.must(err)
	if why := strings.Join(lines, "\n"); !strings.Contains(why, "paused by root") {
		t.Error(why)
	}
	if got := h.began(); len(got) != 1 {
		t.Errorf("a paused run began %v", got)
	}
	h.wantCode("retry of an open run", h.RunRetry(ctx, id, nil), xapi.OperationNotAllowed)
	h.hold(1)
	h.must(h.RunResume(ctx, id))
	h.until(id, "the second host at work", func(_ Run, hosts []RunHost) bool { return hosts[1].State == HostApplying })
	h.must(h.RunCancel(ctx, id, "root"))
	run, hosts = h.ended(id, RunCancelled)
	h.want(run, hosts, HostApplied, HostCancelled, HostCancelled, HostCancelled)
	for what, err := range map[string]error{
		"pause": h.RunPause(ctx, id, ""), "resume": h.RunResume(ctx, id), "cancel": h.RunCancel(ctx, id, ""),
	} {
		h.wantCode(what+" of what has ended", err, xapi.OperationNotAllowed)
	}
	h.must(h.RunRetry(ctx, id, h.hosts[2:3]))
	run, hosts = h.ended(id, RunDone)
	if got := h.states(run, hosts); got[2] != HostApplied {
		t.Errorf("%v", got)
	}
}

func TestRunSeesHostsThatAreAway(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 4)
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	h.away(2, since)
	run, hosts := h.ended(h.begin(Policy{}), RunDone)
	h.want(run, hosts, HostApplied, HostApplied, HostAway, HostApplied)
	for _, rh := range hosts {
		if rh.Host == h.hosts[2] && (!strings.Contains(rh.Reason, "away, not heard of since 2026-01-02 03:04:05Z") || rh.Job != "") {
			t.Errorf("%+v", rh)
		}
	}
	lines, err := h.Why(t.Context(), h.hosts[2], h.patch)
	h.must(err)
	if why := strings.Join(lines, "\n"); !strings.Contains(why, "host host3 (") || !strings.Contains(why, ") is away, not heard of since 2026-01-02 03:04:05Z") {
		t.Error(why)
	}
	id := h.begin(Policy{WaitAway: 3600})
	h.until(id, "it is waited for", func(_ Run, hosts []RunHost) bool {
		return slices.ContainsFunc(hosts, func(rh RunHost) bool { return rh.State == HostWaiting && strings.Contains(rh.Reason, "waited for") })
	})
	h.away(2, time.Time{})
	run, hosts = h.ended(id, RunDone)
	h.want(run, hosts, HostHad, HostHad, HostApplied, HostHad)

	h.away(3, since)
	all, err := h.Compliance(h.patch)
	h.must(err)
	if len(all) != 4 || all[2].Value != ComplianceYes || all[3].Value != ComplianceUnknown || !all[3].Since.Equal(since) {
		t.Errorf("%+v", all)
	}
}

// A host that goes away with a job it has not claimed does not hold the run.
func TestRunWithdrawsWhatAHostNeverTook(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 3)
	h.mu.Lock()
	h.gone[h.hosts[1]] = true // nobody knows yet
	h.mu.Unlock()
	id := h.begin(Policy{NoPrecheck: true})
	_, hosts := h.until(id, "the job of the second host", func(_ Run, hosts []RunHost) bool { return hosts[1].State == HostApplying })
	h.away(1, time.Now())
	run, hosts2 := h.ended(id, RunDone)
	h.want(run, hosts2, HostApplied, HostAway, HostApplied)
	_, err := h.JobClaim(t.Context(), hosts[1].Job)
	h.wantCode("a claim of a withdrawn job", err, xapi.OtherOperationInProgress)
	if _, hps := h.hostPatches(h.patch); len(hps) != 2 {
		t.Errorf("%+v", hps)
	}
	// The pool_apply of the XenAPI fails there.
	h.wantCode("pool_apply", h.PatchPoolApply(t.Context(), h.patch), xapi.HostOffline)
}

func TestRunBelievesProofOnly(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 3)
	lie := proofOf(h.Pool, h.patch)
	lie.Stamp = strings.Repeat("0", 64)
	h.failing(1, JobApply, Outcome{Output: "trust me", Proof: lie})
	id := h.begin(Policy{})
	run, hosts := h.ended(id, RunStopped)
	h.want(run, hosts, HostApplied, HostUnknown, HostSkipped)
	all, err := h.Compliance("")
	h.must(err)
	if all[1].Value != ComplianceUnknown || all[2].Value != ComplianceNo {
		t.Errorf("%+v", all)
	}
	h.mended(1)
	h.must(h.RunRetry(t.Context(), id, nil))
	run, hosts = h.ended(id, RunDone)
	h.want(run, hosts, HostApplied, HostUnknown, HostApplied) // not again without being named
	h.must(h.RunRetry(t.Context(), id, h.hosts[1:2]))
	run, hosts = h.ended(id, RunDone)
	h.want(run, hosts, HostApplied, HostApplied, HostApplied)
}

func TestRunPassesOverExemptHosts(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 3)
	ctx := t.Context()
	h.wantCode("no reason", h.HostExempt(ctx, h.hosts[1], h.patch, true, ""), xapi.ValueNotSupported)
	h.must(h.HostExempt(ctx, h.hosts[1], h.patch, true, "runs the lift"))
	run, hosts := h.ended(h.begin(Policy{}), RunDone)
	h.want(run, hosts, HostApplied, HostSkipped, HostApplied)
	all, err := h.Compliance(h.patch)
	h.must(err)
	if all[1].Value != ComplianceExempt || all[1].Note != "runs the lift" {
		t.Errorf("%+v", all)
	}
	h.must(h.HostExempt(ctx, h.hosts[1], h.patch, false, ""))
	h.must(h.PatchPoolApply(ctx, h.patch))
	if !get[Patch](h.rig, ClassPatch, h.patch).PoolApplied {
		t.Error("not applied to the pool")
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 5)
	rev := func() (n int64) {
		h.must(h.Store.View(func(v *store.View) error { n = v.Revision(); return nil }))
		return n
	}
	before := rev()
	info, hosts, err := h.RunPreview(h.patch, Policy{Canary: 1, DryRun: true})
	h.must(err)
	if len(hosts) != 5 || hosts[0].InWave != canaryWave || hosts[1].InWave != "coordinator" || hosts[1].Name != "host1" || len(info.Waves) != 3 {
		t.Errorf("%+v %+v", info, hosts)
	}
	_, err = h.RunStart(t.Context(), h.patch, Policy{DryRun: true})
	h.wantCode("start", err, xapi.ValueNotSupported)
	if after := rev(); after != before {
		t.Errorf("the database went from %d to %d", before, after)
	}
}

func TestRunChoosesHosts(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 4)
	ctx := t.Context()
	h.must(h.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, h.hosts[3])
		rec.Tags = []string{"blue"}
		tx.Put(ClassHost, h.hosts[3], rec)
		return err
	}))
	uuid := get[Host](h.rig, ClassHost, h.hosts[1]).UUID
	run, hosts := h.ended(h.begin(Policy{Hosts: []xapi.Ref{xapi.Ref(uuid)}, Tags: []string{"blue"}}), RunDone)
	h.want(run, hosts, "", HostApplied, "", HostApplied)
	for name, pol := range map[string]Policy{
		"a tag of nobody":           {Tags: []string{"green"}},
		"a canary outside":          {Tags: []string{"blue"}, CanaryHosts: h.hosts[:1]},
		"too many at once":          {AtOnce: 5000},
		"a canary twice":            {Canary: 1, CanaryHosts: h.hosts[:1]},
		"a wave of nothing":         {Waves: []string{"0"}},
		"a wave of words":           {Waves: []string{"ten"}},
		"more than all":             {Waves: []string{"101%"}},
		"no such place":             {Coordinator: "middle"},
		"a deadline before the run": {HostDeadline: -1},
		"more than all may fail":    {StopPercent: 101},
	} {
		_, err := h.RunStart(ctx, h.patch, pol)
		h.wantCode(name, err, xapi.ValueNotSupported)
	}
	_, err := h.RunStart(ctx, h.patch, Policy{Hosts: []xapi.Ref{"nobody"}})
	h.wantCode("no such host", err, xapi.HandleInvalid)
	_, err = h.RunStart(ctx, "OpaqueRef:none", Policy{})
	h.wantCode("no such patch", err, xapi.HandleInvalid)
	h.Confirmed = func(xapi.Ref) error { return xapi.NewError(xapi.OperationNotAllowed, "one copy only") }
	_, err = h.RunStart(ctx, h.patch, Policy{})
	h.wantCode("a patch that is not confirmed", err, xapi.OperationNotAllowed, "one copy only")
}

// Wherever a process stops, the next one finishes the run, and no host is asked twice.
func TestRunSurvivesACrashAtEveryStep(t *testing.T) {
	t.Parallel()
	for _, at := range []int64{0, 1, 2, 3, 4, 5, 7, 9, 11, 13, 15, 18, 21, 25, 30} {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			t.Parallel()
			h := newHerd(t, 4)
			pol, err := Policy{AtOnce: 2}.Check()
			h.must(err)
			ref, id, err := h.makeRun(t.Context(), Run{Patch: h.patch, Policy: pol})
			h.must(err)
			var began int64
			h.must(h.Store.View(func(v *store.View) error { began = v.Revision(); return nil }))
			for lives := 0; lives < 50; lives++ {
				ctx, kill := context.WithCancel(t.Context())
				go func() {
					_ = h.Store.Until(ctx, func(v *store.View) (bool, error) { return v.Revision() >= began+at, nil })
					kill()
				}()
				if lives > 0 && at > 0 || lives > 20 {
					ctx = t.Context() // this life is left alone
				}
				err = h.Pool.ContinueRun(ctx, ref)
				kill()
				if err == nil {
					break
				}
			}
			h.must(err)
			run, hosts := h.ended(id, RunDone)
			h.want(run, hosts, HostApplied, HostApplied, HostApplied, HostApplied)
			got := h.began()
			slices.Sort(got)
			if !slices.Equal(got, []int{0, 1, 2, 3}) || h.most > 2 {
				t.Errorf("applies on %v, %d at once", got, h.most)
			}
			h.stop()
		})
	}
}

// A run of more hosts than a transaction takes: it is written down in parts, and a
// crash among them leaves nothing.
func TestRunOfManyHosts(t *testing.T) {
	t.Parallel()
	h := newHerd(t, 230)
	run, hosts := h.ended(h.begin(Policy{AtOnce: 40}), RunDone)
	if run.Counts[HostApplied] != 230 || len(hosts) != 230 || h.most > 40 {
		t.Errorf("%v of %d, %d at once", run.Counts, len(hosts), h.most)
	}
	if !get[Patch](h.rig, ClassPatch, h.patch).PoolApplied {
		t.Error("every host has it, and pool_applied is false")
	}
	h.Now = func() time.Time { return time.Now().Add(runKeepTime + time.Hour) }
	_, half := h.golden(h.sr(h.memorySpec("mem2")), []byte("y"))
	ref, id := xapi.NewRef(), xapi.NewUUID()
	h.must(h.Store.Update(t.Context(), func(tx *store.Tx) error {
		tx.Put(ClassRun, ref, Run{UUID: id, Patch: half, State: RunPreparing})
		for _, host := range h.hosts[:90] {
			tx.Put(ClassRunHost, xapi.NewRef(), RunHost{Run: id, Host: host})
		}
		return nil
	}))
	h.wantCode("a run that was interrupted while it was made", h.ContinueRun(t.Context(), ref), xapi.OperationNotAllowed)
	if h.count(ClassRun) != 1 || h.count(ClassRunHost) != 230 {
		t.Errorf("%d runs, %d hosts of runs", h.count(ClassRun), h.count(ClassRunHost))
	}
	h.must(h.PatchPoolApply(t.Context(), half))
	h.must(h.CollectRuns(t.Context()))
	if h.count(ClassRun) != 1 || h.count(ClassRunHost) != 230 {
		t.Errorf("after a month: %d runs, %d hosts of runs", h.count(ClassRun), h.count(ClassRunHost))
	}
}

func TestPolicyWords(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		pol  Policy
		want []string
	}{
		"nothing said": {Policy{}, []string{
			"The run has every host of the pool.",
			"All hosts run the precheck before the first is touched, and each again right before its apply.",
			"The coordinator comes first, alone.", "One host applies at a time.",
			"The run stops at the first host that fails.", "A host may take 4h0m0s. A host that is away is passed over and told of.",
		}},
		"much said": {Policy{
			Tags: []string{"blue", "green"}, AtOnce: 5, Canary: 2, Waves: []string{"10%", "50%"}, Coordinator: CoordinatorLast,
			StopAfter: 3, StopPercent: 20, NoPrecheck: true, HostDeadline: 600, WaitAway: 60,
		}, []string{
			"The run has the hosts tagged blue or green.",
			"Each host runs the precheck right before its apply; there is none of all hosts first.",
			"2 hosts as canary come first; one failure there stops the run.",
			"The coordinator comes last, alone.",
			"The others come in waves of 10%, 50%, then the rest; a wave begins when the one before it has ended.",
			"At most 5 hosts apply at a time.", "The run stops when 3 hosts or 20% of the hosts have failed.",
			"A host may take 10m0s. A host that is away is waited for up to 1m0s.",
		}},
	} {
		pol, err := c.pol.Check()
		if err != nil {
			t.Error(err)
		}
		if got := pol.Words(); !slices.Equal(got, c.want) {
			t.Errorf("%s:\n%s", name, strings.Join(got, "\n"))
		}
	}
}

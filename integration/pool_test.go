package integration

import (
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// C1: three hosts, joined by tokens; a patch uploaded once is applied to all of
// them, by the XenAPI and by the command line. A host that is ejected keeps
// what it has, and brings it back when it joins again.
func TestC1_OnePatchThreeHosts(t *testing.T) {
	t.Parallel()
	p := lab.NewPool(t, 3, nil)
	p.JoinAll()
	first, third := p.Hosts[0], p.Hosts[2]
	s := first.Root()
	if n := len(s.All("host")); n != 3 {
		t.Fatalf("%d hosts", n)
	}

	byCall := p.Work(lab.Patch{Pad: 3 << 20, Label: "by the XenAPI"})
	s.Call("pool_patch.pool_apply", s.MustUpload(byCall.Patch))
	everywhere(t, s, byCall, p.Hosts...)

	byCommand := p.Work(lab.Patch{Pad: 3 << 20, Label: "by the command line"})
	s.MustUpload(byCommand.Patch)
	first.Must("patch", "pool-apply", string(byCommand.UUID))
	everywhere(t, s, byCommand, p.Hosts...)
	p.CheckTruth()

	p.Eject(first, third)
	var alone *lab.Session
	until(t, "the ejected host to be a pool of its own", func() bool {
		var err error
		alone, err = third.Login("root", lab.Password)
		return err == nil
	})
	for _, w := range []*lab.Work{byCall, byCommand} {
		if state := alone.State(w, third); state != "applied" {
			t.Errorf("ejected, it says of %s: %s", w.Label, state)
		}
	}
	meanwhile := p.Work(lab.Patch{Label: "meanwhile"})
	ref := s.MustUpload(meanwhile.Patch)
	s.Call("pool_patch.pool_apply", ref)
	everywhere(t, s, meanwhile, p.Hosts[:2]...)
	untouched(t, meanwhile, third)

	p.Join(first, third)
	p.CheckTruth()
	for w, want := range map[*lab.Work]string{byCall: "applied", byCommand: "applied", meanwhile: "absent"} {
		if state := s.State(w, third); state != want {
			t.Errorf("joined again, %s is %s, want %s", w.Label, state, want)
		}
	}
	s.Call("pool_patch.pool_apply", ref)
	everywhere(t, s, meanwhile, p.Hosts...)
	p.Finish()
}

// C2: a host without the SR of the patch, one that shares it, one with too
// little room, and one that is off.
func TestC2_HostsThatDiffer(t *testing.T) {
	t.Parallel()
	p := lab.NewPool(t, 5, func(i int) lab.Options {
		if i == 3 {
			return lab.Options{Dir: ext4FS(t, 420*mib)}
		}
		return lab.Options{}
	})
	p.JoinAll()
	first, without, sharing, small, off := p.Hosts[0], p.Hosts[1], p.Hosts[2], p.Hosts[3], p.Hosts[4]
	s := first.Root()
	pool, _ := s.One("pool")
	s.Call("pool.set_default_SR", pool, p.Share(s, "shared", t.TempDir()+"/sr", first, sharing))
	off.Down()

	w := p.Work(lab.Patch{Pad: 64 << 20})
	ref := s.MustUpload(w.Patch)
	_, err := s.Try("pool_patch.precheck", ref, s.HostRef(small))
	params := hasCode(t, err, "PATCH_PRECHECK_FAILED_OUT_OF_SPACE")
	if len(params) != 3 || params[0] != ref {
		t.Fatalf("%q", params)
	}
	if found, required := number(t, params[1]), number(t, params[2]); found >= required || required < 64*mib {
		t.Errorf("found %d, required %d", found, required)
	}
	if n := w.Prechecked(small); n != 0 {
		t.Errorf("precheck ran %d times where there is no room", n)
	}

	sent, _ := sharing.Node.Traffic()
	run := startRun(first, w, "--no-precheck", "--at-once", "5", "--stop-after", "5", "--wait-away", "5m")
	until(t, "the hosts that are there to be done", func() bool {
		return s.State(w, first) == "applied" && s.State(w, without) == "applied" && s.State(w, sharing) == "applied" &&
			showRun(first, run).of(t, small).State == "failed"
	})
	if x := showRun(first, run).of(t, small); x.Error != "PATCH_PRECHECK_FAILED_OUT_OF_SPACE" {
		t.Errorf("the small host: %+v", x)
	}
	if _, received := sharing.Node.Traffic(); received-sent > 16*mib {
		t.Errorf("the host that shares the SR has received %d bytes", received-sent)
	}
	untouched(t, w, small, off)
	// A host is away when it was not heard of for 45 s.
	var waiting runHost
	for end := time.Now().Add(75 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if waiting = showRun(first, run).of(t, off); strings.Contains(waiting.Reason, "away, not heard of since") {
			break
		}
	}
	if waiting.State != "waiting" || !strings.Contains(waiting.Reason, "away, not heard of since") {
		t.Errorf("the host that is off: %+v", waiting)
	}
	if c := complianceOf(t, first, w, off); c.Value != "unknown" || c.Since == "" {
		t.Errorf("compliance of the host that is off: %+v", c)
	}
	if c := complianceOf(t, first, w, small); c.Value != "no" {
		t.Errorf("compliance of the small host: %+v", c)
	}
	if out := first.Must("why", off.UUID(), string(w.UUID)); !strings.Contains(out, "away") {
		t.Errorf("why: %s", out)
	}

	off.Up()
	r := ended(first, run, time.Minute)
	if r.of(t, off).State != "applied" || r.of(t, small).State != "failed" {
		t.Errorf("%+v", r)
	}
	everywhere(t, s, w, first, without, sharing, off)
	p.Finish()
}

// C5: a patch that fails on one host stops the run there; the hosts behind it
// are untouched, and `retry` finishes when the cause is gone.
func TestC5_StopsAtTheFirstFailure(t *testing.T) {
	t.Parallel()
	p := lab.NewPool(t, 5, nil)
	p.JoinAll()
	first := p.Hosts[0]
	s := first.Root()
	w := p.Work(lab.Patch{Pad: 1 << 20})
	s.MustUpload(w.Patch)

	refused := p.Hosts[4]
	w.Tell(lab.Refuse, refused)
	r := ended(first, startRun(first, w), time.Minute)
	if x := r.of(t, refused); r.Run.State != "stopped" || x.State != "failed" || x.Error != "PATCH_PRECHECK_FAILED_UNKNOWN_ERROR" {
		t.Errorf("a precheck that refuses: %+v", r)
	}
	untouched(t, w, p.Hosts...)
	w.Relent(lab.Refuse, refused)

	order := inOrder(t, p, r)
	second := order[1]
	w.Tell(lab.Fail, second)
	run := startRun(first, w)
	r = ended(first, run, time.Minute)
	if order = inOrder(t, p, r); order[0] != first || order[1] != second {
		t.Fatalf("the order is another now: %+v", r)
	}
	if x := r.of(t, second); r.Run.State != "stopped" || x.State != "failed" || !strings.Contains(x.Reason, "told to fail") {
		t.Errorf("%+v", r)
	}
	if !strings.Contains(first.Must("run", "show", run), "told to fail") {
		t.Error("the reason is not in run show")
	}
	everywhere(t, s, w, first)
	untouched(t, w, order[2:]...)
	for _, h := range p.Hosts {
		if w.Prechecked(h) == 0 {
			t.Errorf("precheck did not run on %s", h.UUID())
		}
	}
	if n := w.Begun(second); n != 1 {
		t.Errorf("apply has begun %d times where it fails", n)
	}

	w.Relent(lab.Fail, second)
	w.Asked(second)
	first.Must("run", "retry", run)
	if r = ended(first, run, time.Minute); r.Run.State != "done" {
		t.Errorf("retried: %+v", r)
	}
	everywhere(t, s, w, p.Hosts...)
	p.Finish()
}

// C5: canary, waves, how many at once, percentage and pause behave as the
// policy says.
func TestC5_PoliciesDoWhatTheySay(t *testing.T) {
	t.Parallel()
	p := lab.NewPool(t, 5, nil)
	p.JoinAll()
	first := p.Hosts[0]
	s := first.Root()
	slow := func() *lab.Work {
		w := p.Work(lab.Patch{Apply: "sleep 0.4"})
		s.MustUpload(w.Patch)
		return w
	}

	// One host, then two at once, then the other two at once.
	w := slow()
	r := ended(first, startRun(first, w, "--canary", "1", "--waves", "2", "--at-once", "3", "--coordinator", "any"), time.Minute)
	if r.Run.State != "done" {
		t.Fatalf("%+v", r)
	}
	everywhere(t, s, w, p.Hosts...)
	hosts := inOrder(t, p, r)
	if n := atOnce(w, hosts); n != 2 {
		t.Errorf("%d hosts at once, in waves of 1, 2 and 2", n)
	}
	for i, h := range hosts {
		for j, earlier := range hosts[:i] {
			begun, _ := w.Span(h)
			if _, done := w.Span(earlier); r.Hosts[j].Wave != r.Hosts[i].Wave && begun.Before(done) {
				t.Errorf("host %d of wave %s began before host %d of wave %s was done", i, r.Hosts[i].Wave, j, r.Hosts[j].Wave)
			}
		}
	}

	// No more than two at once; the coordinator last.
	w = slow()
	r = ended(first, startRun(first, w, "--at-once", "2", "--coordinator", "last"), time.Minute)
	everywhere(t, s, w, p.Hosts...)
	if hosts = inOrder(t, p, r); hosts[4] != first || atOnce(w, hosts) != 2 {
		t.Errorf("at once %d, in the order %+v", atOnce(w, hosts), r)
	}

	// The second failure of five is 40 percent.
	w = slow()
	w.Tell(lab.Fail, hosts[:2]...)
	r = ended(first, startRun(first, w, "--stop-percent", "40", "--coordinator", "last"), time.Minute)
	if r.Run.State != "stopped" || r.of(t, hosts[0]).State != "failed" || r.of(t, hosts[1]).State != "failed" {
		t.Errorf("40 percent: %+v", r)
	}
	untouched(t, w, hosts[2:]...)

	// Paused while the second is at work: that one ends, the third waits.
	w = slow()
	w.Tell(lab.Hold, hosts[1])
	run := startRun(first, w, "--coordinator", "last")
	until(t, "the second host to be at work", func() bool { return w.Begun(hosts[1]) == 1 })
	if _, errs, code := first.CLI("patch", "pool-apply", string(w.UUID), "--detach", "--at-once", "2"); code != 1 || !strings.Contains(errs, run) {
		t.Errorf("a second run on the same hosts: %d %s", code, errs)
	}
	first.Must("run", "pause", run)
	w.Relent(lab.Hold, hosts[1])
	until(t, "the second host to be done", func() bool { return s.State(w, hosts[1]) == "applied" })
	untouched(t, w, hosts[2:]...)
	if r := showRun(first, run); r.Run.State != "paused" || r.of(t, hosts[2]).State == "applying" {
		t.Errorf("paused: %+v", r)
	}
	first.Must("run", "resume", run)
	if r := ended(first, run, time.Minute); r.Run.State != "done" {
		t.Errorf("resumed: %+v", r)
	}
	everywhere(t, s, w, p.Hosts...)
	p.Finish()
}

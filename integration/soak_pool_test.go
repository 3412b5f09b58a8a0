package integration

import (
	"encoding/json"
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// C3: runs over five hosts, while coordinator, agents, runners, patches and
// members of etcd are killed at random moments and come back: every run ends
// in a true state, nothing runs twice without being asked, nothing is forgotten.
func TestC3_KillsAtRandom(t *testing.T) {
	t.Parallel()
	for name, clustered := range map[string]bool{"embedded": false, "cluster": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			soakPool(t, clustered, 3, 8)
		})
	}
}

// The same for as long as one likes: make soak N=300 SEED=7.
func TestC3_SoakKills(t *testing.T) {
	n, r := soak(t, 1)
	soakPool(t, true, n, r.Int63())
}

func soakPool(t *testing.T, clustered bool, rounds int, seed int64) {
	s := newPoolSoaker(t, clustered)
	for i := range rounds {
		s.round(t, fmt.Sprintf("round %d of seed %d", i, seed), rand.New(rand.NewSource(seed+int64(i))))
	}
	s.Finish()
	t.Logf("%d rounds, kills: %v", rounds, s.kills)
}

// poolSoaker is a pool of five, and what was done to it.
type poolSoaker struct {
	*lab.Pool
	cluster *lab.Etcd // nil: one coordinator with an embedded database
	kinds   []string  // what can be killed
	kills   map[string]int

	begun time.Time // of the round
	tale  []string
	rough bool // a patch or a runner was killed in this round
}

func newPoolSoaker(t *testing.T, clustered bool) *poolSoaker {
	t.Helper()
	s := &poolSoaker{kills: map[string]int{}, kinds: []string{"coordinator", "agent", "agent", "runner", "patch"}}
	n := lab.NewNet(t, 8)
	joined := 1 // the first that has to join
	if clustered {
		s.cluster = lab.StartEtcdOn(t, n.Nodes[5:]...)
		s.kinds = append(s.kinds, "etcd")
		joined = 3
	}
	s.Pool = lab.PoolOn(t, n, 5, func(i int) (o lab.Options) {
		if i < joined && clustered {
			o.Store = s.cluster.URL("")
		}
		return o
	})
	leader := s.Leader().H
	for _, h := range s.Hosts[joined:] {
		s.Join(leader, h)
	}
	return s
}

// note adds a line to what is told of a round that fails.
func (s *poolSoaker) note(format string, args ...any) {
	s.tale = append(s.tale, fmt.Sprintf("%7.3f ", time.Since(s.begun).Seconds())+fmt.Sprintf(format, args...))
}

// happening is something that is done to the pool, so long after a round began.
type happening struct {
	at time.Duration
	do func()
}

// round is one run with kills in it, and a look at everything after it.
func (s *poolSoaker) round(t *testing.T, name string, r *rand.Rand) {
	t.Helper()
	s.tale, s.rough, s.begun = nil, false, time.Now()
	w := s.Work(lab.Patch{Pad: r.Intn(2 << 20), Precheck: "sleep 0.05", Apply: fmt.Sprintf("sleep 0.%d", 1+r.Intn(4))})
	leader := s.Leader()
	ref := leader.MustUpload(w.Patch)
	flags := []string{"--at-once", fmt.Sprint(1 + r.Intn(5)), "--stop-after", "10", "--wait-away", "5m"}
	flags = append(flags, "--coordinator", []string{"first", "last", "any"}[r.Intn(3)])
	s.begun = time.Now()
	run := startRun(leader.H, w, flags...)
	s.note("%s: run %s of %s, %v", name, run, w.UUID, flags)
	for _, x := range s.plan(w, r) {
		time.Sleep(time.Until(s.begun.Add(x.at))) // a moment is what is drawn
		x.do()
	}
	s.healed()
	s.finishRun(t, w, run)
	s.AllConnected()
	s.CheckTruth()
	leader = s.Leader()
	everywhere(t, leader, w, s.once(w)...)
	if _, err := leader.Try("pool_patch.pool_clean", ref); err != nil {
		t.Errorf("clean: %v", err)
	}
	if t.Failed() {
		t.Fatalf("%s failed:\n%s", name, strings.Join(s.tale, "\n"))
	}
}

// plan draws what is killed and when, and when it comes back.
func (s *poolSoaker) plan(w *lab.Work, r *rand.Rand) (all []happening) {
	for range 1 + r.Intn(3) {
		kind, at := s.kinds[r.Intn(len(s.kinds))], time.Duration(r.Intn(2500))*time.Millisecond
		which, again := r.Intn(5), at+time.Duration(r.Intn(1500))*time.Millisecond
		back := func() {}
		all = append(all, happening{at, func() { back = s.kill(kind, which, w) }}, happening{again, func() { back() }})
	}
	// A return is never before its kill, also where both are at the same moment.
	slices.SortStableFunc(all, func(a, b happening) int { return int(a.at - b.at) })
	return all
}

// kill ends something by SIGKILL, and gives what brings it back.
func (s *poolSoaker) kill(kind string, which int, w *lab.Work) (back func()) {
	h, back := s.Hosts[which], func() {}
	switch kind {
	case "coordinator":
		leader, _ := s.LeaderNow()
		if leader == nil {
			return back // it is being elected, or dead
		}
		return s.killDaemon(kind, leader.H)
	case "agent":
		return s.killDaemon(kind, h)
	case "etcd":
		m := s.cluster.Nodes[which%len(s.cluster.Nodes)]
		for _, other := range s.cluster.Nodes {
			if !other.Running() {
				return back // two of three have to live
			}
		}
		m.Kill()
		s.kills[kind]++
		s.note("killed %s", m.Name)
		return func() { m.Restart(); s.note("%s is back", m.Name) }
	case "runner", "patch":
		// The first host from there on that has one, when one comes within a while.
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			for i := range s.Hosts {
				h := s.Hosts[(which+i)%len(s.Hosts)]
				if pids := atWork(kind, h); len(pids) > 0 {
					s.killAll(kind, h, w, pids)
					return back
				}
			}
		}
	}
	return back
}

// atWork are the runners of a host, or the processes of its patches.
func atWork(kind string, h *lab.Host) []int {
	if kind == "runner" {
		return processes("runner\x00--groups\x00" + h.GroupPrefix())
	}
	return (&victim{Host: h}).groupMembers("patch-*")
}

func (s *poolSoaker) killDaemon(kind string, h *lab.Host) (back func()) {
	if !h.Running() {
		return func() {}
	}
	h.Kill()
	s.kills[kind]++
	s.note("killed the %s %s", kind, h.UUID())
	return func() { h.Launch(); s.note("%s starts again", h.UUID()) }
}

func (s *poolSoaker) killAll(kind string, h *lab.Host, w *lab.Work, pids []int) {
	w.Unsure(h)
	s.rough = true
	for _, pid := range pids {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	s.kills[kind]++
	s.note("killed the %s on %s: %v", kind, h.UUID(), pids)
}

// healed waits until everything runs.
func (s *poolSoaker) healed() {
	s.T.Helper()
	for _, h := range s.Hosts {
		if !h.Running() {
			h.Launch()
		}
	}
	for _, h := range s.Hosts {
		if err := h.Ready(time.Minute); err != nil {
			s.T.Fatalf("host %s: %v\n%s", h.UUID(), err, strings.Join(s.tale, "\n"))
		}
	}
	s.note("all hosts are up")
}

// finishRun waits for the run; where patches or runners were killed it asks
// again until every host has the patch.
func (s *poolSoaker) finishRun(t *testing.T, w *lab.Work, run string) {
	t.Helper()
	for range 4 {
		r := s.ended(t, run)
		var missing []string
		for _, x := range r.Hosts {
			if x.State != "applied" {
				missing = append(missing, x.Host)
				s.note("%s is %s: %s %s", x.Host, x.State, x.Reason, x.Error)
			}
		}
		if len(r.Hosts) != len(s.Hosts) {
			t.Errorf("the run has forgotten a host: %+v", r)
		}
		if len(missing) == 0 {
			return
		}
		if !s.rough {
			t.Errorf("only daemons were killed, and %d hosts lack the patch", len(missing))
		}
		for _, h := range s.Hosts {
			if slices.Contains(missing, h.UUID()) {
				w.Asked(h)
			}
		}
		s.Leader().H.Must(append([]string{"run", "retry", run}, missing...)...)
		s.note("asked again")
	}
	t.Errorf("the run does not finish")
}

// ended waits for the end of a run at whichever host leads.
func (s *poolSoaker) ended(t *testing.T, run string) (r runRecord) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		leader, _ := s.LeaderNow()
		if leader == nil {
			continue
		}
		out, _, code := leader.H.CLI("run", "show", run, "--output", "json")
		if code != 0 || json.Unmarshal([]byte(out), &r) != nil {
			continue
		}
		if slices.Contains([]string{"done", "stopped", "cancelled"}, r.Run.State) {
			s.note("the run is %s", r.Run.State)
			return r
		}
	}
	t.Fatalf("the run does not end: %+v\n%s", r, strings.Join(s.tale, "\n"))
	return r
}

// once are the hosts that have the effect exactly once, as all have where no
// patch was killed.
func (s *poolSoaker) once(w *lab.Work) (hosts []*lab.Host) {
	for _, h := range s.Hosts {
		if !s.rough || w.Effects(h) == 1 {
			hosts = append(hosts, h)
		}
	}
	return hosts
}

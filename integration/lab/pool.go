package lab

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// Pool is several hosts in a network of their own. Each begins as a pool of
// itself; Join makes one of them.
type Pool struct {
	T     testing.TB
	Net   *Net    // nil: loopback addresses of this machine
	Hosts []*Host // the first is the coordinator, unless the test says otherwise
	Works []*Work // that CheckTruth looks at

	shared []string // folders of shared SRs
	out    map[*Host]bool
}

// NewPool starts n hosts, each on a node of its own. The options of each come
// from each, which may be nil; its Node is filled in.
func NewPool(t testing.TB, n int, each func(i int) Options) *Pool {
	t.Helper()
	return PoolOn(t, NewNet(t, n), n, each)
}

// PoolOn is NewPool on the first n nodes of a network.
func PoolOn(t testing.TB, w *Net, n int, each func(i int) Options) *Pool {
	t.Helper()
	p := &Pool{T: t, Net: w, out: map[*Host]bool{}}
	var all []Options
	for i := range n {
		var o Options
		if each != nil {
			o = each(i)
		}
		o.Node = w.Nodes[i]
		all = append(all, o)
	}
	p.Hosts = StartAll(t, all...)
	return p
}

// PoolHere is NewPool on loopback addresses of this machine: the test itself can
// reach the hosts, and be one.
func PoolHere(t testing.TB, n int, each func(i int) Options) *Pool {
	t.Helper()
	all := make([]Options, n)
	for i := range all {
		if each != nil {
			all[i] = each(i)
		}
	}
	return &Pool{T: t, Hosts: StartAll(t, all...), out: map[*Host]bool{}}
}

// JoinAll joins every other host to the first.
func (p *Pool) JoinAll() {
	p.T.Helper()
	for _, h := range p.Hosts[1:] {
		p.Join(p.Hosts[0], h)
	}
}

// Join joins a host to the coordinator's pool by a token, and waits until it
// is connected.
func (p *Pool) Join(coordinator, member *Host) {
	p.T.Helper()
	token := strings.TrimSpace(coordinator.Must("pool", "token"))
	member.Must("pool", "join", coordinator.TLSURL, "--token", token)
	p.until("host "+member.UUID()+" to be connected", func() bool {
		if all := coordinator.listed(); all != nil {
			return all[member.UUID()]
		}
		leader, _ := p.LeaderNow() // on a busy machine it may be another one by now
		return leader != nil && leader.H.listed()[member.UUID()]
	})
	p.out[member] = false
}

// Eject takes a host out of the pool, and waits until it is listed no more.
func (p *Pool) Eject(coordinator, member *Host) {
	p.T.Helper()
	coordinator.Must("pool", "eject", member.UUID())
	p.until("host "+member.UUID()+" to be gone", func() bool {
		all := coordinator.listed()
		_, there := all[member.UUID()]
		return all != nil && !there
	})
	p.out[member] = true
}

// AllConnected waits until every host of the pool that runs is connected to the
// one that leads.
func (p *Pool) AllConnected() {
	p.T.Helper()
	p.until("all hosts to be connected", func() bool {
		leader, _ := p.LeaderNow()
		if leader == nil {
			return false
		}
		there := leader.H.listed()
		return !slices.ContainsFunc(p.Hosts, func(h *Host) bool { return !p.out[h] && h.Running() && !there[h.UUID()] })
	})
}

// listed are the hosts of the pool by uuid, as `host list` shows them, and
// whether each is connected.
func (h *Host) listed() map[string]bool {
	out, _, code := h.CLI("host", "list", "--output", "json")
	var recs []struct {
		UUID      string
		Connected bool
	}
	if code != 0 || json.Unmarshal([]byte(out), &recs) != nil {
		return nil
	}
	all := map[string]bool{}
	for _, r := range recs {
		all[r.UUID] = r.Connected
	}
	return all
}

// Must runs the command line, fails the test when that fails, and gives what
// it wrote.
func (h *Host) Must(args ...string) string {
	h.T.Helper()
	out, errs, code := h.CLI(args...)
	if code != 0 {
		h.T.Fatalf("patchd %s: exit %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

func (p *Pool) until(what string, ok func() bool) {
	p.T.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	p.T.Fatalf("%s: not within 30 s", what)
}

// Leader logs in at the host that leads, whichever it is; it waits until there
// is one.
func (p *Pool) Leader() *Session {
	p.T.Helper()
	var last error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		s, err := p.LeaderNow()
		if s != nil {
			return s
		}
		last = cmp.Or(err, last)
	}
	p.T.Fatalf("no host leads: %v", last)
	return nil
}

// LeaderNow asks each host once whether it leads; nil when none does.
func (p *Pool) LeaderNow() (s *Session, err error) {
	for _, h := range p.Hosts {
		if p.out[h] || !h.Running() {
			continue
		}
		if s, err = h.Login("root", Password); err == nil {
			return s, nil
		}
	}
	return nil, err
}

// Running tells whether the daemon's process is there.
func (h *Host) Running() bool {
	select {
	case <-h.Exited():
		return false
	default:
		return true
	}
}

// HostRef is the reference of a host in the pool of the session.
func (s *Session) HostRef(h *Host) string {
	s.H.T.Helper()
	return s.Call("host.get_by_uuid", h.UUID()).(string)
}

// Share makes a folder the shared SR of the hosts, and gives its ref. The first
// of them makes it.
func (p *Pool) Share(s *Session, name, dir string, hosts ...*Host) string {
	p.T.Helper()
	where := map[string]string{"location": dir}
	sr := s.Call("SR.create", s.HostRef(hosts[0]), where, "0", name, "", "file", "user", true, map[string]string{}).(string)
	for _, h := range hosts[1:] {
		pbd := s.Call("PBD.create", map[string]any{"host": s.HostRef(h), "SR": sr, "device_config": where, "other_config": map[string]string{}}).(string)
		s.Call("PBD.plug", pbd)
	}
	p.shared = append(p.shared, dir)
	return sr
}

// Work makes a patch whose effects are counted, and has CheckTruth look at it.
func (p *Pool) Work(patch Patch) *Work {
	w := NewWork(p.T, patch)
	p.Works = append(p.Works, w)
	return w
}

// State is what the records say of a patch on a host: "absent", "applied",
// "unknown", or what else the host_patch holds.
func (s *Session) State(w *Work, h *Host) string {
	s.H.T.Helper()
	patch, err := s.Try("pool_patch.get_by_uuid", string(w.UUID))
	var refusal *xapi.Error
	if errors.As(err, &refusal) && refusal.Code == xapi.UUIDInvalid {
		return "absent"
	}
	if err != nil {
		s.H.T.Fatal(err)
	}
	return stateIn(s.All("host_patch"), patch.(string), s.HostRef(h))
}

func stateIn(hps map[string]Record, patch, host string) string {
	state := "absent"
	for _, hp := range hps {
		if hp["pool_patch"] != patch || hp["host"] != host {
			continue
		}
		if state != "absent" {
			return "twice"
		}
		other, _ := hp["other_config"].(map[string]any)
		switch {
		case hp["applied"] == true:
			state = "applied"
		case other["patchd-state"] == "unknown":
			state = "unknown"
		default:
			state = fmt.Sprintf("of %v", hp)
		}
	}
	return state
}

// CheckTruth waits until every task has ended, and checks of each host in the
// pool and each patch that records, stampfile and effects say the same, that
// nothing ran without being asked, and that nothing is left on any host.
func (p *Pool) CheckTruth() {
	p.T.Helper()
	s := p.Leader()
	p.tasksEnd(s)
	patches, hps := map[string]string{}, s.All("host_patch")
	for ref, rec := range s.All("pool_patch") {
		patches[rec["uuid"].(string)] = ref
	}
	for _, h := range p.Hosts {
		if p.out[h] {
			continue
		}
		host := s.HostRef(h)
		for _, w := range p.Works {
			w.check(h, stateIn(hps, patches[string(w.UUID)], host))
		}
		h.CheckNothingLeft()
	}
	for _, dir := range p.shared {
		if volumes, _ := filepath.Glob(filepath.Join(dir, "*.*.*")); len(volumes) > 0 {
			p.T.Errorf("left in a shared SR: %v", volumes)
		}
	}
}

func (p *Pool) tasksEnd(s *Session) {
	p.T.Helper()
	var pending []Record
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		pending = nil
		for _, rec := range s.All("task") {
			if rec["status"] == "pending" || rec["status"] == "cancelling" {
				pending = append(pending, rec)
			}
		}
		if len(pending) == 0 {
			return
		}
	}
	p.T.Errorf("tasks do not end: %v", pending)
}

// Finish is CheckTruth, then ends all daemons and looks at what only the
// databases show: no job, run or intent is open on any host.
func (p *Pool) Finish() {
	p.T.Helper()
	p.CheckTruth()
	for _, h := range p.Hosts {
		h.Down()
	}
	seen := map[string]bool{} // databases that several hosts share
	for _, h := range p.Hosts {
		if h.o.Store != "" && seen[h.o.Store] {
			continue
		}
		seen[h.o.Store] = true
		args := []string{"store", "backup", "-"}
		if h.o.Store != "" {
			args = append(args, "--store", h.o.Store)
		}
		for line := range strings.Lines(h.Must(args...)) {
			if open := stillOpen(line); open != "" {
				p.T.Errorf("%s is open in the database of %s: %s", open, h.UUID(), line)
			}
		}
	}
}

// stillOpen names what a line of a back-up holds that should have ended.
func stillOpen(line string) string {
	var rec struct {
		Class string
		Value struct{ State string }
	}
	if err := json.Unmarshal([]byte(line), &rec); err != nil {
		return "something that is no record"
	}
	ended := slices.Contains([]string{"done", "stopped", "cancelled"}, rec.Value.State)
	if rec.Class == "intent" || (rec.Class == "job" || rec.Class == "run") && !ended {
		return rec.Class
	}
	return ""
}

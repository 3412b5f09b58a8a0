package integration

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// runRecord is what `run show` tells of a run.
type runRecord struct {
	Run struct{ UUID, State, Reason string }
	// Hosts are in the order of the run.
	Hosts []runHost
}

// runHost is one host of a run.
type runHost struct {
	Host     string // uuid
	Wave     string // its name
	State    string
	Reason   string
	Attempts string
	Error    string // the code
}

// startRun begins a run by the command line and gives its uuid.
func startRun(h *lab.Host, w *lab.Work, flags ...string) string {
	h.T.Helper()
	out := h.Must(append([]string{"patch", "pool-apply", string(w.UUID), "--detach"}, flags...)...)
	words := strings.Fields(out) // begun: run UUID
	if len(words) == 0 {
		h.T.Fatalf("pool-apply says %q", out)
	}
	return words[len(words)-1]
}

// showRun gives a run.
func showRun(h *lab.Host, run string) (r runRecord) {
	h.T.Helper()
	out := h.Must("run", "show", run, "--output", "json")
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		h.T.Fatalf("%v in %s", err, out)
	}
	return r
}

// ended waits until a run is in a last state.
func ended(h *lab.Host, run string, limit time.Duration) runRecord {
	h.T.Helper()
	var r runRecord
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		r = showRun(h, run)
		if slices.Contains([]string{"done", "stopped", "cancelled"}, r.Run.State) {
			return r
		}
	}
	h.T.Fatalf("run %s does not end: %+v", run, r)
	return r
}

// of is the run's line of a host.
func (r runRecord) of(t testing.TB, h *lab.Host) runHost {
	t.Helper()
	for _, x := range r.Hosts {
		if x.Host == h.UUID() {
			return x
		}
	}
	t.Fatalf("run %s has no host %s: %+v", r.Run.UUID, h.UUID(), r.Hosts)
	return runHost{}
}

// inOrder are the hosts of a pool in the order of a run.
func inOrder(t testing.TB, p *lab.Pool, r runRecord) (hosts []*lab.Host) {
	t.Helper()
	for _, x := range r.Hosts {
		i := slices.IndexFunc(p.Hosts, func(h *lab.Host) bool { return h.UUID() == x.Host })
		if i < 0 {
			t.Fatalf("run %s has a host %s that nobody knows", r.Run.UUID, x.Host)
		}
		hosts = append(hosts, p.Hosts[i])
	}
	return hosts
}

// atOnce is how many hosts were applying at the same time.
func atOnce(w *lab.Work, hosts []*lab.Host) (most int) {
	for _, h := range hosts {
		begun, _ := w.Span(h)
		n := 0
		for _, other := range hosts {
			if b, e := w.Span(other); !b.After(begun) && e.After(begun) {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

// everywhere fails the test unless each host has the effect of w once, and the
// records say so.
func everywhere(t testing.TB, s *lab.Session, w *lab.Work, hosts ...*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		if n, state := w.Effects(h), s.State(w, h); n != 1 || state != "applied" {
			t.Errorf("host %s: %d effects, host_patch %s", h.UUID(), n, state)
		}
	}
}

// untouched fails the test if apply has begun on one of hosts.
func untouched(t testing.TB, w *lab.Work, hosts ...*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		if n := w.Begun(h); n != 0 {
			t.Errorf("host %s: apply has begun %d times", h.UUID(), n)
		}
	}
}

// compliance is what the pool knows of one patch on one host.
type compliance struct{ Host, Value, Since, Note string }

// complianceOf asks for it by the command line.
func complianceOf(t testing.TB, leader *lab.Host, w *lab.Work, h *lab.Host) compliance {
	t.Helper()
	var all []struct{ Hosts []compliance }
	out := leader.Must("pool", "compliance", string(w.UUID), "--output", "json")
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all) != 1 {
		t.Fatalf("%v in %s", err, out)
	}
	for _, c := range all[0].Hosts {
		if c.Host == h.UUID() {
			return c
		}
	}
	t.Fatalf("no host %s in %s", h.UUID(), out)
	return compliance{}
}

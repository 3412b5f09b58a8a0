package pool

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// Policy says which hosts a run has, in which order they come, and when it
// stops. The zero value is: all hosts of the pool, the precheck of all of them
// first, then the coordinator, then one host after another, until one fails.
type Policy struct {
	// Hosts are refs or uuids. Without Hosts and Tags the run has every host;
	// with both, the hosts named and those with one of the tags.
	Hosts []xapi.Ref `json:"hosts,omitempty"`
	Tags  []string   `json:"tags,omitempty"`
	// AtOnce is how many hosts apply at the same time; 0: one.
	AtOnce int `json:"at_once,omitempty"`
	// Canary hosts come first, and all others wait for them: so many of the run,
	// or those named. One failure among them stops the run.
	Canary      int        `json:"canary,omitempty"`
	CanaryHosts []xapi.Ref `json:"canary_hosts,omitempty"`
	// Waves are the sizes of the waves after the canary, each a number of hosts or
	// a part of all hosts of the run ("10%"). What they leave over is the last wave. A
	// wave begins when the one before it has ended.
	Waves []string `json:"waves,omitempty"`
	// Coordinator is CoordinatorFirst, CoordinatorLast or CoordinatorAny; "": first.
	Coordinator string `json:"coordinator,omitempty"`
	// The run stops when StopAfter hosts have failed, or StopPercent of all hosts
	// of the run. Neither: at the first.
	StopAfter   int `json:"stop_after,omitempty"`
	StopPercent int `json:"stop_percent,omitempty"`
	// NoPrecheck leaves out the precheck of all hosts before the first is touched.
	// Each host's own, right before its apply, stays.
	NoPrecheck bool `json:"no_precheck,omitempty"`
	// HostDeadline is how many seconds one host may take; 0: four hours.
	HostDeadline int64 `json:"host_deadline,omitempty"`
	// WaitAway is how many seconds a host that is away is waited for when its turn
	// comes; 0: it is passed over and told of.
	WaitAway int64 `json:"wait_away,omitempty"`
	// DryRun only tells what would be done.
	DryRun bool `json:"dry_run,omitempty"`
}

// The places of the coordinator. First is the default, as it is of the pools that
// the XenAPI comes from: there the coordinator is brought up to date and restarted
// before the others. It is a wave of its own, after the canary.
const (
	CoordinatorFirst = "first"
	CoordinatorLast  = "last"
	CoordinatorAny   = "any" // as any other host
)

// The bounds of a policy.
const (
	maxAtOnce           = 1000
	maxWaves            = 100
	maxRunTime          = 30 * 24 * time.Hour
	defaultHostDeadline = 4 * time.Hour
)

// Check fills in the defaults. Code: VALUE_NOT_SUPPORTED [field, value, reason].
func (pol Policy) Check() (Policy, error) {
	if pol.AtOnce == 0 {
		pol.AtOnce = 1
	}
	if pol.Coordinator == "" {
		pol.Coordinator = CoordinatorFirst
	}
	if pol.StopAfter == 0 && pol.StopPercent == 0 {
		pol.StopAfter = 1
	}
	if pol.HostDeadline == 0 {
		pol.HostDeadline = int64(defaultHostDeadline / time.Second)
	}
	month := int64(maxRunTime / time.Second)
	for _, c := range []struct {
		name      string
		n         int64
		low, high int64
	}{
		{"at_once", int64(pol.AtOnce), 1, maxAtOnce}, {"canary", int64(pol.Canary), 0, 1 << 20},
		{"stop_after", int64(pol.StopAfter), 0, 1 << 20}, {"stop_percent", int64(pol.StopPercent), 0, 100},
		{"host_deadline", pol.HostDeadline, 1, month}, {"wait_away", pol.WaitAway, 0, month},
	} {
		if c.n < c.low || c.n > c.high {
			return pol, unsupported(c.name, fmt.Sprint(c.n), fmt.Sprintf("it must lie between %d and %d", c.low, c.high))
		}
	}
	if !slices.Contains([]string{CoordinatorFirst, CoordinatorLast, CoordinatorAny}, pol.Coordinator) {
		return pol, unsupported("coordinator", pol.Coordinator, "it is first, last or any")
	}
	if pol.Canary > 0 && len(pol.CanaryHosts) > 0 {
		return pol, unsupported("canary", fmt.Sprint(pol.Canary), "the canary is a number or names of hosts, not both")
	}
	if len(pol.Waves) > maxWaves {
		return pol, unsupported("waves", fmt.Sprint(len(pol.Waves)), fmt.Sprintf("at most %d", maxWaves))
	}
	for _, w := range pol.Waves {
		if _, err := waveSize(w, 100); err != nil {
			return pol, err
		}
	}
	return pol, nil
}

func unsupported(field, value, reason string) error {
	return xapi.NewError(xapi.ValueNotSupported, field, fmt.Sprintf("%.64s", value), reason)
}

// waveSize reads "7" or "10%" as a number of hosts, of total; at least one.
func waveSize(text string, total int) (int, error) {
	number, part := strings.CutSuffix(text, "%")
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || part && n > 100 || n > 1<<20 {
		return 0, unsupported("waves", text, "a wave is a number of hosts or a percentage from 1% to 100%")
	}
	if part {
		n = (n*total + 99) / 100
	}
	return n, nil
}

// canaryWave is the name of the wave of the canary.
const canaryWave = "canary"

// arrange puts hosts into waves. Each host is in one; no wave is empty. master is
// the coordinator, which may be none of the hosts.
func (pol Policy) arrange(hosts []xapi.Ref, master xapi.Ref) (names []string, waves [][]xapi.Ref) {
	add := func(name string, hosts ...xapi.Ref) {
		if len(hosts) > 0 {
			names, waves = append(names, name), append(waves, hosts)
		}
	}
	rest := slices.Clone(hosts)
	take := func(wanted func(xapi.Ref) bool, most int) (taken []xapi.Ref) {
		rest = slices.DeleteFunc(rest, func(h xapi.Ref) bool {
			if len(taken) >= most || !wanted(h) {
				return false
			}
			taken = append(taken, h)
			return true
		})
		return taken
	}
	isMaster := func(h xapi.Ref) bool { return h == master }
	add(canaryWave, append(
		take(func(h xapi.Ref) bool { return slices.Contains(pol.CanaryHosts, h) }, len(rest)),
		take(func(h xapi.Ref) bool { return pol.Coordinator == CoordinatorAny || !isMaster(h) }, pol.Canary)...)...)
	var last []xapi.Ref
	switch pol.Coordinator {
	case CoordinatorFirst:
		add("coordinator", take(isMaster, 1)...)
	case CoordinatorLast:
		last = take(isMaster, 1)
	}
	for i, w := range pol.Waves {
		n, err := waveSize(w, len(hosts))
		if err != nil {
			continue // Check has refused it
		}
		add(fmt.Sprintf("wave %d", i+1), take(func(xapi.Ref) bool { return true }, n)...)
	}
	name := fmt.Sprintf("wave %d", len(pol.Waves)+1)
	if len(pol.Waves) == 0 {
		name = "all others"
		if len(waves) == 0 && len(last) == 0 {
			name = "all"
		}
	}
	add(name, rest...)
	add("coordinator", last...)
	return names, waves
}

// Words tell what a policy does, a sentence each. It is one that Check has passed.
func (pol Policy) Words() []string {
	lines := []string{pol.whichWords()}
	if pol.NoPrecheck {
		lines = append(lines, "Each host runs the precheck right before its apply; there is none of all hosts first.")
	} else {
		lines = append(lines, "All hosts run the precheck before the first is touched, and each again right before its apply.")
	}
	switch {
	case len(pol.CanaryHosts) > 0:
		lines = append(lines, fmt.Sprintf("The %s named as canary %s first; one failure there stops the run.",
			plural(len(pol.CanaryHosts), "host"), comes(len(pol.CanaryHosts))))
	case pol.Canary > 0:
		lines = append(lines, fmt.Sprintf("%s as canary %s first; one failure there stops the run.", plural(pol.Canary, "host"), comes(pol.Canary)))
	}
	canary := len(pol.CanaryHosts) > 0 || pol.Canary > 0
	switch {
	case pol.Coordinator == CoordinatorFirst && canary:
		lines = append(lines, "Then the coordinator, alone.")
	case pol.Coordinator == CoordinatorFirst:
		lines = append(lines, "The coordinator comes first, alone.")
	case pol.Coordinator == CoordinatorLast:
		lines = append(lines, "The coordinator comes last, alone.")
	}
	if len(pol.Waves) > 0 {
		lines = append(lines, fmt.Sprintf("The others come in waves of %s, then the rest; a wave begins when the one before it has ended.", strings.Join(pol.Waves, ", ")))
	}
	if pol.AtOnce == 1 {
		lines = append(lines, "One host applies at a time.")
	} else {
		lines = append(lines, fmt.Sprintf("At most %d hosts apply at a time.", pol.AtOnce))
	}
	return append(lines, pol.stopWords(), pol.timeWords())
}

func (pol Policy) whichWords() string {
	tags := "tagged " + strings.Join(pol.Tags, " or ")
	switch {
	case len(pol.Hosts) > 0 && len(pol.Tags) > 0:
		return fmt.Sprintf("The run has the %s named and those %s.", plural(len(pol.Hosts), "host"), tags)
	case len(pol.Hosts) > 0:
		return fmt.Sprintf("The run has the %s named.", plural(len(pol.Hosts), "host"))
	case len(pol.Tags) > 0:
		return fmt.Sprintf("The run has the hosts %s.", tags)
	}
	return "The run has every host of the pool."
}

func (pol Policy) stopWords() string {
	var when []string
	if pol.StopAfter > 0 {
		when = append(when, plural(pol.StopAfter, "host"))
	}
	if pol.StopPercent > 0 {
		when = append(when, fmt.Sprintf("%d%% of the hosts", pol.StopPercent))
	}
	have := "have"
	if len(when) == 1 && pol.StopAfter == 1 {
		return "The run stops at the first host that fails."
	}
	return fmt.Sprintf("The run stops when %s %s failed.", strings.Join(when, " or "), have)
}

func (pol Policy) timeWords() string {
	away := "A host that is away is passed over and told of."
	if pol.WaitAway > 0 {
		away = fmt.Sprintf("A host that is away is waited for up to %s.", seconds(pol.WaitAway))
	}
	if pol.HostDeadline == 0 { // of a pool_apply
		return "A host may take as long as it does; one that is away fails."
	}
	return fmt.Sprintf("A host may take %s. %s", seconds(pol.HostDeadline), away)
}

func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func comes(n int) string {
	if n == 1 {
		return "comes"
	}
	return "come"
}

// tooMany tells whether the hosts of a run that failed stop it, and why.
// Those of an earlier try do not count.
func (r Run) tooMany(hosts []RunHost) (reason string, yes bool) {
	failed, canary := 0, 0
	for i := range hosts {
		if !hosts[i].State.bad() || hosts[i].Since.Before(r.Begun) {
			continue
		}
		failed++
		if w := hosts[i].Wave; w >= 0 && w < len(r.Waves) && r.Waves[w] == canaryWave {
			canary++
		}
	}
	pol := r.Policy
	switch {
	case canary > 0:
		return plural(canary, "host") + " of the canary failed", true
	case pol.StopAfter > 0 && failed >= pol.StopAfter:
		return fmt.Sprintf("%s failed, and the policy stops at %d", plural(failed, "host"), pol.StopAfter), true
	case pol.StopPercent > 0 && failed > 0 && failed*100 >= pol.StopPercent*len(hosts):
		return fmt.Sprintf("%d of %s failed, and the policy stops at %d%%", failed, plural(len(hosts), "host"), pol.StopPercent), true
	}
	return "", false
}

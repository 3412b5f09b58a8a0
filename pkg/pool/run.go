package pool

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// The classes of Run and RunHost records, never on the wire under these names:
// our own messages show them.
const (
	ClassRun     = "run"
	ClassRunHost = "run_host"
)

// RunState is how far a run has come.
type RunState string

// The states of a run. One that is open holds its hosts: no other run may have
// one of them.
const (
	RunPreparing  RunState = "preparing"  // its hosts are being written down; a crash undoes it
	RunRunning    RunState = "running"    //
	RunPaused     RunState = "paused"     // what is at work goes on, nothing is begun
	RunStopping   RunState = "stopping"   // too many hosts failed; what is at work goes on to its end
	RunCancelling RunState = "cancelling" // what is at work is cancelled

	RunDone      RunState = "done"    // every host was seen to
	RunStopped   RunState = "stopped" // too many hosts failed; the others were not touched
	RunCancelled RunState = "cancelled"
)

// Ended tells whether nothing of the run goes on.
func (s RunState) Ended() bool { return s == RunDone || s == RunStopped || s == RunCancelled }

// Run is one patch on its way to many hosts, by a policy. It is a record, so it
// goes on after this process dies. It is small: what concerns one host is a
// RunHost.
type Run struct {
	UUID   xapi.UUID `json:"uuid"`
	Patch  xapi.Ref  `json:"patch"`
	Task   xapi.Ref  `json:"task,omitempty"`
	Policy Policy    `json:"policy"`
	// Classic is a pool_patch.pool_apply: one host after another, without a
	// precheck of all of them first.
	Classic bool `json:"classic,omitempty"`
	// Waves are the names of the waves, in their order.
	Waves  []string `json:"waves"`
	Total  int      `json:"total"` // hosts, those that need nothing included
	State  RunState `json:"state"`
	Reason string   `json:"reason,omitempty"` // why it is in that state
	By     string   `json:"by,omitempty"`     // who paused or cancelled it

	Created  time.Time `json:"created"`
	Begun    time.Time `json:"begun"` // or taken up by a retry: failures before it do not stop the run
	Since    time.Time `json:"since"` // of State
	Finished time.Time `json:"finished,omitzero"`
	// Counts are the hosts by state, once the run has ended.
	Counts map[HostState]int `json:"counts,omitempty"`
}

// HostState is how far one host of a run has come.
type HostState string

// The states of a host of a run. From HostApplied on they are final.
const (
	HostWaiting     HostState = "waiting"
	HostPrechecking HostState = "prechecking"
	HostReady       HostState = "ready" // its precheck has agreed
	HostApplying    HostState = "applying"

	HostApplied   HostState = "applied" // and has proved it
	HostHad       HostState = "had-it-already"
	HostFailed    HostState = "failed"
	HostUnknown   HostState = "unknown" // its apply was begun, and its end is not known
	HostAway      HostState = "away"
	HostSkipped   HostState = "skipped"
	HostCancelled HostState = "cancelled"
)

// Final tells whether the host has come to its end in this run.
func (s HostState) Final() bool { return !s.atWork() && s != HostWaiting && s != HostReady }

// atWork tells whether the host has a job of the run.
func (s HostState) atWork() bool { return s == HostPrechecking || s == HostApplying }

// bad tells whether the state counts as a failure of the run.
func (s HostState) bad() bool { return s == HostFailed || s == HostUnknown }

// RunHost is one host of a run (class run_host).
type RunHost struct {
	Run   xapi.UUID `json:"run"`
	Host  xapi.Ref  `json:"host"`
	Order int       `json:"order"`
	Wave  int       `json:"wave"` // index in Run.Waves; -1: the host needs nothing
	State HostState `json:"state"`
	Job   xapi.Ref  `json:"job,omitempty"` // the last one
	// Reason says what a host waits for, or why its end is what it is.
	Reason string    `json:"reason,omitempty"`
	Since  time.Time `json:"since"` // of State
	// Deadline is when the state is given up; zero: never.
	Deadline time.Time `json:"deadline,omitzero"`
	Attempts int       `json:"attempts,omitempty"` // applies that were begun
	Error    []string  `json:"error,omitempty"`    // the code and its parameters
	Proof    *Proof    `json:"proof,omitempty"`
}

// in puts a host into a state as of now.
func (h RunHost) in(s HostState, now time.Time, reason string) RunHost {
	h.State, h.Since, h.Reason, h.Deadline = s, now, reason, time.Time{}
	return h
}

// because is in with the error that is the reason.
func (h RunHost) because(s HostState, now time.Time, err error) RunHost {
	e := xapi.AsError(err)
	h = h.in(s, now, plainError(e.Description()))
	h.Error = e.Description()
	return h
}

// Shown is the state of the host for people: in a run that has ended, one that
// never had its turn was skipped.
func (h RunHost) Shown(r Run) (HostState, string) {
	switch {
	case !r.State.Ended() || h.State.Final():
		return h.State, h.Reason
	case r.State == RunCancelled:
		return HostCancelled, "not touched: the run was cancelled before its turn"
	}
	return HostSkipped, "not touched: the run stopped before its turn"
}

// runHosts reads the hosts of a run, in their order.
func runHosts(v *store.View, run xapi.UUID) (refs []xapi.Ref, hosts []RunHost, err error) {
	type one struct {
		ref xapi.Ref
		RunHost
	}
	var all []one
	for _, ref := range v.Refs(ClassRunHost, "run", string(run)) {
		h, err := store.Get[RunHost](v, ClassRunHost, ref)
		if err != nil {
			return nil, nil, err
		}
		all = append(all, one{ref, h})
	}
	slices.SortFunc(all, func(a, b one) int { return cmp.Compare(a.Order, b.Order) })
	for _, o := range all {
		refs, hosts = append(refs, o.ref), append(hosts, o.RunHost)
	}
	return refs, hosts, nil
}

// runByUUID finds a run. Code: UUID_INVALID ["run", uuid].
func (p *Pool) runByUUID(id xapi.UUID) (ref xapi.Ref, run Run, err error) {
	err = p.Store.View(func(v *store.View) error {
		it, ok := v.ByUUID(ClassRun, id)
		if !ok {
			return xapi.NewError(xapi.UUIDInvalid, ClassRun, fmt.Sprintf("%.64s", id))
		}
		ref = it.Ref
		return it.Decode(&run)
	})
	return ref, run, err
}

// Runs lists all runs that are remembered, the oldest first.
func (p *Pool) Runs() (refs []xapi.Ref, runs []Run, err error) {
	err = p.Store.View(func(v *store.View) error {
		refs, runs, err = runsOf(v)
		return err
	})
	return refs, runs, err
}

func runsOf(v *store.View) (refs []xapi.Ref, runs []Run, err error) {
	for _, it := range v.List(ClassRun) {
		var run Run
		if err := it.Decode(&run); err != nil {
			return nil, nil, err
		}
		refs, runs = append(refs, it.Ref), append(runs, run)
	}
	return refs, runs, nil
}

// OpenRuns lists the runs that were begun and have not ended.
func (p *Pool) OpenRuns() (refs []xapi.Ref, runs []Run, err error) {
	all, recs, err := p.Runs()
	for i, run := range recs {
		if !run.State.Ended() {
			refs, runs = append(refs, all[i]), append(runs, run)
		}
	}
	return refs, runs, err
}

// hostText names a host, with its uuid: names need not differ.
func hostText(v *store.View, ref xapi.Ref) string {
	h, err := store.Get[Host](v, ClassHost, ref)
	if err != nil || h.NameLabel == "" {
		return hostName(v, ref)
	}
	return fmt.Sprintf("%s (%s)", h.NameLabel, h.UUID)
}

// hostName is the name of a host for people.
func hostName(v *store.View, ref xapi.Ref) string {
	h, err := store.Get[Host](v, ClassHost, ref)
	switch {
	case err != nil:
		return "a host that left the pool"
	case h.NameLabel == "":
		return string(h.UUID)
	}
	return h.NameLabel
}

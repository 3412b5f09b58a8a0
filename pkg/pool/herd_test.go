package pool

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// herd is a pool of light hosts in one process: each takes its jobs through the
// same calls as an agent. One watch finds out whom a change concerns, as the link
// does.
type herd struct {
	*rig
	patch xapi.Ref
	hosts []xapi.Ref // the first is the coordinator
	takes time.Duration

	mu      sync.Mutex
	fail    map[xapi.Ref]func(kind JobKind) *Outcome // nil outcome: it works
	applies []xapi.Ref                               // in the order they were begun
	now     int
	most    int                        // applies at the same time
	gate    map[xapi.Ref]chan struct{} // an apply of the host ends when it is closed
	gone    map[xapi.Ref]bool          // hosts that take nothing
	seen    map[xapi.Ref]bool
	stop    context.CancelFunc
	wg      sync.WaitGroup
}

// newHerd makes a pool of n hosts, all at work.
func newHerd(t testing.TB, n int) *herd {
	t.Helper()
	h := &herd{
		rig: newRig(t), fail: map[xapi.Ref]func(JobKind) *Outcome{}, gate: map[xapi.Ref]chan struct{}{},
		gone: map[xapi.Ref]bool{}, seen: map[xapi.Ref]bool{},
	}
	h.Local = &host{files: map[string]Patch{}}
	_, h.patch = h.golden(h.sr(h.memorySpec("mem")), []byte("x"))
	h.hosts = []xapi.Ref{h.Self}
	for len(h.hosts) < n {
		h.must(h.Store.Update(t.Context(), func(tx *store.Tx) error {
			for i := 0; i < 100 && len(h.hosts) < n; i++ {
				ref := xapi.NewRef()
				tx.Put(ClassHost, ref, Host{
					UUID: xapi.NewUUID(), OtherConfig: map[string]string{}, Tags: []string{},
				})
				h.hosts = append(h.hosts, ref)
			}
			return nil
		}))
	}
	h.hosts = nil
	h.must(h.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassHost) {
			h.hosts = append(h.hosts, it.Ref)
		}
		return nil
	}))
	for from := 0; from < n; from += 100 { // the order within one transaction is by ref
		h.must(h.Store.Update(t.Context(), func(tx *store.Tx) error {
			for i := from; i < min(from+100, n); i++ {
				rec, err := store.Read[Host](tx, ClassHost, h.hosts[i])
				if err != nil {
					return err
				}
				rec.NameLabel = fmt.Sprintf("host%d", i+1)
				tx.Put(ClassHost, h.hosts[i], rec)
			}
			return nil
		}))
	}
	h.work()
	return h
}

// work starts the tasks and the hosts.
func (h *herd) work() {
	tasks := task.NewManager(h.Store, func() xapi.Ref { return h.Self }, h.Log)
	h.Tasks = tasks
	ctx, cancel := context.WithCancel(context.Background())
	h.stop = sync.OnceFunc(func() { cancel(); tasks.Stop(); h.wg.Wait() })
	h.t.Cleanup(h.stop)
	h.wg.Go(func() { h.watch(ctx, h.Store) })
}

func (h *herd) watch(ctx context.Context, s *store.Store) {
	rev := int64(0)
	for {
		err := s.Until(ctx, func(v *store.View) (bool, error) {
			changes, _ := v.Since(rev)
			for _, c := range changes {
				if c.Class == ClassJob && c.Op != store.Del {
					h.see(ctx, c.Item)
				}
			}
			rev = v.Revision()
			return false, nil
		})
		if err != nil {
			return
		}
	}
}

func (h *herd) see(ctx context.Context, it store.Item) {
	var job Job
	if it.Decode(&job) != nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if job.Cancel && h.gate[job.Host] != nil && job.State == JobClaimed {
		close(h.gate[job.Host])
		delete(h.gate, job.Host)
	}
	if job.State != JobQueued || h.seen[it.Ref] || h.gone[job.Host] {
		return
	}
	h.seen[it.Ref] = true
	h.wg.Go(func() { h.carry(ctx, it.Ref, job) })
}

// carry is one job on one host.
func (h *herd) carry(ctx context.Context, ref xapi.Ref, job Job) {
	attempt, err := h.JobClaim(ctx, ref)
	if err != nil {
		return
	}
	h.mu.Lock()
	apply, gate := job.Kind == JobApply, h.gate[job.Host]
	if apply {
		h.applies = append(h.applies, job.Host)
		h.now++
		h.most = max(h.most, h.now)
	}
	how := h.fail[job.Host]
	h.mu.Unlock()
	if apply {
		select {
		case <-time.After(h.takes):
		case <-ctx.Done():
		}
		if gate != nil {
			select {
			case <-gate:
			case <-ctx.Done():
				return
			}
		}
	}
	o := Outcome{Output: "done"}
	if rec, err := h.Job(ref); err == nil && rec.Cancel {
		o.Err = xapi.NewError(xapi.TaskCancelled, string(job.Task.OrNull()))
	}
	if how != nil {
		if said := how(job.Kind); said != nil {
			o = *said
		}
	}
	if apply && o.Err == nil && o.Proof == nil {
		o.Proof = proofOf(h.Pool, job.Patch)
	}
	o.Attempt = attempt
	h.mu.Lock()
	if apply {
		h.now--
	}
	h.mu.Unlock()
	if err := h.JobFinish(context.WithoutCancel(ctx), ref, o); err != nil && ctx.Err() == nil {
		h.t.Errorf("the end of a job: %v", err)
	}
}

// failing lets a host fail at one kind of job.
func (h *herd) failing(i int, kind JobKind, o Outcome) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail[h.hosts[i]] = func(k JobKind) *Outcome {
		if k != kind {
			return nil
		}
		return &o
	}
}

func (h *herd) mended(i int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.fail, h.hosts[i])
}

// hold keeps applies of a host from ending; the function it gives lets go.
func (h *herd) hold(i int) (letGo func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := make(chan struct{})
	h.gate[h.hosts[i]] = c
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.gate[h.hosts[i]] == c {
			close(c)
			delete(h.gate, h.hosts[i])
		}
	}
}

// away stores that a host is away, or is there again.
func (h *herd) away(i int, since time.Time) {
	h.t.Helper()
	h.mu.Lock()
	h.gone[h.hosts[i]] = !since.IsZero()
	h.mu.Unlock()
	h.must(h.Store.Update(h.t.Context(), func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, h.hosts[i])
		rec.Away = since
		tx.Put(ClassHost, h.hosts[i], rec)
		return err
	}))
}

// began gives the places, from 0, of the hosts whose apply was begun, in that order.
func (h *herd) began() (order []int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, ref := range h.applies {
		order = append(order, slices.Index(h.hosts, ref))
	}
	return order
}

func (h *herd) begin(pol Policy) xapi.UUID {
	h.t.Helper()
	id, err := h.RunStart(h.t.Context(), h.patch, pol)
	h.must(err)
	return id
}

// until waits for a run to satisfy a condition.
func (h *herd) until(id xapi.UUID, what string, cond func(run Run, hosts []RunHost) bool) (run Run, hosts []RunHost) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 60*time.Second)
	defer cancel()
	err := h.Store.Until(ctx, func(v *store.View) (bool, error) {
		it, ok := v.ByUUID(ClassRun, id)
		if !ok {
			return false, fmt.Errorf("run %s is gone", id)
		}
		run = Run{}
		if err := it.Decode(&run); err != nil {
			return false, err
		}
		var err error
		_, hosts, err = runHosts(v, id)
		return cond(run, hosts), err
	})
	if err != nil {
		h.t.Fatalf("%s: %v; %+v %+v", what, err, run, hosts)
	}
	return run, hosts
}

func (h *herd) ended(id xapi.UUID, want RunState) (run Run, hosts []RunHost) {
	h.t.Helper()
	run, hosts = h.until(id, "the end", func(run Run, _ []RunHost) bool { return run.State.Ended() })
	if run.State != want {
		h.t.Fatalf("the run is %s (%s), want %s: %+v", run.State, run.Reason, want, hosts)
	}
	return run, hosts
}

// states gives how each host is shown, by its place in the pool.
func (h *herd) states(run Run, hosts []RunHost) []HostState {
	out := make([]HostState, len(h.hosts))
	for _, rh := range hosts {
		out[slices.Index(h.hosts, rh.Host)], _ = rh.Shown(run)
	}
	return out
}

func (h *herd) want(run Run, hosts []RunHost, want ...HostState) {
	h.t.Helper()
	if got := h.states(run, hosts); !slices.Equal(got, want) {
		h.t.Errorf("the hosts are %v, want %v; %+v", got, want, hosts)
	}
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// RunTasks is the part of task.Manager by which a run goes on after the call that
// began it has answered.
type RunTasks interface {
	Begin(ctx context.Context, spec task.Spec) (*task.Handle, error)
	Go(ref xapi.Ref, f task.Func)
	Destroy(ctx context.Context, ref xapi.Ref) error
}

// PatchPoolApply applies the patch to every host that lacks it, one after
// another, and stops at the first that fails. Hosts that have it, or are exempt, are
// passed over. It marks the patch as applied to the pool also when nothing was left
// to do. Codes: those of PatchApply, HOST_OFFLINE [host].
func (p *Pool) PatchPoolApply(ctx context.Context, patch xapi.Ref) error {
	run := Run{Patch: patch, Task: task.FromContext(ctx).Ref(), Classic: true}
	run.Policy = Policy{AtOnce: 1, StopAfter: 1, NoPrecheck: true, Coordinator: CoordinatorAny}
	ref, _, err := p.makeRun(ctx, run)
	if err != nil {
		return err
	}
	return p.ContinueRun(ctx, ref)
}

// RunStart begins a run by a policy and gives its uuid; it goes on as a task of its
// own. Codes: HANDLE_INVALID, VALUE_NOT_SUPPORTED [field, value, reason],
// OTHER_OPERATION_IN_PROGRESS ["run", ref, text] when an open run has one of the
// hosts, those of Pool.Confirmed.
func (p *Pool) RunStart(ctx context.Context, patch xapi.Ref, pol Policy) (xapi.UUID, error) {
	pol, err := pol.Check()
	if err != nil {
		return "", err
	}
	if pol.DryRun {
		return "", unsupported("dry_run", "true", "a dry run is not started; RunPlan tells what it would do")
	}
	if p.Confirmed != nil {
		if err := p.Confirmed(patch); err != nil {
			return "", err
		}
	}
	return p.inTask(ctx, func(t xapi.Ref) (xapi.Ref, xapi.UUID, error) {
		return p.makeRun(ctx, Run{Patch: patch, Policy: pol, Task: t})
	})
}

// inTask makes a task, has f write down a run of that task, and drives the run in it.
func (p *Pool) inTask(ctx context.Context, f func(t xapi.Ref) (xapi.Ref, xapi.UUID, error)) (xapi.UUID, error) {
	if p.Tasks == nil {
		return "", xapi.Internal("there is nothing to drive a run")
	}
	h, err := p.Tasks.Begin(ctx, task.Spec{Label: "run", Description: "applies a patch by a policy; see patchd run show"})
	if err != nil {
		return "", err
	}
	ref, id, err := f(h.Ref())
	if err != nil {
		p.Tasks.Go(h.Ref(), func(context.Context, *task.Handle) (string, error) { return "", err })
		return "", errors.Join(err, p.Tasks.Destroy(context.WithoutCancel(ctx), h.Ref()))
	}
	p.Tasks.Go(h.Ref(), func(ctx context.Context, _ *task.Handle) (string, error) {
		return "<value></value>", p.ContinueRun(Resuming(ctx), ref)
	})
	return id, nil
}

// RunPlan tells which hosts a run would have, in which waves, and which of them need
// nothing. It changes nothing. Codes: those of RunStart.
func (p *Pool) RunPlan(patch xapi.Ref, pol Policy) (run Run, hosts []RunHost, err error) {
	if pol, err = pol.Check(); err != nil {
		return run, nil, err
	}
	err = p.Store.View(func(v *store.View) error {
		run, hosts, err = p.planRun(v, Run{Patch: patch, Policy: pol})
		return err
	})
	return run, hosts, err
}

// makeRun writes a run and its hosts down. The hosts of a large pool do not fit into
// one transaction: until the last of them is there the run is being prepared, and a
// crash undoes it.
func (p *Pool) makeRun(ctx context.Context, run Run) (ref xapi.Ref, id xapi.UUID, err error) {
	p.runs.making.Lock()
	defer p.runs.making.Unlock()
	var hosts []RunHost
	err = p.Store.View(func(v *store.View) error {
		run, hosts, err = p.planRun(v, run)
		return err
	})
	if err != nil {
		return "", "", err
	}
	ref = xapi.NewRef()
	for left := hosts; ; {
		batch := left[:min(setBatch, len(left))]
		left = left[len(batch):]
		run.State = RunPreparing
		if len(left) == 0 {
			run.State = RunRunning
		}
		err := p.Store.Update(ctx, func(tx *store.Tx) error {
			if !tx.Has(ClassPatch, run.Patch) {
				return xapi.NewError(xapi.HandleInvalid, ClassPatch, string(run.Patch))
			}
			tx.Put(ClassRun, ref, run)
			for _, h := range batch {
				tx.Put(ClassRunHost, xapi.NewRef(), h)
			}
			return nil
		})
		if err != nil {
			end, cancel := after(ctx)
			defer cancel()
			return "", "", errors.Join(err, p.dropRun(end, ref, run.UUID))
		}
		if len(left) == 0 {
			return ref, run.UUID, nil
		}
	}
}

// planRun fills in a run and gives its hosts, with those that need nothing last.
func (p *Pool) planRun(v *store.View, run Run) (Run, []RunHost, error) {
	patch, err := store.Get[Patch](v, ClassPatch, run.Patch)
	if err != nil {
		return run, nil, err
	}
	chosen, named, err := run.Policy.choose(v)
	if err != nil {
		return run, nil, err
	}
	if err := assertFree(v, run, chosen); err != nil {
		return run, nil, err
	}
	have := map[xapi.Ref]HostPatch{}
	for _, ref := range v.Refs(ClassHostPatch, "pool_patch", string(run.Patch)) {
		hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
		if err != nil {
			return run, nil, err
		}
		have[hp.Host] = hp
	}
	now := p.Now()
	run.UUID, run.State, run.Total = xapi.NewUUID(), RunRunning, len(chosen)
	run.Created, run.Begun, run.Since = now, now, now
	var lacking []xapi.Ref
	var idle []RunHost
	for _, ref := range chosen {
		h := RunHost{Run: run.UUID, Host: ref, Wave: -1}
		hp, there := have[ref]
		exempt, why := exemption(v, ref, patch.UUID)
		unknown := hp.OtherConfig[KeyState] == StateUnknown
		switch {
		case hp.Applied:
			idle = append(idle, h.in(HostHad, now, "it has the patch"))
		case there && !unknown:
			return run, nil, xapi.NewError(xapi.OtherOperationInProgress, "Pool_patch", string(run.Patch),
				"the patch is being applied to host "+hostText(v, ref))
		case exempt:
			idle = append(idle, h.in(HostSkipped, now, "exempt: "+why))
		case unknown && !run.Classic && !named[ref]:
			idle = append(idle, h.in(HostSkipped, now, "the outcome of an earlier apply is unknown: look at the host, then say `patchd patch settle`, or name the host"))
		default:
			lacking = append(lacking, ref)
		}
	}
	_, pool, err := poolOf(v)
	if err != nil {
		return run, nil, err
	}
	var hosts []RunHost
	names, waves := run.Policy.arrange(lacking, pool.Master)
	run.Waves = names
	for w, wave := range waves {
		for _, ref := range wave {
			h := RunHost{Run: run.UUID, Host: ref, Wave: w}
			hosts = append(hosts, h.in(HostWaiting, now, fmt.Sprintf("it waits for its turn in %q", names[w])))
		}
	}
	hosts = append(hosts, idle...)
	for i := range hosts {
		hosts[i].Order = i
	}
	return run, hosts, nil
}

// poolOf gives the one pool record of a view.
func poolOf(v *store.View) (ref xapi.Ref, rec PoolRecord, err error) {
	for _, it := range v.List(ClassPool) {
		return it.Ref, rec, it.Decode(&rec)
	}
	return "", rec, fmt.Errorf("the store holds no pool record")
}

// choose gives the hosts of a policy, the oldest first, and makes refs of the names in
// it. named are those that Hosts names. Codes: HANDLE_INVALID [host, name],
// VALUE_NOT_SUPPORTED.
func (pol *Policy) choose(v *store.View) (hosts []xapi.Ref, named map[xapi.Ref]bool, err error) {
	if named, err = refsOfHosts(v, pol.Hosts); err != nil {
		return nil, nil, err
	}
	canary, err := refsOfHosts(v, pol.CanaryHosts)
	if err != nil {
		return nil, nil, err
	}
	all := len(pol.Hosts) == 0 && len(pol.Tags) == 0
	pol.Hosts, pol.CanaryHosts = nil, nil
	for _, it := range v.List(ClassHost) {
		var h Host
		if err := it.Decode(&h); err != nil {
			return nil, nil, err
		}
		tagged := slices.ContainsFunc(pol.Tags, func(t string) bool { return slices.Contains(h.Tags, t) })
		in := all || tagged || named[it.Ref]
		if in {
			hosts = append(hosts, it.Ref)
		}
		if named[it.Ref] {
			pol.Hosts = append(pol.Hosts, it.Ref)
		}
		if canary[it.Ref] {
			pol.CanaryHosts = append(pol.CanaryHosts, it.Ref)
			if !in {
				return nil, nil, unsupported("canary", hostText(v, it.Ref), "it is none of the hosts of the run")
			}
		}
	}
	if len(hosts) == 0 {
		return nil, nil, unsupported("tags", fmt.Sprint(pol.Tags), "no host has one of them")
	}
	return hosts, named, nil
}

// refsOfHosts finds hosts by ref or uuid.
func refsOfHosts(v *store.View, names []xapi.Ref) (map[xapi.Ref]bool, error) {
	refs := map[xapi.Ref]bool{}
	for _, n := range names {
		if _, ok := v.Get(ClassHost, n); ok {
			refs[n] = true
			continue
		}
		it, ok := v.ByUUID(ClassHost, xapi.UUID(n))
		if !ok {
			return nil, xapi.NewError(xapi.HandleInvalid, ClassHost, fmt.Sprintf("%.64s", n))
		}
		refs[it.Ref] = true
	}
	return refs, nil
}

// assertFree refuses hosts that an open run has. Two pool_applies of different
// patches may go on at the same time, as ever: a host takes one after the other.
func assertFree(v *store.View, run Run, hosts []xapi.Ref) error {
	refs, runs, err := runsOf(v)
	if err != nil {
		return err
	}
	wanted := make(map[xapi.Ref]bool, len(hosts))
	for _, h := range hosts {
		wanted[h] = true
	}
	for i, other := range runs {
		if other.State.Ended() || other.UUID == run.UUID || run.Classic && other.Classic && other.Patch != run.Patch {
			continue
		}
		_, theirs, err := runHosts(v, other.UUID)
		if err != nil {
			return err
		}
		for _, h := range theirs {
			if wanted[h.Host] && h.Wave >= 0 {
				return xapi.NewError(xapi.OtherOperationInProgress, ClassRun, string(refs[i]),
					fmt.Sprintf("host %s is in run %s, which is %s", hostText(v, h.Host), other.UUID, other.State))
			}
		}
	}
	return nil
}

// dropRun removes a run and its hosts, the run last.
func (p *Pool) dropRun(ctx context.Context, ref xapi.Ref, id xapi.UUID) error {
	for {
		var hosts []xapi.Ref
		err := p.Store.View(func(v *store.View) error {
			hosts = v.Refs(ClassRunHost, "run", string(id))
			return nil
		})
		if err != nil {
			return err
		}
		last := len(hosts) <= setBatch
		err = p.Store.Update(ctx, func(tx *store.Tx) error {
			for _, h := range hosts[:min(setBatch, len(hosts))] {
				tx.Delete(ClassRunHost, h)
			}
			if last {
				tx.Delete(ClassRun, ref)
			}
			return nil
		})
		if err != nil || last {
			return err
		}
	}
}

// How many ended runs are kept, how many hosts of them, and how long.
const (
	runKeep     = 100
	runHostKeep = 50_000
	runKeepTime = 30 * 24 * time.Hour
)

// CollectRuns removes old runs that have ended.
func (p *Pool) CollectRuns(ctx context.Context) error {
	refs, runs, err := p.Runs()
	if err != nil {
		return err
	}
	kept, hosts := 0, 0
	for i := len(runs) - 1; i >= 0; i-- {
		run := runs[i]
		if !run.State.Ended() {
			continue
		}
		kept, hosts = kept+1, hosts+run.Total
		if kept == 1 || kept <= runKeep && hosts <= runHostKeep && p.Now().Sub(run.Finished) < runKeepTime {
			continue
		}
		if err := p.dropRun(ctx, refs[i], run.UUID); err != nil {
			return err
		}
	}
	return nil
}

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// Coordinator is what a host needs of the pool's coordinator. *pool.Pool is
// one; across hosts it is spoken over the network.
type Coordinator interface {
	Jobs(host xapi.Ref) (jobs []pool.Assignment, rev int64, err error)
	WaitChange(ctx context.Context, rev int64) error
	FindJob(ctx context.Context, id xapi.UUID) (job pool.Job, there bool, err error)
	JobPromise(ctx context.Context, job xapi.Ref, want pool.Promise) (found int64, err error)
	JobClaim(ctx context.Context, job xapi.Ref) (attempt int64, err error)
	JobReport(ctx context.Context, job xapi.Ref, progress float64, tail string) error
	JobRequeue(ctx context.Context, job xapi.Ref) error
	JobFinish(ctx context.Context, job xapi.Ref, o pool.Outcome) error
	VDIDamaged(ctx context.Context, vdi xapi.Ref, text string) error
	FetchPatch(ctx context.Context, uuid xapi.UUID) (file io.ReadCloser, size int64, err error)
	Resync(ctx context.Context, host xapi.Ref, stamps []pool.Stamp) error
	MessageCreate(ctx context.Context, name string, priority int64, cls string, obj xapi.UUID, body string) (xapi.Ref, error)
}

// Storage gives the repositories plugged on this host, and works on them for
// others. *pool.Pool is one.
type Storage interface {
	AttachedSRs() ([]pool.AttachedSR, error)
	// Replicas lists the VDIs with that block map in those SRs.
	Replicas(digest string) ([]pool.Replica, error)
	// Stage makes such a VDI, from blocks of other hosts where it must be.
	Stage(ctx context.Context, s pool.StageSpec) (xapi.Ref, error)
	// VDIDamaged records that such a VDI was found damaged.
	VDIDamaged(ctx context.Context, vdi xapi.Ref, text string) error
	// HostCall runs the method of a job of kind call. What it has changed is
	// known to the coordinator when it returns.
	HostCall(ctx context.Context, name string, args json.RawMessage) (string, error)
}

// Options is what an agent works with.
type Options struct {
	Coordinator Coordinator
	Storage     Storage
	Dom0        dom0.Dom0
	Log         logrus.FieldLogger

	Self     xapi.Ref
	SelfUUID xapi.UUID
	PoolUUID xapi.UUID

	JobsDir  string // the journal
	PatchDir string
	KeysDir  string
	Pinned   []string // SHA-256 of unsigned files that are allowed
	// Attested is where this host remembers what it has verified; "": nowhere.
	Attested patch.Attestations
	// Runner is the command line that runs RunRunner; the journal folder is
	// appended.
	Runner   []string
	Timeouts Timeouts
	Now      func() time.Time
	// KeepFree says how many bytes must stay free on the filesystem of a path;
	// nil: none.
	KeepFree func(path string) int64
	// MaxCleartext bounds clear-signed files, in bytes; 0: the default.
	MaxCleartext int64
	// Layout is who lays out the images this host makes.
	Layout vdi.LayoutKind
	// KeepQueued tells that who asked for a job lives elsewhere: a job that
	// nothing was done for waits on over a restart of this host.
	KeepQueued bool
}

// Agent carries out the jobs of one host.
type Agent struct {
	Options
	journal journal
	checks  checks

	mu      sync.Mutex
	running map[xapi.UUID]*execution
	wg      sync.WaitGroup
	// One apply at a time: two patches that change one host at once cannot
	// know of each other.
	applying  chan struct{}
	prechecks chan struct{}
	wake      chan struct{} // a job has left this process: look again
}

// maxPrechecks is how many prechecks may run at once on this host.
const maxPrechecks = 4

// New makes an agent; nothing happens before Recover and Run.
func New(o Options) *Agent {
	if o.Timeouts == (Timeouts{}) {
		o.Timeouts = DefaultTimeouts
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Agent{
		Options: o, journal: journal{o.JobsDir}, running: map[xapi.UUID]*execution{},
		applying: make(chan struct{}, 1), prechecks: make(chan struct{}, maxPrechecks), wake: make(chan struct{}, 1),
	}
}

// Run takes the jobs of this host, by watch, until ctx ends. Runners go on
// after that; whatever was being prepared is undone.
func (a *Agent) Run(ctx context.Context) error {
	defer a.wg.Wait()
	for {
		jobs, rev, err := a.jobs()
		if err != nil {
			return err
		}
		for _, j := range jobs {
			a.see(ctx, j)
		}
		if err := a.wait(ctx, rev); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// wait blocks until the records are newer than rev or an execution has ended.
func (a *Agent) wait(ctx context.Context, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed := make(chan error, 1)
	go func() { changed <- a.Coordinator.WaitChange(ctx, rev) }()
	select {
	case err := <-changed:
		return err
	case <-a.wake:
		cancel()
		<-changed
		return nil
	}
}

// see begins a job that is new and cancels one that is no longer wanted.
func (a *Agent) see(ctx context.Context, j pool.Assignment) {
	a.mu.Lock()
	e, ok := a.running[j.Job.UUID]
	a.mu.Unlock()
	if ok {
		if j.Job.Cancel {
			e.cancel(xapi.NewError(xapi.TaskCancelled, string(j.Job.Task.OrNull())))
		}
		return
	}
	if j.Job.State != pool.JobQueued {
		return // an earlier attempt that Recover has to settle
	}
	work := (*execution).work
	if j.Job.Kind == pool.JobCall {
		work = (*execution).call
	}
	a.start(ctx, j.Job.UUID, func(e *execution) { work(e, j) })
}

// start runs f for one job in a goroutine that Run waits for.
func (a *Agent) start(ctx context.Context, id xapi.UUID, f func(e *execution)) {
	e := &execution{agent: a, id: id, stop: ctx}
	e.ctx, e.cancel = context.WithCancelCause(ctx)
	a.mu.Lock()
	a.running[id] = e
	a.mu.Unlock()
	a.wg.Add(1)
	go func() {
		defer a.wg.Done()
		defer func() {
			a.mu.Lock()
			delete(a.running, id)
			a.mu.Unlock()
			e.cancel(nil)
			select {
			case a.wake <- struct{}{}:
			default:
			}
		}()
		f(e)
	}()
}

// ResyncStamps compares this host's stampfiles with the records.
func (a *Agent) ResyncStamps(ctx context.Context) error {
	stamps, err := a.Stamps()
	if err != nil {
		return err
	}
	return a.Coordinator.Resync(ctx, a.Self, stamps)
}

// Stamps reads this host's stampfiles.
func (a *Agent) Stamps() ([]pool.Stamp, error) {
	stamps, bad, err := readStamps(a.PatchDir)
	if err != nil {
		return nil, err
	}
	for name, err := range bad {
		a.Log.WithError(err).WithField("stampfile", name).Warn("a stampfile makes no sense: it only keeps what the records say")
		stamps = append(stamps, pool.Stamp{Patch: pool.Patch{UUID: xapi.UUID(name)}, Garbled: true})
	}
	return stamps, nil
}

// AtWork tells whether this host works on any job.
func (a *Agent) AtWork() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.running) > 0
}

// Knows tells whether this host works on a job, or has something of it to settle.
func (a *Agent) Knows(job xapi.UUID) bool {
	a.mu.Lock()
	_, running := a.running[job]
	a.mu.Unlock()
	if running {
		return true
	}
	_, err := os.Lstat(a.journal.path(job))
	return err == nil
}

// Settle writes or removes the stampfile of a patch whose outcome an admin has
// told.
func (a *Agent) Settle(patch pool.Patch, applied bool) error {
	if applied {
		return writeStamp(a.PatchDir, patch.UUID, patch.InfoXML)
	}
	return removeStamp(a.PatchDir, patch.UUID)
}

// Recover settles what an earlier process of this host left: it ends, follows
// or undoes each journaled job, and the queued jobs that nothing was done for.
// It is called once, before Run, with the storage attached. Following goes on
// in the background until ctx ends.
func (a *Agent) Recover(ctx context.Context) error {
	entries, bad, err := a.journal.entries()
	if err != nil {
		return err
	}
	errs := []error{a.removeScraps()}
	known := map[xapi.UUID]bool{}
	for _, e := range entries {
		known[e.uuid()] = true
		errs = append(errs, a.recoverEntry(ctx, e))
	}
	jobs, _, err := a.jobs()
	errs = append(errs, err)
	for _, j := range jobs {
		id := j.Job.UUID
		switch {
		case known[id]:
		case bad[id] != nil:
			// The record tells enough to settle it; the sweeper finds its image.
			known[id] = true
			errs = append(errs, a.recoverEntry(ctx, Entry{Assignment: j, Created: j.Job.Created}))
			delete(bad, id)
		default:
			errs = append(errs, a.recoverUnjournaled(ctx, j))
		}
	}
	for id, err := range bad {
		a.Log.WithError(err).WithField("job", id).Warn("a journal entry makes no sense; no open job has it, and it is left alone")
	}
	errs = append(errs, a.killStrangers(ctx, known))
	return errors.Join(errs...)
}

// removeScraps removes files that were being written when this host's last
// process died: no name but a temporary one ever led to them.
func (a *Agent) removeScraps() error {
	var errs []error
	for dir, pattern := range map[string]string{
		a.JobsDir: ".import-*", a.PatchDir: ".*-*-*-*-*", appliedDir(a.PatchDir): ".*-*-*-*-*.*",
	} {
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		errs = append(errs, err)
		for _, name := range names {
			id, number, _ := strings.Cut(strings.TrimPrefix(filepath.Base(name), "."), ".")
			ours := xapi.UUID(id).Valid() && strings.Trim(number, "0123456789") == ""
			if dir != a.JobsDir && !ours {
				continue
			}
			errs = append(errs, os.Remove(name))
		}
	}
	return errors.Join(errs...)
}

func (a *Agent) recoverEntry(ctx context.Context, entry Entry) error {
	alive, err := a.Dom0.Alive(runnerGroup(entry.uuid()))
	if err != nil && !errors.Is(err, dom0.ErrNoGroups) {
		return err
	}
	if alive {
		a.Log.WithField("job", entry.uuid()).Info("a runner is still at work: following it")
		gate := a.gate(entry.Assignment.Job.Kind)
		select {
		case gate <- struct{}{}: // others wait for it, as they did before the restart
		default:
			gate = nil
		}
		a.start(ctx, entry.uuid(), func(e *execution) {
			e.gate = gate
			defer e.yield()
			e.follow(entry)
		})
		return nil
	}
	e := &execution{agent: a, id: entry.uuid(), ctx: ctx, stop: ctx, cancel: func(error) {}}
	if err = e.settle(entry); err != nil {
		a.start(ctx, entry.uuid(), func(e *execution) {
			e.conclude(func() error { return e.settle(entry) })
		})
	}
	return err
}

// recoverUnjournaled sees to a job for which this host did nothing yet.
func (a *Agent) recoverUnjournaled(ctx context.Context, j pool.Assignment) error {
	switch {
	case (j.Job.Resumes || a.KeepQueued) && j.Job.State == pool.JobQueued:
		return nil
	case j.Job.Kind == pool.JobCall && !j.Job.Cancel && pool.CallsAgain(j.Job.Call) && j.Job.Attempt < maxAttempts:
		return a.Coordinator.JobRequeue(ctx, j.Ref)
	}
	return a.Coordinator.JobFinish(ctx, j.Ref, pool.Outcome{Err: interrupted(j.Job, ""), Attempt: j.Job.Attempt})
}

// interrupted is the failure of a job of which nothing has changed the host, or of a
// call, which was either done or is undone. said is what its runner said last.
func interrupted(j pool.Job, said string) *xapi.Error {
	if j.Kind == pool.JobCall && j.State != pool.JobQueued {
		return xapi.NewError(xapi.InternalError, "the host was interrupted in "+j.Call+
			": patchd there was ended. Either it is done or nothing of it is left: look before you ask for it again")
	}
	text := "the " + string(j.Kind) + " was interrupted before it changed anything: patchd, or the process that ran it, was ended; ask for it again"
	if said != "" {
		text += ". Last words: " + said
	}
	return xapi.NewError(xapi.InternalError, text)
}

// killStrangers ends control groups of jobs that no journal knows: their
// folder went before the group did. Whoever asked a patch for its `info` before
// this start is dead, too.
func (a *Agent) killStrangers(ctx context.Context, known map[xapi.UUID]bool) error {
	strange, err := a.strangeGroups(func(id xapi.UUID) bool { return known[id] })
	if err != nil {
		return err
	}
	groups, err := a.Dom0.Groups()
	if err != nil {
		return err
	}
	for _, g := range groups {
		if strings.HasPrefix(g, "info-") || strings.HasPrefix(g, "sandbox-") {
			strange = append(strange, g)
		}
	}
	var errs []error
	for _, g := range strange {
		errs = append(errs, a.Dom0.Kill(ctx, g, a.Timeouts.Grace))
	}
	return errors.Join(errs...)
}

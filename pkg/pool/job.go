package pool

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// JobKind says what a host is to do with a patch.
type JobKind string

// The kinds of a job.
const (
	JobPrecheck JobKind = "precheck"
	JobApply    JobKind = "apply"
	// JobCall is a method of the host's own pool.Pool, named by Job.Call: what
	// lies on a host is worked on by that host.
	JobCall JobKind = "call"
)

// JobState is how far a job has come.
type JobState string

// The states of a job, in their order. Before a job is claimed nothing of the
// patch's precheck or apply has run; afterwards something may have.
const (
	JobQueued  JobState = "queued"
	JobClaimed JobState = "claimed"
	JobDone    JobState = "done"
)

// Job is work for one host (class job, never on the wire). The record is the
// truth: whoever asked may go away, and the host may die and come back.
type Job struct {
	UUID  xapi.UUID `json:"uuid"`
	Kind  JobKind   `json:"kind"`
	Patch xapi.Ref  `json:"patch,omitempty"` // none of a call
	Host  xapi.Ref  `json:"host"`
	// Call and Args are the method of a JobCall and its parameters; see HostCall.
	Call      string          `json:"call,omitempty"`
	Args      json.RawMessage `json:"args,omitempty"`
	HostPatch xapi.Ref        `json:"host_patch,omitempty"`
	Task      xapi.Ref        `json:"task,omitempty"`
	Run       xapi.UUID       `json:"run,omitempty"` // of the Run that began it
	// VDI is the golden image the job reads, for as long as it is not done.
	VDI   xapi.Ref `json:"VDI,omitempty"`
	State JobState `json:"state"`
	// What the job is promised by JobPromise, until it is done or queued again.
	SR    xapi.Ref  `json:"SR,omitempty"`    // where its work volume lies
	Room  int64     `json:"room,omitempty"`  // bytes there, those the volume takes already included
	Work  xapi.UUID `json:"work,omitempty"`  // of that volume
	Clone bool      `json:"clone,omitempty"` // it began with the blocks of VDI, which are not its own
	// Attempt counts the claims; an agent never acts on a lower one than it has seen.
	Attempt int64 `json:"attempt"`
	// Resumes tells that the job starts again when it was interrupted before
	// its claim; otherwise it is undone.
	Resumes bool `json:"resumes,omitempty"`
	Cancel  bool `json:"cancel,omitempty"`

	Created  time.Time `json:"created"`
	Finished time.Time `json:"finished"`

	Progress float64 `json:"progress,omitempty"` // 0 to 1
	Tail     string  `json:"tail,omitempty"`     // the last output so far

	// Output and Error are the outcome: Error is empty on success, else the
	// code and its parameters.
	Output string   `json:"output,omitempty"`
	Error  []string `json:"error,omitempty"`
	// Proof is what the host read back after an apply.
	Proof *Proof `json:"proof,omitempty"`
	// Unknown: the apply was begun and how it ended is not known. Withdrawn: the
	// job was ended before the host had claimed it.
	Unknown   bool `json:"unknown,omitempty"`
	Withdrawn bool `json:"withdrawn,omitempty"`
}

// Proof is what a host shows for an apply that it says has worked.
type Proof struct {
	Stamp   string    `json:"stamp"`   // SHA-256 of the stampfile as read back from disk, lower-case hexadecimal
	Payload string    `json:"payload"` // SHA-256 of the payload that was verified and run
	UUID    xapi.UUID `json:"uuid"`    // of the patch, as the stampfile says
	Version string    `json:"version"`
}

// Err is the failure of a job that is done, or nil.
func (j Job) Err() error {
	if len(j.Error) == 0 {
		return nil
	}
	return xapi.NewError(j.Error[0], j.Error[1:]...)
}

// Assignment is a job with all that a host must know to carry it out.
type Assignment struct {
	Ref      xapi.Ref  `json:"ref"`
	Job      Job       `json:"job"`
	PatchRef xapi.Ref  `json:"patch_ref"`
	Patch    Patch     `json:"patch"`
	VDI      *VDI      `json:"vdi,omitempty"` // nil: the patch has no VDI, or it dangles
	VDIRef   xapi.Ref  `json:"vdi_ref,omitempty"`
	Pool     xapi.UUID `json:"pool"`
	Host     xapi.UUID `json:"host"`
}

// Outcome is what a host reports of a job at its end.
type Outcome struct {
	Output string // what the verb printed, capped
	Err    *xapi.Error
	// Unknown: `apply` was begun and how it ended cannot be learned.
	Unknown bool
	// Settled: an outcome that was found at start, not now.
	At time.Time
	// Attempt is the claim that this is the outcome of; one of an earlier claim is refused.
	Attempt int64
	// Proof is of an apply that worked: without one that agrees with the patch's
	// record its outcome is unknown.
	Proof *Proof
}

// Jobs lists the open assignments of a host, oldest first, and the revision
// they were read at. WaitChange(rev) blocks until something may have changed.
func (p *Pool) Jobs(host xapi.Ref) (jobs []Assignment, rev int64, err error) {
	err = p.Store.View(func(v *store.View) (err error) {
		rev = v.Revision()
		jobs, err = p.JobsIn(v, host)
		return err
	})
	return jobs, rev, err
}

// JobsIn lists the open assignments of a host as one view has them, oldest
// first.
func (p *Pool) JobsIn(v *store.View, host xapi.Ref) (jobs []Assignment, err error) {
	for _, ref := range v.Refs(ClassJob, "host", string(host)) {
		job, err := store.Get[Job](v, ClassJob, ref)
		if err != nil {
			return nil, err
		}
		if job.State == JobDone {
			continue
		}
		a, err := p.assignment(v, ref, job)
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, a)
	}
	return jobs, nil
}

func (p *Pool) assignment(v *store.View, ref xapi.Ref, job Job) (Assignment, error) {
	a := Assignment{Ref: ref, Job: job, PatchRef: job.Patch, Pool: p.PoolUUID}
	host, err := store.Get[Host](v, ClassHost, job.Host)
	if err != nil {
		return a, err
	}
	a.Host = host.UUID
	if job.Kind == JobCall {
		return a, nil
	}
	if a.Patch, err = store.Get[Patch](v, ClassPatch, job.Patch); err != nil {
		return a, err
	}
	if vdi, err := store.Get[VDI](v, ClassVDI, a.Patch.VDI); err == nil {
		a.VDI, a.VDIRef = &vdi, a.Patch.VDI
	}
	return a, nil
}

// TaskJobs gives the jobs that have a task, by that task: also those that have
// ended and whose task may not know yet.
func (p *Pool) TaskJobs() (byTask map[xapi.Ref]xapi.Ref, err error) {
	byTask = map[xapi.Ref]xapi.Ref{}
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassJob) {
			var job Job
			if err := it.Decode(&job); err != nil {
				return err
			}
			if !job.Task.IsNull() {
				byTask[job.Task] = it.Ref // of a run: its last
			}
		}
		return nil
	})
	return byTask, err
}

// WaitChange blocks until the records are newer than rev.
func (p *Pool) WaitChange(ctx context.Context, rev int64) error { return p.Store.Wait(ctx, rev) }

// Job gives one job.
func (p *Pool) Job(ref xapi.Ref) (job Job, err error) {
	err = p.Store.View(func(v *store.View) error {
		job, err = store.Get[Job](v, ClassJob, ref)
		return err
	})
	return job, err
}

// JobByUUID finds a job by its uuid; ok is false when there is none.
func (p *Pool) JobByUUID(id xapi.UUID) (ref xapi.Ref, job Job, ok bool) {
	p.Store.View(func(v *store.View) error {
		it, found := v.ByUUID(ClassJob, id)
		ok = found && it.Decode(&job) == nil
		ref = it.Ref
		return nil
	})
	return ref, job, ok
}

// FindJob is JobByUUID for an agent, which may be far away.
func (p *Pool) FindJob(_ context.Context, id xapi.UUID) (job Job, there bool, err error) {
	_, job, there = p.JobByUUID(id)
	return job, there, nil
}

// wantedJob gives a job that waits to be carried out. Codes: TASK_CANCELLED,
// OTHER_OPERATION_IN_PROGRESS, HANDLE_INVALID.
func wantedJob(tx *store.Tx, ref xapi.Ref) (Job, error) {
	job, err := store.Read[Job](tx, ClassJob, ref)
	switch {
	case err != nil:
	case job.State != JobQueued:
		err = xapi.NewError(xapi.OtherOperationInProgress, "job", string(ref))
	case job.Cancel:
		err = xapi.NewError(xapi.TaskCancelled, string(job.Task.OrNull()))
	}
	return job, err
}

// JobClaim is the last gate before anything of a patch runs: it succeeds once
// for each attempt, and only for a job that is still wanted. Codes:
// TASK_CANCELLED, OTHER_OPERATION_IN_PROGRESS, HANDLE_INVALID.
func (p *Pool) JobClaim(ctx context.Context, ref xapi.Ref) (attempt int64, err error) {
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		job, err := wantedJob(tx, ref)
		if err != nil {
			return err
		}
		job.State = JobClaimed
		job.Attempt++
		attempt = job.Attempt
		tx.Put(ClassJob, ref, job)
		return nil
	})
	return attempt, err
}

// JobRequeue puts a claimed job of which nothing has run back into the queue.
// What it was promised is free again. One that is done stays so.
func (p *Pool) JobRequeue(ctx context.Context, ref xapi.Ref) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		var job Job
		if err := tx.Get(ClassJob, ref, &job); err != nil {
			return err
		}
		if job.State == JobDone {
			return nil
		}
		job.State = JobQueued
		job.release()
		tx.Put(ClassJob, ref, job)
		return nil
	})
}

// assertUnused refuses while an open job reads the VDI. Code: VDI_IN_USE.
func (p *Pool) assertUnused(tx *store.Tx, vdi xapi.Ref) error {
	for _, ref := range tx.Refs(ClassJob, "VDI", string(vdi)) {
		var job Job
		if tx.Peek(ClassJob, ref, &job) == nil && job.State != JobDone {
			return xapi.NewError(xapi.VDIInUse, string(vdi), string(job.Kind))
		}
	}
	return nil
}

// JobReport stores how far a job has come. It is for live display: the caller
// limits how often it calls.
func (p *Pool) JobReport(ctx context.Context, ref xapi.Ref, progress float64, tail string) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		var job Job
		if err := tx.Get(ClassJob, ref, &job); err != nil {
			return err
		}
		if job.State == JobDone || (job.Progress == progress && job.Tail == tail) {
			return nil
		}
		job.Progress, job.Tail = progress, tail
		tx.Put(ClassJob, ref, job)
		return nil
	})
}

// JobFinish ends a job and writes what follows from it into host_patch, in one
// transaction, and then into pool_patch. Repeated, it does nothing. An apply that
// worked counts only with a proof; without, it is recorded as unknown.
func (p *Pool) JobFinish(ctx context.Context, ref xapi.Ref, o Outcome) error {
	if o.At.IsZero() {
		o.At = p.Now()
	}
	var applied xapi.Ref // the patch, when the host has it now
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		applied = ""
		o := o
		var job Job
		if err := tx.Get(ClassJob, ref, &job); err != nil {
			return err
		}
		if job.State == JobDone {
			return nil
		}
		if o.Attempt < job.Attempt {
			return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("the report is of attempt %d, the job is at %d", o.Attempt, job.Attempt))
		}
		if job.Kind == JobApply && o.Err == nil && !o.Unknown {
			if err := checkProof(tx, job.Patch, o.Proof); err != nil {
				o.Unknown, o.Err = true, err
			} else {
				applied = job.Patch
			}
		}
		return p.endJob(tx, ref, job, o)
	})
	if xapi.Is(err, xapi.HandleInvalid) {
		return nil
	}
	if err == nil && applied != "" {
		err = p.settlePoolApplied(ctx, applied)
	}
	return err
}

// checkProof holds what a host shows for an apply against the patch's record. A
// patch without a digest is a classic file, whose payload the host alone has seen.
func checkProof(tx *store.Tx, ref xapi.Ref, proof *Proof) *xapi.Error {
	var patch Patch
	if tx.Get(ClassPatch, ref, &patch) != nil {
		return nil // it was removed: there is nothing to hold it against
	}
	stamp := sha256.Sum256([]byte(patch.InfoXML))
	var differs string
	switch {
	case proof == nil:
		differs = "it shows nothing"
	case proof.UUID != patch.UUID:
		differs = fmt.Sprintf("its stampfile names patch %.64s", proof.UUID)
	case proof.Stamp != hex.EncodeToString(stamp[:]):
		differs = "its stampfile holds something else"
	case patch.Digest != "" && proof.Payload != patch.Digest:
		differs = fmt.Sprintf("it ran a payload with SHA-256 %.64s, the record says %s", proof.Payload, patch.Digest)
	default:
		return nil
	}
	return xapi.NewError(xapi.PatchApplyFailed, "the host says that it has applied the patch and does not prove it: "+differs)
}

// withdrawJob ends a job that its host has not claimed: nothing of it has run, and
// the claim that may still come is refused. One that was claimed stays.
func (p *Pool) withdrawJob(ctx context.Context, ref xapi.Ref, why *xapi.Error) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		job, err := store.Read[Job](tx, ClassJob, ref)
		if xapi.Is(err, xapi.HandleInvalid) || err == nil && job.State != JobQueued {
			return nil
		}
		if err != nil {
			return err
		}
		job.State, job.Finished, job.VDI, job.Withdrawn = JobDone, p.Now(), "", true
		job.Error = why.Description()
		job.release()
		tx.Put(ClassJob, ref, job)
		if job.HostPatch != "" {
			tx.Delete(ClassHostPatch, job.HostPatch)
		}
		return nil
	})
}

// The keys of host_patch.other_config that patchd writes.
const (
	KeyState    = "patchd-state"    // StateUnknown, or absent
	KeyGuidance = "patchd-guidance" // what the patch asked to restart
)

// StateUnknown is the state of a host_patch whose apply was begun and whose
// end nobody knows.
const StateUnknown = "unknown"

func (p *Pool) finishApply(tx *store.Tx, job Job, o Outcome) error {
	var hp HostPatch
	if err := tx.Get(ClassHostPatch, job.HostPatch, &hp); err != nil {
		if xapi.Is(err, xapi.HandleInvalid) {
			return nil
		}
		return err
	}
	switch {
	case o.Unknown:
		hp.OtherConfig[KeyState] = StateUnknown
		tx.Put(ClassHostPatch, job.HostPatch, hp)
	case o.Err != nil:
		tx.Delete(ClassHostPatch, job.HostPatch)
	default:
		var patch Patch
		if err := tx.Get(ClassPatch, job.Patch, &patch); err != nil {
			return err
		}
		hp.Applied, hp.TimestampApplied = true, o.At
		hp.OtherConfig[KeyGuidance] = guidanceText(patch.AfterApplyGuidance)
		tx.Put(ClassHostPatch, job.HostPatch, hp)
	}
	return nil
}

func guidanceText(gs []xapi.Guidance) string {
	s := ""
	for i, g := range gs {
		if i > 0 {
			s += " "
		}
		s += string(g)
	}
	return s
}

// cancelWait is how long a cancelled job may take to come to its end before
// the caller is told anyway.
const cancelWait = 2 * time.Minute

// waitJob follows a job to its end and shows its progress in the task of ctx.
// When the task is cancelled the job is too; when the process stops the job
// goes on and the error is that of ctx.
func (p *Pool) waitJob(ctx context.Context, ref xapi.Ref) (Job, error) {
	job, err := p.followJob(ctx, ref)
	if err == nil || ctx.Err() == nil || !xapi.Is(context.Cause(ctx), xapi.TaskCancelled) {
		return job, err
	}
	cause := context.Cause(ctx)
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelWait)
	defer stop()
	if err := p.JobCancel(end, ref); err != nil {
		return job, errors.Join(cause, err)
	}
	if job, err = p.followJob(end, ref); err != nil {
		return job, errors.Join(cause, fmt.Errorf("job %s does not end: %w", job.UUID, err))
	}
	if job.Err() == nil {
		return job, nil // it was done before the cancel reached it
	}
	return job, cause
}

func (p *Pool) followJob(ctx context.Context, ref xapi.Ref) (Job, error) {
	t := task.FromContext(ctx)
	for {
		var job Job
		var rev int64
		err := p.Store.View(func(v *store.View) (err error) {
			rev = v.Revision()
			job, err = store.Get[Job](v, ClassJob, ref)
			return err
		})
		if err != nil {
			return job, err
		}
		if job.State == JobDone {
			if job.Err() != nil && job.Output != "" {
				t.Output(job.Output)
			}
			return job, nil
		}
		t.Progress(job.Progress)
		if job.Tail != "" {
			t.Output(job.Tail)
		}
		if err := p.Store.Wait(ctx, rev); err != nil {
			return job, err
		}
	}
}

// endJob makes a job done.
func (p *Pool) endJob(tx *store.Tx, ref xapi.Ref, job Job, o Outcome) error {
	job.State, job.Finished, job.Progress = JobDone, p.Now(), 1
	job.Output, job.Tail, job.VDI, job.Unknown = o.Output, "", "", o.Unknown
	job.release()
	if o.Err != nil {
		job.Error = o.Err.Description()
	} else {
		job.Proof = o.Proof
	}
	tx.Put(ClassJob, ref, job)
	if job.Kind == JobApply {
		return p.finishApply(tx, job, o)
	}
	return nil
}

// JobCancel asks the host of a job to end it. One that is done stays as it is;
// one that was not claimed, of a host that is not connected, ends at once: the
// host cannot claim it any more.
func (p *Pool) JobCancel(ctx context.Context, ref xapi.Ref) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		var job Job
		if err := tx.Get(ClassJob, ref, &job); err != nil {
			return err
		}
		if job.State == JobDone || job.Cancel {
			return nil
		}
		job.Cancel = true
		if job.State == JobQueued && p.Connected != nil && !p.Connected(job.Host) {
			return p.endJob(tx, ref, job, Outcome{Err: xapi.NewError(xapi.TaskCancelled, string(job.Task.OrNull())), At: p.Now()})
		}
		tx.Put(ClassJob, ref, job)
		return nil
	})
}

// JobAlive tells whether a job of that uuid is open: its working data is in use.
func (p *Pool) JobAlive(id xapi.UUID) bool {
	if p.Busy != nil && p.Busy(id) {
		return true
	}
	_, job, ok := p.JobByUUID(id)
	return ok && job.State != JobDone
}

// jobKeep is how long a finished job stays, for whoever still waits for it.
const jobKeep = time.Hour

// CollectJobs removes the jobs that ended more than an hour ago, in batches: a run of
// a large pool leaves thousands.
func (p *Pool) CollectJobs(ctx context.Context) error {
	var old []xapi.Ref
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassJob) {
			var job Job
			if err := it.Decode(&job); err != nil {
				return err
			}
			if job.State == JobDone && p.Now().Sub(job.Finished) > jobKeep {
				old = append(old, it.Ref)
			}
		}
		return nil
	})
	for err == nil && len(old) > 0 {
		batch := old[:min(setBatch, len(old))]
		old = old[len(batch):]
		err = p.Store.Update(ctx, func(tx *store.Tx) error {
			for _, ref := range batch { // what is done never opens again
				tx.Delete(ClassJob, ref)
			}
			return nil
		})
	}
	return err
}

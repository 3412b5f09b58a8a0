package pool

import (
	"context"
	"math"
	"slices"
	"strconv"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Room is promised in the records, and allocated by nobody: to VDIs in the
// making by their intents, to jobs by JobPromise. A promise ends with its
// record, and what its volume takes already counts against it, so that a promise
// and the room it was kept for are never counted twice.

// Promise is what a host asks for before it makes the work volume of a job.
type Promise struct {
	SR   xapi.Ref  `json:"SR"`
	Room int64     `json:"room"` // bytes
	Work xapi.UUID `json:"work"` // of the volume to be
	// Clone tells that the volume begins with the blocks of the job's VDI.
	Clone bool `json:"clone,omitempty"`
	// Free is what the host sees free there, in bytes: it counts where the SR is
	// not plugged on the coordinator.
	Free int64 `json:"free"`
}

// JobPromise promises room to a queued job, in the place of what it was promised
// before. found is what the SR has free and promised to nobody else, in bytes;
// when that is less than what was asked for, nothing was changed. Of two jobs
// that do not both fit the earlier is kept. Codes: HANDLE_INVALID,
// TASK_CANCELLED, OTHER_OPERATION_IN_PROGRESS when the job is not queued, those
// of Repository.
func (p *Pool) JobPromise(ctx context.Context, ref xapi.Ref, want Promise) (found int64, err error) {
	if want.Room < 0 || want.Free < 0 {
		return 0, xapi.NewError(xapi.InvalidValue, "room", strconv.FormatInt(min(want.Room, want.Free), 10))
	}
	taken, free, err := p.lookAtRoom(ctx, want)
	if err != nil {
		return 0, err
	}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		job, err := wantedJob(tx, ref)
		if err != nil {
			return err
		}
		open, err := p.openPromises(tx, want.SR)
		if err != nil {
			return err
		}
		found = free
		for _, o := range open {
			if o.uuid != job.UUID {
				found -= o.rest(taken)
			}
		}
		if found = max(0, found); found < want.Room {
			return nil
		}
		job.SR, job.Room, job.Work, job.Clone = want.SR, want.Room, want.Work, want.Clone
		tx.Put(ClassJob, ref, job)
		return nil
	})
	return found, err
}

// release ends what a job was promised.
func (j *Job) release() { j.SR, j.Room, j.Work, j.Clone = "", 0, "", false }

// lookAtRoom measures, outside of any transaction, what the promises of an SR
// take already, by their uuid, and then what is free there.
func (p *Pool) lookAtRoom(ctx context.Context, want Promise) (taken map[xapi.UUID]int64, free int64, err error) {
	repo, err := p.Repository(want.SR)
	if xapi.Is(err, xapi.SRNotAttached) {
		return nil, want.Free, nil
	}
	if err != nil {
		return nil, 0, err
	}
	open, err := p.viewPromises(want.SR)
	if err != nil {
		return nil, 0, err
	}
	taken = p.takenBy(ctx, repo, open)
	stat, err := repo.Stat(ctx)
	return taken, stat.Free, err
}

// Promised is how many of an SR's free bytes are promised to VDIs in the making
// and to jobs: what each was promised less what its volumes take already. Codes:
// those of Repository.
func (p *Pool) Promised(ctx context.Context, ref xapi.Ref) (int64, error) {
	repo, release, err := p.useSR(ref)
	if err != nil {
		return 0, err
	}
	defer release()
	return p.promised(ctx, repo, ref, math.MaxInt64)
}

// SRRoom is what of an SR may still be written, and how much of that is promised,
// in bytes. Codes: those of Promised.
func (p *Pool) SRRoom(ctx context.Context, ref xapi.Ref) (free, promised int64, err error) {
	repo, release, err := p.useSR(ref)
	if err != nil {
		return 0, 0, err
	}
	defer release()
	if promised, err = p.promised(ctx, repo, ref, math.MaxInt64); err != nil {
		return 0, 0, err
	}
	stat, err := repo.Stat(ctx)
	return stat.Free, promised, err
}

// promised counts the intents that were recorded before a moment, and all jobs:
// one that came later has left room for those before it.
func (p *Pool) promised(ctx context.Context, repo sr.Repository, ref xapi.Ref, before int64) (sum int64, err error) {
	open, err := p.viewPromises(ref)
	if err != nil {
		return 0, err
	}
	open = slices.DeleteFunc(open, func(o promise) bool { return o.since >= before })
	taken := p.takenBy(ctx, repo, open)
	for _, o := range open {
		sum += o.rest(taken)
	}
	return sum, sr.Alive(ctx)
}

// promise is one that is open.
type promise struct {
	uuid  xapi.UUID // of the intent or job
	room  int64     // bytes
	since int64     // the revision of an intent; of a job 0
	// names are those its volume may have, one after another; none when they
	// cannot be told.
	names []sr.Name
	base  *sr.Name // the volume whose blocks it began with
}

// rest is what of the promise is not taken yet, in bytes.
func (o promise) rest(taken map[xapi.UUID]int64) int64 { return max(0, o.room-taken[o.uuid]) }

// records is what promises are read from: a view or a transaction.
type records interface {
	List(class string) []store.Item
	Refs(class, field, value string) []xapi.Ref
	Get(class string, ref xapi.Ref, into any) error
}

// viewed gives a view the Get of a transaction.
type viewed struct{ *store.View }

// Get decodes a record into into.
func (v viewed) Get(class string, ref xapi.Ref, into any) error {
	it, ok := v.View.Get(class, ref)
	if !ok {
		return xapi.NewError(xapi.HandleInvalid, class, string(ref))
	}
	return it.Decode(into)
}

func (p *Pool) viewPromises(on xapi.Ref) (open []promise, err error) {
	err = p.Store.View(func(v *store.View) error {
		open, err = p.openPromises(viewed{v}, on)
		return err
	})
	return open, err
}

// openPromises lists those of an SR.
func (p *Pool) openPromises(r records, on xapi.Ref) (open []promise, err error) {
	for _, it := range r.List(ClassIntent) {
		var in Intent
		if err := it.Decode(&in); err != nil {
			return nil, err
		}
		if in.SR == on && in.Room > 0 {
			open = append(open, p.promiseTo(in, it.Created))
		}
	}
	for _, ref := range r.Refs(ClassJob, "SR", string(on)) {
		var job Job
		if err := r.Get(ClassJob, ref, &job); err != nil {
			return nil, err
		}
		if job.State == JobDone || job.Room <= 0 {
			continue
		}
		o := promise{uuid: job.UUID, room: job.Room}
		var host Host
		if r.Get(ClassHost, job.Host, &host) == nil {
			o.names = []sr.Name{sr.Work(sr.Owner{Pool: p.PoolUUID, Host: host.UUID, Job: job.UUID}, job.Work)}
		}
		if job.Clone {
			var golden VDI
			if r.Get(ClassVDI, job.VDI, &golden) != nil {
				o.names = nil // what is its own cannot be told
			}
			name := sr.Live(golden.UUID)
			o.base = &name
		}
		open = append(open, o)
	}
	return open, nil
}

// promiseTo is that of an intent. What a clone has written over is not to be
// told from what it shares: all of its promise counts.
func (p *Pool) promiseTo(in Intent, since int64) promise {
	o := promise{uuid: in.UUID, room: in.Room, since: since}
	if in.Host == p.Self && !in.Clone { // its name elsewhere is the other host's to know
		o.names = []sr.Name{p.part(in), sr.Live(in.VDI)}
	}
	return o
}

// takenBy measures what the volumes of promises take of their own, in bytes, by
// uuid; 0 where it cannot be told, so that the whole promise counts.
func (p *Pool) takenBy(ctx context.Context, repo sr.Repository, open []promise) map[xapi.UUID]int64 {
	taken := map[xapi.UUID]int64{}
	for _, o := range open {
		for _, n := range o.names {
			used, err := volumeSize(ctx, repo, n)
			if err != nil {
				continue
			}
			if o.base != nil {
				shared, err := volumeSize(ctx, repo, *o.base)
				if err != nil {
					shared = used
				}
				used = max(0, used-shared)
			}
			taken[o.uuid] = used
			break
		}
	}
	return taken
}

// assertRoom refuses an intent that was promised more than an SR has. The
// promise is on record already, and of two that do not both fit the earlier one
// is kept. Code: OUT_OF_SPACE.
func (p *Pool) assertRoom(ctx context.Context, repo sr.Repository, ref xapi.Ref, in Intent) error {
	if in.Room <= 0 {
		return nil
	}
	var since int64
	err := p.Store.View(func(v *store.View) error {
		it, _ := v.Get(ClassIntent, ref)
		since = it.Created
		return nil
	})
	if err != nil {
		return err
	}
	promised, err := p.promised(ctx, repo, in.SR, since)
	if err != nil {
		return err
	}
	stat, err := repo.Stat(ctx)
	if err != nil {
		return err
	}
	if in.Room > stat.Free-promised {
		return xapi.NewError(xapi.OutOfSpace, "").Because(&sr.Shortage{Needed: in.Room, Free: stat.Free, Promised: promised})
	}
	return nil
}

package pool

import (
	"sync"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// job puts a queued job of this host for a patch into the database.
func (r *rig) job(patch xapi.Ref) (ref xapi.Ref, job Job) {
	r.t.Helper()
	r.must(r.Store.Update(r.t.Context(), func(tx *store.Tx) (err error) {
		ref, err = r.newJob(r.t.Context(), tx, Job{Kind: JobPrecheck, Patch: patch, Host: r.Self})
		return err
	}))
	return ref, get[Job](r, ClassJob, ref)
}

// promisedOn fails the test unless so much is promised on an SR.
func (r *rig) promisedOn(on xapi.Ref, want int64) {
	r.t.Helper()
	if got, err := r.Promised(r.t.Context(), on); err != nil || got != want {
		r.t.Errorf("%d bytes are promised, %v; want %d", got, err, want)
	}
}

// What a job is promised, and when that ends.
func TestRoomIsPromisedToJobs(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.mem.Capacity = 10 << 20
	on := r.sr(r.memorySpec("m"))
	_, patch := r.golden(on, []byte("x"))
	free, _, err := r.SRRoom(ctx, on)
	r.must(err)
	ask := func(job xapi.Ref, room int64, work xapi.UUID) int64 {
		t.Helper()
		found, err := r.JobPromise(ctx, job, Promise{SR: on, Room: room, Work: work})
		r.must(err)
		return found
	}
	first, rec := r.job(patch)
	work := xapi.NewUUID()
	if got := ask(first, 6<<20, work); got != free {
		t.Errorf("found %d, %d are free", got, free)
	}
	r.promisedOn(on, 6<<20)
	if got := ask(first, 5<<20, work); got != free { // in the place of the first
		t.Errorf("found %d beside its own promise", got)
	}
	r.promisedOn(on, 5<<20)

	// The later one that does not fit gets nothing, and neither does a VDI.
	second, _ := r.job(patch)
	if got := ask(second, 6<<20, xapi.NewUUID()); got != free-5<<20 {
		t.Errorf("found %d of %d", got, free)
	}
	r.promisedOn(on, 5<<20)
	_, err = r.NewVDI(ctx, NewVDI{SR: on, VirtualSize: 8 << 20, Room: 6 << 20})
	r.wantCode("a VDI beside it", err, xapi.OutOfSpace)

	// What its work volume takes counts once.
	repo, err := r.Repository(on)
	r.must(err)
	name := sr.Work(sr.Owner{Pool: r.PoolUUID, Host: r.SelfUUID, Job: rec.UUID}, work)
	_, err = repo.Create(ctx, name, 4<<20)
	r.must(err)
	f, err := repo.Open(ctx, name, sr.ReadWrite)
	r.must(err)
	_, err = f.WriteAt(make([]byte, 2<<20), 0)
	r.must(err)
	r.must(f.Close())
	r.promisedOn(on, 3<<20)
	r.must(repo.Destroy(ctx, name))
	r.promisedOn(on, 5<<20)

	// A draft that came later leaves room for the job, and the job for it.
	d, err := r.NewDraft(ctx, NewVDI{SR: on, VirtualSize: 4 << 20, Room: 2 << 20}, r.aDay())
	r.must(err)
	if got := ask(first, 5<<20, work); got != free-2<<20 {
		t.Errorf("found %d beside a draft", got)
	}
	r.must(d.Discard(ctx))

	// It ends with the job, and when the job is queued again.
	_, err = r.JobClaim(ctx, first)
	r.must(err)
	_, err = r.JobPromise(ctx, first, Promise{SR: on, Room: 1})
	r.wantCode("for a job that runs", err, xapi.OtherOperationInProgress)
	r.promisedOn(on, 5<<20)
	r.must(r.JobRequeue(ctx, first))
	r.promisedOn(on, 0)
	ask(first, 5<<20, work)
	r.must(r.finish(ctx, first, Outcome{}))
	r.promisedOn(on, 0)
	r.must(r.JobCancel(ctx, second))
	_, err = r.JobPromise(ctx, second, Promise{SR: on, Room: 1})
	r.wantCode("for a job that is cancelled", err, xapi.TaskCancelled)
	r.must(r.finish(ctx, second, Outcome{}))
	_, err = r.JobPromise(ctx, "OpaqueRef:none", Promise{SR: on, Room: 1})
	r.wantCode("for no job", err, xapi.HandleInvalid)
}

// Of a clone only what it does not share counts against its promise.
func TestASharedBlockIsNotTakenByAJob(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.mem.Clones = true
	on := r.sr(r.memorySpec("m"))
	vdi, patch := r.golden(on, []byte("x"))
	ref, rec := r.job(patch)
	work := xapi.NewUUID()
	_, err := r.JobPromise(ctx, ref, Promise{SR: on, Room: 4 << 20, Work: work, Clone: true})
	r.must(err)
	repo, err := r.Repository(on)
	r.must(err)
	name := sr.Work(sr.Owner{Pool: r.PoolUUID, Host: r.SelfUUID, Job: rec.UUID}, work)
	_, err = repo.Clone(ctx, sr.Live(get[VDI](r, ClassVDI, vdi).UUID), name)
	r.must(err)
	r.promisedOn(on, 4<<20)
	r.must(repo.Destroy(ctx, name))
	r.must(r.finish(ctx, ref, Outcome{}))
}

// Of many that ask at once only as many are promised room as there is.
func TestPromisesAreMadeOneByOne(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.mem.Capacity = 10 << 20
	on := r.sr(r.memorySpec("m"))
	_, patch := r.golden(on, []byte("x"))
	free, _, err := r.SRRoom(ctx, on)
	r.must(err)
	const each = 3 << 20
	var mu sync.Mutex
	var wg sync.WaitGroup
	granted := int64(0)
	for range 12 {
		ref, _ := r.job(patch)
		wg.Go(func() {
			found, err := r.JobPromise(ctx, ref, Promise{SR: on, Room: each, Work: xapi.NewUUID()})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			} else if found >= each {
				granted++
			}
		})
	}
	wg.Wait()
	if granted != free/each {
		t.Errorf("%d were promised %d bytes of %d", granted, each, free)
	}
	r.promisedOn(on, granted*each)
}

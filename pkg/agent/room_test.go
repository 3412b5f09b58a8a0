package agent

import (
	"fmt"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// promised is what the SR has promised, in bytes.
func (r *rig) promised(ref xapi.Ref) int64 {
	r.t.Helper()
	n, err := r.pool.Promised(r.t.Context(), ref)
	r.must(err)
	return n
}

// small makes an SR that has room for one job, where patches go from now on.
func (r *rig) small() {
	r.t.Helper()
	r.mem.Capacity = 3 * headroom / 2
	ref, err := r.pool.SRCreate(r.t.Context(), pool.SRSpec{Host: r.pool.Self, Type: "memory", NameLabel: "small", DeviceConfig: map[string]string{"tag": "small"}})
	r.must(err)
	r.sr = ref
}

// While a job runs its room is promised; another that does not fit beside it is
// refused with what was found and what it needs, and has the room afterwards.
func TestRoomOfAJobIsPromised(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.small()
	r.begin()
	first, _ := r.patch()
	second, _ := r.patch()
	begun, goOn := make(chan struct{}, 1), make(chan struct{})
	r.verbs["apply"] = blocks(begun, goOn)
	done := make(chan error, 1)
	go func() { _, err := r.apply(first); done <- err }()
	<-begun
	if got := r.promised(r.sr); got < headroom || got > r.mem.Capacity {
		t.Errorf("%d bytes are promised while a patch runs", got)
	}
	_, err := r.precheck(second)
	e := wantCode(t, err, xapi.PrecheckFailedOutOfSpace)
	var found, required int64
	fmt.Sscan(e.Params[1], &found)
	fmt.Sscan(e.Params[2], &required)
	if e.Params[0] != string(second) || found <= 0 || found >= headroom || required <= headroom {
		t.Errorf("%v", e)
	}
	jobs := r.jobs()
	if said := jobs[len(jobs)-1].Output; !strings.Contains(said, "small (") || !strings.Contains(said, e.Params[1]) || !strings.Contains(said, e.Params[2]) {
		t.Errorf("the job says %q", said)
	}
	close(goOn)
	r.must(<-done)
	r.tidy("after both")
	if got := r.promised(r.sr); got != 0 {
		t.Errorf("%d bytes are promised to nobody", got)
	}
	if _, err := r.precheck(second); err != nil {
		t.Errorf("with room: %v", err)
	}
	r.tidy("in the end")
}

// A target whose room is promised to others is passed over.
func TestTheNextTargetIsTakenWhenThePromiseIsRefused(t *testing.T) {
	t.Parallel()
	r := newRigOf(t, false)
	other := r.sr
	r.small()
	r.begin()
	first, _ := r.patch()
	second, _ := r.patch()
	begun, goOn := make(chan struct{}, 2), make(chan struct{})
	r.verbs["precheck"] = blocks(begun, goOn)
	done := make(chan error, 2)
	for _, ref := range []xapi.Ref{first, second} {
		go func() { _, err := r.precheck(ref); done <- err }()
		<-begun
	}
	if here, there := r.promised(r.sr), r.promised(other); here <= 0 || there <= 0 {
		t.Errorf("%d bytes are promised on the first SR, %d on the other", here, there)
	}
	close(goOn)
	r.must(<-done)
	r.must(<-done)
	r.tidy("in the end")
	if here, there := r.promised(r.sr), r.promised(other); here != 0 || there != 0 {
		t.Errorf("%d and %d bytes stay promised", here, there)
	}
}

func (r *rig) jobs() (jobs []pool.Job) {
	r.t.Helper()
	r.must(r.store.View(func(v *store.View) error {
		for _, it := range v.List(pool.ClassJob) {
			var job pool.Job
			if err := it.Decode(&job); err != nil {
				return err
			}
			jobs = append(jobs, job)
		}
		return nil
	}))
	return jobs
}

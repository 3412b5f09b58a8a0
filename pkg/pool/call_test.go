package pool

import (
	"encoding/json"
	"testing"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// otherHost is a second host of the pool, with an SR that only it has plugged.
func (r *rig) otherHost() (host, on xapi.Ref) {
	r.t.Helper()
	host, on = xapi.NewRef(), xapi.NewRef()
	r.must(r.Store.Update(r.t.Context(), func(tx *store.Tx) error {
		tx.Put(ClassHost, host, Host{UUID: xapi.NewUUID(), NameLabel: "other", OtherConfig: map[string]string{}})
		tx.Put(ClassSR, on, SR{UUID: xapi.NewUUID(), NameLabel: "its SR", Type: "file"})
		tx.Put(ClassPBD, xapi.NewRef(), PBD{UUID: xapi.NewUUID(), Host: host, SR: on, CurrentlyAttached: true, OtherConfig: map[string]string{}})
		return nil
	}))
	return host, on
}

func TestACallIsAJobOfTheOtherHost(t *testing.T) {
	r := newRig(t)
	host, on := r.otherHost()
	if at, yes := r.elsewhere(on); !yes || at != host {
		t.Fatalf("the SR is worked on by %q %v", at, yes)
	}
	type answer struct {
		text string
		err  error
	}
	ask := func() (xapi.Ref, chan answer) {
		got := make(chan answer, 1)
		go func() {
			text, err := r.callOn(t.Context(), host, "SRScan", on)
			got <- answer{text, err}
		}()
		var job xapi.Ref
		r.must(r.Store.Until(t.Context(), func(v *store.View) (bool, error) {
			jobs, _, err := r.Jobs(host)
			if len(jobs) == 1 {
				job = jobs[0].Ref
			}
			return len(jobs) == 1, err
		}))
		return job, got
	}
	job, got := ask()
	rec, err := r.Job(job)
	var arg xapi.Ref
	if err != nil || rec.Kind != JobCall || rec.Call != "SRScan" || json.Unmarshal(rec.Args, &arg) != nil || arg != on {
		t.Fatalf("%+v %v", rec, err)
	}
	_, err = r.JobClaim(t.Context(), job)
	r.must(err)
	r.must(r.finish(t.Context(), job, Outcome{Output: "scanned"}))
	if a := <-got; a.text != "scanned" || a.err != nil {
		t.Errorf("%+v", a)
	}

	job, got = ask() // and now the host goes away
	r.must(r.Store.Update(t.Context(), func(tx *store.Tx) error {
		h, err := store.Read[Host](tx, ClassHost, host)
		h.Away = r.Now()
		tx.Put(ClassHost, host, h)
		return err
	}))
	r.must(r.Store.Until(t.Context(), func(*store.View) (bool, error) { j, err := r.Job(job); return j.Cancel, err }))
	r.must(r.finish(t.Context(), job, Outcome{Err: xapi.NewError(xapi.TaskCancelled)}))
	r.wantCode("a call of a host that went away", (<-got).err, xapi.HostOffline, string(host))
	r.Connected = func(xapi.Ref) bool { return false }
	_, err = r.callOn(t.Context(), host, "SRScan", on)
	r.wantCode("a call of a host that is away", err, xapi.HostOffline, string(host))
}

package pool

import (
	"context"
	"fmt"
	"syscall"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// busySR is an SR that something outside of this process uses.
type busySR struct{ sr.Repository }

func (busySR) Detach(context.Context) error {
	return sr.BackendFailure("unmount: %w", fmt.Errorf("held by process 1: %w", syscall.EBUSY))
}

// An SR that cannot be let go of stays plugged and usable, whoever asked.
func TestABusySRStaysPlugged(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	ref := r.sr(r.fileSpec("sr"))
	real := r.storage.repository(ref)
	r.storage.setRepository(ref, busySR{real})
	pbd := r.pbdOf(ref)
	r.wantCode("unplug", r.PBDUnplug(ctx, pbd), xapi.SRBackendFailure)
	if rec := get[PBD](r, ClassPBD, pbd); !rec.CurrentlyAttached || len(rec.Features) == 0 {
		t.Errorf("a busy SR is recorded as unplugged: %+v", rec)
	}
	r.wantCode("destroy", r.SRDestroy(ctx, ref), xapi.SRBackendFailure)
	if n := r.count(ClassIntent); n != 0 || r.count(ClassSR) != 1 {
		t.Errorf("%d intents and %d SRs after a refused destroy", n, r.count(ClassSR))
	}
	vdi := r.filled(ref, 4096, []byte("still works"))
	r.holds(vdi, []byte("still works"))
	r.must(r.DetachStorage(ctx)) // a stop is none of its business
	r.storage.setRepository(ref, real)
	r.must(r.PBDUnplug(ctx, pbd))
	if get[PBD](r, ClassPBD, pbd).CurrentlyAttached {
		t.Error("it is recorded as plugged after it was unplugged")
	}
}

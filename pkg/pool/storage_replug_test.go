package pool

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

// An SR that was away at the start is plugged when it is back, without a
// restart, and what it holds is there.
func TestAnSRThatIsBackIsPlugged(t *testing.T) {
	r := newRig(t)
	ref := r.sr(r.fileSpec("sr"))
	vdi := r.filled(ref, 4096, []byte("x"))
	pbd := r.pbdOf(ref)
	away := filepath.Join(r.dir, "away")
	r.must(os.Rename(filepath.Join(r.dir, "sr"), away))
	r.must(os.Mkdir(filepath.Join(r.dir, "sr"), 0o700))
	r.restart()
	r.must(r.ReplugFailed(t.Context()))
	_, err := r.Repository(ref)
	r.wantCode("repository of an SR that is away", err, xapi.SRNotAttached, string(ref))
	if r.count(ClassMessage) != 1 {
		t.Errorf("%d messages about the same reason, want one", r.count(ClassMessage))
	}

	r.must(os.Remove(filepath.Join(r.dir, "sr")))
	r.must(os.Rename(away, filepath.Join(r.dir, "sr")))
	r.must(r.ReplugFailed(t.Context()))
	if rec := get[PBD](r, ClassPBD, pbd); !rec.CurrentlyAttached || rec.OtherConfig[keyPlugFailed] != "" {
		t.Errorf("PBD of an SR that is back: %+v", rec)
	}
	r.holds(vdi, []byte("x"))

	// One that was unplugged by hand meanwhile stays so.
	r.must(r.PBDUnplug(t.Context(), pbd))
	r.must(r.ReplugFailed(t.Context()))
	_, err = r.Repository(ref)
	r.wantCode("repository of an unplugged SR", err, xapi.SRNotAttached)
}

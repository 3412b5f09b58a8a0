//go:build vm

package vm

import (
	"errors"
	"syscall"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// TestBusyLVM and TestBusyNFS: an SR of which somebody holds a volume open is
// not detached, and goes on; it is once that one lets go.
func TestBusyLVM(t *testing.T) {
	d, c := lvmSR(t, 200<<20)
	staysWhileInUse(t, d, c)
}

func TestBusyNFS(t *testing.T) {
	d, c := nfsSR(t, exported(t, 400<<20, "no_root_squash", xfs...), patient)
	staysWhileInUse(t, d, c)
}

func staysWhileInUse(t *testing.T, d sr.Driver, c sr.Config) {
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	n := sr.Live(xapi.NewUUID())
	_, err = r.Create(t.Context(), n, 1<<20)
	must(t, err)
	f, err := r.Open(t.Context(), n, sr.ReadWrite)
	must(t, err)
	if err := r.Detach(t.Context()); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("detach with an open volume: %v", err)
	}
	if _, err := r.Scan(t.Context()); err != nil {
		t.Errorf("after a detach that failed: %v", err)
	}
	_, err = f.WriteAt([]byte("still there"), 0)
	must(t, errors.Join(err, f.Sync(), f.Close()))
	must(t, r.Destroy(t.Context(), n))
	must(t, r.Detach(t.Context()))
	must(t, d.Destroy(t.Context(), c))
}

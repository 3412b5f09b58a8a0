//go:build vm

package vm

import (
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/lvm"
	"github.com/patchd/patchd/pkg/sr/srtest"
	"github.com/patchd/patchd/pkg/xapi"
)

// lvmSR is an SR, not made yet, on a fresh disk.
func lvmSR(t *testing.T, size int64) (sr.Driver, sr.Config) {
	t.Helper()
	return &lvm.Driver{}, sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"device": disk(t, size)}, Dom0: system(t), MountDir: t.TempDir()}
}

// TestLVM runs the whole conformance suite on thin volumes.
func TestLVM(t *testing.T) {
	sequences(t, "2", "15")
	srtest.Run(t, srtest.Suite{
		New:     func(t *testing.T) (sr.Driver, sr.Config) { return lvmSR(t, 2<<30) },
		Small:   func(t *testing.T) (sr.Driver, sr.Config) { return lvmSR(t, 56<<20) },
		Hostile: []map[string]string{{"device": "sda"}, {"device": "/dev/null"}, {"device": "/etc/passwd"}, {"device": "/dev/sda\"]"}},
	})
}

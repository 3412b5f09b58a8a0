package agent

import (
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

// A claim whose answer was lost with the coordinator fails no host: the job is
// taken once more, a few times at most, and its patch runs once.
func TestALostClaimIsAskedForAgain(t *testing.T) {
	for lost, ok := range map[int]bool{1: true, 2: true, maxAttempts: false} {
		r := newRig(t)
		patch, _ := r.patch()
		r.begin()
		r.gate.mu.Lock()
		r.gate.lost = lost
		r.gate.mu.Unlock()
		_, err := r.apply(patch)
		if (err == nil) != ok || !ok && !xapi.Is(err, xapi.CannotContactHost) {
			t.Errorf("%d lost claims: %v", lost, err)
		}
		r.end()
		r.tidy("after lost claims")
	}
}

package agent

import (
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/pool"
)

func TestWhatIsSaidOfAnInterruptedJob(t *testing.T) {
	for name, c := range map[string]struct {
		job  pool.Job
		want string
	}{
		"a call that had begun":     {pool.Job{Kind: pool.JobCall, Call: "SRCreate", State: pool.JobClaimed}, "Either it is done or nothing of it is left"},
		"a call that had not begun": {pool.Job{Kind: pool.JobCall, Call: "SRCreate", State: pool.JobQueued}, "before it changed anything"},
		"an apply":                  {pool.Job{Kind: pool.JobApply, State: pool.JobClaimed}, "before it changed anything"},
	} {
		if e := interrupted(c.job, ""); len(e.Params) != 1 || !strings.Contains(e.Params[0], c.want) {
			t.Errorf("%s: %v does not say %q", name, e, c.want)
		}
	}
}

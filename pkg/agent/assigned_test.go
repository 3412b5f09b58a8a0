package agent

import (
	"testing"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// Whoever has stolen the coordinator does not write or remove files of this host.
func TestACoordinatorNamesNoPaths(t *testing.T) {
	t.Parallel()
	const path = xapi.UUID("../../../etc/cron.d/x")
	id := xapi.NewUUID()
	info := func(of xapi.UUID) string {
		return `<info uuid="` + string(of) + `" version="1" name-label="n" name-description="d" after-apply-guidance=""/>`
	}
	for name, c := range map[string]struct {
		change func(*pool.Assignment)
		ok     bool
	}{
		"an apply":             {func(*pool.Assignment) {}, true},
		"a call":               {func(j *pool.Assignment) { j.Job.Kind, j.Patch, j.VDI = pool.JobCall, pool.Patch{}, nil }, true},
		"a job by path":        {func(j *pool.Assignment) { j.Job.UUID = path }, false},
		"a call by path":       {func(j *pool.Assignment) { j.Job.Kind, j.Job.UUID = pool.JobCall, path }, false},
		"no job":               {func(j *pool.Assignment) { j.Job.UUID = "" }, false},
		"a patch by path":      {func(j *pool.Assignment) { j.Patch.UUID = path }, false},
		"a VDI by path":        {func(j *pool.Assignment) { j.VDI.UUID = path }, false},
		"a pool by path":       {func(j *pool.Assignment) { j.Pool = path }, false},
		"a host by path":       {func(j *pool.Assignment) { j.Host = path }, false},
		"another's stampfile":  {func(j *pool.Assignment) { j.Patch.InfoXML = info(xapi.NewUUID()) }, false},
		"no stampfile at all":  {func(j *pool.Assignment) { j.Patch.InfoXML = "* * * * * root evil" }, false},
		"a classic one's info": {func(j *pool.Assignment) { j.Patch.InfoXML = "" }, true},
	} {
		t.Run(name, func(t *testing.T) {
			j := pool.Assignment{
				Job: pool.Job{UUID: xapi.NewUUID(), Kind: pool.JobApply}, Pool: xapi.NewUUID(), Host: xapi.NewUUID(),
				Patch: pool.Patch{UUID: id, InfoXML: info(id)}, VDI: &pool.VDI{UUID: xapi.NewUUID()},
			}
			c.change(&j)
			if err := checkAssignment(j); (err == nil) != c.ok {
				t.Error(err)
			}
		})
	}
}

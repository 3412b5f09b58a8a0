package agent

import (
	"fmt"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// jobs gives the open jobs of this host and their revision. The coordinator may
// schedule; it has no say about paths on this host, so an assignment whose names
// are not what they should be is logged and not touched.
func (a *Agent) jobs() (good []pool.Assignment, rev int64, err error) {
	all, rev, err := a.Coordinator.Jobs(a.Self)
	if err != nil {
		return nil, 0, err
	}
	for _, j := range all {
		if err := checkAssignment(j); err != nil {
			a.Log.WithError(err).WithField("job", fmt.Sprintf("%.64q", j.Ref)).Error("the coordinator has given out a job that makes no sense; it is not touched")
			continue
		}
		good = append(good, j)
	}
	return good, rev, nil
}

// checkAssignment refuses names that would become paths and are no uuids, and a
// stampfile that would be of another patch.
func checkAssignment(j pool.Assignment) error {
	names := map[string]xapi.UUID{"job": j.Job.UUID, "pool": j.Pool, "host": j.Host}
	if j.Job.Kind != pool.JobCall {
		names["patch"] = j.Patch.UUID
		if j.VDI != nil {
			names["VDI"] = j.VDI.UUID
		}
	}
	for what, id := range names {
		if !id.Valid() {
			return fmt.Errorf("%.64q is no uuid of a %s", id, what)
		}
	}
	if j.Job.Kind == pool.JobCall || j.Patch.InfoXML == "" {
		return nil
	}
	info, err := patch.ParseInfo([]byte(j.Patch.InfoXML))
	if err == nil && info.UUID != j.Patch.UUID {
		err = fmt.Errorf("it is of patch %s", info.UUID)
	}
	if err != nil {
		return fmt.Errorf("the info of patch %s: %w", j.Patch.UUID, err)
	}
	return nil
}

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// Examine looks at what jobs left on this host: journals nobody works on,
// control groups without a journal, stampfiles that make no sense. It changes
// nothing.
func (a *Agent) Examine() ([]pool.Finding, error) {
	say := func(check, text string) pool.Finding {
		return pool.Finding{Check: check, Class: pool.ClassHost, UUID: a.SelfUUID, Text: text}
	}
	var out []pool.Finding
	idle, err := a.idleJournals()
	if err != nil {
		return nil, err
	}
	for _, id := range idle {
		out = append(out, say("journal", fmt.Sprintf("job %s could not be settled or cleaned up; it is tried at each start, the log of the last one says why", id)))
	}
	groups, err := a.strangeGroups(a.isJournaled)
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		alive, err := a.Dom0.Alive(g)
		if err != nil {
			return nil, err
		}
		if alive {
			out = append(out, say("processes", fmt.Sprintf("processes of a job that is over live in the control group %s: the next start ends them", g)))
		}
	}
	_, bad, err := readStamps(a.PatchDir)
	if err != nil {
		return nil, err
	}
	for name, why := range bad {
		out = append(out, say("stampfile", fmt.Sprintf("%s/%s makes no sense and is passed over: %v", appliedDir(a.PatchDir), name, why)))
	}
	if len(out) == 0 {
		out = []pool.Finding{{Check: "jobs", OK: true, Text: "nothing is left of any"}}
	}
	return out, nil
}

// idleJournals lists the journaled jobs that no execution works on. A journal
// is written by its execution, so what is idle after it was listed was left.
func (a *Agent) idleJournals() ([]xapi.UUID, error) {
	names, err := os.ReadDir(a.journal.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var idle []xapi.UUID
	for _, n := range names {
		id := xapi.UUID(n.Name())
		a.mu.Lock()
		_, busy := a.running[id]
		a.mu.Unlock()
		if id.Valid() && !busy && a.isJournaled(id) {
			idle = append(idle, id)
		}
	}
	return idle, nil
}

func (a *Agent) isJournaled(id xapi.UUID) bool {
	_, err := os.Lstat(a.journal.path(id))
	return err == nil
}

// strangeGroups lists the control groups of jobs that are not known.
func (a *Agent) strangeGroups(known func(xapi.UUID) bool) ([]string, error) {
	groups, err := a.Dom0.Groups()
	if err != nil {
		return nil, err
	}
	var strange []string
	for _, g := range groups {
		for _, prefix := range []string{"runner-", "patch-"} {
			if len(g) != len(prefix)+36 || g[:len(prefix)] != prefix {
				continue
			}
			if id := xapi.UUID(g[len(prefix):]); id.Valid() && !known(id) {
				strange = append(strange, g)
			}
		}
	}
	return strange, nil
}

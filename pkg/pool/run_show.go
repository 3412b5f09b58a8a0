package pool

import (
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// RunInfo is a run for people: the record, and the names of what it is about.
type RunInfo struct {
	Run
	PatchUUID xapi.UUID
	PatchName string
	TaskUUID  xapi.UUID // "": the task is gone
	Now       map[HostState]int
}

// RunHostInfo is a host of a run for people. State and Reason are as Shown.
type RunHostInfo struct {
	RunHost
	UUID   xapi.UUID
	Name   string
	InWave string    // "": it needs nothing
	Away   time.Time // since when; zero: it is there
}

// RunList gives all runs that are remembered, the oldest first.
func (p *Pool) RunList() (all []RunInfo, err error) {
	err = p.Store.View(func(v *store.View) error {
		_, runs, err := runsOf(v)
		if err != nil {
			return err
		}
		for _, run := range runs {
			info, err := infoOf(v, run)
			if err != nil {
				return err
			}
			all = append(all, info)
		}
		return nil
	})
	return all, err
}

// RunShow gives one run and its hosts in their order. Code: UUID_INVALID.
func (p *Pool) RunShow(id xapi.UUID) (info RunInfo, hosts []RunHostInfo, err error) {
	_, run, err := p.runByUUID(id)
	if err != nil {
		return info, nil, err
	}
	err = p.Store.View(func(v *store.View) error {
		if info, err = infoOf(v, run); err != nil {
			return err
		}
		_, recs, err := runHosts(v, id)
		if err != nil {
			return err
		}
		hosts = hostInfos(v, run, recs)
		return nil
	})
	return info, hosts, err
}

// RunPreview gives what RunPlan does, with names.
func (p *Pool) RunPreview(patch xapi.Ref, pol Policy) (info RunInfo, hosts []RunHostInfo, err error) {
	run, recs, err := p.RunPlan(patch, pol)
	if err != nil {
		return info, nil, err
	}
	err = p.Store.View(func(v *store.View) error {
		info = RunInfo{Run: run, Now: countStates(run, recs)}
		info.name(v)
		hosts = hostInfos(v, run, recs)
		return nil
	})
	return info, hosts, err
}

func infoOf(v *store.View, run Run) (RunInfo, error) {
	info := RunInfo{Run: run, Now: run.Counts}
	info.name(v)
	if info.Now == nil {
		_, hosts, err := runHosts(v, run.UUID)
		if err != nil {
			return info, err
		}
		info.Now = countStates(run, hosts)
	}
	return info, nil
}

func (i *RunInfo) name(v *store.View) {
	if patch, err := store.Get[Patch](v, ClassPatch, i.Patch); err == nil {
		i.PatchUUID, i.PatchName = patch.UUID, patch.NameLabel
	}
	var t struct {
		UUID xapi.UUID `json:"uuid"`
	}
	if it, ok := v.Get("task", i.Task); ok && it.Decode(&t) == nil {
		i.TaskUUID = t.UUID
	}
}

func countStates(run Run, hosts []RunHost) map[HostState]int {
	counts := map[HostState]int{}
	for _, h := range hosts {
		state, _ := h.Shown(run)
		counts[state]++
	}
	return counts
}

func hostInfos(v *store.View, run Run, recs []RunHost) []RunHostInfo {
	hosts := make([]RunHostInfo, 0, len(recs))
	for _, h := range recs {
		info := RunHostInfo{RunHost: h, Name: hostName(v, h.Host)}
		if rec, err := store.Get[Host](v, ClassHost, h.Host); err == nil {
			info.UUID, info.Away = rec.UUID, rec.Away
		}
		if h.Wave >= 0 && h.Wave < len(run.Waves) {
			info.InWave = run.Waves[h.Wave]
		}
		info.State, info.Reason = h.Shown(run)
		hosts = append(hosts, info)
	}
	return hosts
}

// plainError tells an error in words, with its code, and without the refs among its
// parameters: nobody can read those.
func plainError(description []string) string {
	if len(description) == 0 {
		return ""
	}
	code := description[0]
	text := code
	if words := errorWords[code]; words != "" {
		text = words + " (" + code + ")"
	}
	var rest []string
	for _, p := range description[1:] {
		if p = strings.TrimSpace(p); p != "" && !strings.HasPrefix(p, "OpaqueRef:") {
			rest = append(rest, p)
		}
	}
	if len(rest) > 0 {
		text += ": " + strings.Join(rest, ", ")
	}
	return text
}

// errorWords say what the codes mean that an apply ends with.
var errorWords = map[string]string{
	xapi.PatchApplyFailed:              "the apply failed",
	xapi.PatchApplyFailedBackupFiles:   "files of an earlier apply are in the way",
	xapi.PrecheckFailedUnknownError:    "the precheck refused",
	xapi.PrecheckFailedISOMounted:      "a CD image is mounted",
	xapi.PrecheckFailedPrerequisite:    "patches that it needs are missing",
	xapi.PrecheckFailedWrongVersion:    "the host has the wrong version: found, required",
	xapi.PrecheckFailedWrongBuild:      "the host has the wrong build: found, required",
	xapi.PrecheckFailedVMRunning:       "virtual machines are running",
	xapi.PrecheckFailedOutOfSpace:      "there is too little room: found, required, in bytes",
	xapi.PrecheckFailedConflictPresent: "it conflicts with what is there",
	xapi.CannotFetchPatch:              "the patch cannot be fetched",
	xapi.CannotFindPatch:               "there is neither image nor file of the patch",
	xapi.InvalidPatch:                  "the patch is not valid, or nobody whom the host trusts signed it",
	xapi.OutOfSpace:                    "there is no room",
	xapi.HostOffline:                   "the host is away",
	xapi.TaskCancelled:                 "it was cancelled",
	xapi.Timeout:                       "it took too long",
	xapi.OtherOperationInProgress:      "something else is going on",
	xapi.VDIContentChanged:             "the image is not what was uploaded",
}

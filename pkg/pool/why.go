package pool

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Why tells, the nearest reason first, why a host has or lacks a patch: a line each,
// with names. Code: HANDLE_INVALID.
func (p *Pool) Why(_ context.Context, host, patch xapi.Ref) (lines []string, err error) {
	err = p.Store.View(func(v *store.View) error {
		w := why{pool: p, view: v, host: host, patch: patch}
		if w.rec, err = store.Get[Host](v, ClassHost, host); err != nil {
			return err
		}
		if w.patchRec, err = store.Get[Patch](v, ClassPatch, patch); err != nil {
			return err
		}
		lines, err = w.chain()
		return err
	})
	return lines, err
}

// why collects the reasons.
type why struct {
	pool        *Pool
	view        *store.View
	host, patch xapi.Ref
	rec         Host
	patchRec    Patch
	lines       []string
}

func (w *why) say(format string, args ...any) {
	w.lines = append(w.lines, fmt.Sprintf(format, args...))
}

func moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }

func (w *why) chain() ([]string, error) {
	name, patch := hostText(w.view, w.host), w.patchRec.NameLabel
	hp, _, there := hostPatchOf(w.view, w.patch, w.host)
	if there && hp.Applied {
		w.say("host %s has patch %s, since %s", name, patch, moment(hp.TimestampApplied))
		w.away(name)
		return w.lines, nil
	}
	w.say("host %s lacks patch %s", name, patch)
	if there && hp.OtherConfig[KeyState] == StateUnknown {
		w.lines[0] = fmt.Sprintf("whether host %s has patch %s is unknown: an apply was begun, and how it ended cannot be learned", name, patch)
		w.say("look at the host, then say `patchd patch settle`, or apply the patch again")
	}
	if exempt, reason := exemption(w.view, w.host, w.patchRec.UUID); exempt {
		w.say("the host is exempt from it: %s", reason)
	}
	w.away(name)
	jobs, err := w.jobs()
	if err != nil {
		return nil, err
	}
	runs, err := w.runs()
	if err != nil {
		return nil, err
	}
	if !runs {
		w.say("no run of the patch that is remembered has the host")
	}
	sources := w.sources()
	if len(w.lines) == 2 && !jobs && !runs && sources {
		w.say("nothing is in the way: `patchd patch apply` or `patchd patch pool-apply` puts it there")
	}
	return w.lines, nil
}

func (w *why) away(name string) {
	switch {
	case w.host == w.pool.Self:
	case !w.rec.Away.IsZero():
		w.say("host %s is away, not heard of since %s: what is said of it is as old as that", name, moment(w.rec.Away))
	case w.pool.Connected != nil && !w.pool.Connected(w.host):
		w.say("host %s is not connected just now", name)
	}
}

// jobs tells of what the host is doing about the patch, and how the last try ended.
func (w *why) jobs() (open bool, err error) {
	var last *Job
	for _, ref := range w.view.Refs(ClassJob, "host", string(w.host)) {
		job, err := store.Get[Job](w.view, ClassJob, ref)
		if err != nil {
			return open, err
		}
		if job.Patch != w.patch {
			continue
		}
		switch job.State {
		case JobQueued:
			w.say("its %s waits for the host to take it, since %s", job.Kind, moment(job.Created))
			open = true
		case JobClaimed:
			w.say("its %s is under way, %.0f %%", job.Kind, 100*job.Progress)
			open = true
		case JobDone:
			last = &job
		}
	}
	if last != nil && !open && last.Run == "" && last.Err() != nil {
		w.say("the last %s ended at %s: %s", last.Kind, moment(last.Finished), plainError(last.Error))
	}
	return open, nil
}

// runs tells of the newest run of the patch that has the host.
func (w *why) runs() (found bool, err error) {
	_, runs, err := runsOf(w.view)
	if err != nil {
		return false, err
	}
	for i := len(runs) - 1; i >= 0; i-- {
		run := runs[i]
		if run.Patch != w.patch {
			continue
		}
		_, hosts, err := runHosts(w.view, run.UUID)
		if err != nil {
			return false, err
		}
		for _, h := range hosts {
			if h.Host == w.host {
				w.run(run, h, hosts)
				return true, nil
			}
		}
	}
	return false, nil
}

// maxWhyHosts is how many other hosts are named as a reason.
const maxWhyHosts = 3

func (w *why) run(run Run, h RunHost, hosts []RunHost) {
	state, reason := h.Shown(run)
	text := fmt.Sprintf("in run %s the host is %q since %s", run.UUID, state, moment(h.Since))
	if run.State.Ended() && !h.State.Final() {
		text = fmt.Sprintf("in run %s the host was %q", run.UUID, state)
	}
	if h.Wave >= 0 && h.Wave < len(run.Waves) {
		text += fmt.Sprintf(", in the wave %q", run.Waves[h.Wave])
	}
	if reason != "" {
		text += ": " + reason
	}
	w.say("%s", text)
	if run.State != RunRunning && run.State != RunDone || run.Reason != "" {
		text := fmt.Sprintf("the run is %s since %s", run.State, moment(run.Since))
		if run.Reason != "" {
			text += ": " + run.Reason
		}
		w.say("%s", text)
	}
	if h.State.Final() {
		return
	}
	w.others("host %s failed there: %s", hosts, func(o RunHost) bool { return o.State.bad() && !o.Since.Before(run.Begun) })
	if !run.State.Ended() && !h.State.atWork() {
		w.others("host %s has its turn before it: %s", hosts, func(o RunHost) bool {
			return !o.State.Final() && (o.Wave < h.Wave || o.Wave == h.Wave && o.State.atWork())
		})
	}
}

// others names the first hosts of a run that are a reason.
func (w *why) others(format string, hosts []RunHost, which func(RunHost) bool) {
	var names []string
	n := 0
	for _, o := range hosts {
		if o.Host == w.host || !which(o) {
			continue
		}
		if n++; n <= maxWhyHosts {
			reason := o.Reason
			if reason == "" {
				reason = string(o.State)
			}
			names = append(names, fmt.Sprintf(format, hostText(w.view, o.Host), reason))
		}
	}
	w.lines = append(w.lines, names...)
	if n > maxWhyHosts {
		w.say("and %d more", n-maxWhyHosts)
	}
}

// sources tells what is wrong with where the bytes come from; ok: nothing.
func (w *why) sources() (ok bool) {
	n := len(w.lines)
	vdi, err := store.Get[VDI](w.view, ClassVDI, w.patchRec.VDI)
	switch {
	case err != nil && w.patchRec.Filename == "":
		w.say("the patch has no image and no file: upload it again")
	case err != nil:
	case vdi.Damage != "":
		w.say("the image of the patch, VDI %s, is damaged: %s", vdi.NameLabel, vdi.Damage)
	case vdi.Missing:
		w.say("the image of the patch, VDI %s, is missing", vdi.NameLabel)
	}
	if err == nil && !w.plugged(vdi.SR) {
		sr, _ := store.Get[SR](w.view, ClassSR, vdi.SR)
		w.say("SR %s, which holds the image, is not plugged on any host that is there", strings.TrimSpace(sr.NameLabel+" "+string(sr.UUID)))
	}
	if w.pool.Confirmed != nil {
		if err := w.pool.Confirmed(w.patch); err != nil {
			w.say("the patch is not confirmed: %s", plainError(xapi.AsError(err).Description()))
		}
	}
	return len(w.lines) == n
}

// plugged tells whether a host that is there has an SR plugged.
func (w *why) plugged(sr xapi.Ref) bool {
	for _, ref := range w.view.Refs(ClassPBD, "SR", string(sr)) {
		pbd, err := store.Get[PBD](w.view, ClassPBD, ref)
		if err != nil || !pbd.CurrentlyAttached {
			continue
		}
		host, err := store.Get[Host](w.view, ClassHost, pbd.Host)
		if err == nil && (host.Away.IsZero() || pbd.Host == w.pool.Self) {
			return true
		}
	}
	return false
}

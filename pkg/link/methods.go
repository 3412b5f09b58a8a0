package link

import (
	"encoding/json"
	"fmt"

	"golang.org/x/time/rate"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// do carries out one request of the host. Each method looks first whether what
// it names is the host's. Codes: OPERATION_NOT_ALLOWED, HANDLE_INVALID, those of
// the Backend, MESSAGE_METHOD_UNKNOWN, INVALID_VALUE for parameters that do not
// decode.
func (l *hostLink) do(method string, params json.RawMessage) (any, error) {
	switch method {
	case methodPromise, methodClaim, methodReport, methodRequeue, methodFinish:
		p, err := decode[jobParams](params)
		if err != nil {
			return nil, err
		}
		return l.aboutJob(method, p)
	case methodJob:
		return with(params, l.findJob)
	case methodInventory:
		return with(params, func(inv pool.Inventory) (any, error) {
			return nil, l.hub.o.Pool.TakeInventory(l.ctx, l.caller.host, inv)
		})
	case methodDamaged:
		return with(params, l.damaged)
	case methodResync:
		return with(params, l.resync)
	case methodMessage:
		return with(params, l.message)
	case methodSources:
		return with(params, func(p sourcesParams) (any, error) {
			return l.hub.o.Pool.Sources(l.ctx, l.caller.host, p.Map, p.Fetching)
		})
	}
	return nil, xapi.NewError(xapi.MessageMethodUnknown, method)
}

func decode[T any](params json.RawMessage) (p T, err error) {
	if err := json.Unmarshal(params, &p); err != nil {
		return p, xapi.NewError(xapi.InvalidValue, "params", err.Error())
	}
	return p, nil
}

// with decodes the parameters for f.
func with[T any](params json.RawMessage, f func(T) (any, error)) (any, error) {
	p, err := decode[T](params)
	if err != nil {
		return nil, err
	}
	return f(p)
}

// aboutJob carries out a method about one job of the host.
func (l *hostLink) aboutJob(method string, p jobParams) (any, error) {
	b := l.hub.o.Pool
	if err := l.ownJob(p.Job); err != nil && !(method == methodFinish && xapi.Is(err, xapi.HandleInvalid)) {
		return nil, err
	}
	switch {
	case method == methodPromise && p.Promise != nil:
		if err := l.ownSR(p.Promise.SR); err != nil {
			return nil, err
		}
		return b.JobPromise(l.ctx, p.Job, *p.Promise)
	case method == methodClaim:
		return b.JobClaim(l.ctx, p.Job)
	case method == methodReport:
		if err := l.patient(); err != nil {
			return nil, err
		}
		return nil, b.JobReport(l.ctx, p.Job, min(max(p.Progress, 0), 1), ending(p.Tail, maxParam))
	case method == methodRequeue:
		return nil, b.JobRequeue(l.ctx, p.Job)
	case method == methodFinish && p.Outcome != nil:
		return nil, b.JobFinish(l.ctx, p.Job, p.Outcome.outcome())
	}
	return nil, xapi.NewError(xapi.InvalidValue, "params", "something is missing")
}

// ownJob refuses a job of another host. Codes: OPERATION_NOT_ALLOWED,
// HANDLE_INVALID.
func (l *hostLink) ownJob(ref xapi.Ref) error {
	return l.hub.o.Store.View(func(v *store.View) error {
		job, err := store.Get[pool.Job](v, pool.ClassJob, ref)
		if err != nil {
			return err
		}
		return l.own(job)
	})
}

// ownSR refuses an SR that the host is not linked to.
func (l *hostLink) ownSR(ref xapi.Ref) error {
	return l.hub.o.Store.View(func(v *store.View) error {
		if l.plugged(v, ref) {
			return nil
		}
		return l.foreign(fmt.Sprintf("SR %.80s is none of yours", ref))
	})
}

func (l *hostLink) own(job pool.Job) error {
	if job.Host == l.caller.host {
		return nil
	}
	return l.foreign(fmt.Sprintf("job %s is one of host %s", job.UUID, job.Host))
}

// foreign is the refusal of what is not the caller's.
func (l *hostLink) foreign(what string) error {
	return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("%s, and you are %s", what, l.caller.host))
}

func (l *hostLink) findJob(p jobParams) (any, error) {
	job, there, err := l.hub.o.Pool.FindJob(l.ctx, p.UUID)
	if err == nil && there {
		err = l.own(job)
	}
	if err != nil {
		return nil, err
	}
	return jobResult{job, there}, nil
}

// damaged takes it from a host that an image is damaged when an open job of
// that host reads it, or it lies where the host has plugged it.
func (l *hostLink) damaged(p damagedParams) (any, error) {
	err := l.hub.o.Store.View(func(v *store.View) error {
		vdi, err := store.Get[pool.VDI](v, pool.ClassVDI, p.VDI)
		if err != nil {
			return err
		}
		if l.reads(v, p.VDI) || l.plugged(v, vdi.SR) {
			return nil
		}
		return l.foreign(fmt.Sprintf("VDI %s is in no job of yours and in no SR of yours", vdi.UUID))
	})
	if err == nil {
		err = l.patient()
	}
	if err != nil {
		return nil, err
	}
	return nil, l.hub.o.Pool.DamageSaid(l.ctx, l.caller.host, p.VDI, ending(p.Text, maxParam))
}

// reads tells whether an open job of the host names the VDI.
func (l *hostLink) reads(v *store.View, vdi xapi.Ref) bool {
	for _, ref := range v.Refs(pool.ClassJob, "host", string(l.caller.host)) {
		job, err := store.Get[pool.Job](v, pool.ClassJob, ref)
		if err != nil || job.State == pool.JobDone {
			continue
		}
		patch, err := store.Get[pool.Patch](v, pool.ClassPatch, job.Patch)
		if job.VDI == vdi || err == nil && patch.VDI == vdi {
			return true
		}
	}
	return false
}

// plugged tells whether the host has a PBD of the SR.
func (l *hostLink) plugged(v *store.View, sr xapi.Ref) bool {
	for _, ref := range v.Refs(pool.ClassPBD, "SR", string(sr)) {
		pbd, err := store.Get[pool.PBD](v, pool.ClassPBD, ref)
		if err == nil && pbd.Host == l.caller.host {
			return true
		}
	}
	return false
}

func (l *hostLink) resync(p resyncParams) (any, error) {
	if p.Host != l.caller.host {
		return nil, l.foreign(fmt.Sprintf("the stampfiles are said to be of host %s", p.Host))
	}
	stamps := make([]pool.Stamp, len(p.Stamps))
	for i, s := range p.Stamps {
		stamps[i] = pool.Stamp{Patch: s.Patch, Applied: s.Applied, Garbled: s.Garbled}
	}
	return nil, l.hub.o.Pool.Resync(l.ctx, l.caller.host, stamps)
}

func (l *hostLink) message(p messageParams) (any, error) {
	if p.Cls != "Host" || p.Object != l.caller.uuid {
		return nil, l.foreign(fmt.Sprintf("the message is about %s %s", p.Cls, p.Object))
	}
	if err := l.patient(); err != nil {
		return nil, err
	}
	if len(p.Name) > 64 || len(p.Body) > maxParam {
		return nil, xapi.NewError(xapi.InvalidValue, "message", "it is too long")
	}
	return l.hub.o.Pool.MessageCreate(l.ctx, p.Name, min(max(p.Priority, 1), 5), p.Cls, p.Object, p.Body)
}

// limit bounds what the host may ask for, over all its links.
func (l *hostLink) limit() *rate.Limiter {
	ask, _ := l.hub.limits(l.caller.host)
	return ask
}

// patient makes a host wait that tells more than anybody wants to read.
func (l *hostLink) patient() error {
	_, tell := l.hub.limits(l.caller.host)
	return tell.Wait(l.ctx)
}

// limits are those of a host, or fresh ones for a host that has gone.
func (h *Hub) limits(host xapi.Ref) (ask, tell *rate.Limiter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if m := h.index.members[host]; m != nil {
		return m.ask, m.tell
	}
	return newLimits()
}

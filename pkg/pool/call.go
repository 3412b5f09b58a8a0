package pool

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// Storage is worked on by the host it is plugged on. A method that is asked for
// storage of another host becomes a job of that host, whose agent runs the same
// method of its own Pool: see JobCall.

// hostCall is one method that another host may be asked for.
type hostCall struct {
	run func(ctx context.Context, p *Pool, args json.RawMessage) (string, error)
	// again tells that a call which was cut off is simply begun again: it has no
	// effect that a second one would repeat.
	again bool
}

// answering makes a hostCall of a method with one parameter.
func answering[A any](again bool, f func(ctx context.Context, p *Pool, a A) (string, error)) hostCall {
	return hostCall{again: again, run: func(ctx context.Context, p *Pool, raw json.RawMessage) (string, error) {
		var a A
		if err := json.Unmarshal(raw, &a); err != nil {
			return "", xapi.NewError(xapi.InternalError, "the parameters of the call cannot be read").Because(err)
		}
		return f(ctx, p, a)
	}}
}

// obeying is answering for a method that gives nothing.
func obeying[A any](again bool, f func(ctx context.Context, p *Pool, a A) error) hostCall {
	return answering(again, func(ctx context.Context, p *Pool, a A) (string, error) { return "", f(ctx, p, a) })
}

// HostCall runs the method of a JobCall on this host and gives its result as
// text, a ref or nothing. Codes: those of the method, MESSAGE_METHOD_UNKNOWN [name].
func (p *Pool) HostCall(ctx context.Context, name string, args json.RawMessage) (string, error) {
	c, ok := hostCalls[name]
	if !ok {
		return "", xapi.NewError(xapi.MessageMethodUnknown, fmt.Sprintf("%.64s", name))
	}
	return c.run(ctx, p, args)
}

// CallsAgain tells whether a call that was cut off may be begun again.
func CallsAgain(name string) bool { return hostCalls[name].again }

// hostWith tells which host works on an SR: this one where it is plugged here,
// else the one whose link to it is the oldest of those that are plugged. ""
// when none is.
func (p *Pool) hostWith(sr xapi.Ref) (host xapi.Ref, err error) {
	if p.storage.repository(sr) != nil {
		return p.Self, nil
	}
	err = p.Store.View(func(v *store.View) error {
		for _, ref := range v.Refs(ClassPBD, "SR", string(sr)) {
			pbd, err := store.Get[PBD](v, ClassPBD, ref)
			if err != nil {
				return err
			}
			if pbd.CurrentlyAttached && pbd.Host != p.Self {
				host = pbd.Host
				return nil
			}
		}
		return nil
	})
	return host, err
}

// elsewhere tells whether an SR is worked on by another host, and by which.
func (p *Pool) elsewhere(sr xapi.Ref) (host xapi.Ref, yes bool) {
	host, err := p.hostWith(sr)
	return host, err == nil && host != "" && host != p.Self
}

// vdiElsewhere is elsewhere of the SR of a VDI.
func (p *Pool) vdiElsewhere(vdi xapi.Ref) (host xapi.Ref, yes bool) {
	rec, err := p.vdi(vdi)
	if err != nil {
		return "", false
	}
	return p.elsewhere(rec.SR)
}

// callOn has a host run a method of its Pool and gives the result. Codes: those
// of the method, HOST_OFFLINE [host] when the host is away, at the start or
// later: then the call is cancelled.
func (p *Pool) callOn(ctx context.Context, host xapi.Ref, name string, args any) (string, error) {
	if _, ok := hostCalls[name]; !ok {
		return "", fmt.Errorf("there is no host call %q", name)
	}
	raw, err := json.Marshal(args)
	if err != nil {
		return "", err
	}
	if p.Connected != nil && !p.Connected(host) {
		return "", xapi.NewError(xapi.HostOffline, string(host))
	}
	var ref xapi.Ref
	err = p.Store.Update(ctx, func(tx *store.Tx) (err error) {
		ref, err = p.newJob(ctx, tx, Job{Kind: JobCall, Host: host, Call: name, Args: raw})
		return err
	})
	if err != nil {
		return "", err
	}
	wait, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		if p.untilAway(wait, host) {
			stop(xapi.NewError(xapi.HostOffline, string(host)))
		}
	}()
	text, err := p.JobResult(wait, ref)
	if cause := context.Cause(wait); err != nil && ctx.Err() == nil && xapi.Is(cause, xapi.HostOffline) {
		end, cancel := after(ctx)
		defer cancel()
		if cerr := p.JobCancel(end, ref); cerr != nil {
			p.Log.WithError(cerr).WithField("host", host).Warn("a call of a host that is away could not be cancelled")
		}
		return "", cause
	}
	return text, err
}

// leaveCall has a host run a method when it is there, and does not wait for that.
// One that is left already is not left twice.
func (p *Pool) leaveCall(ctx context.Context, host xapi.Ref, name string, args any) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error { return p.leaveIn(ctx, tx, host, name, args) })
}

// leaveIn is leaveCall inside a transaction.
func (p *Pool) leaveIn(ctx context.Context, tx *store.Tx, host xapi.Ref, name string, args any) error {
	raw, err := json.Marshal(args)
	if err != nil {
		return err
	}
	for _, ref := range tx.Refs(ClassJob, "host", string(host)) {
		job, err := store.Read[Job](tx, ClassJob, ref)
		if err != nil {
			return err
		}
		if job.State != JobDone && !job.Cancel && job.Call == name && bytes.Equal(job.Args, raw) {
			return nil
		}
	}
	_, err = p.newJob(Resuming(task.Detached(ctx)), tx, Job{Kind: JobCall, Host: host, Call: name, Args: raw})
	return err
}

// untilAway waits until the record of a host says that it is away, or is gone.
func (p *Pool) untilAway(ctx context.Context, host xapi.Ref) bool {
	err := p.Store.Until(ctx, func(v *store.View) (bool, error) {
		rec, err := store.Get[Host](v, ClassHost, host)
		return err != nil || !rec.Away.IsZero(), nil
	})
	return err == nil
}

// hostCalls are the methods that another host may be asked for, by name.
var hostCalls map[string]hostCall

func init() {
	hostCalls = map[string]hostCall{
		callStage: answering(true, func(ctx context.Context, p *Pool, s StageSpec) (string, error) { return refText(p.Stage(ctx, s)) }),

		"SRCreate":  answering(false, func(ctx context.Context, p *Pool, s SRSpec) (string, error) { return refText(p.SRCreate(ctx, s)) }),
		"SRDestroy": obeying(true, func(ctx context.Context, p *Pool, sr xapi.Ref) error { return unlessGone(p.SRDestroy(ctx, sr)) }),
		"SRForget":  obeying(true, func(ctx context.Context, p *Pool, sr xapi.Ref) error { return unlessGone(p.SRForget(ctx, sr)) }),
		"SRScan":    obeying(true, func(ctx context.Context, p *Pool, sr xapi.Ref) error { return p.SRScan(ctx, sr) }),
		"SRUpdate":  obeying(true, func(ctx context.Context, p *Pool, sr xapi.Ref) error { return p.SRUpdate(ctx, sr) }),
		"SRProbe": answering(true, func(ctx context.Context, p *Pool, a probeCall) (string, error) {
			return p.SRProbe(ctx, p.Self, a.Device, a.Type, a.SMConfig)
		}),

		"PBDPlug": obeying(true, func(ctx context.Context, p *Pool, a plugCall) error {
			if err := p.takeLink(ctx, a); err != nil {
				return err
			}
			return p.PBDPlug(ctx, a.Ref)
		}),
		"PBDUnplug":  obeying(true, func(ctx context.Context, p *Pool, pbd xapi.Ref) error { return p.PBDUnplug(ctx, pbd) }),
		"PBDDestroy": obeying(true, func(ctx context.Context, p *Pool, pbd xapi.Ref) error { return unlessGone(p.PBDDestroy(ctx, pbd)) }),
		"PBDSetDeviceConfig": obeying(true, func(ctx context.Context, p *Pool, a deviceCall) error {
			return unlessGone(p.PBDSetDeviceConfig(ctx, a.Ref, a.Device))
		}),

		"VDICreate": answering(false, func(ctx context.Context, p *Pool, rec VDI) (string, error) { return refText(p.VDICreate(ctx, rec)) }),
		"VDIIntroduce": answering(false, func(ctx context.Context, p *Pool, in VDIIntro) (string, error) {
			return refText(p.VDIIntroduce(ctx, in))
		}),
		"VDIClone": answering(false, func(ctx context.Context, p *Pool, vdi xapi.Ref) (string, error) {
			return refText(p.VDIClone(ctx, vdi, nil))
		}),
		"VDISnapshot": answering(false, func(ctx context.Context, p *Pool, vdi xapi.Ref) (string, error) {
			return refText(p.VDISnapshot(ctx, vdi, nil))
		}),
		"VDICopy": answering(false, func(ctx context.Context, p *Pool, a copyCall) (string, error) {
			return refText(p.VDICopy(ctx, a.VDI, a.SR, a.Base, a.Into))
		}),
		"VDIMakeMap": answering(true, func(ctx context.Context, p *Pool, vdi xapi.Ref) (string, error) { return p.VDIMakeMap(ctx, vdi) }),
		"VDIResize":  obeying(true, func(ctx context.Context, p *Pool, a resizeCall) error { return p.VDIResize(ctx, a.VDI, a.Size) }),
		"VDIForget":  obeying(true, func(ctx context.Context, p *Pool, vdi xapi.Ref) error { return unlessGone(p.VDIForget(ctx, vdi)) }),
		"VDIDestroy": obeying(true, func(ctx context.Context, p *Pool, vdi xapi.Ref) error { return unlessGone(p.VDIDestroy(ctx, vdi)) }),
		"VDIUpdate":  obeying(true, func(ctx context.Context, p *Pool, vdi xapi.Ref) error { return p.VDIUpdate(ctx, vdi) }),
		callRepair:   obeying(true, func(ctx context.Context, p *Pool, vdi xapi.Ref) error { return p.VDIRepair(ctx, vdi) }),
		"VDIVerify": answering(true, func(ctx context.Context, p *Pool, vdi xapi.Ref) (string, error) {
			report, err := p.VDIVerify(ctx, vdi)
			if err != nil {
				return "", err
			}
			b, err := json.Marshal(report)
			return string(b), err
		}),
		"Resync": obeying(true, func(ctx context.Context, p *Pool, _ struct{}) error { return p.Local.ResyncStamps(ctx) }),
	}
}

// unlessGone takes it for done that an object is gone.
func unlessGone(err error) error {
	if xapi.Is(err, xapi.HandleInvalid) {
		return nil
	}
	return err
}

func refText(ref xapi.Ref, err error) (string, error) { return string(ref), err }

// The parameters of the calls that have more than one.
type (
	probeCall struct {
		Type     string            `json:"type"`
		Device   map[string]string `json:"device_config"`
		SMConfig map[string]string `json:"sm_config"`
	}
	// plugCall brings the records, which the host need not have.
	plugCall struct {
		Ref   xapi.Ref `json:"ref"`
		PBD   PBD      `json:"PBD"`
		SRRef xapi.Ref `json:"SR_ref"`
		SR    SR       `json:"SR"`
	}
	deviceCall struct {
		Ref    xapi.Ref          `json:"ref"`
		Device map[string]string `json:"device_config"`
	}
	copyCall struct {
		VDI  xapi.Ref `json:"VDI"`
		SR   xapi.Ref `json:"SR"`
		Base xapi.Ref `json:"base"`
		Into xapi.Ref `json:"into"`
	}
	resizeCall struct {
		VDI  xapi.Ref `json:"VDI"`
		Size int64    `json:"size"`
	}
)

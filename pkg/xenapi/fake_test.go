package xenapi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// fakePool plays the pool: it remembers the last call as text and does what
// the few fields say.
type fakePool struct {
	mu      sync.Mutex
	last    string
	apply   func(ctx context.Context, patch, host xapi.Ref) (string, error)
	vdi     pool.VDI
	spec    pool.SRSpec
	intro   pool.VDIIntro
	checked xapi.Ref
}

func (p *fakePool) note(name string, args ...any) {
	texts := make([]string, len(args))
	for i, a := range args {
		texts[i] = fmt.Sprint(a)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = name + "(" + strings.Join(texts, ", ") + ")"
}

func (p *fakePool) took() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// made is the reference of whatever this pool makes.
const made = xapi.Ref("OpaqueRef:11111111-2222-3333-4444-555555555555")

func (p *fakePool) MessageCreate(_ context.Context, name string, priority int64, cls string, object xapi.UUID, body string) (xapi.Ref, error) {
	p.note("MessageCreate", name, priority, cls, object, body)
	return made, nil
}

func (p *fakePool) MessageDestroy(_ context.Context, message xapi.Ref) error {
	p.note("MessageDestroy", message)
	return nil
}

func (p *fakePool) PatchPrecheck(_ context.Context, patch, host xapi.Ref) (string, error) {
	p.note("PatchPrecheck", patch, host)
	return "text", nil
}

func (p *fakePool) PatchApply(ctx context.Context, patch, host xapi.Ref) (string, error) {
	p.note("PatchApply", patch, host)
	if p.apply == nil {
		return "done <&>", nil
	}
	return p.apply(ctx, patch, host)
}

func (p *fakePool) PatchPoolApply(_ context.Context, patch xapi.Ref) error {
	p.note("PatchPoolApply", patch)
	return nil
}

func (p *fakePool) PatchClean(_ context.Context, patch xapi.Ref) error {
	p.note("PatchClean", patch)
	return errors.New("disk on fire")
}

func (p *fakePool) PatchCleanOnHost(_ context.Context, patch, host xapi.Ref) error {
	p.note("PatchCleanOnHost", patch, host)
	return nil
}

func (p *fakePool) PatchPoolClean(_ context.Context, patch xapi.Ref) error {
	p.note("PatchPoolClean", patch)
	return nil
}

func (p *fakePool) PatchDestroy(_ context.Context, patch xapi.Ref) error {
	p.note("PatchDestroy", patch)
	return xapi.NewError(xapi.PatchIsApplied).Because(errors.New("a cause for the log"))
}

func (p *fakePool) PatchSettle(_ context.Context, patch, host xapi.Ref, applied bool) error {
	p.note("PatchSettle", patch, host, applied)
	return nil
}

func (p *fakePool) PatchImport(_ context.Context, path string) (xapi.Ref, error) {
	p.note("PatchImport", path)
	return made, nil
}

func (p *fakePool) HostPatchDestroy(_ context.Context, hostPatch xapi.Ref) error {
	p.note("HostPatchDestroy", hostPatch)
	return nil
}

func (p *fakePool) SRCreate(_ context.Context, spec pool.SRSpec) (xapi.Ref, error) {
	p.note("SRCreate", spec)
	p.spec = spec
	return made, nil
}

func (p *fakePool) SRIntroduce(_ context.Context, uuid xapi.UUID, spec pool.SRSpec) (xapi.Ref, error) {
	p.note("SRIntroduce", uuid, spec)
	return made, nil
}

func (p *fakePool) SRForget(_ context.Context, sr xapi.Ref) error {
	p.note("SRForget", sr)
	return nil
}

func (p *fakePool) SRDestroy(_ context.Context, sr xapi.Ref) error {
	p.note("SRDestroy", sr)
	return nil
}

func (p *fakePool) SRScan(_ context.Context, sr xapi.Ref) error {
	p.note("SRScan", sr)
	panic("a driver lost its mind")
}

func (p *fakePool) SRUpdate(_ context.Context, sr xapi.Ref) error {
	p.note("SRUpdate", sr)
	return nil
}

func (p *fakePool) SRProbe(_ context.Context, host xapi.Ref, deviceConfig map[string]string, typ string, smConfig map[string]string) (string, error) {
	p.note("SRProbe", host, deviceConfig, typ, smConfig)
	return "text", nil
}

func (p *fakePool) SRSetShared(_ context.Context, sr xapi.Ref, shared bool) error {
	p.note("SRSetShared", sr, shared)
	return nil
}

func (p *fakePool) SRSetNameLabel(_ context.Context, sr xapi.Ref, label string) error {
	p.note("SRSetNameLabel", sr, label)
	return nil
}

func (p *fakePool) SRSetNameDescription(_ context.Context, sr xapi.Ref, description string) error {
	p.note("SRSetNameDescription", sr, description)
	return nil
}

func (p *fakePool) SRSetPhysicalSize(_ context.Context, sr xapi.Ref, size int64) error {
	p.note("SRSetPhysicalSize", sr, size)
	return nil
}

func (p *fakePool) PBDCreate(_ context.Context, rec pool.PBD) (xapi.Ref, error) {
	p.note("PBDCreate", rec)
	return made, nil
}

func (p *fakePool) PBDDestroy(_ context.Context, pbd xapi.Ref) error {
	p.note("PBDDestroy", pbd)
	return nil
}

func (p *fakePool) PBDPlug(_ context.Context, pbd xapi.Ref) error {
	p.note("PBDPlug", pbd)
	return nil
}

func (p *fakePool) PBDUnplug(_ context.Context, pbd xapi.Ref) error {
	p.note("PBDUnplug", pbd)
	return nil
}

func (p *fakePool) PBDSetDeviceConfig(_ context.Context, pbd xapi.Ref, config map[string]string) error {
	p.note("PBDSetDeviceConfig", pbd, config)
	return nil
}

func (p *fakePool) VDICreate(_ context.Context, rec pool.VDI) (xapi.Ref, error) {
	p.note("VDICreate", rec)
	p.vdi = rec
	return made, nil
}

func (p *fakePool) VDIIntroduce(_ context.Context, intro pool.VDIIntro) (xapi.Ref, error) {
	p.note("VDIIntroduce", intro)
	p.intro = intro
	return made, nil
}

func (p *fakePool) VDIDestroy(_ context.Context, vdi xapi.Ref) error {
	p.note("VDIDestroy", vdi)
	return nil
}

func (p *fakePool) VDIForget(_ context.Context, vdi xapi.Ref) error {
	p.note("VDIForget", vdi)
	return nil
}

func (p *fakePool) VDIUpdate(_ context.Context, vdi xapi.Ref) error {
	p.note("VDIUpdate", vdi)
	return nil
}

func (p *fakePool) VDIClone(_ context.Context, vdi xapi.Ref, driverParams map[string]string) (xapi.Ref, error) {
	p.note("VDIClone", vdi, driverParams)
	return made, nil
}

func (p *fakePool) VDISnapshot(_ context.Context, vdi xapi.Ref, driverParams map[string]string) (xapi.Ref, error) {
	p.note("VDISnapshot", vdi, driverParams)
	return made, nil
}

func (p *fakePool) VDICopy(_ context.Context, vdi, sr, baseVDI, intoVDI xapi.Ref) (xapi.Ref, error) {
	p.note("VDICopy", vdi, sr, baseVDI, intoVDI)
	return made, nil
}

func (p *fakePool) VDIPoolMigrate(_ context.Context, vdi, sr xapi.Ref, options map[string]string) (xapi.Ref, error) {
	p.note("VDIPoolMigrate", vdi, sr, options)
	return made, nil
}

func (p *fakePool) VDIResize(_ context.Context, vdi xapi.Ref, size int64) error {
	p.note("VDIResize", vdi, size)
	return nil
}

func (p *fakePool) VDISetNameLabel(_ context.Context, vdi xapi.Ref, label string) error {
	p.note("VDISetNameLabel", vdi, label)
	return nil
}

func (p *fakePool) VDISetNameDescription(_ context.Context, vdi xapi.Ref, description string) error {
	p.note("VDISetNameDescription", vdi, description)
	return nil
}

func (p *fakePool) VDISetReadOnly(_ context.Context, vdi xapi.Ref, value bool) error {
	p.note("VDISetReadOnly", vdi, value)
	return nil
}

func (p *fakePool) VDISetSharable(_ context.Context, vdi xapi.Ref, value bool) error {
	p.note("VDISetSharable", vdi, value)
	return nil
}

func (p *fakePool) VDIVerify(_ context.Context, vdi xapi.Ref) (pool.VerifyReport, error) {
	p.note("VDIVerify", vdi)
	return pool.VerifyReport{Damage: "damaged <&>"}, nil
}

func (p *fakePool) VDIRepair(_ context.Context, vdi xapi.Ref) error {
	p.note("VDIRepair", vdi)
	return nil
}

func (p *fakePool) SRRoom(_ context.Context, sr xapi.Ref) (free, promised int64, err error) {
	p.note("SRRoom", sr)
	return 7, 5, nil
}

func (p *fakePool) VDIChecks() ([]pool.VDICheck, error) {
	p.note("VDIChecks")
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return []pool.VDICheck{
		{VDI: p.checked, UUID: xapi.UUID(made[10:]), Map: "m", Checked: at, Damage: "d"}, {VDI: p.checked, Map: "m"},
	}, nil
}

func (p *fakePool) HostEject(_ context.Context, host xapi.Ref, force bool) error {
	p.note("HostEject", host, force)
	return nil
}

func (p *fakePool) HostRevoke(_ context.Context, host xapi.Ref) error {
	p.note("HostRevoke", host)
	return nil
}

func (p *fakePool) HostStates(context.Context) ([]pool.HostInfo, error) {
	p.note("HostStates")
	return []pool.HostInfo{{Ref: made, NameLabel: "host", Rank: pool.RankMember}}, nil
}

func (p *fakePool) RunStart(_ context.Context, patch xapi.Ref, policy pool.Policy) (xapi.UUID, error) {
	p.note("RunStart", patch, policy.AtOnce)
	return "11111111-2222-4333-8444-555555555555", nil
}

func (p *fakePool) RunPreview(patch xapi.Ref, policy pool.Policy) (pool.RunInfo, []pool.RunHostInfo, error) {
	p.note("RunPreview", patch, policy.AtOnce)
	return pool.RunInfo{PatchName: "p"}, []pool.RunHostInfo{{Name: "h"}}, nil
}

func (p *fakePool) RunList() ([]pool.RunInfo, error) {
	p.note("RunList")
	return []pool.RunInfo{{PatchName: "p", Now: map[pool.HostState]int{pool.HostFailed: 2}}}, nil
}

func (p *fakePool) RunShow(run xapi.UUID) (pool.RunInfo, []pool.RunHostInfo, error) {
	p.note("RunShow", run)
	return pool.RunInfo{PatchName: "p"}, []pool.RunHostInfo{{Name: "h"}}, nil
}

func (p *fakePool) RunPause(_ context.Context, run xapi.UUID, by string) error {
	p.note("RunPause", run)
	return nil
}

func (p *fakePool) RunResume(_ context.Context, run xapi.UUID) error {
	p.note("RunResume", run)
	return nil
}

func (p *fakePool) RunCancel(_ context.Context, run xapi.UUID, by string) error {
	p.note("RunCancel", run)
	return nil
}

func (p *fakePool) RunRetry(_ context.Context, run xapi.UUID, hosts []xapi.Ref) error {
	p.note("RunRetry", run, hosts)
	return nil
}

func (p *fakePool) Why(_ context.Context, host, patch xapi.Ref) ([]string, error) {
	p.note("Why", host, patch)
	return []string{"because"}, nil
}

func (p *fakePool) Compliance(patch xapi.Ref) ([]pool.Compliance, error) {
	p.note("Compliance", patch)
	return []pool.Compliance{{HostName: "h", Value: pool.ComplianceYes}}, nil
}

func (p *fakePool) HostExempt(_ context.Context, host, patch xapi.Ref, exempt bool, reason string) error {
	p.note("HostExempt", host, patch, exempt, reason)
	return nil
}

func (p *fakePool) HostResync(_ context.Context, host xapi.Ref) error {
	p.note("HostResync", host)
	return nil
}

func (p *fakePool) PatchStage(_ context.Context, patch xapi.Ref, hosts []xapi.Ref) error {
	p.note("PatchStage", patch, hosts)
	return nil
}

package xenapi

import (
	"context"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// Pool is what the wire asks of the pool. Every method returns errors with
// codes; work that takes long reports to the task of ctx and ends with it.
type Pool interface {
	PatchPool
	StoragePool
	VDIPool
	VerifyPool
	RoomPool
	MemberPool
	RunPool
	StagePool
	MessageCreate(ctx context.Context, name string, priority int64, cls string, object xapi.UUID, body string) (xapi.Ref, error)
	MessageDestroy(ctx context.Context, message xapi.Ref) error
}

// Examiner is a Pool that can look for what an admin must see to.
type Examiner interface {
	Examine(ctx context.Context) ([]pool.Finding, error)
}

var _ Examiner = (*pool.Pool)(nil)

// PatchPool is the side of patches.
type PatchPool interface {
	PatchPrecheck(ctx context.Context, patch, host xapi.Ref) (string, error)
	PatchApply(ctx context.Context, patch, host xapi.Ref) (string, error)
	PatchPoolApply(ctx context.Context, patch xapi.Ref) error
	PatchClean(ctx context.Context, patch xapi.Ref) error
	PatchCleanOnHost(ctx context.Context, patch, host xapi.Ref) error
	PatchPoolClean(ctx context.Context, patch xapi.Ref) error
	PatchDestroy(ctx context.Context, patch xapi.Ref) error
	PatchSettle(ctx context.Context, patch, host xapi.Ref, applied bool) error
	PatchImport(ctx context.Context, path string) (xapi.Ref, error)
	HostPatchDestroy(ctx context.Context, hostPatch xapi.Ref) error
}

// StoragePool is the side of SRs and PBDs. Sizes are in bytes.
type StoragePool interface {
	SRCreate(ctx context.Context, spec pool.SRSpec) (xapi.Ref, error)
	SRIntroduce(ctx context.Context, uuid xapi.UUID, spec pool.SRSpec) (xapi.Ref, error)
	SRForget(ctx context.Context, sr xapi.Ref) error
	SRDestroy(ctx context.Context, sr xapi.Ref) error
	SRScan(ctx context.Context, sr xapi.Ref) error
	SRUpdate(ctx context.Context, sr xapi.Ref) error
	SRProbe(ctx context.Context, host xapi.Ref, deviceConfig map[string]string, typ string, smConfig map[string]string) (string, error)
	SRSetShared(ctx context.Context, sr xapi.Ref, shared bool) error
	SRSetNameLabel(ctx context.Context, sr xapi.Ref, label string) error
	SRSetNameDescription(ctx context.Context, sr xapi.Ref, description string) error
	SRSetPhysicalSize(ctx context.Context, sr xapi.Ref, size int64) error

	PBDCreate(ctx context.Context, rec pool.PBD) (xapi.Ref, error)
	PBDDestroy(ctx context.Context, pbd xapi.Ref) error
	PBDPlug(ctx context.Context, pbd xapi.Ref) error
	PBDUnplug(ctx context.Context, pbd xapi.Ref) error
	PBDSetDeviceConfig(ctx context.Context, pbd xapi.Ref, config map[string]string) error
}

// VDIPool is the side of disk images. Sizes are in bytes.
type VDIPool interface {
	VDICreate(ctx context.Context, rec pool.VDI) (xapi.Ref, error)
	VDIIntroduce(ctx context.Context, intro pool.VDIIntro) (xapi.Ref, error)
	VDIDestroy(ctx context.Context, vdi xapi.Ref) error
	VDIForget(ctx context.Context, vdi xapi.Ref) error
	VDIUpdate(ctx context.Context, vdi xapi.Ref) error
	VDIClone(ctx context.Context, vdi xapi.Ref, driverParams map[string]string) (xapi.Ref, error)
	VDISnapshot(ctx context.Context, vdi xapi.Ref, driverParams map[string]string) (xapi.Ref, error)
	VDICopy(ctx context.Context, vdi, sr, baseVDI, intoVDI xapi.Ref) (xapi.Ref, error)
	VDIPoolMigrate(ctx context.Context, vdi, sr xapi.Ref, options map[string]string) (xapi.Ref, error)
	VDIResize(ctx context.Context, vdi xapi.Ref, size int64) error
	VDISetNameLabel(ctx context.Context, vdi xapi.Ref, label string) error
	VDISetNameDescription(ctx context.Context, vdi xapi.Ref, description string) error
	VDISetReadOnly(ctx context.Context, vdi xapi.Ref, value bool) error
	VDISetSharable(ctx context.Context, vdi xapi.Ref, value bool) error
}

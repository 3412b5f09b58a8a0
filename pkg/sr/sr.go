// Package sr is the contract between patchd and storage repositories.
//
// # Terms
//
// A Driver is one kind of storage (XenAPI: SM). A Repository is one SR,
// attached to this host (XenAPI: a plugged PBD). A volume is one disk image in
// it, known by its Name: a live VDI, or working data of one job.
//
// # Life cycle
//
// Driver.Create prepares an empty SR; Driver.Attach plugs it; volumes are
// created, filled, renamed, cloned and destroyed; Repository.Detach unplugs it;
// Driver.Destroy removes an SR that holds nothing.
//
// A new VDI begins as a part volume and gets its live name only when its bytes
// are there and synced:
//
//	part := sr.Part(owner, vdi)
//	vol, err := repo.Create(ctx, part, size)
//	f, err := repo.Open(ctx, part, sr.ReadWrite)
//	… fill f, f.Sync(), f.Close() …
//	err = repo.Rename(ctx, part, sr.Live(vdi))
//
// Whatever carries a part or work name is ours and belongs to one job: when
// that job is dead, the sweeper destroys it. A live name is never swept, and
// never follows from what is inside a volume. Working volumes need not outlive
// a power failure, so that a driver may make and destroy them without a sync;
// all else is durable when a call has returned.
//
// # Rules for every method
//
// Methods may be called at the same time by many goroutines, also for one
// volume. A cancelled context ends the call soon and nothing half-made is left
// behind under a live name. What does not exist is destroyed with success: every call may be
// repeated. Sizes are bytes. A full SR gives an error for which
// xapi.Is(err, xapi.OutOfSpace) holds.
package sr

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/xapi"
)

// Feature is a capability string, as in SM.features.
type Feature string

// The features a repository can have.
const (
	VDICreate   Feature = "VDI_CREATE"
	VDIDelete   Feature = "VDI_DELETE"
	VDIClone    Feature = "VDI_CLONE" // in constant time, whatever the size
	VDISnapshot Feature = "VDI_SNAPSHOT"
	VDIResize   Feature = "VDI_RESIZE"
	VDIIntro    Feature = "VDI_INTRODUCE"
	SRProbe     Feature = "SR_PROBE"
	SRUpdate    Feature = "SR_UPDATE"
)

// Info says what a driver is: the SM record.
type Info struct {
	Type        string // "file"; the value of SR.type
	Label       string
	Description string
	Vendor      string
	Copyright   string
	Version     string
	// Config lists the device_config keys, name to explanation. A key that is
	// not listed is refused.
	Config   map[string]string
	Required []string // those keys of Config that must be given
	// Features are those every SR of this kind has, whatever lies below it.
	Features []Feature
	// Shared tells whether an SR of this kind may be plugged on many hosts.
	Shared bool
}

// Config is one configured SR as one host sees it.
type Config struct {
	SR     xapi.UUID
	Device map[string]string // PBD.device_config
	SM     map[string]string // SR.sm_config
	// KeepFree is what must stay free on the filesystem below, in bytes, so
	// that the database that may lie there never meets a full disk. A
	// repository that shares no filesystem with the state directory has 0.
	KeepFree func(path string) int64
	// Name gives the name-label of the SR at this moment, for errors; nil or
	// "" when there is none yet.
	Name func() string
	// Dom0 is how a driver acts on the operating system: makes a filesystem,
	// mounts, runs the tools of a volume manager.
	Dom0 dom0.Dom0
	// MountDir is the folder of this host below which a driver may mount, at
	// MountDir/<SR uuid>; made on demand.
	MountDir string
}

// Driver is one kind of storage.
type Driver interface {
	// Info never fails and never changes.
	Info() Info

	// Probe looks at what c points to and describes it as the XML text that
	// SR.probe returns. It changes nothing.
	Probe(ctx context.Context, c Config) (string, error)

	// Create prepares an empty SR. What is there already and is not an SR of this
	// uuid is refused (SR_DEVICE_IN_USE), never overwritten. Twice is success.
	Create(ctx context.Context, c Config) error

	// Attach plugs the SR and probes its features: they are facts of this
	// configuration, not of the driver.
	Attach(ctx context.Context, c Config) (Repository, error)

	// Destroy removes an SR that holds no volume (else SR_NOT_EMPTY). An SR
	// that is not there is success; another one in its place stays.
	Destroy(ctx context.Context, c Config) error
}

// Repository is an SR attached to this host.
type Repository interface {
	// Features are what was probed at attach.
	Features() []Feature

	// Stat tells the room there is.
	Stat(ctx context.Context) (Stat, error)

	// Scan lists all volumes, live and working; what is not ours is not
	// listed. Sorted by name.
	Scan(ctx context.Context) ([]Volume, error)

	// Create makes a volume of size bytes that reads as zeros and takes no
	// room yet where the storage can be thin. An existing name is an error.
	Create(ctx context.Context, n Name, size int64) (Volume, error)

	// Open opens a volume. VDI_NOT_AVAILABLE when it is not there. The
	// descriptor stays valid when the volume is renamed or destroyed. Read and
	// write at offsets; the length never changes by writing.
	Open(ctx context.Context, n Name, m Mode) (*os.File, error)

	// Path is what a loop device can be made of, or a block device, valid
	// while the volume lives.
	Path(ctx context.Context, n Name) (string, error)

	// Clone makes dst share src's blocks, copy on write, in constant time.
	// Without VDI_CLONE: SR_OPERATION_NOT_SUPPORTED; use Copy.
	Clone(ctx context.Context, src, dst Name) (Volume, error)

	// Resize sets the size; shrinking is refused (VDI_TOO_SMALL is the
	// caller's word: the driver answers INVALID_VALUE).
	Resize(ctx context.Context, n Name, size int64) error

	// Rename gives a volume another name, durably and atomically. An existing
	// target is an error, except that renaming what was already renamed is
	// success.
	Rename(ctx context.Context, from, to Name) error

	// Destroy removes a volume. An absent one is success. Open descriptors
	// stay readable.
	Destroy(ctx context.Context, n Name) error

	// Detach unplugs the SR. No call may follow it. When something else uses
	// what is mounted there, the error names it, errors.Is(err, syscall.EBUSY)
	// holds, and the SR stays attached and usable.
	Detach(ctx context.Context) error
}

// Mode is how a volume is opened.
type Mode int

// The two modes.
const (
	ReadOnly Mode = iota
	ReadWrite
)

// Stat is the room of an SR, in bytes.
type Stat struct {
	PhysicalSize        int64
	PhysicalUtilisation int64
	// Free is what may still be written: below PhysicalSize minus
	// PhysicalUtilisation where something must be kept free.
	Free int64
}

// Volume is what is known about one disk image without reading it.
type Volume struct {
	Name                Name
	VirtualSize         int64
	PhysicalUtilisation int64
}

// Kind tells a live volume from working data.
type Kind string

// The kinds of a volume.
const (
	KindLive Kind = "vdi"  // a VDI
	KindPart Kind = "part" // a VDI in the making
	KindWork Kind = "work" // a clone or copy that one job uses

	KindMap     Kind = "map"     // the block map of a VDI
	KindMapPart Kind = "mappart" // the block map of a VDI in the making
)

// Owner is whose working data a volume is: our own intent, written into its name.
type Owner struct {
	Pool, Host, Job xapi.UUID
}

// Name is the name of a volume. VDI is the uuid of the live VDI, of the VDI in
// the making, or of the working volume itself, which is never that of a VDI.
type Name struct {
	Kind  Kind
	VDI   xapi.UUID
	Owner Owner // zero for a live volume and its map
}

// Live names the volume of a VDI.
func Live(vdi xapi.UUID) Name { return Name{Kind: KindLive, VDI: vdi} }

// Part names a VDI in the making.
func Part(o Owner, vdi xapi.UUID) Name { return Name{Kind: KindPart, VDI: vdi, Owner: o} }

// Work names working data of a job.
func Work(o Owner, id xapi.UUID) Name { return Name{Kind: KindWork, VDI: id, Owner: o} }

// Map names the block map that belongs to a live volume or to a part.
func (n Name) Map() Name {
	if n.Kind == KindPart {
		n.Kind = KindMapPart
	} else {
		n.Kind = KindMap
	}
	return n
}

// String is the name as drivers write it: the bare uuid of a live volume, "map"
// and that uuid, or kind and the four uuids, joined by a dot. It is safe as one
// element of a path.
func (n Name) String() string {
	switch n.Kind {
	case KindLive:
		return string(n.VDI)
	case KindMap:
		return string(KindMap) + "." + string(n.VDI)
	}
	return strings.Join([]string{string(n.Kind), string(n.Owner.Pool), string(n.Owner.Host), string(n.Owner.Job), string(n.VDI)}, ".")
}

// Validate refuses a name with anything in it that is not a uuid.
func (n Name) Validate() error {
	ids := []xapi.UUID{n.VDI}
	switch n.Kind {
	case KindLive, KindMap:
	case KindPart, KindMapPart, KindWork:
		ids = append(ids, n.Owner.Pool, n.Owner.Host, n.Owner.Job)
	default:
		return fmt.Errorf("volume of unknown kind %.32q", n.Kind)
	}
	for _, id := range ids {
		if !id.Valid() {
			return fmt.Errorf("volume name holds %.64q, which is not a uuid", id)
		}
	}
	return nil
}

// ParseName reads what String wrote. ok is false for anything else: it is not ours.
func ParseName(s string) (n Name, ok bool) {
	f := strings.Split(s, ".")
	switch len(f) {
	case 1:
		n = Live(xapi.UUID(f[0]))
	case 2:
		n = Name{Kind: Kind(f[0]), VDI: xapi.UUID(f[1])}
	case 5:
		n = Name{Kind: Kind(f[0]), VDI: xapi.UUID(f[4]), Owner: Owner{xapi.UUID(f[1]), xapi.UUID(f[2]), xapi.UUID(f[3])}}
	default:
		return Name{}, false
	}
	if n.Validate() != nil || n.String() != s {
		return Name{}, false
	}
	return n, true
}

// Has tells whether f is among features.
func Has(features []Feature, f Feature) bool { return slices.Contains(features, f) }

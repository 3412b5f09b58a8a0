// Package pool owns the records of the pool and every operation on them:
// introduce, precheck, apply, pool_apply, clean and destroy of patches; create,
// plug, scan and destroy of SRs; create, clone, copy, verify, repair and
// destroy of VDIs, and VDIs in the making (Draft); room that is promised; the
// comparison of records with what a host really has.
//
// What changes the pool's records goes through one store transaction. What
// takes place on a host is a job: a record that the agent of that host takes,
// carries out and reports on. The package knows no wire, runs no program and
// mounts nothing.
//
// The codes an operation returns are those of the XenAPI; the comment of each
// method names them.
package pool

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Pool is the service. Every method may be called by many goroutines.
type Pool struct {
	Store   *store.Store
	Log     logrus.FieldLogger
	Drivers []sr.Driver
	Now     func() time.Time

	// Self is the record of the host this process runs on.
	Self     xapi.Ref
	SelfUUID xapi.UUID
	PoolUUID xapi.UUID

	// PatchDir is this host's folder of classic patch files and of stampfiles.
	PatchDir string

	// KeepFree is what must stay free on the filesystem that holds path.
	KeepFree func(path string) int64

	// OwnDirs are folders of patchd's own, where no SR may lie.
	OwnDirs []string

	// Dom0 is what storage drivers act through, and MountDir where they mount.
	Dom0     dom0.Dom0
	MountDir string

	// Local is the agent of this host; set before the first call that needs it.
	Local LocalHost

	// Connected tells whether a host is there to do something now; nil: every one is.
	Connected func(host xapi.Ref) bool

	// Seen tells since when a host is connected, or is not; nil: all are.
	Seen func(host xapi.Ref) (since time.Time, connected bool)

	// Fetcher gets images from other hosts; nil: none can.
	Fetcher Fetcher

	// Ticket makes the right of a host to read the images with a map from others;
	// nil: there are no tickets.
	Ticket func(reader Host, digest string) ([]byte, error)

	// Busy tells of a job that this host works on and that is in another store; may be nil.
	Busy func(job xapi.UUID) bool

	// Copies is how many hosts must have the image of an upload before Confirm
	// confirms it, CopiesTimeout how long that may take, and StageOn has a host
	// take the image; nil: no host can be asked to.
	Copies        int
	CopiesTimeout time.Duration
	StageOn       func(ctx context.Context, patch, host xapi.Ref) error

	// Confirmed tells whether enough hosts have the bytes of a patch that a run may
	// begin with it: nil, or why not; nil itself: every patch is.
	Confirmed func(patch xapi.Ref) error

	// Tasks are what runs by a policy are driven as; set before the first of them.
	Tasks RunTasks

	// Also is what Examine looks at beside the records and the storage; may be nil.
	Also func(ctx context.Context) ([]Finding, error)

	storage  Storage
	runs     runsInHand
	fetching fetching
}

// Options says who this host is and where its things lie.
type Options struct {
	Store    *store.Store
	Log      logrus.FieldLogger
	Drivers  []sr.Driver
	Now      func() time.Time // nil: the clock
	HostUUID xapi.UUID        // of this host, kept by the caller
	Hostname string
	Address  string // by which clients and other hosts reach this one, or ""
	PatchDir string
	OwnDirs  []string
	KeepFree func(path string) int64
	// Dom0 and MountDir are handed to the storage drivers; see sr.Config.
	Dom0     dom0.Dom0
	MountDir string
	// Version is this program's version, for the host's software_version.
	Version string
	CPUInfo map[string]string
	// Key is this host's public key (DER of SubjectPublicKeyInfo) and URL where
	// its TLS listener is reached; nil and "" where there is none.
	Key []byte
	URL string
}

// Indexes are the relations that the records of this package are looked up by.
// The field named Parent changes when a child comes, goes or moves.
func Indexes() []store.Index {
	return []store.Index{
		{Class: ClassHostPatch, Field: "pool_patch", Parent: ClassPatch},
		{Class: ClassHostPatch, Field: "host", Parent: ClassHost},
		{Class: ClassVDI, Field: "SR", Parent: ClassSR},
		{Class: ClassVDI, Field: "snapshot_of", Parent: ClassVDI},
		{Class: ClassPBD, Field: "SR", Parent: ClassSR},
		{Class: ClassPBD, Field: "host", Parent: ClassHost},
		{Class: ClassPatch, Field: "VDI"},
		{Class: ClassRunHost, Field: "run"},
		{Class: ClassRunHost, Field: "host"},
		{Class: ClassJob, Field: "host"},
		{Class: ClassJob, Field: "patch"},
		{Class: ClassJob, Field: "VDI"},
		{Class: ClassJob, Field: "SR"},
		{Class: ClassVDI, Field: "_map"},
	}
}

// Open makes sure that the pool and this host have their records and gives the
// service. A store that is empty gets a pool of one host.
func Open(ctx context.Context, o Options) (*Pool, error) {
	p := &Pool{
		Store: o.Store, Log: o.Log, Drivers: o.Drivers, Now: o.Now,
		SelfUUID: o.HostUUID, PatchDir: o.PatchDir, OwnDirs: o.OwnDirs, KeepFree: o.KeepFree,
		Dom0: o.Dom0, MountDir: o.MountDir,
	}
	if p.Now == nil {
		p.Now = time.Now
	}
	if p.KeepFree == nil {
		p.KeepFree = func(string) int64 { return 0 }
	}
	err := p.Store.Update(ctx, func(tx *store.Tx) error { return p.ensureRecords(tx, o) })
	if err != nil {
		return nil, fmt.Errorf("write the records of pool and host: %w", err)
	}
	return p, nil
}

// ensureRecords is the body of Open's transaction.
func (p *Pool) ensureRecords(tx *store.Tx, o Options) error {
	host, ref := Host{}, xapi.NewRef()
	for _, it := range tx.List(ClassHost) {
		var h Host
		if err := it.Decode(&h); err != nil {
			return err
		}
		if h.UUID == o.HostUUID {
			host, ref = h, it.Ref
		}
	}
	if host.UUID == "" {
		host = Host{
			UUID: o.HostUUID, NameLabel: o.Hostname, Enabled: true, Display: "enabled",
			OtherConfig: map[string]string{}, Tags: []string{}, Logging: map[string]string{},
			LicenseServer: map[string]string{}, GuestVCPUsParams: map[string]string{},
			SuspendImageSR: xapi.NullRef, CrashDumpSR: xapi.NullRef, Bare: true,
		}
	}
	host.Hostname, host.Address, host.CPUInfo = o.Hostname, o.Address, o.CPUInfo
	host.Coordinator, host.URL = true, o.URL
	host.addKey(o.Key, p.Now())
	if host.CPUInfo == nil {
		host.CPUInfo = map[string]string{}
	}
	host.SoftwareVersion = SoftwareVersion(o.Version)
	tx.Put(ClassHost, ref, host)
	p.Self = ref

	if pools := tx.List(ClassPool); len(pools) > 0 {
		var r PoolRecord
		if err := pools[0].Decode(&r); err != nil {
			return err
		}
		p.PoolUUID = r.UUID
		return nil
	}
	r := PoolRecord{
		UUID: xapi.NewUUID(), NameLabel: "", Master: ref, DefaultSR: xapi.NullRef,
		SuspendImageSR: xapi.NullRef, CrashDumpSR: xapi.NullRef, OtherConfig: map[string]string{},
		GuiConfig: map[string]string{}, HealthCheckConfig: map[string]string{}, Tags: []string{},
	}
	tx.Put(ClassPool, xapi.NewRef(), r)
	p.PoolUUID = r.UUID
	return nil
}

// keysKept is how many public keys of a host are known at a time: the present
// one and the one before it.
const keysKept = 2

// addKey makes key the newest of the host.
func (h *Host) addKey(key []byte, now time.Time) {
	if key == nil {
		return
	}
	for i, k := range h.Keys {
		if bytes.Equal(k.SPKI, key) && i == len(h.Keys)-1 {
			return
		}
	}
	h.Keys = slices.DeleteFunc(h.Keys, func(k HostKey) bool { return bytes.Equal(k.SPKI, key) })
	h.Keys = append(h.Keys, HostKey{SPKI: key, Added: now.UTC()})
	h.Keys = h.Keys[max(0, len(h.Keys)-keysKept):]
}

// HostAddKey makes key the newest of a host; the one before stays known. Code:
// HANDLE_INVALID.
func (p *Pool) HostAddKey(ctx context.Context, host xapi.Ref, key []byte) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, host)
		if err != nil {
			return err
		}
		rec.addKey(key, p.Now())
		tx.Put(ClassHost, host, rec)
		return nil
	})
}

// SoftwareVersion is what a host with that patchd says of its software: 7.0 with platform 2.1.0: the last family with classic
// patches, so that clients which know two ways take the classic one.
func SoftwareVersion(version string) map[string]string {
	return map[string]string{
		"product_brand": "patchd", "product_version": "7.0.0", "product_version_text": "7.0",
		"product_version_text_short": "7.0", "platform_name": "XCP", "platform_version": "2.1.0",
		"build_number": version, "patchd": version, "network_backend": "openvswitch",
		"hostname": "localhost", "date": "2016-05-20",
	}
}

// Record gives the one pool record and its ref.
func (p *Pool) Record() (xapi.Ref, PoolRecord, error) {
	var ref xapi.Ref
	var rec PoolRecord
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassPool) {
			ref = it.Ref
			return it.Decode(&rec)
		}
		return fmt.Errorf("the store holds no pool record")
	})
	return ref, rec, err
}

// keyReady in pool.other_config tells that the first start was done once: a
// pool whose SRs were all removed stays without.
const keyReady = "patchd-ready"

// SetDefaultSR makes sr the pool's default. Code: HANDLE_INVALID.
func (p *Pool) SetDefaultSR(ctx context.Context, sr xapi.Ref) error {
	ref, _, err := p.Record()
	if err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[PoolRecord](tx, ClassPool, ref)
		if err != nil {
			return err
		}
		if !tx.Has(ClassSR, sr) {
			return xapi.NewError(xapi.HandleInvalid, ClassSR, string(sr))
		}
		rec.DefaultSR, rec.OtherConfig[keyReady] = sr, "true"
		tx.Put(ClassPool, ref, rec)
		return nil
	})
}

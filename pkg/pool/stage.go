package pool

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// Fetcher gets the blocks of images from other hosts.
type Fetcher interface {
	// FetchMap gets the block map of that digest.
	FetchMap(ctx context.Context, digest string) (*vdi.Map, error)
	// Pull makes dst the image that m describes. What dst has already is kept with
	// resume. progress hears of bytes.
	Pull(ctx context.Context, m *vdi.Map, dst *os.File, resume bool, progress func(done, total int64)) error
}

// StageSpec says which image is to be on the storage of a host.
type StageSpec struct {
	Map  string `json:"map"`            // digest of its block map
	Size int64  `json:"virtual_size"`   // bytes; 0: what the map says
	Room int64  `json:"room,omitempty"` // bytes its blocks take, as far as is known
	// SR is where it is to lie; empty: a local one with the most room, else a
	// shared one.
	SR xapi.Ref `json:"SR,omitempty"`
	// VDI is its record to be; uuid, SR, sizes and location are filled in.
	VDI VDI `json:"VDI"`
	// Golden is the uuid of the image that it is a replica of; empty for a copy,
	// which is a VDI of its own: always a new one.
	Golden xapi.UUID `json:"golden,omitempty"`
	// Staged tells that an admin asked for a replica: it stays until the patch goes.
	Staged bool `json:"staged,omitempty"`

	// Progress hears of bytes; nil: the task of ctx does.
	Progress func(done, total int64) `json:"-"`
}

// ReplicaSpec is the StageSpec of a golden image.
func ReplicaSpec(golden VDI, patch Patch) StageSpec {
	return StageSpec{
		Map: golden.Map, Size: golden.VirtualSize, Room: patch.PayloadSize, Golden: golden.UUID,
		VDI: VDI{
			NameLabel: golden.NameLabel, NameDescription: golden.NameDescription, Type: golden.Type, ReadOnly: true,
			OtherConfig: map[string]string{KeyReplica: string(golden.UUID)},
		},
	}
}

// Stage makes sure that an image lies on the storage of this host, and gives its
// VDI: one that is there; else a copy of one in another SR that is plugged here;
// else it is made from blocks of other hosts, each held against the map. It has its
// map beside it and is as durable as any VDI. Two that ask for the same image at
// once get the same one. After a crash what was fetched is kept for the next
// Stage, for an hour; any failure but that of a process that stops leaves
// nothing. Codes: INVALID_VALUE, SR_NOT_ATTACHED, OUT_OF_SPACE,
// VDI_NOT_AVAILABLE [map] when no host has the blocks, and those of NewVDI.
func (p *Pool) Stage(ctx context.Context, s StageSpec) (xapi.Ref, error) {
	if s.Map == "" {
		return "", xapi.NewError(xapi.InvalidValue, "map", "")
	}
	if s.Progress == nil {
		s.Progress = progressOf(ctx)
	}
	leave, err := p.storage.alone(ctx, s.Map)
	if err != nil {
		return "", err
	}
	defer leave()
	have, err := p.Replicas(s.Map)
	if err != nil {
		return "", err
	}
	if s.Golden != "" {
		for _, r := range have {
			if s.SR.IsNull() && !p.isShared(r.VDI.SR) || r.VDI.SR == s.SR {
				return r.Ref, p.markStaged(ctx, r, s)
			}
		}
		s.VDI.OtherConfig = notNil(s.VDI.OtherConfig)
		if s.Staged {
			s.VDI.OtherConfig[KeyStaged] = "true"
		}
	}
	for _, r := range have {
		made, err := p.stageCopy(ctx, s, r)
		if err == nil || ctx.Err() != nil || xapi.Is(err, xapi.OutOfSpace) {
			return made, err
		}
		p.Log.WithError(err).WithField("VDI", r.VDI.UUID).Warn("an image could not be copied; its blocks are fetched from other hosts")
	}
	return p.stageFetch(ctx, s)
}

func (p *Pool) isShared(ref xapi.Ref) bool {
	rec, err := p.sr(ref)
	return err == nil && rec.Shared
}

// markStaged keeps a replica that is there because an admin asked for it.
func (p *Pool) markStaged(ctx context.Context, r Replica, s StageSpec) error {
	if !s.Staged || r.VDI.OtherConfig[KeyReplica] == "" || r.VDI.OtherConfig[KeyStaged] != "" {
		return nil
	}
	return p.changeVDI(ctx, r.Ref, func(rec *VDI) {
		rec.OtherConfig = notNil(rec.OtherConfig)
		rec.OtherConfig[KeyStaged] = "true"
	})
}

// stageTarget is the SR that an image of room bytes is to lie in. Code:
// OUT_OF_SPACE, SR_NOT_ATTACHED.
func (p *Pool) stageTarget(ctx context.Context, s StageSpec, room int64) (xapi.Ref, error) {
	if !s.SR.IsNull() {
		return s.SR, nil
	}
	attached, err := p.AttachedSRs()
	if err != nil {
		return "", err
	}
	type target struct {
		AttachedSR
		free int64
	}
	var list []target
	for _, a := range attached {
		free, promised, err := p.SRRoom(ctx, a.Ref)
		if err != nil {
			p.Log.WithError(err).WithField("SR", a.UUID).Warn("an SR does not answer and is not used")
			continue
		}
		list = append(list, target{a, free - promised})
	}
	if len(list) == 0 {
		return "", xapi.NewError(xapi.SRNotAttached, string(xapi.NullRef)).Because(errors.New("no SR is plugged on this host"))
	}
	slices.SortStableFunc(list, func(a, b target) int {
		fitsA, fitsB := a.free >= room, b.free >= room
		switch {
		case fitsA != fitsB:
			return cmp.Compare(btoi(fitsB), btoi(fitsA))
		case a.Shared != b.Shared:
			return cmp.Compare(btoi(a.Shared), btoi(b.Shared))
		}
		return cmp.Compare(b.free, a.free)
	})
	return list[0].Ref, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// stageCopy makes the image as a verified copy of one that is plugged here.
func (p *Pool) stageCopy(ctx context.Context, s StageSpec, from Replica) (xapi.Ref, error) {
	rec, repo, release, err := p.useVDI(from.Ref)
	if err != nil {
		return "", err
	}
	defer release()
	src := source{from.Ref, rec, repo}
	m, err := src.mapOf(ctx)
	if err != nil {
		return "", err
	}
	if m == nil || m.Digest() != s.Map {
		return "", contentChanged(from.Ref, "it has become another image")
	}
	dst, err := p.stageTarget(ctx, s, mapRoom(m))
	if err != nil {
		return "", err
	}
	shares := dst == rec.SR && sr.Has(repo.Features(), sr.VDIClone)
	n := NewVDI{SR: dst, VDI: s.VDI, VirtualSize: m.Size}
	if !shares {
		n.Room = mapRoom(m)
	}
	d, err := p.begin(ctx, n, Intent{Kind: IntentCreate})
	if err != nil {
		return "", err
	}
	d.shares = shares
	return d.bear(ctx, nil, func(ctx context.Context) (*vdi.Map, error) { return m, d.copy(ctx, src, m) })
}

// mapRoom is what the blocks of a map take, in bytes.
func mapRoom(m *vdi.Map) int64 { return int64(len(m.Blocks)) * vdi.MapBlock }

const (
	// stageKeep is how long what was fetched before a crash waits to be gone on with.
	stageKeep = time.Hour
	// noteStage is the note of a draft that Stage makes: the digest of the map.
	noteStage = "stage"
)

// stageFetch makes the image from blocks of other hosts.
func (p *Pool) stageFetch(ctx context.Context, s StageSpec) (xapi.Ref, error) {
	if p.Fetcher == nil {
		return "", xapi.NewError(xapi.VDINotAvailable, s.Map).Because(errors.New("this host does not fetch from others"))
	}
	m, err := p.Fetcher.FetchMap(ctx, s.Map)
	if err != nil {
		return "", p.unfetched(ctx, s, err)
	}
	if m.Digest() != s.Map || s.Size > 0 && m.Size > s.Size {
		return "", xapi.NewError(xapi.InvalidValue, "map", s.Map).Because(fmt.Errorf("the map is of an image of %d bytes, not %d", m.Size, s.Size))
	}
	d, resume, err := p.stageDraft(ctx, s, m)
	if err != nil {
		return "", err
	}
	if err = p.Fetcher.Pull(ctx, m, d.File(), resume, s.Progress); err != nil {
		err = p.unfetched(ctx, s, p.inSR(d.in.SR, err))
	}
	var made xapi.Ref
	if err == nil {
		made, err = d.Publish(ctx, m, nil)
	}
	if err == nil {
		return made, nil
	}
	if ctx.Err() != nil && !xapi.Is(context.Cause(ctx), xapi.TaskCancelled) {
		return "", errors.Join(err, d.Close()) // the process stops: the next one goes on
	}
	return "", joinUndo(err, d.Discard(context.WithoutCancel(ctx)))
}

// unfetched is the error of blocks that could not be had.
func (p *Pool) unfetched(ctx context.Context, s StageSpec, err error) error {
	var known *xapi.Error
	if ctx.Err() != nil || errors.As(err, &known) {
		return err
	}
	return xapi.NewError(xapi.VDINotAvailable, s.Map).Because(err)
}

// stageDraft takes up what an earlier process has begun, or begins.
func (p *Pool) stageDraft(ctx context.Context, s StageSpec, m *vdi.Map) (d *Draft, resume bool, err error) {
	drafts, err := p.Drafts()
	if err != nil {
		return nil, false, err
	}
	for _, i := range drafts {
		if i.Note[noteStage] != s.Map || !s.SR.IsNull() && i.SR != s.SR || i.VirtualSize != m.Size {
			continue
		}
		d, err := p.OpenDraft(ctx, i.ID)
		if err != nil {
			p.Log.WithError(err).WithField("draft", i.ID).Info("what was fetched of an image cannot be gone on with")
			continue
		}
		d.in.Record = &s.VDI
		return d, true, nil
	}
	dst, err := p.stageTarget(ctx, s, mapRoom(m))
	if err != nil {
		return nil, false, err
	}
	d, err = p.NewDraft(ctx, NewVDI{SR: dst, VDI: s.VDI, VirtualSize: m.Size, Room: mapRoom(m)},
		DraftOptions{Expires: p.Now().Add(stageKeep), Note: map[string]string{noteStage: s.Map}})
	return d, false, err
}

// alone waits until nobody else of this process stages the image with a map.
func (s *Storage) alone(ctx context.Context, digest string) (leave func(), err error) {
	for {
		s.mu.Lock()
		other, busy := s.staging[digest]
		if !busy {
			mine := make(chan struct{})
			if s.staging == nil {
				s.staging = map[string]chan struct{}{}
			}
			s.staging[digest] = mine
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.staging, digest)
				close(mine)
			}, nil
		}
		s.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// mapOfCall is the map of the image that a call makes, or "".
func mapOfCall(job Job) string {
	var s StageSpec
	if job.Call != callStage || json.Unmarshal(job.Args, &s) != nil {
		return ""
	}
	return s.Map
}

// The names of Stage and VDIRepair as host calls: those fetch blocks from others.
const (
	callStage  = "Stage"
	callRepair = "VDIRepair"
)

// stageAt is how many hosts PatchStage asks at once.
const stageAt = 16

// PatchStage moves the image of a patch to the storage of hosts ahead of time: to
// all of them, when none is named. Hosts that have it already are passed over. One
// that fails keeps no other from it. Codes: HANDLE_INVALID, CANNOT_FIND_PATCH for
// a patch without an image or whose image has no block map, and those of the
// first host that failed: HOST_OFFLINE, OUT_OF_SPACE, VDI_NOT_AVAILABLE.
func (p *Pool) PatchStage(ctx context.Context, patch xapi.Ref, hosts []xapi.Ref) error {
	spec, hosts, err := p.stageOrder(patch, hosts)
	if err != nil {
		return err
	}
	t := task.FromContext(ctx)
	places, ended := make(chan struct{}, stageAt), make(chan error)
	quiet := task.Detached(ctx)
	for _, host := range hosts {
		go func() {
			places <- struct{}{}
			defer func() { <-places }()
			err := p.stageOn(quiet, host, spec)
			if err != nil {
				err = fmt.Errorf("stage on host %s: %w", p.hostName(host), err)
			}
			ended <- err
		}()
	}
	var errs []error
	for i := range hosts {
		if err := <-ended; err != nil {
			errs = append(errs, err)
		}
		t.Progress(float64(i+1) / float64(len(hosts)))
	}
	return errors.Join(errs...)
}

// stageOn has a host stage an image.
func (p *Pool) stageOn(ctx context.Context, host xapi.Ref, spec StageSpec) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if host == p.Self {
		_, err := p.Stage(ctx, spec)
		return err
	}
	_, err := p.callOn(ctx, host, callStage, spec)
	return err
}

// stageOrder says what to stage, and where.
func (p *Pool) stageOrder(patch xapi.Ref, hosts []xapi.Ref) (spec StageSpec, where []xapi.Ref, err error) {
	rec, err := p.patch(patch)
	if err != nil {
		return spec, nil, err
	}
	golden, err := p.vdi(rec.VDI)
	if err != nil || golden.Map == "" {
		return spec, nil, xapi.NewError(xapi.CannotFindPatch).Because(errors.Join(errors.New("the patch has no image with a block map"), err))
	}
	spec = ReplicaSpec(golden, rec)
	spec.Staged = true
	err = p.Store.View(func(v *store.View) error {
		if len(hosts) == 0 {
			for _, it := range v.List(ClassHost) {
				hosts = append(hosts, it.Ref)
			}
		}
		for _, host := range hosts {
			if _, err := store.Get[Host](v, ClassHost, host); err != nil {
				return err
			}
			if !reaches(v, host, golden.SR) && !slices.Contains(where, host) {
				where = append(where, host)
			}
		}
		return nil
	})
	return spec, where, err
}

// reaches tells whether a host has an SR plugged.
func reaches(v *store.View, host, sr xapi.Ref) bool {
	for _, ref := range v.Refs(ClassPBD, "SR", string(sr)) {
		pbd, err := store.Get[PBD](v, ClassPBD, ref)
		if err == nil && pbd.Host == host && pbd.CurrentlyAttached {
			return true
		}
	}
	return false
}

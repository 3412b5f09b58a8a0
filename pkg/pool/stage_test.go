package pool

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// over is a Fetcher of one host that reads from the storage of another: the wire
// is left out, what the coordinator allows is not.
type over struct {
	coordinator *rig
	from        *rig
	self        xapi.Ref
	pulls       atomic.Int64
	resumed     atomic.Int64
	fail        func(n int) error // before block n; nil: none fails
}

func (o *over) open(ctx context.Context, digest string, fetching bool) (vdi.Stored, error) {
	if _, err := o.coordinator.Sources(ctx, o.self, digest, fetching); err != nil {
		return vdi.Stored{}, err
	}
	list, err := o.from.OpenImages(ctx, digest)
	if err == nil && len(list) == 0 {
		err = errors.New("no host has it")
	}
	if err != nil {
		return vdi.Stored{}, err
	}
	for _, s := range list[1:] {
		s.Close()
	}
	return list[0], nil
}

func (o *over) FetchMap(ctx context.Context, digest string) (*vdi.Map, error) {
	s, err := o.open(ctx, digest, false)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.Map, nil
}

func (o *over) Pull(ctx context.Context, m *vdi.Map, dst *os.File, resume bool, progress func(done, total int64)) error {
	o.pulls.Add(1)
	s, err := o.open(ctx, m.Digest(), true)
	if err != nil {
		return err
	}
	defer s.Close()
	fill, good, err := vdi.Fill(ctx, dst, m, resume, progress)
	if err != nil {
		return err
	}
	defer fill.Close()
	for at, b := range m.Blocks {
		if good[at] {
			o.resumed.Add(1)
			continue
		}
		if o.fail != nil {
			if err := o.fail(at); err != nil {
				return err
			}
		}
		_, n := m.Span(b.Index)
		data := make([]byte, n)
		if err := errors.Join(m.ReadBlock(s.File, b.Index, data), fill.Put(at, data)); err != nil {
			return err
		}
		progress(int64(at+1), int64(len(m.Blocks)))
	}
	return fill.Sync()
}

// pair is a coordinator and a member, with an agent that runs calls there and
// tells of the storage.
type pair struct {
	*rig
	m        *rig
	home, on xapi.Ref // an SR of each
	over     *over
}

func newPair(t *testing.T) *pair {
	t.Helper()
	m, on, _, _, req := joiner(t)
	p := &pair{rig: newRig(t), m: m, on: on}
	a := p.admitted(req, "its key")
	p.must(m.BecomeMember(t.Context(), a))
	p.home = p.sr(p.fileSpec("home"))
	p.must(p.Store.Update(t.Context(), func(tx *store.Tx) error {
		h, err := store.Read[Host](tx, ClassHost, p.Self)
		h.URL, h.Keys, h.NameLabel = "https://127.0.0.1:8443", []HostKey{{SPKI: []byte("coordinator")}}, "first"
		tx.Put(ClassHost, p.Self, h)
		return err
	}))
	p.over = &over{coordinator: p.rig, from: p.rig, self: m.Self}
	m.Fetcher = p.over
	p.Fetcher = &over{coordinator: p.rig, from: m, self: p.Self}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	member := m.Pool
	wg.Go(func() { p.agent(ctx, member) })
	t.Cleanup(func() { stop(); wg.Wait() })
	return p
}

// agent runs the calls of the member, one after the other.
func (p *pair) agent(ctx context.Context, m *Pool) {
	for {
		jobs, rev, err := p.Jobs(m.Self)
		if err != nil || ctx.Err() != nil {
			return
		}
		if len(jobs) == 0 {
			if p.WaitChange(ctx, rev) != nil {
				return
			}
			continue
		}
		j := jobs[0]
		attempt, err := p.JobClaim(ctx, j.Ref)
		var o Outcome
		if err == nil {
			o.Output, err = m.HostCall(ctx, j.Job.Call, j.Job.Args)
		}
		if o.Attempt = attempt; err != nil {
			o.Err = xapi.AsError(err)
		}
		inv, err := m.Inventory()
		if err = errors.Join(err, p.TakeInventory(ctx, m.Self, inv), p.JobFinish(ctx, j.Ref, o)); err != nil && ctx.Err() == nil {
			p.t.Errorf("agent: %v", err)
			return
		}
	}
}

// many is content of several blocks, with zeros between them.
func many() []byte {
	b := make([]byte, 5<<20+100)
	for _, at := range []int{0, 2 << 20, 4 << 20, 5 << 20} {
		copy(b[at:], bytes.Repeat([]byte{byte(at>>20) + 1}, 70000))
	}
	return b
}

// image makes a patch whose image has several blocks.
func (p *pair) image() (golden, patch xapi.Ref, data []byte) {
	data = many()
	n := NewVDI{
		SR: p.home, VDI: VDI{NameLabel: "patch", ReadOnly: true}, VirtualSize: 8 << 20,
		Commit: func(tx *store.Tx, vdi xapi.Ref) (err error) {
			patch, err = p.IntroducePatch(tx, Patch{UUID: xapi.NewUUID(), NameLabel: "p", VDI: vdi, AfterApplyGuidance: []xapi.Guidance{}})
			return err
		},
	}
	mapped(&n, data)
	golden, err := p.NewVDI(p.t.Context(), n)
	p.must(err)
	return golden, patch, data
}

func TestAPatchIsStagedOnAnotherHost(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	golden, patch, data := p.image()
	p.must(p.PatchStage(ctx, patch, nil))
	p.must(p.PatchStage(ctx, patch, []xapi.Ref{p.m.Self})) // once more does nothing
	digest := get[VDI](p.rig, ClassVDI, golden).Map
	here, err := p.m.Replicas(digest)
	p.must(err)
	if len(here) != 1 || p.over.pulls.Load() != 1 {
		t.Fatalf("%d replicas by %d pulls", len(here), p.over.pulls.Load())
	}
	rec := here[0].VDI
	if rec.OtherConfig[KeyReplica] != string(get[VDI](p.rig, ClassVDI, golden).UUID) || rec.OtherConfig[KeyStaged] != "true" || !rec.ReadOnly {
		t.Errorf("%+v", rec)
	}
	p.m.holds(here[0].Ref, data)
	report, err := p.m.VDIVerify(ctx, here[0].Ref)
	if err != nil || report.Damage != "" || report.Blocks != 4 {
		t.Errorf("%+v %v", report, err)
	}
	if got := get[VDI](p.rig, ClassVDI, here[0].Ref); got.Map != digest || got.SR != p.on || got.OtherConfig[KeyReplica] == "" {
		t.Errorf("the pool knows %+v", got)
	}
	p.must(p.CollectReplicas(ctx))
	if here, err = p.m.Replicas(digest); err != nil || len(here) != 1 {
		t.Errorf("what an admin has staged was collected: %v", err)
	}
	p.must(p.PatchPoolClean(ctx, patch))
	if here, err = p.m.Replicas(digest); err != nil || len(here) != 0 {
		t.Errorf("a replica is left of a patch that was cleaned: %+v %v", here, err)
	}
	p.wantTidy("coordinator without the member's")
	p.m.wantTidy("member")
}

func TestAReplicaOfAHostThatIsAwayGoesLater(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	golden, patch, _ := p.image()
	p.must(p.PatchStage(ctx, patch, []xapi.Ref{p.m.Self}))
	digest := get[VDI](p.rig, ClassVDI, golden).Map
	var away atomic.Bool
	away.Store(true)
	p.Connected = func(h xapi.Ref) bool { return h == p.Self || !away.Load() }
	p.wantCode("stage on a host that is away", p.PatchStage(ctx, patch, []xapi.Ref{p.m.Self}), xapi.HostOffline)
	p.must(p.PatchPoolClean(ctx, patch))
	p.must(p.CollectReplicas(ctx)) // does not leave the call twice
	p.must(p.Store.Until(ctx, func(v *store.View) (bool, error) { return len(v.Refs(ClassVDI, "_map", digest)) == 0, nil }))
	calls := 0
	p.must(p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassJob) {
			var job Job
			if it.Decode(&job) == nil && job.Call == "VDIDestroy" {
				calls++
			}
		}
		return nil
	}))
	if calls != 1 {
		t.Errorf("%d calls were left", calls)
	}
	p.m.wantTidy("member")
}

func TestStageGoesOnWhereItWasCutOff(t *testing.T) {
	p := newPair(t)
	golden, _, data := p.image()
	rec := get[VDI](p.rig, ClassVDI, golden)
	p.over.self = p.Self // whom every map is allowed
	cut := errors.New("the process stops")
	ctx, stop := context.WithCancelCause(t.Context())
	p.over.fail = func(n int) error {
		if n == 2 {
			stop(cut)
			return cut
		}
		return nil
	}
	spec := ReplicaSpec(rec, Patch{PayloadSize: 1})
	if _, err := p.m.Stage(ctx, spec); !errors.Is(err, cut) {
		t.Fatalf("%v", err)
	}
	p.m.restart()
	p.m.Fetcher = p.over
	p.over.fail = nil
	spec = ReplicaSpec(rec, Patch{})
	made, err := p.m.Stage(t.Context(), spec)
	p.must(err)
	p.m.holds(made, data)
	if p.over.resumed.Load() != 2 {
		t.Errorf("%d blocks were kept, not 2", p.over.resumed.Load())
	}
	p.m.wantTidy("after the second one")

	bad := errors.New("no host has block 1")
	p.over.fail = func(n int) error {
		if n == 1 {
			return bad
		}
		return nil
	}
	p.must(p.m.VDIDestroy(t.Context(), made))
	_, err = p.m.Stage(t.Context(), ReplicaSpec(rec, Patch{}))
	p.wantCode("blocks that cannot be had", err, xapi.VDINotAvailable, rec.Map)
	p.m.wantTidy("after a failure")
}

func TestTwoThatStageTheSameGetOne(t *testing.T) {
	p := newPair(t)
	golden, _, _ := p.image()
	rec := get[VDI](p.rig, ClassVDI, golden)
	p.over.self = p.Self
	var made [4]xapi.Ref
	var wg sync.WaitGroup
	for i := range made {
		wg.Go(func() {
			var err error
			if made[i], err = p.m.Stage(t.Context(), ReplicaSpec(rec, Patch{})); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, ref := range made {
		if ref != made[0] {
			t.Errorf("%q", made)
		}
	}
	if p.over.pulls.Load() != 1 {
		t.Errorf("%d pulls", p.over.pulls.Load())
	}
}

func TestAHostReadsOnlyWhatItsJobsName(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	golden, patch, _ := p.image()
	digest := get[VDI](p.rig, ClassVDI, golden).Map
	var reader Host
	p.Ticket = func(h Host, d string) ([]byte, error) { reader = h; return []byte("ticket of " + d), nil }
	_, err := p.Sources(ctx, p.m.Self, digest, true)
	p.wantCode("without a job", err, xapi.OperationNotAllowed)
	p.must(p.Store.Update(ctx, func(tx *store.Tx) error {
		tx.Put(ClassJob, xapi.NewRef(), Job{UUID: xapi.NewUUID(), Kind: JobPrecheck, Patch: patch, Host: p.m.Self, State: JobClaimed, VDI: golden})
		return nil
	}))
	s, err := p.Sources(ctx, p.m.Self, digest, true)
	p.must(err)
	if len(s.Peers) != 1 || !s.Peers[0].Reserved || s.Peers[0].Partial || s.Peers[0].Host != p.SelfUUID || string(s.Ticket) != "ticket of "+digest || reader.UUID != p.m.SelfUUID {
		t.Errorf("%+v of %s", s, reader.UUID)
	}
	_, err = p.Sources(ctx, p.m.Self, "0"+digest[1:], true)
	p.wantCode("another map", err, xapi.OperationNotAllowed)
	_, err = p.Sources(ctx, xapi.NewRef(), digest, true)
	p.wantCode("no host", err, xapi.HandleInvalid)
	if s, err = p.Sources(ctx, p.Self, digest, false); err != nil || len(s.Peers) != 1 || !s.Peers[0].Partial || s.Peers[0].Host != p.m.SelfUUID {
		t.Errorf("the one that fetches is not named: %+v %v", s, err)
	}
	p.Connected = func(h xapi.Ref) bool { return h == p.Self }
	if s, err = p.Sources(ctx, p.Self, digest, false); err != nil || len(s.Peers) != 0 {
		t.Errorf("one that is away is named: %+v %v", s, err)
	}
}

func TestVDIsAreCopiedAndMovedBetweenHosts(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	plain := p.filled(p.home, 3<<20, []byte("a disk without a map"))
	made, err := p.VDICopy(ctx, plain, p.on, "", "")
	p.must(err)
	p.m.holds(made, []byte("a disk without a map"))
	if rec := get[VDI](p.rig, ClassVDI, made); rec.SR != p.on || rec.NameLabel != "disk" || rec.ReadOnly {
		t.Errorf("%+v", rec)
	}
	second, err := p.VDICopy(ctx, plain, p.on, "", "")
	if err != nil || second == made {
		t.Errorf("a copy is always a new one: %s %v", second, err)
	}
	cloned, err := p.VDIClone(ctx, made, nil)
	p.must(err)
	p.m.holds(cloned, []byte("a disk without a map"))
	p.must(p.VDIResize(ctx, cloned, 5<<20))
	if n := get[VDI](p.rig, ClassVDI, cloned).VirtualSize; n != 5<<20 {
		t.Errorf("%d bytes", n)
	}
	back, err := p.VDICopy(ctx, made, p.home, "", "")
	p.must(err)
	p.holds(back, []byte("a disk without a map"))

	golden, patch, data := p.image()
	moved, err := p.VDIPoolMigrate(ctx, golden, p.on, nil)
	p.must(err)
	p.m.holds(moved, data)
	if rec := get[Patch](p.rig, ClassPatch, patch); rec.VDI != moved {
		t.Errorf("the patch is in %s, not %s", rec.VDI, moved)
	}
	if _, err := p.vdi(golden); !xapi.Is(err, xapi.HandleInvalid) {
		t.Errorf("the old one: %v", err)
	}
	home, err := p.VDIPoolMigrate(ctx, moved, p.home, nil)
	p.must(err)
	p.holds(home, data)
	p.must(p.VDIDestroy(ctx, made))
	p.must(p.VDIDestroy(ctx, second))
	p.must(p.VDIDestroy(ctx, cloned))
	p.m.wantTidy("member")
}

func TestStorageOfAnotherHostIsMadeThere(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	spec := p.m.fileSpec("made from afar")
	on, err := p.SRCreate(ctx, spec)
	p.must(err)
	if p.m.storage.repository(on) == nil || get[SR](p.rig, ClassSR, on).NameLabel != "made from afar" {
		t.Fatal("it is not there")
	}
	disk, err := p.VDICreate(ctx, VDI{SR: on, VirtualSize: 4096})
	p.must(err)
	pbd := p.m.pbdOf(on)
	p.must(p.PBDUnplug(ctx, pbd))
	if get[PBD](p.rig, ClassPBD, pbd).CurrentlyAttached || p.m.storage.repository(on) != nil {
		t.Error("it is still plugged")
	}
	p.must(p.PBDPlug(ctx, pbd))
	p.must(p.SRScan(ctx, on))
	p.must(p.VDIDestroy(ctx, disk))
	p.must(p.SRDestroy(ctx, on))
	if _, err := p.rig.Pool.sr(on); !xapi.Is(err, xapi.HandleInvalid) {
		t.Errorf("the record of an SR that is gone: %v", err)
	}

	// A link that was made here brings its SR along.
	dir := p.sr(p.fileSpec("shared"))
	p.must(p.SRSetShared(ctx, dir, true))
	link, err := p.PBDCreate(ctx, PBD{Host: p.m.Self, SR: dir, DeviceConfig: get[PBD](p.rig, ClassPBD, p.pbdOf(dir)).DeviceConfig})
	p.must(err)
	p.must(p.PBDPlug(ctx, link))
	if p.m.storage.repository(dir) == nil || !get[PBD](p.rig, ClassPBD, link).CurrentlyAttached {
		t.Error("it is not plugged")
	}
}

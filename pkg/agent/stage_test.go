package agent

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestMakePlanWithReplicas(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	golden := &pool.VDI{UUID: "22222222-2222-4222-8222-222222222222", SR: "away", Map: "m"}
	at := func(sr xapi.Ref) pool.Replica {
		return pool.Replica{Ref: "r-" + sr, VDI: pool.VDI{UUID: xapi.UUID(sr), SR: sr, Map: "m"}}
	}
	clones := SRFact{Ref: "clones", Name: "C", Clones: true, Free: 1000 * mib}
	plain := SRFact{Ref: "plain", Name: "P", Free: 5000 * mib}
	shared := SRFact{Ref: "shared", Name: "S", Shared: true, Clones: true, Free: 9000 * mib}
	tiny := SRFact{Ref: "tiny", Name: "T", Clones: true, Free: mib}
	home := SRFact{Ref: "away", Name: "H", Free: 1000 * mib}
	patch := pool.Patch{PayloadSize: 10 * mib}
	for name, c := range map[string]struct {
		patch pool.Patch
		srs   []SRFact
		reps  []pool.Replica
		want  Plan
		code  string
		found string
	}{
		"a replica in an SR that clones": {patch, []SRFact{plain, clones}, []pool.Replica{at("plain"), at("clones")},
			Plan{Way: WayClone, Source: "clones", Image: "clones", ImageRef: "r-clones", Target: "clones", Room: 18 * mib}, "", ""},
		"the golden one is here, a replica clones": {patch, []SRFact{home, clones}, []pool.Replica{at("clones")},
			Plan{Way: WayClone, Source: "clones", Image: "clones", ImageRef: "r-clones", Target: "clones", Room: 18 * mib}, "", ""},
		"a replica that is copied": {patch, []SRFact{plain, clones}, []pool.Replica{at("plain")},
			Plan{Way: WayCopy, Source: "plain", Image: "plain", ImageRef: "r-plain", Target: "plain", Room: 28 * mib}, "", ""},
		"the second one has the room": {patch, []SRFact{tiny, clones}, []pool.Replica{at("tiny"), at("clones")},
			Plan{Way: WayClone, Source: "clones", Image: "clones", ImageRef: "r-clones", Target: "clones", Room: 18 * mib}, "", ""},
		"staged where it clones":        {patch, []SRFact{shared, plain, clones}, nil, Plan{Way: WayStage, Target: "clones", Room: 36 * mib}, "", ""},
		"staged locally before shared":  {patch, []SRFact{shared, plain}, nil, Plan{Way: WayStage, Target: "plain", Room: 46 * mib}, "", ""},
		"staged where there is room":    {patch, []SRFact{tiny, shared}, nil, Plan{Way: WayStage, Target: "shared", Room: 36 * mib}, "", ""},
		"a file rather than no room":    {pool.Patch{PayloadSize: 10 * mib, Filename: "f"}, []SRFact{tiny}, nil, Plan{}, xapi.PrecheckFailedOutOfSpace, "1048576"},
		"only a small one is here":      {patch, []SRFact{tiny}, nil, Plan{}, xapi.PrecheckFailedOutOfSpace, "1048576"},
		"nothing is plugged on it":      {patch, nil, nil, Plan{}, xapi.HostCannotSeeSR, ""},
		"a replica whose SR is no more": {patch, []SRFact{clones}, []pool.Replica{at("gone")}, Plan{Way: WayStage, Target: "clones", Room: 36 * mib}, "", ""},
	} {
		got, err := MakePlan(Facts{Assignment: pool.Assignment{Patch: c.patch, VDI: golden, VDIRef: "g", PatchRef: "p", Job: pool.Job{Host: "h"}}, SRs: c.srs, Replicas: c.reps})
		if c.code != "" {
			if e := wantCode(t, err, c.code); c.found != "" && (len(e.Params) != 3 || e.Params[1] != c.found || !strings.Contains(e.Unwrap().Error(), "T: ")) {
				t.Errorf("%s: %v because of %v", name, e, e.Unwrap())
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, c.want)
		}
	}
}

// elsewhere is another host that has one image.
type elsewhere struct {
	m     *vdi.Map
	bytes []byte
	pulls atomic.Int64
	err   error
}

func (e *elsewhere) FetchMap(_ context.Context, digest string) (*vdi.Map, error) {
	if e.err != nil || digest != e.m.Digest() {
		return nil, errors.Join(e.err, errors.New("no such map"))
	}
	return e.m, nil
}

func (e *elsewhere) Pull(_ context.Context, m *vdi.Map, dst *os.File, _ bool, progress func(done, total int64)) error {
	e.pulls.Add(1)
	progress(1, 2)
	_, err := dst.WriteAt(e.bytes, 0)
	return err
}

// unplugged makes a patch whose golden image lies in an SR that this host has not
// plugged, and gives what another host has of it.
func (r *rig) unplugged() (ref xapi.Ref, rec pool.Patch, far *elsewhere) {
	r.t.Helper()
	home := r.sr
	var err error
	r.sr, err = r.pool.SRCreate(r.t.Context(), pool.SRSpec{Host: r.pool.Self, Type: "memory", NameLabel: "far", DeviceConfig: map[string]string{"tag": "far"}})
	r.must(err)
	ref, rec = r.mappedPatch()
	far = &elsewhere{}
	far.m, err = r.pool.VDIMap(r.t.Context(), rec.VDI)
	r.must(err)
	f, release, err := r.pool.VDIFile(r.t.Context(), rec.VDI, sr.ReadOnly)
	r.must(err)
	far.bytes = make([]byte, far.m.Size)
	_, err = f.ReadAt(far.bytes, 0)
	release()
	r.must(err)
	r.must(r.store.View(func(v *store.View) error {
		for _, pbd := range v.Refs(pool.ClassPBD, "SR", string(r.sr)) {
			err = r.pool.PBDUnplug(r.t.Context(), pbd)
		}
		return nil
	}))
	r.must(err)
	r.sr = home
	r.pool.Fetcher = far
	return ref, rec, far
}

func TestAPatchIsStagedOnAHostWithoutItsSR(t *testing.T) {
	for name, clones := range map[string]bool{"an SR that clones": true, "an SR that does not": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRigOf(t, clones)
			r.verbs["apply"] = says("applied", 0)
			ref, rec, far := r.unplugged()
			r.begin()
			_, err := r.precheck(ref)
			r.must(err)
			_, err = r.apply(ref)
			r.must(err)
			r.tidy("after the apply")
			if r.hostPatch(ref) != "applied" || !r.stamped(rec.UUID) {
				t.Error("it is not applied")
			}
			replicas, err := r.pool.Replicas(far.m.Digest())
			r.must(err)
			if len(replicas) != 1 || far.pulls.Load() != 1 || replicas[0].VDI.OtherConfig[pool.KeyReplica] != string(r.vdi(rec.VDI).UUID) {
				t.Errorf("%d replicas by %d pulls: %+v", len(replicas), far.pulls.Load(), replicas)
			}
			r.must(r.pool.CollectReplicas(t.Context())) // the whole pool has the patch
			if replicas, err = r.pool.Replicas(far.m.Digest()); err != nil || len(replicas) != 0 {
				t.Errorf("still there: %+v, %v", replicas, err)
			}
		})
	}
}

func TestBlocksThatCannotBeHadFailTheJob(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ref, rec, far := r.unplugged()
	far.err = errors.New("all of them are away")
	r.begin()
	_, err := r.precheck(ref)
	if e := wantCode(t, err, xapi.CannotFetchPatch); e.Params[0] != string(rec.UUID) {
		t.Errorf("%v", e)
	}
	r.tidy("after the precheck")
	far.err, far.bytes = nil, make([]byte, len(far.bytes)) // and now wrong bytes, that the pull did not see
	_, err = r.apply(ref)
	e := wantCode(t, err, xapi.VDIContentChanged)
	if len(e.Params) != 2 || e.Params[0] == string(rec.VDI) {
		t.Errorf("the replica is not named: %v", e)
	}
	r.tidy("after the apply")
	replicas, err := r.pool.Replicas(far.m.Digest())
	if err != nil || len(replicas) != 0 {
		t.Errorf("a damaged replica is used again: %+v, %v", replicas, err)
	}
	r.must(r.pool.CollectReplicas(t.Context()))
	r.must(r.store.View(func(v *store.View) error {
		if n := v.Count(pool.ClassVDI); n != 2 { // the golden one, and the one that patch made first
			t.Errorf("%d VDIs are left", n)
		}
		return nil
	}))
}

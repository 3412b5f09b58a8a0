package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/dom0/dom0test"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/sr/memory"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

const testXML = `<info uuid="%s" version="1.0" name-label="p" name-description="d" after-apply-guidance="restartHost"/>`

// verbs is what a patch does, by its verb: nil succeeds and says nothing.
type verbs map[string]func(ctx context.Context, p *dom0test.Process) dom0.Result

// rig is an agent over a real pool database, storage in memory, and a machine
// in memory on which real runner code runs.
type rig struct {
	t     *testing.T
	dir   string
	store *store.Store
	pool  *pool.Pool
	mem   *memory.Driver
	sr    xapi.Ref

	machine *dom0test.Dom0 // of the agent
	agent   *Agent
	gate    *coordinator
	verbs   verbs

	mu      sync.Mutex
	effects int                  // applies that ran
	prepare func(*dom0test.Dom0) // of the machine of the next runner
	runners []*dom0test.Dom0     // all that there were
	payload map[xapi.UUID][]byte // by patch
	stop    func()               // ends Run
	keep    bool                 // Options.KeepQueued of the next life
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigOf(t, true)
}

// newRigOf is newRig with an SR that clones, or does not.
func newRigOf(t *testing.T, clones bool) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), mem: &memory.Driver{Clones: clones}, verbs: verbs{}, payload: map[xapi.UUID][]byte{}}
	s, err := store.Open(t.Context(), store.Options{Dir: filepath.Join(r.dir, "db"), Indexes: append(pool.Indexes(), task.Indexes()...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r.store = s
	log := logrus.New()
	log.SetOutput(io.Discard)
	r.pool, err = pool.Open(t.Context(), pool.Options{
		Store: s, Log: log, HostUUID: "11111111-1111-4111-8111-111111111111", Hostname: "host",
		PatchDir: filepath.Join(r.dir, "patches"), Drivers: []sr.Driver{&file.Driver{}, r.mem},
	})
	r.must(err)
	t.Cleanup(func() { r.pool.DetachStorage(context.Background()) })
	r.must(os.MkdirAll(filepath.Join(r.dir, "patches"), 0o755))
	r.sr, err = r.pool.SRCreate(t.Context(), pool.SRSpec{Host: r.pool.Self, Type: "memory", NameLabel: "mem", DeviceConfig: map[string]string{"tag": "x"}})
	r.must(err)
	r.machine = dom0test.New(r.program)
	t.Cleanup(r.machine.Close)
	r.life()
	t.Cleanup(func() { r.end() })
	return r
}

// life makes the agent of a new process on this machine.
func (r *rig) life() {
	log := logrus.New()
	log.SetOutput(io.Discard)
	r.gate = &coordinator{Coordinator: r.pool, machine: r.machine}
	r.agent = New(Options{
		Coordinator: r.gate, Storage: r.pool, Dom0: r.machine, Log: log,
		Self: r.pool.Self, SelfUUID: r.pool.SelfUUID, PoolUUID: r.pool.PoolUUID,
		JobsDir: filepath.Join(r.dir, "jobs"), PatchDir: filepath.Join(r.dir, "patches"), KeysDir: filepath.Join(r.dir, "keys"),
		Attested: patch.Attestations(filepath.Join(r.dir, "attested")),
		Pinned:   r.pinned(), Runner: []string{"/patchd", "runner"},
		Timeouts:   Timeouts{Precheck: 5 * time.Second, Apply: 5 * time.Second, Grace: 20 * time.Millisecond},
		KeepQueued: r.keep,
	})
	r.pool.Local = r.agent
}

// begin starts the agent's Run.
func (r *rig) begin() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	a := r.agent
	go func() {
		defer close(done)
		a.Run(ctx)
	}()
	r.stop = func() {
		cancel()
		<-done
	}
}

func (r *rig) end() {
	if r.stop != nil {
		r.stop()
		r.stop = nil
	}
}

// reborn is the death of the agent and the start of the next.
func (r *rig) reborn() {
	r.t.Helper()
	r.end()
	r.machine.Restart()
	r.life()
	if err := r.agent.Recover(r.t.Context()); err != nil {
		r.t.Errorf("recover: %v", err)
	}
	r.begin()
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatalf("unexpected error: %v", err)
	}
}

func (r *rig) pinned() (sums []string) {
	for _, b := range r.payload {
		sums = append(sums, sum(b))
	}
	return sums
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// patch makes a golden image and its records.
func (r *rig) patch() (ref xapi.Ref, rec pool.Patch) {
	r.t.Helper()
	id := xapi.NewUUID()
	b := []byte("#!/bin/sh\n# " + id + "\n")
	r.payload[id] = b
	r.agent.Pinned = r.pinned()
	rec = pool.Patch{
		UUID: id, NameLabel: "p", AfterApplyGuidance: []xapi.Guidance{"restartHost"}, Digest: sum(b), PayloadSize: int64(len(b)),
		SignatureKind: "pinned", InfoXML: fmt.Sprintf(testXML, id),
	}
	_, err := r.pool.NewVDI(r.t.Context(), pool.NewVDI{
		SR: r.sr, VDI: pool.VDI{NameLabel: "golden"}, VirtualSize: 1 << 20,
		Commit: func(tx *store.Tx, vdi xapi.Ref) (err error) {
			rec.VDI = vdi
			ref, err = r.pool.IntroducePatch(tx, rec)
			return err
		},
	})
	r.must(err)
	return ref, rec
}

// program plays what the agent's machine is asked to run: runners, and `info`
// in a sandbox.
func (r *rig) program(ctx context.Context, p *dom0test.Process) dom0.Result {
	if p.Sandbox != nil {
		return r.verb(ctx, p, "info")
	}
	if p.Args[0] != "runner" {
		return dom0.Result{ExitCode: 127}
	}
	dir := p.Args[1]
	d := dom0test.New(func(ctx context.Context, p *dom0test.Process) dom0.Result { return r.verb(ctx, p, p.Args[0]) })
	d.Private = true
	r.mu.Lock()
	if r.prepare != nil {
		r.prepare(d)
	}
	r.runners = append(r.runners, d)
	r.mu.Unlock()
	defer d.Close()
	var run Run
	if err := readJSON(filepath.Join(dir, fileRun), &run); err != nil {
		return dom0.Result{ExitCode: 1}
	}
	mnt := filepath.Join(dir, dirMount)
	os.WriteFile(filepath.Join(mnt, vdi.FileName), r.payload[run.Patch], 0o755)
	err := RunRunner(ctx, d, dir)
	// What was mounted goes with the mount.
	os.RemoveAll(mnt)
	os.Mkdir(mnt, 0o700)
	if d.Crashed() { // it did not live to write it
		os.Remove(filepath.Join(dir, fileResult))
	} else if leaks := d.Leaks(); len(leaks) > 0 && err == nil && r.prepare == nil {
		r.t.Errorf("the runner leaves %v", leaks)
	}
	return dom0.Result{}
}

func (r *rig) verb(ctx context.Context, p *dom0test.Process, verb string) dom0.Result {
	if verb == "apply" {
		r.mu.Lock()
		r.effects++
		r.mu.Unlock()
	}
	if f := r.verbs[verb]; f != nil {
		return f(ctx, p)
	}
	return dom0.Result{}
}

// says gives a verb that prints text and ends with code.
func says(text string, code int) func(context.Context, *dom0test.Process) dom0.Result {
	return func(_ context.Context, p *dom0test.Process) dom0.Result {
		io.WriteString(p.Stdout, text)
		return dom0.Result{ExitCode: code}
	}
}

// blocks gives a verb that runs until it is terminated or go is closed.
func blocks(begun chan<- struct{}, goOn <-chan struct{}) func(context.Context, *dom0test.Process) dom0.Result {
	return func(ctx context.Context, p *dom0test.Process) dom0.Result {
		begun <- struct{}{}
		select {
		case <-ctx.Done():
			return dom0.Result{ExitCode: -1, Signal: 15}
		case <-goOn:
			return dom0.Result{}
		}
	}
}

// apply asks for an apply and waits for its end.
func (r *rig) apply(patch xapi.Ref) (string, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	return r.pool.PatchApply(ctx, patch, r.pool.Self)
}

func (r *rig) precheck(patch xapi.Ref) (string, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	return r.pool.PatchPrecheck(ctx, patch, r.pool.Self)
}

// hostPatch gives the state of a patch on the host: absent, applied, unknown
// or busy.
func (r *rig) hostPatch(patch xapi.Ref) string {
	state := "absent"
	r.must(r.store.View(func(v *store.View) error {
		for _, ref := range v.Refs(pool.ClassHostPatch, "pool_patch", string(patch)) {
			hp, err := store.Get[pool.HostPatch](v, pool.ClassHostPatch, ref)
			switch {
			case err != nil:
				return err
			case hp.Applied:
				state = "applied"
			case hp.OtherConfig[pool.KeyState] == pool.StateUnknown:
				state = "unknown"
			default:
				state = "busy"
			}
		}
		return nil
	}))
	return state
}

func (r *rig) stamped(id xapi.UUID) bool {
	_, ok := stampTime(r.agent.PatchDir, id)
	return ok
}

// tidy waits until no execution is left, and fails when anything else is.
func (r *rig) tidy(when string) {
	r.t.Helper()
	var left []string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if left = r.left(); len(left) == 0 {
			return
		}
	}
	r.t.Errorf("%s: left: %v", when, left)
}

func (r *rig) left() []string {
	left := r.machine.Leaks()
	jobs, _ := os.ReadDir(r.agent.JobsDir)
	for _, j := range jobs {
		left = append(left, "journal "+j.Name())
	}
	attached, err := r.pool.AttachedSRs()
	if err != nil {
		return append(left, err.Error())
	}
	for _, s := range attached {
		if n, err := r.pool.Promised(context.Background(), s.Ref); err != nil || n != 0 {
			left = append(left, fmt.Sprintf("%d bytes promised on %s, %v", n, s.NameLabel, err))
		}
		volumes, err := s.Repository.Scan(context.Background())
		if err != nil {
			return append(left, err.Error())
		}
		for _, v := range volumes {
			if v.Name.Kind != sr.KindLive && v.Name.Kind != sr.KindMap {
				left = append(left, "volume "+v.Name.String())
			}
		}
	}
	open, _, err := r.pool.Jobs(r.pool.Self)
	if err != nil {
		left = append(left, err.Error())
	}
	for _, j := range open {
		left = append(left, "open job "+string(j.Job.UUID))
	}
	return left
}

// coordinator is the pool as the agent sees it. It can fail or crash at call n,
// and is silent to an agent that has died.
type coordinator struct {
	Coordinator
	machine *dom0test.Dom0

	mu     sync.Mutex
	calls  []string
	failAt int
	dieAt  int
	after  bool
	dead   bool
	lost   int // so many claims are granted, and their answers lost
}

var errInjected = errors.New("injected")

// call counts one change; done tells whether it is to happen.
func (c *coordinator) call(name string, f func() error) error {
	c.mu.Lock()
	c.calls = append(c.calls, name)
	n := len(c.calls)
	dead := c.dead || c.machine.Crashed()
	dies := n == c.dieAt
	if dies {
		c.dead = true
	}
	c.mu.Unlock()
	switch {
	case dead, dies && !c.after:
		return dom0test.ErrCrashed
	case n == c.failAt:
		return errInjected
	}
	err := f()
	if dies {
		return dom0test.ErrCrashed
	}
	return err
}

func (c *coordinator) JobClaim(ctx context.Context, job xapi.Ref) (n int64, err error) {
	err = c.call("claim", func() error { n, err = c.Coordinator.JobClaim(ctx, job); return err })
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && c.lost > 0 {
		c.lost--
		return 0, xapi.NewError(xapi.CannotContactHost, "the coordinator")
	}
	return n, err
}

func (c *coordinator) JobPromise(ctx context.Context, job xapi.Ref, want pool.Promise) (found int64, err error) {
	err = c.call("promise", func() error { found, err = c.Coordinator.JobPromise(ctx, job, want); return err })
	return found, err
}

func (c *coordinator) JobRequeue(ctx context.Context, job xapi.Ref) error {
	return c.call("requeue", func() error { return c.Coordinator.JobRequeue(ctx, job) })
}

func (c *coordinator) JobFinish(ctx context.Context, job xapi.Ref, o pool.Outcome) error {
	return c.call("finish", func() error { return c.Coordinator.JobFinish(ctx, job, o) })
}

func (c *coordinator) Resync(ctx context.Context, host xapi.Ref, s []pool.Stamp) error {
	return c.call("resync", func() error { return c.Coordinator.Resync(ctx, host, s) })
}

func (c *coordinator) MessageCreate(ctx context.Context, name string, prio int64, cls string, id xapi.UUID, body string) (ref xapi.Ref, err error) {
	err = c.call("message", func() error {
		ref, err = c.Coordinator.MessageCreate(ctx, name, prio, cls, id, body)
		return err
	})
	return ref, err
}

func (c *coordinator) isDead() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dead || c.machine.Crashed()
}

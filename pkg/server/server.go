// Package server wires the parts of patchd into one daemon: it opens the state
// directory, the pool database and the listeners, repairs what an earlier
// process left, and runs until it is told to stop.
package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/agent"
	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/sr/all"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/upload"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi/thincli"
)

// Server is one running daemon.
type Server struct {
	config Config
	log    *logrus.Logger
	state  stateDir
	dom0   *dom0.System
	layout vdi.LayoutKind
	// identity is the key of this host, which the TLS listener shows.
	identity *trust.Identity

	store    *store.Store
	leader   *store.Leadership
	pool     *pool.Pool
	tasks    *task.Manager
	sessions *session.Manager
	agent    *agent.Agent
	ways     *listeners
	cli      *thincli.Handler
	uploads  *upload.Handler

	version string
	runner  []string
	// FirstPassword is root's password when this start has generated it.
	FirstPassword string
}

// Options is what Open needs beside the configuration.
type Options struct {
	Log     *logrus.Logger
	Version string
	// Runner is the command line of `patchd runner`; the default is this
	// program itself.
	Runner []string
}

// Open starts everything but the jobs: after it the listeners answer, with
// HOST_STILL_BOOTING until Run has repaired what was left. On failure nothing
// stays behind. Close ends it.
func Open(ctx context.Context, c Config, o Options) (_ *Server, err error) {
	s := &Server{config: c, log: o.Log, version: o.Version, runner: o.Runner}
	if len(s.runner) == 0 {
		exe, err := os.Executable()
		if err != nil {
			return nil, err
		}
		s.runner = []string{exe, "runner", "--groups", groupPrefix(c.StateDir)}
	}
	var undo xapi.Undo
	defer func() { err = undo.Close(ctx, err) }()
	if s.state, err = openStateDir(c.StateDir); err != nil {
		return nil, err
	}
	undo.Push("unlock", func(context.Context) error { return s.state.close() })
	s.dom0, err = dom0.New(dom0.Options{Log: s.log, Hide: []string{c.StateDir}, CgroupPrefix: groupPrefix(c.StateDir)})
	if err != nil {
		return nil, err
	}
	undo.Push("close dom0", func(context.Context) error { return s.dom0.Close() })
	if s.layout, err = c.layout(); err == nil {
		err = vdi.CheckLayout(s.layout, s.dom0)
	}
	if err != nil {
		return nil, fmt.Errorf("image-layout: %w", err)
	}
	if left, err := s.dom0.LeaveGroup(); err != nil {
		s.log.WithError(err).Warn("this daemon was started by a patch and ends with it: start it through the init system")
	} else if left {
		s.log.Info("this daemon was started by a patch and has left the patch's control group")
	}
	full, err := s.state.useReserve(s.dom0, s.log)
	if err != nil {
		return nil, err
	}
	if err := s.openStore(ctx, full); err != nil {
		return nil, err
	}
	undo.Push("close store", func(context.Context) error { return s.store.Close() })
	hostname, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	if s.identity, err = s.state.identity(hostname); err != nil {
		return nil, fmt.Errorf("make the TLS certificate: %w", err)
	}
	if s.ways, err = openListeners(c, s.state, s.identity, s.log); err != nil {
		return nil, err
	}
	undo.Push("close listeners", func(context.Context) error { s.ways.close(0); return nil })
	return s, s.openPool(ctx, hostname)
}

// groupPrefix is the folder of this daemon's control groups: another patchd on
// the same machine has another state directory.
func groupPrefix(stateDir string) string {
	sum := sha256.Sum256([]byte(stateDir))
	return "patchd-" + hex.EncodeToString(sum[:6])
}

func (s *Server) openStore(ctx context.Context, full bool) error {
	indexes := append(pool.Indexes(), task.Indexes()...)
	indexes = append(indexes, session.Indexes()...)
	o := storeOptions(s.config, s.state, s.log)
	o.Indexes = indexes
	st, err := store.Open(ctx, o)
	if err != nil && full {
		return fmt.Errorf("the pool database cannot be opened while the disk is full: make room on the filesystem of %s and start again: %w", s.config.StateDir, err)
	}
	if err != nil {
		return fmt.Errorf("open the pool database: %w", err)
	}
	s.store = st
	return nil
}

// openPool makes the services and, at the very first start, the pool.
func (s *Server) openPool(ctx context.Context, hostname string) error {
	host, err := s.state.hostUUID()
	if err != nil {
		return err
	}
	if s.leader, err = s.store.Campaign(ctx, string(host)); err != nil {
		return fmt.Errorf("become the pool's coordinator: %w", err)
	}
	s.pool, err = pool.Open(ctx, pool.Options{
		Store: s.store, Log: s.log, Drivers: all.Drivers(), HostUUID: host, Hostname: hostname,
		Address: s.address(), PatchDir: s.config.PatchDir, OwnDirs: s.ownDirs(), KeepFree: s.state.keepFree(s.dom0), Version: s.version,
		Dom0: s.dom0, MountDir: s.state.path("mnt"),
	})
	if err != nil {
		return err
	}
	secret, err := s.state.poolSecret()
	if err != nil {
		return err
	}
	self := func() xapi.Ref { return s.pool.Self }
	s.tasks = task.NewManager(s.store, self, s.log)
	s.sessions, err = session.NewManager(s.store, session.Options{
		PoolSecret: secret, BadPasswordDelay: time.Duration(s.config.BadPasswordDelay), Log: s.log, ThisHost: self,
	})
	if err != nil {
		return err
	}
	if err := s.ensureRoot(ctx); err != nil {
		return err
	}
	s.agent = agent.New(agent.Options{
		Coordinator: s.pool, Storage: s.pool, Dom0: s.dom0, Log: s.log,
		Self: s.pool.Self, SelfUUID: s.pool.SelfUUID, PoolUUID: s.pool.PoolUUID,
		JobsDir: s.state.path("jobs"), PatchDir: s.config.PatchDir, KeysDir: s.keysDir(), Pinned: s.config.PinnedSHA256,
		Attested: s.attested(),
		Runner:   s.runner, MaxCleartext: s.config.MaxCleartext, Layout: s.layout, KeepFree: s.state.keepFree(s.dom0),
		Timeouts: agent.Timeouts{
			Precheck: time.Duration(s.config.PrecheckTimeout), Apply: time.Duration(s.config.ApplyTimeout),
			Grace: time.Duration(s.config.GraceTimeout),
		},
	})
	s.pool.Local, s.pool.Also = s.agent, s.examine
	return os.MkdirAll(s.keysDir(), 0o755)
}

// ownDirs are the folders in which nothing but patchd puts anything.
func (s *Server) ownDirs() []string {
	return []string{s.state.path("jobs"), s.state.path("db"), s.state.path("uploads"), s.state.path("mnt"), s.keysDir(), s.config.PatchDir}
}

func (s *Server) keysDir() string { return s.state.path("trusted-keys") }

// address is what the host record and HOST_IS_SLAVE tell: what was configured,
// or the address of the plain listener.
func (s *Server) address() string {
	if s.config.Address != "" {
		return s.config.Address
	}
	host, _, err := net.SplitHostPort(s.config.Listen)
	if err != nil || host == "" {
		return "127.0.0.1"
	}
	return host
}

// ensureRoot gives root a password at the first start.
func (s *Server) ensureRoot(ctx context.Context) error {
	have, err := s.sessions.HasUser("root")
	if err != nil || have {
		return err
	}
	password := os.Getenv("PATCHD_ROOT_PASSWORD")
	if password == "" {
		if password, err = s.state.text("root-password", randomPassword); err != nil {
			return err
		}
		s.FirstPassword = password
	}
	_, err = s.sessions.EnsureRoot(ctx, password)
	return err
}

func randomPassword() string { return string(xapi.NewUUID()) }

// Addresses are those the listeners have in fact: plain HTTP and TLS; nil
// where there is none.
func (s *Server) Addresses() (plain, tls net.Addr) { return s.ways.Addr, s.ways.TLSAddr }

// Run repairs what was left, then serves until ctx ends. ready is called when
// calls are answered.
func (s *Server) Run(ctx context.Context, ready func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := s.repair(ctx); err != nil {
		return fmt.Errorf("repair at start: %w", err)
	}
	handler, err := s.routes(ctx)
	if err != nil {
		return err
	}
	defer s.uploads.Close()
	s.ways.setHandler(handler)
	boundMemory()
	if ready != nil {
		ready()
	}
	var wg sync.WaitGroup
	wg.Go(func() { cancel(s.agent.Run(ctx)) })
	wg.Go(func() { s.every(ctx, housekeepingEvery, "housekeeping", s.keepHouse) })
	wg.Go(func() { s.every(ctx, sweepEvery, "the sweep", s.pool.Sweep) })
	wg.Go(func() { s.every(ctx, replugEvery, "plugging SRs that were away", s.pool.ReplugFailed) })
	wg.Go(func() {
		s.pool.Scrub(ctx, pool.ScrubOptions{Interval: time.Duration(s.config.ScrubInterval), Rate: s.config.ScrubRate})
	})
	wg.Go(func() {
		select {
		case <-s.leader.Done():
			cancel(errors.New("this process no longer leads the pool"))
		case <-ctx.Done():
		}
	})
	<-ctx.Done()
	s.tasks.Stop()
	s.cli.Close()
	s.uploads.Close()
	s.ways.close(stopGrace)
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// stopGrace is how long calls may go on after SIGTERM.
const stopGrace = 2 * time.Second

// repair makes true what must be true after every start: every undo ran, every
// task that nothing durable owns has ended.
func (s *Server) repair(ctx context.Context) error {
	if err := s.ensureStorage(ctx); err != nil {
		return err
	}
	if err := s.agent.Recover(ctx); err != nil {
		// A job that cannot be settled now is tried again at the next start;
		// it must not keep an admin from the pool.
		s.log.WithError(err).Error("some jobs of an earlier process could not be settled")
	}
	owned, err := s.resume(ctx)
	if err != nil {
		return err
	}
	drafts, err := s.pool.Drafts()
	if err != nil {
		return err
	}
	uploads := upload.DraftTasks(drafts)
	if err := s.tasks.Repair(ctx, func(ref xapi.Ref) bool { return owned[ref] || uploads[ref] || s.pool.OwnsTask(ref) }); err != nil {
		return err
	}
	if err := s.agent.ResyncStamps(ctx); err != nil {
		return fmt.Errorf("compare stampfiles with records: %w", err)
	}
	return s.pool.ImportPatchDir(ctx)
}

// ensureStorage plugs the SRs, and makes the first one of a new pool.
func (s *Server) ensureStorage(ctx context.Context) error {
	if err := s.pool.EnsureSM(ctx); err != nil {
		return err
	}
	if err := s.pool.RepairStorage(ctx); err != nil {
		return fmt.Errorf("repair the storage: %w", err)
	}
	fresh, ref, err := s.pool.IsNew()
	if err != nil || !fresh {
		return err
	}
	if ref != "" {
		return s.pool.SetDefaultSR(ctx, ref)
	}
	ref, err = s.pool.SRCreate(ctx, pool.SRSpec{
		Host: s.pool.Self, Type: "file", NameLabel: "Local storage", ContentType: "user",
		NameDescription: "made at the first start", DeviceConfig: map[string]string{"location": s.state.path("sr")},
		SMConfig: map[string]string{},
	})
	if err != nil {
		return fmt.Errorf("make the first SR: %w", err)
	}
	return s.pool.SetDefaultSR(ctx, ref)
}

// resume takes up the tasks whose work is durable: open runs, copies of VDIs, and
// jobs, also those that ended while nobody could tell their task.
func (s *Server) resume(ctx context.Context) (map[xapi.Ref]bool, error) {
	owned := map[xapi.Ref]bool{}
	refs, runs, err := s.pool.OpenRuns()
	if err != nil {
		return nil, err
	}
	for i, run := range runs {
		owned[run.Task] = true
		err := s.takeUp(ctx, run.Task, func(ctx context.Context) (string, error) {
			return "", s.pool.ContinueRun(pool.Resuming(ctx), refs[i])
		})
		if err != nil {
			return nil, err
		}
	}
	err = s.pool.ResumeCopies(ctx, func(ref xapi.Ref, work func(context.Context) (string, error)) error {
		return s.takeUp(ctx, ref, work)
	})
	if err != nil {
		return nil, err
	}
	jobs, err := s.pool.TaskJobs()
	if err != nil {
		return nil, err
	}
	for ref, job := range jobs {
		if rec, err := s.tasks.Get(ref); err != nil || rec.Status.Finished() || owned[ref] {
			continue
		}
		owned[ref] = true
		if err := s.takeUp(ctx, ref, func(ctx context.Context) (string, error) { return s.jobResult(ctx, job) }); err != nil {
			return nil, err
		}
	}
	return owned, nil
}

// jobResult is the outcome of a job as its task tells it: pool_patch.pool_apply
// gives no text.
func (s *Server) jobResult(ctx context.Context, ref xapi.Ref) (string, error) {
	text, err := s.pool.JobResult(ctx, ref)
	if job, jerr := s.pool.Job(ref); jerr == nil && job.Run != "" {
		text = ""
	}
	return text, err
}

// takeUp drives the task of resumed work. A task that is gone does not keep
// the work from going on: it gets another one.
func (s *Server) takeUp(ctx context.Context, ref xapi.Ref, f func(context.Context) (string, error)) error {
	if _, err := s.tasks.Get(ref); xapi.Is(err, xapi.HandleInvalid) {
		h, err := s.tasks.Begin(ctx, task.Spec{Label: "pool_patch.pool_apply", Description: "goes on after a restart"})
		if err != nil {
			return err
		}
		ref = h.Ref()
	}
	s.tasks.Go(ref, func(ctx context.Context, _ *task.Handle) (string, error) {
		text, err := f(ctx)
		return xmlValue(text), err
	})
	return nil
}

// How often old records are collected, left-over volumes are (at the start the
// repair of the storage has done that), and SRs are tried again that could not
// be plugged at the start.
const (
	housekeepingEvery = 5 * time.Minute
	sweepEvery        = time.Hour
	replugEvery       = 30 * time.Second
)

// every calls f again and again, until ctx ends. What may have to wait, as for an
// SR that does not answer, has a loop of its own.
func (s *Server) every(ctx context.Context, pause time.Duration, what string, f func(context.Context) error) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := f(ctx); err != nil && ctx.Err() == nil {
			s.log.WithError(err).Errorf("%s failed; it is tried again in %s", what, pause)
		}
	}
}

func (s *Server) keepHouse(ctx context.Context) error {
	boundMemory()
	_, err := s.state.useReserve(s.dom0, s.log)
	return errors.Join(s.tasks.GC(ctx), s.pool.CollectJobs(ctx), s.sessions.GC(ctx), s.forgetAttested(), err)
}

// Close ends everything; runners go on.
func (s *Server) Close() error {
	s.ways.close(0)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := s.pool.DetachStorage(ctx)
	s.sessions.Close()
	return errors.Join(err, s.store.Close(), s.dom0.Close(), s.state.close())
}

// healthz answers 200: until start-up is done another handler answers.
func healthz(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	fmt.Fprintln(w, "ok")
}

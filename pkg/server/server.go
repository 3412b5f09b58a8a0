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
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/agent"
	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/peer"
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
	leader   *store.Leadership                // of the goroutine that plays the roles
	leads    atomic.Pointer[store.Leadership] // once it answers for the pool
	leading  chan struct{}                    // closed then
	pool     *pool.Pool
	tasks    *task.Manager
	sessions *session.Manager
	agent    *agent.Agent
	ways     *listeners
	cli      *thincli.Handler
	uploads  *upload.Handler

	hostUUID xapi.UUID
	hostname string
	version  string
	runner   []string
	member   *membership  // as it was at the start; nil: this host is none
	link     *link.Client // to the coordinator; nil on one that has the embedded database
	told     *inventory   // of a member: what the coordinator knows of its storage
	peers    *peers       // how this host gives and takes blocks
	node     *peer.Node
	hub      *link.Hub               // of the coordinator, while it leads
	joining  atomic.Bool             // this host has asked another pool to take it in
	joins    chan struct{}           // holds one for each request to join that is read
	reopen   context.CancelCauseFunc // ends Run; set by it
	lent     bool                    // the state directory's lock is Serve's
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

	state *stateDir // locked by Serve; nil: Open takes the lock
}

// ErrDeposed is how Run ends when another host has taken the lead, or may have:
// the daemon is to be closed and opened again.
var ErrDeposed = errors.New("this host no longer leads the pool")

// Serve runs a daemon until ctx ends. Where it is deposed it opens again in
// place, as a start does; the lock of the state directory is held all the while.
// ready is called whenever calls are answered.
func Serve(ctx context.Context, c Config, o Options, ready func(*Server)) error {
	state, err := openStateDir(c.StateDir)
	if err != nil {
		return err
	}
	o.state = &state
	for {
		err = serveOnce(ctx, c, o, ready)
		if ctx.Err() != nil && (opensAgain(err) || errors.Is(err, context.Canceled)) {
			err = nil
		}
		if !opensAgain(err) {
			return errors.Join(err, state.close())
		}
		o.Log.WithError(err).Warn("the daemon opens again, in another role")
	}
}

// opensAgain tells whether a daemon that ended so has to be opened again.
func opensAgain(err error) bool { return errors.Is(err, ErrDeposed) || errors.Is(err, errReopen) }

func serveOnce(ctx context.Context, c Config, o Options, ready func(*Server)) error {
	s, err := Open(ctx, c, o)
	if err != nil {
		return err
	}
	err = s.Run(ctx, func() { ready(s) })
	o.Log.Info("patchd is stopping")
	cerr := s.Close()
	if opensAgain(err) && cerr != nil {
		o.Log.WithError(cerr).Warn("not all was let go of in order")
		cerr = nil
	}
	return errors.Join(err, cerr)
}

// Open starts everything but the jobs: after it the listeners answer, with
// HOST_STILL_BOOTING until Run has repaired what was left. On failure nothing
// stays behind. Close ends it.
func Open(ctx context.Context, c Config, o Options) (_ *Server, err error) {
	s := &Server{leading: make(chan struct{}), joins: make(chan struct{}, joinsAtOnce), config: c, log: o.Log, version: o.Version, runner: o.Runner}
	if len(s.runner) == 0 {
		exe, err := os.Executable()
		if err != nil {
			return nil, err
		}
		s.runner = []string{exe, "runner", "--groups", groupPrefix(c.StateDir)}
	}
	var undo xapi.Undo
	defer func() { err = undo.Close(ctx, err) }()
	if o.state != nil {
		s.state, s.lent = *o.state, true
	} else if s.state, err = openStateDir(c.StateDir); err != nil {
		return nil, err
	}
	undo.Push("unlock", func(context.Context) error { return s.unlock() })
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
	if s.hostname, err = os.Hostname(); err != nil {
		return nil, err
	}
	if s.identity, err = s.state.identity(s.hostname); err != nil {
		return nil, fmt.Errorf("make the TLS certificate: %w", err)
	}
	if s.ways, err = openListeners(c, s.state, s.identity, s.log); err != nil {
		return nil, err
	}
	undo.Push("close listeners", func(context.Context) error { s.ways.close(0); return nil })
	if err := s.openStore(ctx, full); err != nil {
		return nil, err
	}
	undo.Push("close store", func(context.Context) error { return s.store.Close() })
	return s, s.openPool(ctx)
}

// unlock gives the state directory's lock back, unless it is lent.
func (s *Server) unlock() error {
	if s.lent {
		return nil
	}
	return s.state.close()
}

// groupPrefix is the folder of this daemon's control groups: another patchd on
// the same machine has another state directory.
func groupPrefix(stateDir string) string {
	sum := sha256.Sum256([]byte(stateDir))
	return "patchd-" + hex.EncodeToString(sum[:6])
}

func (s *Server) openStore(ctx context.Context, full bool) error {
	if s.config.Store == "" {
		if err := s.state.assertNotMoved(); err != nil {
			return err
		}
	}
	indexes := append(pool.Indexes(), task.Indexes()...)
	indexes = append(indexes, session.Indexes()...)
	o := storeOptions(s.config, s.state, s.log)
	o.Indexes = indexes
	st, err := s.reachStore(ctx, o)
	if err != nil && full {
		return fmt.Errorf("the pool database cannot be opened while the disk is full: make room on the filesystem of %s and start again: %w", s.config.StateDir, err)
	}
	if err != nil {
		return fmt.Errorf("open the pool database: %w", err)
	}
	s.store = st
	return nil
}

// How long a cluster may take to be opened, and the pause until it is tried
// again where it does not answer.
const (
	storePatience = 10 * time.Second
	storePause    = time.Second
)

// reachStore opens the database. A cluster that does not answer is waited for,
// as long as ctx lasts: after a power cut all begin at once.
func (s *Server) reachStore(ctx context.Context, o store.Options) (*store.Store, error) {
	if o.URL == "" {
		return store.Open(ctx, o)
	}
	for {
		limit, cancel := context.WithTimeout(ctx, storePatience)
		st, err := store.Open(limit, o)
		cancel()
		if err == nil || ctx.Err() != nil || !store.Unreachable(err) {
			return st, err
		}
		s.log.WithError(err).Warn("the pool database does not answer; it is tried again")
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(storePause):
		}
	}
}

// openPool makes the services and, at the very first start, the pool. Nobody
// but this host can lead on the embedded database: it does so at once.
func (s *Server) openPool(ctx context.Context) (err error) {
	if s.hostUUID, err = s.state.hostUUID(); err != nil {
		return err
	}
	if s.config.Store == "" {
		if s.leader, err = s.store.Campaign(ctx, string(s.hostUUID)); err != nil {
			return fmt.Errorf("become the pool's coordinator: %w", err)
		}
	}
	s.pool, err = pool.Open(ctx, pool.Options{
		Store: s.store, Log: s.log, Drivers: all.Drivers(), HostUUID: s.hostUUID, Hostname: s.hostname,
		Address: s.address(), Key: s.identity.SPKI(), URL: s.url(),
		PatchDir: s.config.PatchDir, OwnDirs: s.ownDirs(), KeepFree: s.state.keepFree(s.dom0), Version: s.version,
		Dom0: s.dom0, MountDir: s.state.path("mnt"),
	})
	if err != nil {
		return err
	}
	s.pool.Copies, s.pool.CopiesTimeout = s.config.copies(), time.Duration(s.config.CopiesTimeout)
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
	if err := s.openLink(ctx); err != nil {
		return err
	}
	s.openPeers()
	coordinator, storage := s.agentServes()
	s.agent = agent.New(agent.Options{
		Coordinator: coordinator, Storage: storage, Dom0: s.dom0, Log: s.log,
		Self: s.pool.Self, SelfUUID: s.pool.SelfUUID, PoolUUID: s.pool.PoolUUID,
		JobsDir: s.state.path("jobs"), PatchDir: s.config.PatchDir, KeysDir: s.keysDir(), Pinned: s.config.PinnedSHA256,
		Attested: s.attested(),
		Runner:   s.runner, MaxCleartext: s.config.MaxCleartext, Layout: s.layout, KeepFree: s.state.keepFree(s.dom0),
		KeepQueued: s.config.Store != "" || s.member != nil,
		Timeouts: agent.Timeouts{
			Precheck: time.Duration(s.config.PrecheckTimeout), Apply: time.Duration(s.config.ApplyTimeout),
			Grace: time.Duration(s.config.GraceTimeout),
		},
	})
	s.pool.Local, s.pool.Also, s.pool.Tasks = s.agent, s.examine, s.tasks
	s.pool.Confirmed = s.pool.PatchConfirmed
	return os.MkdirAll(s.keysDir(), 0o755)
}

// ownDirs are the folders in which nothing but patchd puts anything.
func (s *Server) ownDirs() []string {
	return []string{s.state.path("jobs"), s.state.path("db"), s.state.path("uploads"), s.state.path("mnt"), s.keysDir(), s.config.PatchDir}
}

func (s *Server) keysDir() string { return s.state.path("trusted-keys") }

// Addresses are those the listeners have in fact: plain HTTP and TLS; nil
// where there is none.
func (s *Server) Addresses() (plain, tls net.Addr) { return s.ways.Addr, s.ways.TLSAddr }

// Run mends what was left on this host, then serves until ctx ends: as the
// coordinator where it leads, else it stands by until it does. ready is called
// when calls are answered. The error is ErrDeposed when another host leads.
func (s *Server) Run(ctx context.Context, ready func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.reopen = cancel
	if err := s.repairHost(ctx); err != nil {
		return fmt.Errorf("repair at start: %w", err)
	}
	boundMemory(s.hosts())
	var wg sync.WaitGroup
	serving := func() {
		wg.Go(func() { cancel(s.runAgent(ctx)) })
		wg.Go(func() { s.every(ctx, housekeepingEvery, "housekeeping of the host", s.keepHost) })
		wg.Go(func() { s.every(ctx, sweepEvery, "the sweep", s.pool.Sweep) })
		wg.Go(func() { s.every(ctx, replugEvery, "plugging SRs that were away", s.pool.ReplugFailed) })
		wg.Go(func() {
			s.pool.Scrub(ctx, pool.ScrubOptions{Interval: time.Duration(s.config.ScrubInterval), Rate: s.config.ScrubRate})
		})
		if ready != nil {
			ready()
		}
	}
	wg.Go(func() { cancel(s.play(ctx, serving)) })
	<-ctx.Done()
	wg.Wait()
	s.leave()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// play takes the roles of this host one after another. serving is called once,
// when calls are answered.
func (s *Server) play(ctx context.Context, serving func()) error {
	if s.member != nil {
		return s.serveMember(ctx, serving)
	}
	if s.leader == nil {
		if err := s.stand(ctx, serving); err != nil {
			return err
		}
		serving = func() {}
	}
	return s.lead(ctx, serving)
}

// leave lets another host lead, at once, and then ends the calls under way.
func (s *Server) leave() {
	if s.leader != nil && s.config.Store != "" {
		ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
		defer cancel()
		if err := s.leader.Abdicate(ctx); err != nil {
			s.log.WithError(err).Warn("the lead could not be given back; it ends by itself in a moment")
		}
	}
	s.ways.close(stopGrace)
}

// stopGrace is how long calls may go on after SIGTERM.
const stopGrace = 2 * time.Second

// repairHost makes true what must be true of this host after every start,
// whoever leads: every undo of its own ran, its SRs are plugged, its jobs of an
// earlier process are settled, and the records know its stampfiles.
func (s *Server) repairHost(ctx context.Context) error {
	if err := s.pool.RepairStorage(ctx); err != nil {
		return fmt.Errorf("repair the storage: %w", err)
	}
	err := s.pool.EnsureFirstSR(ctx, pool.SRSpec{
		Type: "file", NameLabel: "Local storage", ContentType: "user",
		NameDescription: "made at the first start", DeviceConfig: map[string]string{"location": s.state.path("sr")},
		SMConfig: map[string]string{},
	})
	if err != nil {
		return err
	}
	if s.member != nil {
		return nil // its jobs are the coordinator's: see runAgent
	}
	return s.recoverJobs(ctx)
}

// recoverJobs settles the jobs of an earlier process of this host, and compares
// stampfiles with records.
func (s *Server) recoverJobs(ctx context.Context) error {
	if err := s.agent.Recover(ctx); err != nil {
		// A job that cannot be settled now is tried again at the next start;
		// it must not keep an admin from the pool.
		s.log.WithError(err).Error("some jobs of an earlier process could not be settled")
	}
	if err := s.agent.ResyncStamps(ctx); err != nil {
		return fmt.Errorf("compare stampfiles with records: %w", err)
	}
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

// hosts is how many hosts the pool has, as far as this one knows.
func (s *Server) hosts() (n int) {
	err := s.store.View(func(v *store.View) error {
		n = v.Count(pool.ClassHost)
		return nil
	})
	if err != nil {
		return 1
	}
	return n
}

// keepHost is the housekeeping of every host.
func (s *Server) keepHost(context.Context) error {
	boundMemory(s.hosts())
	_, err := s.state.useReserve(s.dom0, s.log)
	renewed, kerr := s.identity.Renew(time.Now())
	if renewed {
		s.log.Info("this host has a new certificate for its key")
	}
	return errors.Join(s.forgetAttested(), kerr, err)
}

// Close ends everything; runners go on.
func (s *Server) Close() error {
	s.ways.close(0)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := s.pool.DetachStorage(ctx)
	s.sessions.Close()
	s.peers.close()
	return errors.Join(err, s.store.Close(), s.dom0.Close(), s.unlock())
}

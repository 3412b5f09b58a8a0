package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/upload"
	"github.com/patchd/patchd/pkg/xapi"
)

// lead is the coordinator's part: it takes up what an earlier one has left,
// opens the API, and keeps house, until ctx ends. When another host leads, or
// the cluster was silent for too long, the error is ErrDeposed, and nothing that
// is still under way can write any more.
func (s *Server) lead(ctx context.Context, serving func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // ends with ctx
		select {
		case <-s.leader.Done():
			cancel(ErrDeposed)
		case <-ctx.Done():
		}
	}()
	err := s.serveLeading(ctx, serving)
	if errors.Is(err, store.ErrDeposed) || errors.Is(context.Cause(ctx), ErrDeposed) {
		return ErrDeposed
	}
	return err
}

func (s *Server) serveLeading(ctx context.Context, serving func()) error {
	defer s.tasks.Stop()
	s.openHub()
	if err := s.takeOver(ctx); err != nil {
		return fmt.Errorf("repair at start: %w", err)
	}
	handler, err := s.routes(ctx)
	if err != nil {
		return err
	}
	defer s.uploads.Close()
	defer s.cli.Close()
	defer s.tasks.Stop() // before those
	s.leads.Store(s.leader)
	close(s.leading)
	s.ways.setHandler(handler)
	s.log.WithField("term", s.leader.Revision).Info("this host leads the pool")
	var hosts sync.WaitGroup
	defer hosts.Wait()
	hosts.Go(func() { s.keepHosts(ctx) })
	serving()
	s.every(ctx, housekeepingEvery, "housekeeping", s.keepHouse)
	if errors.Is(context.Cause(ctx), ErrDeposed) {
		s.ways.setHandler(http.HandlerFunc(booting))
	}
	return context.Cause(ctx)
}

// keepHosts is what a coordinator does for the other hosts: their links, and
// those that come or go.
func (s *Server) keepHosts(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if err := s.hub.Run(ctx); err != nil && ctx.Err() == nil {
			s.log.WithError(err).Error("the links of the hosts ended")
		}
	})
	if err := s.pool.FinishEjects(ctx); err != nil && ctx.Err() == nil {
		s.log.WithError(err).Error("a host that was being ejected is still in the records; the next start tries again")
	}
	hosts, err := s.pool.Aligning()
	if err != nil {
		s.log.WithError(err).Error("the hosts that are to be put at the pool's level cannot be read")
	}
	for _, host := range hosts {
		s.align(host)
	}
}

// align puts a host at the pool's level, as a task that ends with this role.
func (s *Server) align(host xapi.Ref) {
	h, err := s.tasks.Begin(context.Background(), task.Spec{Label: "patchd.align", Description: "puts a new host at the pool's level"})
	if err != nil {
		s.log.WithError(err).WithField("host", host).Error("a host cannot be put at the pool's level; the next start tries again")
		return
	}
	s.tasks.Go(h.Ref(), func(ctx context.Context, _ *task.Handle) (string, error) {
		return xmlValue(""), s.pool.Align(ctx, host)
	})
}

// takeOver makes true what must be true of the pool whenever a coordinator
// begins: this host is its master, and every task that nothing durable owns has
// ended.
func (s *Server) takeOver(ctx context.Context) error {
	for _, f := range []func(context.Context) error{s.pool.Lead, s.ensureRoot, s.pool.EnsureSM, s.pool.EnsureDefaultSR} {
		if err := f(ctx); err != nil {
			return err
		}
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
	if err := s.pool.SettlePoolApplied(ctx); err != nil {
		return err
	}
	return s.pool.ImportPatchDir(ctx)
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
		s.log.Infof("root's first password is in %s/root-password", s.config.StateDir)
	}
	_, err = s.sessions.EnsureRoot(ctx, password)
	return err
}

func randomPassword() string { return string(xapi.NewUUID()) }

// resume takes up the tasks whose work is durable: open runs, copies of VDIs, and
// jobs, also those that ended while nobody could tell their task.
func (s *Server) resume(ctx context.Context) (map[xapi.Ref]bool, error) {
	owned := map[xapi.Ref]bool{}
	refs, runs, err := s.pool.Runs()
	if err != nil {
		return nil, err
	}
	for i, run := range runs {
		// One that has ended has its say when its task does not know of it yet.
		if task, err := s.tasks.Get(run.Task); run.State.Ended() && (err != nil || task.Status.Finished()) {
			continue
		}
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
	if err := s.resumeUploads(ctx, owned); err != nil {
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

// resumeUploads goes on with uploads that were not confirmed.
func (s *Server) resumeUploads(ctx context.Context, owned map[xapi.Ref]bool) error {
	patches, err := s.pool.UnconfirmedPatches()
	if err != nil {
		return err
	}
	for patch, ref := range patches {
		if rec, err := s.tasks.Get(ref); err == nil && rec.Status.Finished() {
			ref = xapi.NewRef() // it failed, and could not be undone then
		}
		owned[ref] = true
		err := s.takeUp(ctx, ref, func(ctx context.Context) (string, error) { return string(patch), s.pool.Confirm(ctx, patch) })
		if err != nil {
			return err
		}
	}
	return nil
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

// keepHouse is the housekeeping of the pool.
func (s *Server) keepHouse(ctx context.Context) error {
	return errors.Join(s.tasks.GC(ctx), s.pool.CollectJobs(ctx), s.pool.CollectRuns(ctx), s.pool.CollectReplicas(ctx), s.sessions.GC(ctx))
}

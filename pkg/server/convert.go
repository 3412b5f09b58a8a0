package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// settleRole makes the store agree with what member.json says, before anything is
// served: a host that was taken into a pool gives up its own, and one that leaves
// gets one again. Each step may be repeated, so a crash at any of them is mended
// by the next start. It gives the membership that holds afterwards, or nil.
func (s *Server) settleRole(ctx context.Context) (*membership, error) {
	m, err := s.state.membership()
	if err != nil || m == nil || m.Phase == phaseMember {
		return m, err
	}
	if s.config.Store != "" {
		return nil, errors.New("this host is a member of a pool (member.json in the state directory) and cannot have the pool's database (--store) too: eject it first, or start it without --store")
	}
	// What was begun under the old name of the pool is undone under it.
	if err := s.pool.RepairStorage(ctx); err != nil {
		return nil, fmt.Errorf("repair the storage: %w", err)
	}
	if m.Phase == phaseLeaving {
		if err := s.pool.LeavePool(ctx); err != nil {
			return nil, fmt.Errorf("leave the pool: %w", err)
		}
		// The pool that was left lets nobody in with the old key, ever.
		if _, err := s.RotateKey(ctx); err != nil {
			return nil, fmt.Errorf("give this host another key: %w", err)
		}
		s.log.WithField("pool", m.Answer.Pool).Info("this host has left its pool and is one of its own")
		return nil, s.state.endMembership()
	}
	if err := s.backUpBefore(ctx, m.Answer.Pool); err != nil {
		return nil, fmt.Errorf("back up the pool database before joining pool %s: %w", m.Answer.Pool, err)
	}
	if err := s.pool.BecomeMember(ctx, m.Answer); err != nil {
		return nil, fmt.Errorf("become a member of pool %s: %w", m.Answer.Pool, err)
	}
	m.Phase = phaseMember
	return m, s.state.setMembership(*m)
}

// backUpBefore keeps the store of the pool that this host was, as a file that
// `patchd store restore` takes. What is there already is from before a crash.
func (s *Server) backUpBefore(ctx context.Context, joined xapi.UUID) error {
	name := s.state.path("before-joining-" + string(joined) + ".backup")
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp := name + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(s.store.Backup(ctx, f), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, name)
}

// Leave makes a member a pool of its own. The coordinator is not asked: where it
// is there it should be told to eject the host. Codes: OPERATION_NOT_ALLOWED on
// a host that is no member, OTHER_OPERATION_IN_PROGRESS while it has work to do.
func (s *Server) Leave(context.Context) error {
	return s.leavePool("this host leaves its pool, as its admin has said")
}

func (s *Server) leavePool(why string) error {
	m, err := s.state.membership()
	if err != nil {
		return err
	}
	if m == nil {
		return xapi.NewError(xapi.OperationNotAllowed, "this host is no member of another pool")
	}
	if s.agent.AtWork() {
		return xapi.NewError(xapi.OtherOperationInProgress, pool.ClassHost, string(s.pool.Self), "this host has work to do")
	}
	m.Phase = phaseLeaving
	if err := s.state.setMembership(*m); err != nil {
		return err
	}
	s.log.Info(why)
	s.reopenSoon()
	return nil
}

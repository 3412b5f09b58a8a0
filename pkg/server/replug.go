package server

import (
	"context"
	"time"
)

// replugEvery is how often SRs are tried again that could not be plugged at the start.
const replugEvery = 30 * time.Second

// replugging has a loop of its own: an SR that does not answer may keep it waiting.
func (s *Server) replugging(ctx context.Context) {
	tick := time.NewTicker(replugEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.pool.ReplugFailed(ctx); err != nil && ctx.Err() == nil {
			s.log.WithError(err).Error("SRs that could not be plugged at the start could not be tried again; the next attempt follows")
		}
	}
}

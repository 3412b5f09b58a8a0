package pool

import (
	"context"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// HostInfo is one host as the coordinator sees it now.
type HostInfo struct {
	Ref       xapi.Ref
	UUID      xapi.UUID
	NameLabel string
	Address   string
	Rank      Rank
	// Connected tells that the host is there. Since is when it came or went; zero:
	// before this coordinator began to look.
	Connected bool
	Since     time.Time
	Version   string // of its patchd
	Jobs      int    // that it has not ended
	Keys      []string
}

// HostStates tells of every host, oldest first.
func (p *Pool) HostStates(context.Context) (out []HostInfo, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassHost) {
			var h Host
			if err := it.Decode(&h); err != nil {
				return err
			}
			s := HostInfo{
				Ref: it.Ref, UUID: h.UUID, NameLabel: h.NameLabel, Address: h.Address, Rank: RankMember,
				Version: h.SoftwareVersion["patchd"], Connected: true,
			}
			if h.Coordinator {
				s.Rank = RankStandby
			}
			if it.Ref == p.Self {
				s.Rank = RankCoordinator
			} else if p.Seen != nil {
				s.Since, s.Connected = p.Seen(it.Ref)
			}
			if !s.Connected && !h.Away.IsZero() {
				s.Since = h.Away
			}
			for _, k := range h.Keys {
				s.Keys = append(s.Keys, pinOf(k.SPKI))
			}
			for _, ref := range v.Refs(ClassJob, "host", string(it.Ref)) {
				if job, err := store.Get[Job](v, ClassJob, ref); err == nil && job.State != JobDone {
					s.Jobs++
				}
			}
			out = append(out, s)
		}
		return nil
	})
	return out, err
}

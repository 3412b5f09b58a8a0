package pool

import (
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// AttachedSR is one SR that is plugged on this host.
type AttachedSR struct {
	Ref        xapi.Ref
	UUID       xapi.UUID
	NameLabel  string
	Shared     bool
	Repository sr.Repository
}

// AttachedSRs lists the SRs plugged on this host, oldest first.
func (p *Pool) AttachedSRs() ([]AttachedSR, error) {
	var out []AttachedSR
	err := p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassSR) {
			var rec SR
			if err := it.Decode(&rec); err != nil {
				return err
			}
			out = append(out, AttachedSR{Ref: it.Ref, UUID: rec.UUID, NameLabel: rec.NameLabel, Shared: rec.Shared})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	plugged := out[:0]
	for _, s := range out {
		repo, err := p.Repository(s.Ref)
		if xapi.Is(err, xapi.SRNotAttached) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.Repository = repo
		plugged = append(plugged, s)
	}
	return plugged, nil
}

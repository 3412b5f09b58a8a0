package pool

import (
	"context"
	"fmt"
	"math"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Promised is how many of an SR's free bytes are promised to VDIs in the
// making: what each was promised less what its volumes take already. Codes:
// those of Repository.
func (p *Pool) Promised(ctx context.Context, ref xapi.Ref) (int64, error) {
	repo, release, err := p.useSR(ref)
	if err != nil {
		return 0, err
	}
	defer release()
	return p.promised(ctx, repo, ref, math.MaxInt64)
}

// promised counts the intents that were recorded before a moment.
func (p *Pool) promised(ctx context.Context, repo sr.Repository, ref xapi.Ref, before int64) (sum int64, err error) {
	var open []Intent
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			if in.SR == ref && in.Room > 0 && it.Created < before {
				open = append(open, in)
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for _, in := range open {
		sum += max(0, in.Room-p.taken(ctx, repo, in))
	}
	return sum, sr.Alive(ctx)
}

// taken is what the volumes of a VDI in the making take, in bytes; 0 when it
// cannot be told, so that the whole promise counts.
func (p *Pool) taken(ctx context.Context, repo sr.Repository, in Intent) int64 {
	if in.Host != p.Self {
		return 0 // its name there is the other host's to know
	}
	for _, n := range []sr.Name{p.part(in), sr.Live(in.VDI)} {
		if used, err := volumeSize(ctx, repo, n); err == nil {
			return used
		}
	}
	return 0
}

// assertRoom refuses an intent that was promised more than an SR has. The
// promise is on record already, and of two that do not both fit the earlier one
// is kept. Code: OUT_OF_SPACE.
func (p *Pool) assertRoom(ctx context.Context, repo sr.Repository, ref xapi.Ref, in Intent) error {
	if in.Room <= 0 {
		return nil
	}
	var since int64
	err := p.Store.View(func(v *store.View) error {
		it, _ := v.Get(ClassIntent, ref)
		since = it.Created
		return nil
	})
	if err != nil {
		return err
	}
	promised, err := p.promised(ctx, repo, in.SR, since)
	if err != nil {
		return err
	}
	stat, err := repo.Stat(ctx)
	if err != nil {
		return err
	}
	if in.Room > stat.Free-promised {
		return xapi.NewError(xapi.OutOfSpace, "").Because(fmt.Errorf("%d bytes are needed, %d are free, of which %d are promised to others",
			in.Room, stat.Free, promised))
	}
	return nil
}

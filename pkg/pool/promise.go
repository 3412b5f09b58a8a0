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

// promised counts the intents that were recorded up to a moment.
func (p *Pool) promised(ctx context.Context, repo sr.Repository, ref xapi.Ref, until int64) (sum int64, err error) {
	var open []Intent
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			if in.SR == ref && in.Room > 0 && it.Created <= until {
				open = append(open, in)
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for _, in := range open {
		used, err := p.taken(ctx, repo, in)
		if err != nil {
			return 0, err
		}
		sum += max(0, in.Room-used)
	}
	return sum, nil
}

// taken is what the volumes of a VDI in the making take, in bytes.
func (p *Pool) taken(ctx context.Context, repo sr.Repository, in Intent) (int64, error) {
	if in.Host != p.Self {
		return 0, nil // its name there is the other host's to know
	}
	for _, n := range []sr.Name{p.part(in), sr.Live(in.VDI)} {
		used, err := volumeSize(ctx, repo, n)
		if err == nil || !xapi.Is(err, xapi.VDINotAvailable) {
			return used, err
		}
	}
	return 0, nil
}

// assertRoom refuses an intent that was promised more than an SR has. The
// promise is on record already, and of two that do not both fit the earlier one
// is kept. Code: OUT_OF_SPACE.
func (p *Pool) assertRoom(ctx context.Context, repo sr.Repository, ref xapi.Ref, in Intent) error {
	if in.Room <= 0 {
		return nil
	}
	var until int64
	err := p.Store.View(func(v *store.View) error {
		it, _ := v.Get(ClassIntent, ref)
		until = it.Created
		return nil
	})
	if err != nil {
		return err
	}
	promised, err := p.promised(ctx, repo, in.SR, until)
	if err != nil {
		return err
	}
	stat, err := repo.Stat(ctx)
	if err != nil {
		return err
	}
	if promised > stat.Free {
		return xapi.NewError(xapi.OutOfSpace, "").Because(fmt.Errorf("%d bytes are needed, %d are free, of which %d are promised to others",
			in.Room, stat.Free, promised-in.Room))
	}
	return nil
}

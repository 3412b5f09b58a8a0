package pool

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// keepMap writes the block map of a VDI that is being made beside its image,
// under the name it will have for good, and gives its digest; "" when there is none.
func keepMap(ctx context.Context, b birth, part sr.Name) (digest string, err error) {
	if b.Map == nil {
		return "", nil
	}
	m := b.Map()
	if m == nil {
		return "", nil
	}
	size, err := checkSize(m.EncodedSize())
	if err != nil {
		return "", err
	}
	if _, err := b.repo.Create(ctx, part.Map(), size); err != nil {
		return "", err
	}
	f, err := b.repo.Open(ctx, part.Map(), sr.ReadWrite)
	if err != nil {
		return "", err
	}
	err = m.Encode(io.NewOffsetWriter(f, 0))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("write the block map of VDI %s: %w", b.uuid, err)
	}
	return m.Digest(), b.repo.Rename(ctx, part.Map(), sr.Live(b.uuid).Map())
}

// VDIMap reads the block map of a VDI, held against the digest in its record;
// nil when it has none. Codes: those of UseVDI, VDI_CONTENT_CHANGED [VDI ref,
// text] when the map is gone or damaged.
func (p *Pool) VDIMap(ctx context.Context, ref xapi.Ref) (*vdi.Map, error) {
	rec, repo, release, err := p.useVDI(ref)
	if err != nil {
		return nil, err
	}
	defer release()
	if rec.Map == "" {
		return nil, nil
	}
	m, err := sr.ReadMap(ctx, repo, rec.UUID, rec.Map)
	if err != nil && sr.Alive(ctx) == nil {
		err = xapi.NewError(xapi.VDIContentChanged, string(ref), "its block map is gone or damaged").Because(err)
	}
	return m, err
}

package pool

import (
	"context"
	"errors"
	"io"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// writeMap makes a volume with an encoded block map in it, durably.
func writeMap(ctx context.Context, repo sr.Repository, n sr.Name, m *vdi.Map) error {
	size, err := checkSize(m.EncodedSize())
	if err != nil {
		return err
	}
	if _, err := repo.Create(ctx, n, size); err != nil {
		return err
	}
	f, err := repo.Open(ctx, n, sr.ReadWrite)
	if err != nil {
		return err
	}
	if err = m.Encode(io.NewOffsetWriter(f, 0)); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
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

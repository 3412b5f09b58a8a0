package sr

import (
	"bufio"
	"context"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// ReadMap reads the block map that lies beside the image of a VDI and holds it
// against its digest.
func ReadMap(ctx context.Context, repo Repository, id xapi.UUID, digest string) (*vdi.Map, error) {
	f, err := repo.Open(ctx, Live(id).Map(), ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return vdi.ReadMap(bufio.NewReaderSize(f, 64<<10), digest)
}

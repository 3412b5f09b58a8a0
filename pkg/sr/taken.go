package sr

import (
	"context"
	"fmt"
	"os"

	"github.com/patchd/patchd/pkg/vdi"
)

// Taken is what volume n of r, open as f, takes there, in bytes: of a file its
// blocks, of a block device, which does not know, what Scan says.
func Taken(ctx context.Context, r Repository, n Name, f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("measure volume %s: %w", n, err)
	}
	if fi.Mode().IsRegular() {
		return vdi.Allocated(f)
	}
	volumes, err := r.Scan(ctx)
	if err != nil {
		return 0, err
	}
	for _, v := range volumes {
		if v.Name == n {
			return v.PhysicalUtilisation, nil
		}
	}
	return vdi.Allocated(f) // it was renamed just now
}

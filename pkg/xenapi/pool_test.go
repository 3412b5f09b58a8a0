package xenapi

import "github.com/patchd/patchd/pkg/pool"

// The service is what the wire asks for.
var _ Pool = (*pool.Pool)(nil)

// Package all is the one list of storage drivers: what stands here is what
// patchd can use.
package all

import (
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/btrfs"
	"github.com/patchd/patchd/pkg/sr/ext"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/sr/lvm"
	"github.com/patchd/patchd/pkg/sr/nfs"
	"github.com/patchd/patchd/pkg/sr/xfs"
)

// Drivers lists every storage driver, each with its own Info().Type.
func Drivers() []sr.Driver {
	return []sr.Driver{&file.Driver{}, ext.New(), xfs.New(), btrfs.New(), &nfs.Driver{}, &lvm.Driver{}}
}

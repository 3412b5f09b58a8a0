// Package xfs keeps an SR in an XFS filesystem that it makes and mounts itself,
// on a block device or in an image file. XFS clones by reflink.
package xfs

import (
	"fmt"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/mounted"
	"github.com/patchd/patchd/pkg/xapi"
)

// New gives the driver.
func New() *mounted.Driver { return mounted.New(Kind()) }

// Kind says how XFS is made and mounted: with reflink.
func Kind() mounted.Kind {
	return mounted.Kind{
		Info: sr.Info{
			Type: "xfs", Label: "XFS", Vendor: "patchd", Copyright: "The patchd authors", Version: "1.0",
			Description: "Disk images in an XFS filesystem that patchd makes on a device or in an image file; clones in constant time",
		},
		Type: "xfs", Tool: "mkfs.xfs", Package: "xfsprogs", MinSize: 304 << 20,
		Arguments: func(uuid xapi.UUID, size int64, device string) []string {
			return []string{"-q", "-f", "-K", "-L", mounted.Label, "-m", "reflink=1,uuid=" + string(uuid), "-d", fmt.Sprintf("size=%d", size), device}
		},
	}
}

// Package btrfs keeps an SR in a btrfs filesystem that it makes and mounts
// itself, on a block device or in an image file. btrfs clones by reflink.
package btrfs

import (
	"fmt"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/mounted"
	"github.com/patchd/patchd/pkg/xapi"
)

// New gives the driver.
func New() *mounted.Driver { return mounted.New(Kind()) }

// Kind says how btrfs is made and mounted: on one device, with its defaults.
func Kind() mounted.Kind {
	return mounted.Kind{
		Info: sr.Info{
			Type: "btrfs", Label: "btrfs", Vendor: "patchd", Copyright: "The patchd authors", Version: "1.0",
			Description: "Disk images in a btrfs filesystem that patchd makes on a device or in an image file; clones in constant time",
		},
		Type: "btrfs", Tool: "mkfs.btrfs", Package: "btrfs-progs", MinSize: 128 << 20,
		Arguments: func(uuid xapi.UUID, size int64, device string) []string {
			return []string{"-q", "-f", "-K", "-L", mounted.Label, "-U", string(uuid), "-b", fmt.Sprint(size), device}
		},
	}
}

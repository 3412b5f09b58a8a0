// Package ext keeps an SR in an ext4 filesystem that it makes and mounts itself,
// on a block device or in an image file. ext4 does not clone.
package ext

import (
	"fmt"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/mounted"
	"github.com/patchd/patchd/pkg/xapi"
)

// New gives the driver.
func New() *mounted.Driver { return mounted.New(Kind()) }

// Kind says how ext4 is made and mounted: few inodes for few large files, no
// blocks kept for root, inode tables written when the kernel has time for it.
func Kind() mounted.Kind {
	return mounted.Kind{
		Info: sr.Info{
			Type: "ext", Label: "ext4", Vendor: "patchd", Copyright: "The patchd authors", Version: "1.0",
			Description: "Disk images in an ext4 filesystem that patchd makes on a device or in an image file; no clones",
		},
		Type: "ext4", Tool: "mkfs.ext4", Package: "e2fsprogs", MinSize: 16 << 20, Options: "errors=remount-ro",
		Arguments: func(uuid xapi.UUID, size int64, device string) []string {
			return []string{
				"-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-i", "65536", "-L", mounted.Label, "-U", string(uuid),
				"-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", device, fmt.Sprint(size / 4096),
			}
		},
	}
}

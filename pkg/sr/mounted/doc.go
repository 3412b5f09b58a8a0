// Package mounted is what the drivers ext, xfs and btrfs have in common: it
// makes a filesystem on a block device or in an image file, mounts it at
// MountDir/<SR uuid>, and keeps an SR of pkg/sr/file in its root.
//
// # On the device
//
//	0 … n           the filesystem; its uuid is that of the SR, its label "patchd"
//	the last 4 MiB  one line, the claim: which SR the device belongs to, and
//	                whether its filesystem is made
//
// The claim is written and synced before anything else and says that the device
// was empty then. So a Create that was broken off at any moment, in the
// middle of mkfs too, can be repeated or taken back, and nothing else is ever
// overwritten. What counts for attaching is the uuid of the filesystem, and the
// marker inside it.
//
// # Loop devices
//
// An image file is attached with autoclear and direct I/O; once it is mounted,
// the mount alone holds the loop device. One image never gets a second loop
// device: after a kill -9, or while a patch still runs from the SR in a mount
// namespace of its own, the first one is used again.
//
// # Busy
//
// What uses a volume keeps the filesystem mounted. Detach then fails with an
// error that names the holders, for which errors.Is(err, syscall.EBUSY) holds,
// and the SR stays attached. The next Attach, also of another process, finds the
// mount and takes it over.
package mounted

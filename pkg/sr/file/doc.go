// Package file keeps the VDIs of an SR as raw sparse files in one folder.
//
// # Layout
//
//	<location>/.patchd-sr        the uuid of the SR
//	<location>/<vdi uuid>.img    a VDI; its length is virtual_size
//	<location>/part.….img        a VDI in the making, see sr.Name
//	<location>/work.….img        working data of one job
//
// Whatever else lies there is foreign: never listed, changed or removed, but it
// keeps the folder from becoming an SR. The marker file is why an SR whose
// filesystem is not mounted, or another SR's folder, is refused at attach: an
// empty mount point is not taken for an empty SR.
//
// # What is trusted
//
// The folder belongs to the user patchd runs as, or root, and nobody else may write
// to it. No part of its path is a symbolic link. Every access goes through a
// descriptor of the folder that is opened once, at attach, and never follows a
// link; a name is a kind and uuids, so it cannot lead out of the folder. The
// filesystem cannot be unmounted while the SR is attached.
//
// # Durability
//
// A volume gets its name when it has its size: it is made without a name
// (O_TMPFILE) and linked. Every change of a name is followed by an fsync of the
// folder. Whether the filesystem clones (FICLONE: xfs, btrfs and others) is
// tried out at every attach.
package file

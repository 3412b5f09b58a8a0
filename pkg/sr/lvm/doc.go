// Package lvm keeps the VDIs of an SR as thin logical volumes on one block device.
//
// # Layout
//
//	device                        a physical volume, its uuid is made of the SR's
//	pd_<SR uuid, no dashes>       the volume group, alone on the device
//	…/pool                        the thin pool, all of the group
//	…/vdi.<uuid>, …/map.<uuid>    a VDI and its block map
//	…/W…, P…, M…                  working data of one job, see logicalName
//	…/trash.…                     destroyed while it was still open
//
// Whatever else is in the group is foreign: never listed, changed or removed. A
// device that holds anything is refused.
//
// # Sizes
//
// An extent is one sector up to 2 TiB, so that a volume has just the bytes that
// were asked for; larger devices need larger extents, see extentFor, and a size
// that is no multiple is refused (INVALID_VALUE). Blocks are given when they are
// first written, 64 KiB at a time, and read as zeros before.
//
// # A full pool
//
// Nothing is ever enlarged behind the admin's back. The pool is set to answer
// errors when it is full, so that a write fails and never waits.
//
// # Commands
//
// Everything is done by the lvm2 tools, one at a time per SR, with a
// configuration of our own that shows them only this one device. A command is
// never broken off by a cancelled call: between two of its steps devices are
// suspended. Where no udev runs, the tools make the device nodes themselves.
package lvm

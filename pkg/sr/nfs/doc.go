// Package nfs keeps the VDIs of an SR on an NFS 4.2 or 4.1 export, where many
// hosts may share them.
//
// # Layout
//
//	server:serverpath            the export, mounted at MountDir/<SR uuid>
//	<SR uuid>/                   the SR: a folder of pkg/sr/file, one per SR
//
// Names, marker and rules inside the folder are those of pkg/sr/file. What else
// is on the export is foreign. Clones are made where server and filesystem clone
// (CLONE of NFS 4.2, over xfs or btrfs); that is tried out at attach.
//
// # A server that does not answer
//
// The mount is soft: the kernel gives up a request after timeo × (1 + retrans).
// That alone is not enough, as the kernel waits for ever in some states of
// recovery. So every call also has a limit of its own, three seconds longer,
// after which it returns an error that names the SR, and the system call is
// left behind. While one is left behind, further calls are refused at once:
// there are never more than a few. When the server is back they end, and the
// SR works again by itself. What is written meanwhile through an open
// descriptor fails with EIO or ETIMEDOUT, at the latest in Sync.
//
// Detach of a server that does not answer unmounts by force and says so.
//
// # Many hosts
//
// Folders are looked up anew for every call (acdirmax=0, lookupcache=pos), so
// that a VDI made by one host is there for the others at once; the contents of
// files follow close-to-open. A VDI that one host destroys while another one
// reads it gives that one ESTALE.
package nfs

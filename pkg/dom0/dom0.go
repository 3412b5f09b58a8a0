// Package dom0 is the only place where patchd acts on the operating system it
// runs on: loop devices, mounts, processes with their control groups, free
// space. Everything else describes what it wants as a value (Mount, Cmd) and
// hands it to the Dom0 interface, so that it can be tested without root.
//
// # Life of a loop device and a mount
//
// A loop device is set up with autoclear: it goes when its last user goes. The
// runner attaches and mounts inside a private mount namespace, so that when it
// dies, however it dies, mount and loop device go with it.
//
//	dev, err := d.Attach(ctx, "/srv/sr/0a….img", true)
//	defer dev.Close()
//	err = d.Mount(ctx, dom0.Mount{Source: dev.Path(), Target: dir, Type: "ext4", ReadOnly: true, Options: "noload"})
//	defer d.Unmount(ctx, dir)
//
// # Processes
//
// Run starts one program, waits for it and leaves nothing of it behind: what
// remains in its control group is killed. Spawn starts one that outlives the
// caller; Alive and Kill find it again by the name of its control group.
//
// What must happen between fork and exec, namespaces above all, is done by the
// shim: this program, started again, as init of this package notices.
package dom0

import (
	"context"
	"io"
	"time"
)

// Dom0 is every effect on the operating system. System does it for real,
// dom0test keeps it in memory.
type Dom0 interface {
	// Attach makes a block device of an image file, by a loop device with
	// autoclear and direct I/O where the filesystem allows it. Cancelled
	// before it begins, it does nothing.
	Attach(ctx context.Context, image string, readOnly bool) (Device, error)

	// Mount mounts m. The type is always named, nosuid and nodev are always
	// set. Mounting on a target that is in use is an error.
	Mount(ctx context.Context, m Mount) error

	// Unmount unmounts target and retries while it is busy, for 5 s at most;
	// the error then names the processes that hold it. A target that is not
	// mounted is no error.
	Unmount(ctx context.Context, target string) error

	// SyncFS flushes the filesystem that holds path. An I/O error that
	// happened after write() returned shows here, and only here.
	SyncFS(ctx context.Context, path string) error

	// Run runs c to its end and kills whatever is left in its control group.
	// An exit status other than 0 is a Result, not an error; an error means
	// that the program could not be started (*StartError) or its end not be
	// learned. When ctx ends, the program is ended as by Timeout, and the error
	// is the cause of ctx. A group that a process lives in is ErrGroupBusy.
	Run(ctx context.Context, c Cmd) (Result, error)

	// Spawn starts c as a process of its own: own session, own control group
	// outside that of this service, standard streams from Cmd. It goes on when this
	// process ends. The pid is for logs: find it again by Alive(c.Group). The
	// errors are those of Run. The group stays, empty at last, until Kill.
	Spawn(ctx context.Context, c Cmd) (pid int, err error)

	// Alive tells whether a process lives in the control group.
	Alive(group string) (bool, error)

	// Kill ends every process of the control group by TERM, then after grace
	// by KILL, waits until it is empty, and removes it. An absent group is no
	// error.
	Kill(ctx context.Context, group string, grace time.Duration) error

	// WaitEmpty blocks until no process lives in the control group, by a watch
	// on it; an absent group is empty. It ends early with ctx's error.
	WaitEmpty(ctx context.Context, group string) error

	// Groups lists the control groups below this prefix that exist, alive or empty.
	Groups() ([]string, error)

	// Space tells the room on the filesystem that holds path.
	Space(path string) (Space, error)

	// BootID names this boot of the machine.
	BootID() (string, error)
}

// Device is an attached block device.
type Device interface {
	Path() string // as /dev/loop7
	// Close lets go of the device; with autoclear it is gone once it is not
	// mounted either. Closing twice is no error.
	Close() error
}

// Mount says what to mount where.
type Mount struct {
	Source   string
	Target   string // an existing directory
	Type     string // "ext4", "tmpfs": never guessed
	ReadOnly bool
	NoExec   bool
	NoAtime  bool
	Options  string // the filesystem's own, comma-separated
}

// Cmd says what to run.
type Cmd struct {
	Path string   // absolute
	Args []string // without the program's name
	Env  []string // the whole environment: nothing is inherited
	Dir  string

	Stdin io.Reader // nil: nothing
	// Stdout and Stderr are written by one goroutine when they are equal. A
	// writer that caps what it keeps must still take everything. In Spawn
	// they must be *os.File.
	Stdout, Stderr io.Writer

	// ExtraFiles become descriptors 3, 4, … of the program.
	ExtraFiles []File

	// Group is the name of the control group the program runs in: one path
	// element. Empty: none (only for programs that are part of patchd).
	Group string

	// Timeout ends the program by TERM, then after Grace by KILL. 0: none.
	Timeout time.Duration
	Grace   time.Duration

	// Sandbox locks the program down; nil runs it with all rights. A sandbox
	// without Group gets one named "sandbox-…"; it dies with its parent.
	Sandbox *Sandbox

	// PrivateMounts gives the program a mount namespace of its own with slave
	// propagation: it sees the host's mounts, the host does not see its own.
	PrivateMounts bool
}

// File is an open file as os.File is one.
type File interface {
	Fd() uintptr
	Close() error
}

// Sandbox runs a program out of a disk image, locked away from the host: own
// mount, process, network, IPC and UTS namespaces, everything read-only but a
// small tmpfs on /tmp, no capabilities, no new privileges, as nobody, with
// limits on memory, processes and file size. Cmd.Path is taken inside the image.
type Sandbox struct {
	Image string // an ext4 image, mounted ro,noload
}

// Result is how a program ended.
type Result struct {
	ExitCode int  // -1 when a signal ended it
	Signal   int  // the signal, or 0
	TimedOut bool // Timeout passed and we ended it
	// Straggler is true when processes were left in the group and were killed.
	Straggler bool
}

// Space is the room on a filesystem, in bytes.
type Space struct {
	Total int64
	Free  int64 // what this process may still use
	// ReadOnly tells that nothing can be written, such as after an I/O error on
	// a filesystem that was mounted to end so.
	ReadOnly bool
}

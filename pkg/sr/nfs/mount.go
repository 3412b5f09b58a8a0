package nfs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// reachLimit bounds the look-up of the server's name and the first connection.
const reachLimit = 5 * time.Second

// mount is one SR's mount on this host, shared by all who have it attached.
type mount struct {
	*gate
	uuid   xapi.UUID
	turn   chan struct{} // full while somebody mounts or unmounts
	users  int           // guarded by turn
	target string
	dom0   dom0.Dom0
	export export
}

// open gives the mount of an SR, mounted; close lets go of it.
func (d *Driver) open(ctx context.Context, c sr.Config) (*mount, error) {
	if err := sr.Alive(ctx); err != nil {
		return nil, err
	}
	e, err := read(c)
	if err != nil {
		return nil, err
	}
	if c.Dom0 == nil || c.MountDir == "" {
		return nil, sr.BackendFailure("this process mounts nothing")
	}
	m := d.mountOf(c, e)
	if err := m.take(ctx); err != nil {
		return nil, err
	}
	defer func() { <-m.turn }()
	if m.users == 0 {
		m.export, m.dom0, m.target = e, c.Dom0, filepath.Join(c.MountDir, string(c.SR))
		m.set(name(c, e), e.limit())
		if err := m.do(ctx, "mount", m.mount); err != nil {
			return nil, err
		}
	}
	m.users++
	return m, nil
}

// mountOf gives what is known about an SR's mount in this process.
func (d *Driver) mountOf(c sr.Config, e export) *mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mounts == nil {
		d.mounts = map[xapi.UUID]*mount{}
	}
	m := d.mounts[c.SR]
	if m == nil {
		m = &mount{gate: newGate(name(c, e), e.limit()), uuid: c.SR, turn: make(chan struct{}, 1)}
		d.mounts[c.SR] = m
	}
	return m
}

// name is how errors call the SR: by name-label, uuid and place.
func name(c sr.Config, e export) func() string {
	return func() string {
		label := ""
		if c.Name != nil {
			label = c.Name()
		}
		if label == "" {
			return fmt.Sprintf("SR %s (nfs %s)", c.SR, e.source())
		}
		return fmt.Sprintf("SR %q (%s, nfs %s)", label, c.SR, e.source())
	}
}

// take waits for the turn, at most as long as a call may take.
func (m *mount) take(ctx context.Context) error {
	t := time.NewTimer(m.patience())
	defer t.Stop()
	select {
	case m.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return m.silent("mount", "it is being mounted or unmounted by another call")
	}
}

// mount mounts the export. It runs behind the gate.
func (m *mount) mount(ctx context.Context) error {
	server, client, err := m.reach(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(m.target), 0o700); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if there, err := m.leftOver(ctx); there || err != nil {
		return err
	}
	if err := os.Mkdir(m.target, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make mount point: %w", err)
	}
	what := dom0.Mount{Source: m.export.source(), Target: m.target, Type: "nfs4", NoExec: true, Options: m.export.mountOptions("softerr", server, client)}
	err = m.dom0.Mount(ctx, what)
	if errors.Is(err, unix.EINVAL) {
		what.Options = m.export.mountOptions("soft", server, client)
		err = m.dom0.Mount(ctx, what)
	}
	if err != nil {
		os.Remove(m.target)
		return explainMount(err)
	}
	if ctx.Err() == nil {
		return nil
	}
	// Too late: nobody waits any more.
	return errors.Join(context.Cause(ctx), m.dom0.Unmount(context.WithoutCancel(ctx), m.target))
}

// reach looks up the server and connects to it once: a server that is not
// there is told at once, and the kernel's own attempts are not waited for.
func (m *mount) reach(ctx context.Context) (server, client netip.Addr, err error) {
	ctx, cancel := context.WithTimeout(ctx, reachLimit)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(m.export.server, strconv.Itoa(m.export.port)))
	if err != nil {
		return server, client, fmt.Errorf("the server cannot be reached: %w", err)
	}
	defer conn.Close()
	remote, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return server, client, err
	}
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	return remote.Addr().Unmap(), local.Addr().Unmap(), err
}

// leftOver deals with a mount that another process of this host left: it is
// unmounted, so that it has today's options; one that is in use and of the same
// export is taken over.
func (m *mount) leftOver(ctx context.Context) (takenOver bool, err error) {
	there, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(m.target))
	if err != nil || len(there) == 0 {
		return false, err
	}
	err = m.dom0.Unmount(ctx, m.target)
	if errors.Is(err, unix.EBUSY) && there[0].FSType == "nfs4" && there[0].Source == m.export.source() {
		return true, nil
	}
	return false, err
}

// explainMount says what an error of mount(2) means here.
func explainMount(err error) error {
	for errno, text := range map[unix.Errno]string{
		unix.ENOENT:          "the server exports no such path",
		unix.EACCES:          "the server does not export that path to this host",
		unix.EPERM:           "the server does not export that path to this host",
		unix.EPROTONOSUPPORT: "the server does not speak this version of NFS",
		unix.ENODEV:          "this kernel has no NFS client (module nfsv4)",
	} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%s: %w", text, err)
		}
	}
	return err
}

// leave lets go of the mount after a call that ended with err.
func (m *mount) leave(ctx context.Context, err error) error {
	_, cerr := m.close(context.WithoutCancel(ctx))
	return errors.Join(err, cerr)
}

// close lets go of the mount; the last one unmounts. Unless gone it is as before.
func (m *mount) close(ctx context.Context) (gone bool, err error) {
	if err := m.take(ctx); err != nil {
		return false, err
	}
	defer func() { <-m.turn }()
	if m.users > 1 {
		m.users--
		return true, nil
	}
	if !m.hung() {
		err = m.do(ctx, "unmount", func(ctx context.Context) error { return m.dom0.Unmount(ctx, m.target) })
	}
	if m.hung() {
		err = m.force(ctx)
	}
	if err != nil && m.mounted() {
		return false, err
	}
	m.users--
	os.Remove(m.target) // nothing is mounted there: this folder is ours and empty
	return true, err
}

func (m *mount) mounted() bool {
	there, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(m.target))
	return err != nil || len(there) > 0
}

// forcer is a Dom0 that can also unmount what does not answer.
type forcer interface {
	ForceUnmount(ctx context.Context, target string) error
}

// force takes the mount away from a server that does not answer and tells so.
func (m *mount) force(ctx context.Context) error {
	f, ok := m.dom0.(forcer)
	if !ok {
		return m.refuse("unmount")
	}
	done := make(chan error, 1)
	go func() { done <- f.ForceUnmount(context.WithoutCancel(ctx), m.target) }() // ends as the calls it breaks off
	t := time.NewTimer(m.patience())
	defer t.Stop()
	select {
	case err := <-done:
		if err != nil {
			return m.worded(ctx, "unmount by force", err)
		}
	case <-t.C:
	}
	if m.mounted() {
		return m.silent("unmount by force", fmt.Sprintf("not within %s", m.patience()))
	}
	return m.silent("unmount", "it was unmounted by force; what was not written yet is lost")
}

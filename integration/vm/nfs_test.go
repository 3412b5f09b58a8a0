//go:build vm

package vm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/nfs"
	"github.com/patchd/patchd/pkg/sr/srtest"
	"github.com/patchd/patchd/pkg/xapi"
)

// server is where the guest's own NFS server listens: an address of its own,
// so that it can be cut off alone.
const server = "10.77.0.1"

// bringUp makes the server ready once in a run.
var bringUp = sync.OnceValue(func() error {
	for _, line := range []string{
		"mkdir -p /var/lib/nfs/rpc_pipefs /var/lib/nfs/nfsdcltrack",
		"mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs",
		"mount -t nfsd nfsd /proc/fs/nfsd",
		"ip link add nfs0 type dummy", "ip addr add " + server + "/24 dev nfs0", "ip link set nfs0 up",
		// Clients of a server that came back wait for the end of its grace period.
		"sh -c 'echo 10 >/proc/fs/nfsd/nfsv4gracetime; echo 10 >/proc/fs/nfsd/nfsv4leasetime'",
		"rpc.mountd -N 2 -N 3", "rpc.nfsd -N 3 -U 4",
	} {
		if err := shell(line); err != nil {
			return err
		}
	}
	return nil
})

var exports = 0

// exported makes a filesystem by mkfs on a fresh disk and exports it.
func exported(t *testing.T, size int64, options string, mkfs ...string) string {
	t.Helper()
	must(t, bringUp())
	dev := disk(t, size)
	run(t, append(mkfs, dev)...)
	exports++
	dir := fmt.Sprintf("/srv/export%d", exports)
	must(t, os.MkdirAll(dir, 0o755))
	run(t, "mount", dev, dir)
	at := "*:" + dir
	run(t, "exportfs", "-o", fmt.Sprintf("rw,insecure,no_subtree_check,fsid=%d,%s", exports, options), at)
	t.Cleanup(func() {
		run(t, "exportfs", "-u", at)
		if shell("exportfs -f; umount "+dir) != nil {
			// The server keeps what a client had open that it lost sight of.
			run(t, "sh", "-c", "rpc.nfsd 0; umount "+dir+"; status=$?; rpc.nfsd -N 3 -U 4; exit $status")
		}
	})
	return dir
}

// The time-outs of the mounts: one that is passed in no test but those about a
// silent server, where it is to be short.
const (
	patient = "timeo=150,retrans=2"
	hasty   = "timeo=20,retrans=1"
)

// nfsSR is an SR, not made yet, on an export.
func nfsSR(t *testing.T, path, options string) (sr.Driver, sr.Config) {
	t.Helper()
	return &nfs.Driver{}, sr.Config{
		SR: xapi.NewUUID(), Dom0: system(t), MountDir: t.TempDir(), Name: func() string { return "the shared one" },
		Device: map[string]string{"server": server, "serverpath": path, "options": options},
	}
}

var (
	xfs  = []string{"mkfs.xfs", "-q"}
	ext4 = []string{"mkfs.ext4", "-q", "-F"}
)

// TestNFS runs the whole conformance suite on exports of a filesystem that
// clones and of one that does not.
func TestNFS(t *testing.T) {
	sequences(t, "10", "30")
	for name, fs := range map[string]struct {
		mkfs   []string
		clones bool
	}{"xfs": {xfs, true}, "ext4": {ext4, false}} {
		t.Run(name, func(t *testing.T) {
			dir := exported(t, 1<<30, "no_root_squash", fs.mkfs...)
			srtest.Run(t, srtest.Suite{
				Quick: !fs.clones,
				New:   func(t *testing.T) (sr.Driver, sr.Config) { return nfsSR(t, dir, patient) },
				Small: func(t *testing.T) (sr.Driver, sr.Config) {
					return nfsSR(t, exported(t, 40<<20, "no_root_squash", ext4...), patient)
				},
				Hostile: []map[string]string{{"server": server}, {"server": "a,b", "serverpath": "/x"}, {"server": server, "serverpath": "x"}},
			})
			d, c := nfsSR(t, dir, patient)
			must(t, d.Create(t.Context(), c))
			r, err := d.Attach(t.Context(), c)
			must(t, err)
			if got := sr.Has(r.Features(), sr.VDIClone); got != fs.clones {
				t.Errorf("VDI_CLONE over %s is %v, want %v", name, got, fs.clones)
			}
			must(t, r.Detach(t.Context()))
			must(t, d.Destroy(t.Context(), c))
			if out := run(t, "sh", "-c", "grep -c "+string(c.SR)+" /proc/mounts || true"); out != "0" {
				t.Errorf("%s mounts of the SR are left", out)
			}
		})
	}
}

// TestNFSRefusals: what is wrong with server or export is told in words.
func TestNFSRefusals(t *testing.T) {
	squashed := exported(t, 200<<20, "root_squash", ext4...)
	for name, c := range map[string]struct{ server, path, want string }{
		"root is squashed":  {server, squashed, "no_root_squash"},
		"no such export":    {server, "/no/such/export", "exports no such path"},
		"no such host name": {"no-such-host.invalid", squashed, "cannot be reached"},
	} {
		d, conf := nfsSR(t, c.path, patient)
		conf.Device["server"] = c.server
		err := d.Create(t.Context(), conf)
		if !xapi.Is(err, xapi.SRBackendFailure) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), string(conf.SR)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// silence is a way in which a server can go away.
type silence struct {
	name       string
	away, back []string
}

var silences = []silence{
	{"stopped", []string{"rpc.nfsd 0"}, []string{"rpc.nfsd -N 3 -U 4"}},
	{"cut off", []string{
		"nft add table inet cut", "nft add chain inet cut in '{ type filter hook input priority 0; }'",
		"nft add rule inet cut in ip daddr " + server + " tcp dport 2049 drop", "nft add rule inet cut in ip saddr " + server + " tcp sport 2049 drop",
	}, []string{"nft delete table inet cut"}},
}

// TestNFSServerIsSilent: every call ends in time with the name of the SR, the
// next ones at once, another SR works on, and all is well when the server is back.
func TestNFSServerIsSilent(t *testing.T) {
	for _, s := range silences {
		t.Run(s.name, func(t *testing.T) {
			d, c := nfsSR(t, exported(t, 400<<20, "no_root_squash", xfs...), hasty)
			must(t, d.Create(t.Context(), c))
			r, err := d.Attach(t.Context(), c)
			must(t, err)
			n := sr.Live(xapi.NewUUID())
			_, err = r.Create(t.Context(), n, 1<<20)
			must(t, err)
			open, err := r.Open(t.Context(), n, sr.ReadWrite)
			must(t, err)
			defer open.Close()

			for _, line := range s.away {
				must(t, shell(line))
			}
			back := sync.OnceFunc(func() {
				for _, line := range s.back {
					must(t, shell(line))
				}
			})
			defer back()
			const limit = 7 * time.Second // timeo × (1 + retrans), and 3 s
			calls := map[string]func() error{
				"stat":    func() error { _, err := r.Stat(t.Context()); return err },
				"scan":    func() error { _, err := r.Scan(t.Context()); return err },
				"create":  func() error { _, err := r.Create(t.Context(), sr.Live(xapi.NewUUID()), 1<<20); return err },
				"open":    func() error { _, err := r.Open(t.Context(), n, sr.ReadOnly); return err },
				"destroy": func() error { return r.Destroy(t.Context(), sr.Live(xapi.NewUUID())) },
			}
			for verb, f := range calls {
				var err error
				took := within(t, verb, limit+5*time.Second, func() { err = f() })
				t.Logf("%s: %s: %v", verb, took.Round(time.Millisecond), err)
				if !xapi.Is(err, xapi.SRBackendFailure) || !strings.Contains(err.Error(), `SR "the shared one" (`+string(c.SR)) {
					t.Errorf("%s of a silent server: %v", verb, err)
				}
			}
			var werr error
			took := within(t, "write", time.Minute, func() {
				_, err := open.WriteAt(make([]byte, 4096), 0)
				werr = errors.Join(err, open.Sync())
			})
			t.Logf("write and sync: %s: %v", took.Round(time.Millisecond), werr)
			if werr == nil {
				t.Error("a write to a silent server was synced")
			}
			_, again := (&nfs.Driver{}).Attach(t.Context(), c)
			if !xapi.Is(again, xapi.SRBackendFailure) {
				t.Errorf("attach: %v", again)
			}

			back()
			eventually(t, "the SR working again", func() error { _, err := r.Scan(t.Context()); return err })
			open.Close() // what could not be written is told once more
			must(t, r.Destroy(t.Context(), n))
			must(t, r.Detach(t.Context()))
			must(t, d.Destroy(t.Context(), c))
		})
	}
}

// TestNFSDetachOfASilentServer ends in time and leaves no mount.
func TestNFSDetachOfASilentServer(t *testing.T) {
	d, c := nfsSR(t, exported(t, 400<<20, "no_root_squash", xfs...), hasty)
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	for _, line := range silences[1].away {
		must(t, shell(line))
	}
	_, err = r.Scan(t.Context())
	t.Logf("scan: %v", err)
	took := within(t, "detach", 30*time.Second, func() { err = r.Detach(t.Context()) })
	t.Logf("detach: %s: %v", took.Round(time.Millisecond), err)
	if mounts, _ := os.ReadFile("/proc/mounts"); strings.Contains(string(mounts), filepath.Join(c.MountDir, string(c.SR))) {
		t.Error("it is still mounted")
	}
	for _, line := range silences[1].back {
		must(t, shell(line))
	}
	eventually(t, "attaching again", func() error { r, err = d.Attach(t.Context(), c); return err })
	must(t, r.Detach(t.Context()))
}

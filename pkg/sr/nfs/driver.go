package nfs

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/xapi"
)

var info = sr.Info{
	Type:        "nfs",
	Label:       "NFS",
	Description: "Disk images as raw sparse files on an NFS 4.2 or 4.1 export, shared by many hosts; clones where the server does",
	Vendor:      "patchd",
	Copyright:   "The patchd authors",
	Version:     "1.0",
	Config: map[string]string{
		keyServer:  "host name or address of the server (required)",
		keyPath:    "absolute path of the export (required)",
		keyVersion: "4.2, or 4.1 for a server that has no 4.2 (4.2)",
		keyOptions: "further mount options, separated by commas: " + optionsKnown + " (timeo=40,retrans=2)",
	},
	Required: []string{keyServer, keyPath},
	Features: []sr.Feature{sr.VDICreate, sr.VDIDelete, sr.VDIResize, sr.VDIIntro, sr.SRProbe, sr.SRUpdate},
	Shared:   true,
}

// Driver keeps VDIs as files on NFS exports. It knows what is mounted by this
// process: use one value for all. Its zero value is ready.
type Driver struct {
	mu     sync.Mutex
	mounts map[xapi.UUID]*mount
}

var _ sr.Driver = (*Driver)(nil)

// Info describes the driver.
func (*Driver) Info() sr.Info { return info }

type probeResult struct {
	XMLName xml.Name   `xml:"SRlist"`
	SRs     []probedSR `xml:"SR"`
}

type probedSR struct {
	UUID   string `xml:"UUID"`
	Server string `xml:"Server"`
	Path   string `xml:"ServerPath"`
}

// maxProbed is how many SRs of one export are listed.
const maxProbed = 256

// Probe mounts the export and lists the SRs on it.
func (d *Driver) Probe(ctx context.Context, c sr.Config) (string, error) {
	if c.SR == "" {
		c.SR = xapi.NewUUID() // one can look at an export without knowing whose it is
	}
	m, err := d.open(ctx, c)
	if err != nil {
		return "", err
	}
	found, err := call(ctx, m.gate, "probe", func(ctx context.Context) ([]probedSR, error) { return m.find(ctx) }, nil)
	if err = m.leave(ctx, err); err != nil {
		return "", err
	}
	text, err := xml.Marshal(probeResult{SRs: found})
	if err != nil {
		return "", fmt.Errorf("write probe result: %w", err)
	}
	return xml.Header + string(text), nil
}

// find lists the folders of the export that are SRs.
func (m *mount) find(ctx context.Context) ([]probedSR, error) {
	dir, err := os.Open(m.target)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var found []probedSR
	for len(found) < maxProbed {
		names, err := dir.Readdirnames(256)
		if err != nil || len(names) == 0 {
			break
		}
		for _, name := range names {
			uuid := xapi.UUID(name)
			if err := sr.Alive(ctx); err != nil {
				return nil, err
			}
			if uuid.Valid() && isSR(filepath.Join(m.target, name), uuid) {
				found = append(found, probedSR{name, m.export.server, m.export.path})
			}
		}
	}
	return found, nil
}

// isSR tells whether the folder carries the marker of that SR.
func isSR(folder string, uuid xapi.UUID) bool {
	r, err := file.Inside(folder, sr.Config{SR: uuid}, nil)
	if err != nil {
		return false
	}
	r.Detach(context.Background())
	return true
}

// Create makes the SR's folder on the export.
func (d *Driver) Create(ctx context.Context, c sr.Config) error {
	m, err := d.open(ctx, c)
	if err != nil {
		return sr.Untouched(err)
	}
	err = m.do(ctx, "create", func(context.Context) error { return m.makeFolder() })
	return m.leave(ctx, err)
}

func (m *mount) folder() string { return filepath.Join(m.target, string(m.uuid)) }

// makeFolder makes the SR. The server must let root be root: else whoever is
// nobody on any host could replace a golden image.
func (m *mount) makeFolder() error {
	path := m.folder()
	err := os.Mkdir(path, 0o700)
	made := err == nil
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return squashed(err)
	case err != nil && !errors.Is(err, os.ErrExist):
		return fmt.Errorf("make the folder of the SR: %w", err)
	}
	fi, err := os.Lstat(path)
	if err == nil {
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() && st.Uid != 0 {
			err = squashed(fmt.Errorf("what this host makes belongs to user %d", st.Uid))
		}
	}
	if err == nil {
		err = file.Make(path, m.uuid)
	}
	if err != nil && made {
		return errors.Join(err, os.Remove(path))
	}
	return err
}

func squashed(cause error) error {
	return fmt.Errorf("the server does not let root write: export with rw,no_root_squash to the hosts of the pool: %w", cause)
}

// Attach mounts the export and opens the SR on it.
func (d *Driver) Attach(ctx context.Context, c sr.Config) (sr.Repository, error) {
	m, err := d.open(ctx, c)
	if err != nil {
		return nil, err
	}
	inner, err := m.inside(ctx, c)
	if err != nil {
		return nil, m.leave(ctx, err)
	}
	return &repository{config: c, inner: inner, mount: m}, nil
}

// inside opens the SR's folder on the export.
func (m *mount) inside(ctx context.Context, c sr.Config) (sr.Repository, error) {
	return call(ctx, m.gate, "attach", func(context.Context) (sr.Repository, error) {
		return file.Inside(m.folder(), c, nil)
	}, func(late sr.Repository) { late.Detach(context.Background()) })
}

// Destroy removes the SR's folder when no volume is in it.
func (d *Driver) Destroy(ctx context.Context, c sr.Config) error {
	m, err := d.open(ctx, c)
	if err != nil {
		return err
	}
	err = m.do(ctx, "destroy", func(ctx context.Context) error {
		return (&file.Driver{}).Destroy(ctx, sr.Config{SR: c.SR, Device: map[string]string{"location": m.folder()}})
	})
	return m.leave(ctx, err)
}

package file

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

var info = sr.Info{
	Type:        "file",
	Label:       "Folder",
	Description: "Disk images as raw sparse files in a folder of a mounted filesystem; clones where the filesystem does (xfs, btrfs)",
	Vendor:      "patchd",
	Copyright:   "The patchd authors",
	Version:     "1.0",
	Config:      map[string]string{keyLocation: "absolute path of the folder, without symbolic links (required)"},
	Required:    []string{keyLocation},
	Features:    []sr.Feature{sr.VDICreate, sr.VDIDelete, sr.VDIResize, sr.VDIIntro, sr.SRProbe, sr.SRUpdate},
	Shared:      true,
}

// Driver keeps VDIs as files in a folder. Its zero value is ready.
type Driver struct{}

var _ sr.Driver = (*Driver)(nil)

// Info describes the driver.
func (*Driver) Info() sr.Info { return info }

type probeResult struct {
	XMLName xml.Name   `xml:"SRlist"`
	SRs     []probedSR `xml:"SR"`
}

type probedSR struct {
	UUID     string `xml:"UUID"`
	Location string `xml:"Location"`
	Size     int64  `xml:"PhysicalSize"`
	Free     int64  `xml:"Free"`
}

// Probe lists the SR in the folder, if there is one.
func (*Driver) Probe(ctx context.Context, c sr.Config) (string, error) {
	if err := sr.Alive(ctx); err != nil {
		return "", err
	}
	if c.SR == "" {
		c.SR = xapi.NewUUID() // one can look at a folder without knowing whose it is
	}
	path, err := location(c)
	if err != nil {
		return "", err
	}
	var result probeResult
	switch found, err := probe(path, c); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return "", sr.BackendFailure("probe %s: %w", path, err)
	case found.UUID != "":
		result.SRs = append(result.SRs, found)
	}
	text, err := xml.Marshal(result)
	if err != nil {
		return "", fmt.Errorf("write probe result: %w", err)
	}
	return xml.Header + string(text), nil
}

func probe(path string, c sr.Config) (probedSR, error) {
	folder, err := openFolder(path)
	if err != nil {
		return probedSR{}, err
	}
	defer folder.Close()
	uuid, err := readMarker(folder)
	if err != nil || uuid == "" {
		return probedSR{}, err
	}
	s, err := room(folder, c.KeepFree)
	return probedSR{string(uuid), path, s.PhysicalSize, s.Free}, err
}

// Create makes the folder an SR. It must be empty, or absent in an existing
// folder; lost+found does not count.
func (*Driver) Create(ctx context.Context, c sr.Config) error {
	if err := sr.Alive(ctx); err != nil {
		return err
	}
	path, err := location(c)
	if err != nil {
		return err
	}
	if err := create(path, c.SR); err != nil {
		return coded(err, "create an SR in %s", path)
	}
	return nil
}

func create(path string, uuid xapi.UUID) error {
	folder, err := makeFolder(path)
	if err != nil {
		return err
	}
	defer folder.Close()
	if err := checkOwner(folder); err != nil {
		return err
	}
	found, err := readMarker(folder)
	switch {
	case err != nil:
		return inUse(err)
	case found == uuid:
		return nil
	case found != "":
		return inUse(fmt.Errorf("%s is SR %s. Introduce that SR, or name another folder", path, found))
	}
	foreign, err := anything(folder)
	if err != nil {
		return err
	}
	if foreign != "" {
		return inUse(fmt.Errorf("%s is not empty: there is %q. Name an empty folder, or one that is not there yet", path, foreign))
	}
	err = writeMarker(folder, uuid)
	if errors.Is(err, os.ErrExist) {
		return inUse(err)
	}
	return err
}

func inUse(err error) error { return xapi.NewError(xapi.SRDeviceInUse, err.Error()).Because(err) }

// Attach opens the SR in the folder and tries out whether it clones.
func (*Driver) Attach(ctx context.Context, c sr.Config) (sr.Repository, error) {
	if err := sr.Alive(ctx); err != nil {
		return nil, err
	}
	path, err := location(c)
	if err != nil {
		return nil, err
	}
	r, err := attach(path, c, nil)
	if err != nil {
		return nil, coded(err, "attach the SR in %s", path)
	}
	return r, nil
}

func attach(path string, c sr.Config, release func(context.Context) error) (r *repository, err error) {
	folder, err := openFolder(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			folder.Close()
		}
	}()
	if err := checkOwner(folder); err != nil {
		return nil, err
	}
	found, err := readMarker(folder)
	switch {
	case err != nil:
		return nil, err
	case found == "":
		return nil, fmt.Errorf("there is no SR: no file %s (is its filesystem mounted?)", markerName)
	case found != c.SR:
		return nil, fmt.Errorf("it holds SR %s, not %s", found, c.SR)
	}
	features := info.Features
	clones, err := clonesHere(folder)
	if err != nil {
		return nil, err
	}
	if clones {
		features = append([]sr.Feature{sr.VDIClone, sr.VDISnapshot}, features...)
	}
	return &repository{folder: folder, uuid: c.SR, features: features, keepFree: c.KeepFree, release: release}, nil
}

// Destroy takes the marker and, when nothing foreign is in it, the folder away.
func (*Driver) Destroy(ctx context.Context, c sr.Config) error {
	if err := sr.Alive(ctx); err != nil {
		return err
	}
	path, err := location(c)
	if err != nil {
		return err
	}
	if err := destroy(ctx, path, c.SR); err != nil {
		return coded(err, "destroy the SR in %s", path)
	}
	return nil
}

func destroy(ctx context.Context, path string, uuid xapi.UUID) error {
	folder, err := openFolder(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer folder.Close()
	found, err := readMarker(folder)
	if errors.Is(err, errUnknownMarker) || (err == nil && found != uuid) {
		return nil // what is there is not this SR
	}
	if err != nil {
		return err
	}
	volumes, err := scan(ctx, folder)
	if err != nil {
		return err
	}
	if len(volumes) > 0 {
		return xapi.NewError(xapi.SRNotEmpty).Because(fmt.Errorf("%s holds volume %s", path, volumes[0].Name))
	}
	if err := unlink(folder, markerName, durable); err != nil {
		return err
	}
	return removeFolder(path)
}

// removeFolder removes an empty folder; one with foreign files in it, or with
// a filesystem mounted on it, stays.
func removeFolder(path string) error {
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.Close()
	err = unix.Unlinkat(int(parent.Fd()), filepath.Base(path), unix.AT_REMOVEDIR)
	for _, stays := range []error{unix.ENOTEMPTY, unix.EEXIST, unix.EBUSY, unix.EROFS, unix.EPERM, unix.EACCES} {
		if errors.Is(err, stays) {
			return nil
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove folder %s: %w", path, err)
	}
	return parent.Sync()
}

// anything gives the name of something in folder that is not lost+found.
func anything(folder *os.File) (string, error) {
	found := ""
	err := eachName(folder, func(name string) bool {
		if name != "lost+found" {
			found = name
		}
		return found == ""
	})
	return found, err
}

// coded gives err a code where it has none.
func coded(err error, format string, args ...any) error {
	var known *xapi.Error
	if errors.As(err, &known) {
		return err
	}
	what := fmt.Sprintf(format, args...)
	if sr.NoSpace(err) {
		return xapi.NewError(xapi.OutOfSpace, strings.TrimSpace(what)).Because(err)
	}
	return sr.BackendFailure("%s: %w", what, err)
}

package mounted

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// Kind is what one kind of filesystem differs in.
type Kind struct {
	// Info is the SM record; Config, Required and Features are filled in by New.
	Info sr.Info
	// Type is the filesystem as mount(2) names it.
	Type string
	// Tool makes it, Package is the Debian package that has the tool.
	Tool, Package string
	// Arguments of Tool for a filesystem of size bytes on a device, which
	// takes the place of what is there without asking and discards nothing.
	Arguments func(uuid xapi.UUID, size int64, device string) []string
	// MinSize is the smallest device, in bytes.
	MinSize int64
	// Options of the mount.
	Options string
	// ToolDirs are searched for Tool; New gives the usual ones.
	ToolDirs []string
	// Timeout bounds the run of Tool; New gives 10 minutes.
	Timeout time.Duration
}

// The keys of device_config.
const (
	keyDevice = "device"
	keySize   = "size"
)

// Driver keeps SRs in filesystems of one kind that it makes and mounts itself.
// It counts who has an SR attached in this process: use one value for all.
type Driver struct {
	kind Kind

	mu  sync.Mutex
	srs map[xapi.UUID]*plug
}

var _ sr.Driver = (*Driver)(nil)

// New gives the driver of a kind.
func New(k Kind) *Driver {
	k.Info.Config = map[string]string{
		keyDevice: "absolute path of a block device (/dev/…) or of an image file (required)",
		keySize:   `size of an image file that is not there yet and is to be made, in bytes or like "100GiB"; it takes room as it is filled`,
	}
	k.Info.Required = []string{keyDevice}
	k.Info.Features = []sr.Feature{sr.VDICreate, sr.VDIDelete, sr.VDIResize, sr.VDIIntro, sr.SRProbe, sr.SRUpdate}
	if k.ToolDirs == nil {
		k.ToolDirs = []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"}
	}
	if k.Timeout == 0 {
		k.Timeout = 10 * time.Minute
	}
	return &Driver{kind: k, srs: map[xapi.UUID]*plug{}}
}

// Info describes the driver.
func (d *Driver) Info() sr.Info { return d.kind.Info }

// plug is who has one SR attached in this process.
type plug struct {
	turn  chan struct{} // held by the call that works on the SR
	users int           // repositories that are attached; guarded by turn
	calls int           // that hold turn or wait for it; guarded by Driver.mu
}

// hold takes an SR for one call; release gives it free.
func (d *Driver) hold(ctx context.Context, uuid xapi.UUID) (p *plug, release func(), err error) {
	d.mu.Lock()
	p = d.srs[uuid]
	if p == nil {
		p = &plug{turn: make(chan struct{}, 1)}
		d.srs[uuid] = p
	}
	p.calls++
	d.mu.Unlock()
	leave := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if p.calls--; p.calls == 0 && p.users == 0 {
			delete(d.srs, uuid)
		}
	}
	select {
	case p.turn <- struct{}{}:
		return p, func() { <-p.turn; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, nil, context.Cause(ctx)
	}
}

type probeResult struct {
	XMLName xml.Name   `xml:"SRlist"`
	SRs     []probedSR `xml:"SR"`
}

type probedSR struct {
	UUID   string `xml:"UUID"`
	Device string `xml:"Device"`
	Type   string `xml:"Type"`
	Size   int64  `xml:"PhysicalSize"`
}

// Probe lists the SR on the device, if there is one of this kind.
func (d *Driver) Probe(ctx context.Context, c sr.Config) (string, error) {
	if err := sr.Alive(ctx); err != nil {
		return "", err
	}
	if c.SR == "" {
		c.SR = xapi.NewUUID() // one can look at a device without knowing whose it is
	}
	p, err := d.place(c)
	if err != nil {
		return "", err
	}
	var result probeResult
	found, err := p.examine(d.kind.Type)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return "", coded(err, c.SR, "probe %s", p.path)
	case found.sr != "" && found.made:
		result.SRs = append(result.SRs, probedSR{string(found.sr), p.given, d.kind.Info.Type, found.size})
	}
	text, err := xml.Marshal(result)
	if err != nil {
		return "", fmt.Errorf("write probe result: %w", err)
	}
	return xml.Header + string(text), nil
}

// coded gives err a code where it has none, and the SR and the place in its text.
func coded(err error, uuid xapi.UUID, format string, args ...any) error {
	var known *xapi.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	what := fmt.Sprintf(format, args...)
	if sr.NoSpace(err) {
		return xapi.NewError(xapi.OutOfSpace, strings.TrimSpace(what)).Because(err)
	}
	return sr.BackendFailure("SR %s: %s: %w", uuid, what, err)
}

// inUse refuses a device that something is on, and says how to get it free.
func inUse(format string, args ...any) error {
	return xapi.NewError(xapi.SRDeviceInUse, fmt.Sprintf(format, args...))
}

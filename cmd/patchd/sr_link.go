package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/xapi"
)

// srFlags say what an SR is and where it lies.
type srFlags struct {
	name, typ, description, host string
	device                       []string
	shared                       bool
}

func (s *srFlags) register(g *global, cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.name, "name", "", "name of the SR")
	f.StringVar(&s.typ, "type", "file", "kind of storage: file, ext, xfs, btrfs, nfs or lvm")
	f.StringVar(&s.description, "description", "", "description")
	f.StringVar(&s.host, "host", "", "host it is on; not needed where there is one")
	f.StringSliceVar(&s.device, "device-config", nil, "key=value of the driver; for file: location=FOLDER, for ext, xfs, btrfs and lvm: device=PATH, for nfs: server=HOST,serverpath=PATH")
	f.BoolVar(&s.shared, "shared", false, "other hosts may plug it too (file, nfs)")
	g.completeFlag(cmd, "host", "host")
	completeWords(cmd, "type", "file", "ext", "xfs", "btrfs", "nfs", "lvm")
}

// config is the device_config.
func (s *srFlags) config() (map[string]string, error) {
	if s.name == "" {
		return nil, usagef("--name is needed")
	}
	config := map[string]string{}
	for _, d := range s.device {
		k, v, ok := strings.Cut(d, "=")
		if !ok {
			return nil, usagef("--device-config: %q is not key=value", d)
		}
		config[k] = v
	}
	return config, nil
}

// newSRIntroduce is introduce, plug and scan in one, as after a restore.
func newSRIntroduce(g *global) *cobra.Command {
	var s srFlags
	cmd := &cobra.Command{
		Use: "introduce", Short: "take up an SR that is there, with the disk images in it", Args: cobra.NoArgs,
		Long: "Gives an SR that was forgotten, or made by another pool, a record, links the host to it, plugs it, and\n" +
			"gives records to the disk images in it. With --name of an SR that the pool knows and no host is\n" +
			"linked to, the host is linked to that one. Nothing on the storage is changed. Prints the SR's uuid.",
		Example: "  patchd sr introduce --name fast --type xfs --device-config device=/dev/disk/by-id/…",
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := s.config()
			if err != nil {
				return err
			}
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				uuid, err := s.introduce(ctx, c, config)
				if err != nil {
					return fmt.Errorf("introduce SR %s: %w", s.name, explain(ctx, c, err))
				}
				return g.printText("uuid", string(uuid))
			})
		},
	}
	s.register(g, cmd)
	return cmd
}

// newSRForget unplugs an SR and drops its records.
func newSRForget(g *global) *cobra.Command {
	cmd := objectCommand(g, "SR", "forget SR", "unplug an SR and drop its records; its disk images stay on disk", g.forgetSR)
	cmd.Long = "Unplugs an SR and drops its records and those of its disk images; on the storage everything stays. After\n" +
		"`patchd sr introduce` the disk images are plain ones: patches in them must be uploaded again."
	return cmd
}

func (s *srFlags) introduce(ctx context.Context, c *client, config map[string]string) (uuid xapi.UUID, err error) {
	host, _, err := c.hostOrOnly(ctx, s.host)
	if err != nil {
		return "", err
	}
	if uuid, err = c.probe(ctx, host, config, s.typ); err != nil {
		return "", err
	}
	var ref, pbd string
	known := c.call(ctx, &ref, "SR.get_by_uuid", uuid) == nil
	if !known {
		err := c.call(ctx, &ref, "SR.introduce", uuid, s.name, s.description, s.typ, "user", s.shared, map[string]string{})
		if err != nil {
			return "", err
		}
	}
	err = c.call(ctx, &pbd, "PBD.create", map[string]any{"host": host, "SR": ref, "device_config": config})
	if err == nil {
		if err = c.call(ctx, nil, "PBD.plug", pbd); err != nil {
			err = errors.Join(err, c.call(ctx, nil, "PBD.destroy", pbd))
		}
	}
	switch {
	case err == nil:
		_, err = c.async(ctx, "scan", "SR.scan", ref)
	case !known:
		err = errors.Join(err, c.call(ctx, nil, "SR.forget", ref))
	}
	return uuid, err
}

// probe tells which SR lies at a place.
func (c *client) probe(ctx context.Context, host string, config map[string]string, typ string) (xapi.UUID, error) {
	var text string
	if err := c.call(ctx, &text, "SR.probe", host, config, typ, map[string]string{}); err != nil {
		return "", err
	}
	var list struct {
		SRs []struct {
			UUID xapi.UUID `xml:"UUID"`
		} `xml:"SR"`
	}
	if err := xml.Unmarshal([]byte(text), &list); err != nil {
		return "", fmt.Errorf("answer of SR.probe: %w", err)
	}
	switch len(list.SRs) {
	case 0:
		return "", errors.New("no SR is there: `patchd sr create` makes one")
	case 1:
		return list.SRs[0].UUID, nil
	}
	return "", fmt.Errorf("%d SRs are there: `xe sr-introduce` takes a uuid", len(list.SRs))
}

// newSRPlug is plug or unplug: method, and what it is called when it is done.
func newSRPlug(g *global, verb, done, short, method string) *cobra.Command {
	var host string
	cmd := objectCommand(g, "SR", verb+" SR", short, func(ctx context.Context, c *client, ref string, rec record) error {
		only := ""
		if host != "" {
			var err error
			if only, _, err = c.find(ctx, "host", host); err != nil {
				return err
			}
		}
		return g.linked(ctx, c, ref, rec, only, method, done)
	})
	cmd.Flags().StringVar(&host, "host", "", "only on this host; default: on every host that is linked to it")
	g.completeFlag(cmd, "host", "host")
	return cmd
}

// linked calls method for the PBDs of an SR, of one host or of all.
func (g *global) linked(ctx context.Context, c *client, ref string, rec record, host, method, done string) error {
	pbds, err := c.all(ctx, "PBD")
	if err != nil {
		return err
	}
	any := false
	for pbd, p := range pbds {
		if p.text("SR") != ref || host != "" && p.text("host") != host {
			continue
		}
		if err := c.call(ctx, nil, method, pbd); err != nil {
			return err
		}
		any = true
	}
	if !any {
		return errors.New("no host is linked to it: `patchd sr introduce` links one")
	}
	return g.done(done, "SR", rec)
}

func (g *global) forgetSR(ctx context.Context, c *client, ref string, rec record) error {
	if err := c.unplugAll(ctx, rec); err != nil {
		return err
	}
	if err := c.call(ctx, nil, "SR.forget", ref); err != nil {
		return err
	}
	return g.done("forgotten", "SR", rec)
}

func (c *client) unplugAll(ctx context.Context, sr record) error {
	pbds, _ := sr["PBDs"].([]any)
	for _, p := range pbds {
		if err := c.call(ctx, nil, "PBD.unplug", p); err != nil {
			return err
		}
	}
	return nil
}

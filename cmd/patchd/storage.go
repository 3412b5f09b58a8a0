package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/xapi"
)

func newSR(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "sr", Short: "storage repositories"}
	cmd.AddCommand(
		newSRCreate(g),
		&cobra.Command{
			Use: "list", Short: "list the SRs", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return g.with(cmd.Context(), g.listSRs) },
		},
		objectCommand(g, "SR", "show UUID|NAME", "show one SR: where it lies, its room, and what it can do", g.showSR),
		objectCommand(g, "SR", "scan SR", "look for disk images that have no record", func(ctx context.Context, c *client, ref string, rec record) error {
			if _, err := c.async(ctx, "scan", "SR.scan", ref); err != nil {
				return err
			}
			return g.done("scanned", "SR", rec)
		}),
		newSRIntroduce(g),
		newSRPlug(g, "plug", "plugged", "mount or open an SR, so that it can be used", "PBD.plug"),
		newSRPlug(g, "unplug", "unplugged", "let go of an SR that nothing uses; it stays on disk", "PBD.unplug"),
		newSRForget(g),
		objectCommand(g, "SR", "destroy SR", "remove an SR that holds no disk image", g.destroySR),
		objectCommand(g, "SR", "set-default SR", "make an SR the one that patches are put on", func(ctx context.Context, c *client, ref string, rec record) error {
			pools, err := c.all(ctx, "pool")
			if err != nil {
				return err
			}
			for pool := range pools {
				if err := c.call(ctx, nil, "pool.set_default_SR", pool, ref); err != nil {
					return err
				}
			}
			return g.done("now the default", "SR", rec)
		}),
	)
	return cmd
}

func (g *global) listSRs(ctx context.Context, c *client) error {
	all, err := c.all(ctx, "SR")
	if err != nil {
		return err
	}
	pools, err := c.all(ctx, "pool")
	if err != nil {
		return err
	}
	pbds, err := c.all(ctx, "PBD")
	if err != nil {
		return err
	}
	plugged := map[string]bool{}
	for _, p := range pbds {
		if on, _ := p["currently_attached"].(bool); on {
			plugged[p.text("SR")] = true
		}
	}
	for ref, rec := range all {
		rec["plugged"], rec["default"] = plugged[ref], false
		for _, p := range pools {
			rec["default"] = p.text("default_SR") == ref
		}
	}
	return g.printRecords(os.Stdout, all, []column{
		field("UUID", "uuid"), field("NAME", "name_label"), field("TYPE", "type"), size("SIZE", "physical_size"),
		size("USED", "physical_utilisation"), field("PLUGGED", "plugged"), field("DEFAULT", "default"),
	})
}

func newSRCreate(g *global) *cobra.Command {
	var s srFlags
	cmd := &cobra.Command{
		Use: "create", Short: "make an SR and plug it", Args: cobra.NoArgs,
		Example: "  patchd sr create --name patches --device-config location=/srv/patches\n" +
			"  patchd sr create --name fast --type xfs --device-config device=/dev/disk/by-id/…\n" +
			"  patchd sr create --name fast --type xfs --device-config device=/srv/patches.img,size=100GiB\n" +
			"  patchd sr create --name thin --type lvm --device-config device=/dev/disk/by-id/…\n" +
			"  patchd sr create --name shared --type nfs --shared --device-config server=nas.example.com,serverpath=/srv/patches",
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := s.config()
			if err != nil {
				return err
			}
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				host, _, err := c.hostOrOnly(ctx, s.host)
				if err != nil {
					return err
				}
				ref, err := c.async(ctx, "create", "SR.create", host, config, "0", s.name, s.description, s.typ, "user", s.shared, map[string]string{})
				if err != nil {
					return fmt.Errorf("create SR %s: %w", s.name, explain(ctx, c, err))
				}
				var uuid string
				if err := c.call(ctx, &uuid, "SR.get_uuid", ref); err != nil {
					return err
				}
				return g.printText("uuid", uuid)
			})
		},
	}
	s.register(g, cmd)
	return cmd
}

// destroySR unplugs and destroys.
func (g *global) destroySR(ctx context.Context, c *client, ref string, rec record) error {
	if images, _ := rec["VDIs"].([]any); len(images) > 0 {
		return fmt.Errorf("it holds %d disk images: destroy them first (`patchd vdi list`)", len(images))
	}
	if err := c.unplugAll(ctx, rec); err != nil {
		return err
	}
	if err := c.call(ctx, nil, "SR.destroy", ref); err != nil {
		return err
	}
	return g.done("destroyed", "SR", rec)
}

func newVDI(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "vdi", Short: "disk images"}
	cmd.AddCommand(
		&cobra.Command{
			Use: "list", Short: "list the disk images", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return g.with(cmd.Context(), g.listVDIs) },
		},
		newVDIShow(g),
		newVDICopy(g), newVDIExport(g), newVDIImport(g),
		newVDIVerify(g),
		newVDIRepair(g),
		objectCommand(g, "VDI", "clone VDI", "clone a disk image inside its SR", func(ctx context.Context, c *client, ref string, _ record) error {
			return g.printNewVDI(ctx, c, "clone", "VDI.clone", ref, map[string]string{})
		}),
		objectCommand(g, "VDI", "destroy VDI", "remove a disk image; a patch in it keeps its record", func(ctx context.Context, c *client, ref string, rec record) error {
			if _, err := c.async(ctx, "destroy", "VDI.destroy", ref); err != nil {
				return err
			}
			return g.done("destroyed", "VDI", rec)
		}),
	)
	return cmd
}

func (g *global) listVDIs(ctx context.Context, c *client) error {
	all, err := c.all(ctx, "VDI")
	if err != nil {
		return err
	}
	if err := c.addNames(ctx, all); err != nil {
		return err
	}
	if err := c.addChecks(ctx, all); err != nil {
		return err
	}
	return g.printRecords(os.Stdout, all, []column{
		field("UUID", "uuid"), field("NAME", "name_label"), field("SR", "sr_name"), size("SIZE", "virtual_size"),
		size("USED", "physical_utilisation"), field("PATCH", "patch"), field("STATE", "state"),
	})
}

// addNames puts into the records of VDIs the name of the SR and of the patch.
func (c *client) addNames(ctx context.Context, all map[string]record) error {
	srs, err := c.all(ctx, "SR")
	if err != nil {
		return err
	}
	patches, err := c.all(ctx, "pool_patch")
	if err != nil {
		return err
	}
	owner := map[string]string{}
	for _, p := range patches {
		owner[p.text("VDI")] = p.text("name_label")
	}
	for ref, rec := range all {
		rec["sr_name"], rec["patch"] = srs[rec.text("SR")].text("name_label"), owner[ref]
	}
	return nil
}

func newVDICopy(g *global) *cobra.Command {
	var srName string
	cmd := objectCommand(g, "VDI", "copy VDI", "copy a disk image to an SR", func(ctx context.Context, c *client, ref string, rec record) error {
		target := rec.text("SR")
		if srName != "" {
			var err error
			if target, _, err = c.find(ctx, "SR", srName); err != nil {
				return err
			}
		}
		return g.printNewVDI(ctx, c, "copy", "VDI.copy", ref, target, string(xapi.NullRef), string(xapi.NullRef))
	})
	cmd.Flags().StringVar(&srName, "sr", "", "SR to copy to; default: the one it is on")
	g.completeFlag(cmd, "sr", "SR")
	return cmd
}

func (g *global) printNewVDI(ctx context.Context, c *client, name, method string, params ...any) error {
	ref, err := c.async(ctx, name, method, params...)
	if err != nil {
		return err
	}
	var uuid string
	if err := c.call(ctx, &uuid, "VDI.get_uuid", ref); err != nil {
		return err
	}
	return g.printText("uuid", uuid)
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

func newVDIVerify(g *global) *cobra.Command {
	cmd := objectCommand(g, "VDI", "verify VDI", "read a disk image and hold it against its block map", func(ctx context.Context, c *client, ref string, rec record) error {
		damage, err := c.async(ctx, "verify", "patchd.vdi_verify", ref)
		if err != nil {
			return err
		}
		if damage != "" {
			return errors.New("it is damaged: " + damage + ": `patchd vdi repair " + rec.text("uuid") + "` may help")
		}
		return g.done("good", "VDI", rec)
	})
	cmd.Long = "Reads every byte of a disk image that has a block map, as those of patches have, and compares. What is\n" +
		"found stays in the record; damage raises a message, and is an error here. The same is done in the\n" +
		"background, see scrub-interval."
	return cmd
}

func newVDIRepair(g *global) *cobra.Command {
	cmd := objectCommand(g, "VDI", "repair VDI", "mend a damaged disk image", func(ctx context.Context, c *client, ref string, rec record) error {
		if _, err := c.async(ctx, "repair", "patchd.vdi_repair", ref); err != nil {
			return err
		}
		return g.done("good", "VDI", rec)
	})
	cmd.Long = "Takes good blocks from other disk images of the SRs that are plugged: copies of this one, or any that\n" +
		"holds the same blocks; else from other hosts that have the patch. Nothing is written that was not\n" +
		"checked. Where nothing has the blocks, destroy the VDI and upload the patch again."
	return cmd
}

// addChecks puts into the records of VDIs what is known of their state: state
// (good, damaged, or never checked), checked and damage. Disk images without a block map
// have nothing there.
func (c *client) addChecks(ctx context.Context, all map[string]record) error {
	var checks []record
	if err := c.call(ctx, &checks, "patchd.vdi_checks"); err != nil {
		return err
	}
	for _, rec := range all {
		rec["checked"], rec["damage"], rec["state"] = "", "", ""
	}
	for _, k := range checks {
		rec, ok := all[k.text("VDI")]
		if !ok {
			continue
		}
		rec["checked"], rec["damage"], rec["state"] = k.text("checked"), k.text("damage"), "good"
		switch {
		case k.text("damage") != "":
			rec["state"] = "damaged"
		case k.text("checked") == "":
			rec["state"] = "never checked"
		}
	}
	return nil
}

// newVDIShow is the show of every class, with the state of the image.
func newVDIShow(g *global) *cobra.Command {
	cmd := showCommand(g, "VDI", "show one disk image")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
			ref, rec, err := c.find(ctx, "VDI", args[0])
			if err != nil {
				return err
			}
			one := map[string]record{ref: rec}
			if err := errors.Join(c.addNames(ctx, one), c.addChecks(ctx, one)); err != nil {
				return fmt.Errorf("state of the image: %w", err)
			}
			if at := rec.text("checked"); !g.json() && strings.TrimSpace(at) != "" {
				rec["checked"] = dateText(at)
			}
			return g.printRecord(os.Stdout, ref, rec)
		})
	}
	return cmd
}

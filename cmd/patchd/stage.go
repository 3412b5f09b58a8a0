package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
)

func newPatchStage(g *global) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "stage PATCH [HOST…]", Short: "move a patch to the storage of hosts ahead of time",
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: g.complete("pool_patch"),
		Long: "Makes a copy of a patch's disk image on the storage of each host that does not reach it, from blocks of\n" +
			"all hosts that have some. An apply does that itself; done before, it does not have to wait for it. Such a\n" +
			"copy goes with the patch.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 1) {
				return usagef("name the hosts, or say --all")
			}
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				ref, rec, err := c.find(ctx, "pool_patch", args[0])
				if err != nil {
					return err
				}
				hosts, err := c.hostRefs(ctx, args[1:])
				if err != nil {
					return err
				}
				if _, err := c.async(ctx, "stage", "patchd.patch_stage", ref, hosts); err != nil {
					return fmt.Errorf("stage of patch %s (%s): %w", rec.text("name_label"), rec.text("uuid"), explain(ctx, c, err))
				}
				where := fmt.Sprintf("staged on %d hosts", len(hosts))
				switch {
				case all:
					where = "staged on every host"
				case len(hosts) == 1:
					where = "staged on host " + args[1]
				}
				return g.done(where, "pool_patch", rec)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every host of the pool")
	return cmd
}

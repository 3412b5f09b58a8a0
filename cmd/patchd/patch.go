package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/xapi"
)

func newPatch(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "patch", Short: "build, upload, apply and remove patches"}
	cmd.AddCommand(
		newPatchBuild(g), newPatchVerify(g), newPatchUpload(g), newPatchImport(g),
		newPatchList(g), newPatchShow(g), newPatchPrecheck(g), newPatchStage(g), newPatchApply(g), newPatchPoolApply(g),
		newPatchClean(g), newPatchPoolClean(g), newPatchDestroy(g), newPatchSettle(g),
	)
	return cmd
}

func newPatchList(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "list the patches of the pool", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				all, err := c.all(ctx, "pool_patch")
				if err != nil {
					return err
				}
				held, err := c.holders(ctx)
				if err != nil {
					return err
				}
				return g.printRecords(os.Stdout, all, []column{
					field("UUID", "uuid"), field("NAME", "name_label"), field("VERSION", "version"), size("SIZE", "size"),
					{"STORED", func(r record) string { return storedIn(r) }},
					{"HOSTS", func(r record) string { return held(r) }}, field("GUIDANCE", "after_apply_guidance"),
				})
			})
		},
	}
}

// storedIn tells whether a patch has a VDI.
func storedIn(r record) string {
	if xapi.Ref(r.text("VDI")).IsNull() {
		return "-"
	}
	return "VDI"
}

// holders gives a function that tells on which hosts a patch is.
func (c *client) holders(ctx context.Context) (func(r record) string, error) {
	hostPatches, err := c.all(ctx, "host_patch")
	if err != nil {
		return nil, err
	}
	hosts, err := c.all(ctx, "host")
	if err != nil {
		return nil, err
	}
	return func(r record) string {
		refs, _ := r["host_patches"].([]any)
		var names []string
		for _, ref := range refs {
			hp := hostPatches[fmt.Sprint(ref)]
			name := hosts[hp.text("host")].text("name_label")
			if applied, _ := hp["applied"].(bool); !applied {
				name += " (" + stateOf(hp) + ")"
			}
			names = append(names, name)
		}
		return strings.Join(names, ", ")
	}, nil
}

func stateOf(hp record) string {
	config, _ := hp["other_config"].(map[string]any)
	if s, ok := config["patchd-state"].(string); ok {
		return s
	}
	return "in progress"
}

func newPatchShow(g *global) *cobra.Command {
	return showCommand(g, "pool_patch", "show one patch")
}

func newPatchImport(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "import PATH", Short: "take up a classic patch file that lies on the coordinator", Args: cobra.ExactArgs(1),
		Long: "Makes a record for a signed patch file in the coordinator's patch-dir, or copies the file there first.\n" +
			"Such a patch is applied from the file; `patchd patch upload` is the way for new patches.",
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				ref, err := c.async(ctx, "import", "patchd.patch_import", path)
				if err != nil {
					return fmt.Errorf("import of %s: %w", path, explain(ctx, c, err))
				}
				var uuid string
				if err := c.call(ctx, &uuid, "pool_patch.get_uuid", ref); err != nil {
					return err
				}
				return g.printText("uuid", uuid)
			})
		},
	}
}

// hostCommand does something with a patch on a host; the only host of a pool
// need not be named.
func hostCommand(g *global, use, short string, f func(ctx context.Context, c *client, patch, host string, rec record) error) *cobra.Command {
	return &cobra.Command{
		Use: use + " PATCH [HOST]", Short: short, Args: cobra.RangeArgs(1, 2), ValidArgsFunction: g.complete("pool_patch"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				patch, rec, err := c.find(ctx, "pool_patch", args[0])
				if err != nil {
					return err
				}
				name := ""
				if len(args) == 2 {
					name = args[1]
				}
				host, hostRec, err := c.hostOrOnly(ctx, name)
				if err != nil {
					return err
				}
				if err := f(ctx, c, patch, host, rec); err != nil {
					return fmt.Errorf("%s of patch %s (%s) on host %s (%s): %w", use, rec.text("name_label"), rec.text("uuid"),
						hostRec.text("name_label"), hostRec.text("uuid"), explain(ctx, c, err))
				}
				return nil
			})
		},
	}
}

// warnAway says that a host is away, which takes its jobs when it is back. What is
// not known is not said.
func (c *client) warnAway(ctx context.Context, host string) {
	var states []map[string]string
	if c.call(ctx, &states, "patchd.host_states") != nil {
		return
	}
	for _, st := range states {
		if st["ref"] == host && st["connected"] == "false" {
			fmt.Fprintf(os.Stderr, "host %s is away since %s: it begins when it is back\n", &named{st["uuid"], st["name_label"]}, dateText(st["since"]))
		}
	}
}

func newPatchPrecheck(g *global) *cobra.Command {
	return hostCommand(g, "precheck", "run a patch's precheck on a host", func(ctx context.Context, c *client, patch, host string, _ record) error {
		c.warnAway(ctx, host)
		text, err := c.async(ctx, "precheck", "pool_patch.precheck", patch, host)
		if err != nil {
			return err
		}
		if !g.json() && strings.TrimSpace(text) == "" {
			text = "the precheck agrees: the patch can be applied"
		}
		return g.printText("output", text)
	})
}

func newPatchApply(g *global) *cobra.Command {
	return hostCommand(g, "apply", "apply a patch to a host", func(ctx context.Context, c *client, patch, host string, rec record) error {
		c.warnAway(ctx, host)
		text, err := c.async(ctx, "apply", "pool_patch.apply", patch, host)
		if err != nil {
			return err
		}
		if g.json() {
			return printJSON(os.Stdout, map[string]any{"output": text, "guidance": rec["after_apply_guidance"]})
		}
		if guidance := rec.text("after_apply_guidance"); guidance != "" {
			fmt.Fprintln(os.Stderr, "applied; it asks for: "+guidance)
		}
		return g.printText("output", text)
	})
}

func newPatchPoolApply(g *global) *cobra.Command {
	var flags policyFlags
	var policy bool
	cmd := objectCommand(g, "pool_patch", "pool-apply PATCH", "apply a patch to every host that lacks it",
		func(ctx context.Context, c *client, ref string, rec record) error {
			if policy {
				return flags.start(ctx, g, c, ref)
			}
			if _, err := c.async(ctx, "pool-apply", "pool_patch.pool_apply", ref); err != nil {
				return c.whichHosts(ctx, rec.text("uuid"), err)
			}
			return g.done("applied to every host", "pool_patch", rec)
		})
	cmd.Long = "Without flags this is pool_patch.pool_apply of the XenAPI: one host after another, up to the first\n" +
		"that fails. Any of the flags makes it a run by a policy: all hosts run the precheck first, then the\n" +
		"coordinator applies, then the others, until one fails, unless the flags say otherwise. A run goes on\n" +
		"when this command or the coordinator ends; see `patchd run`."
	flags.register(cmd)
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		policy = flags.given(cmd)
		return flags.check(cmd)
	}
	return cmd
}

// whichHosts adds to the failure of a pool_apply on which hosts that was: the error of
// the XenAPI names none, the run that it was does.
func (c *client) whichHosts(ctx context.Context, patch string, err error) error {
	r, rerr := c.run(ctx, "")
	if rerr != nil || r.Run.text("patch") != patch || !r.ended() {
		return err // it has not come to a run
	}
	if failed := r.failure(); failed != nil {
		return fmt.Errorf("%w\n%w", explain(ctx, c, err), failed)
	}
	return err
}

const deprecation = "deprecated: %s is kept for old scripts; `patchd vdi destroy` frees the room of a patch\n"

func newPatchClean(g *global) *cobra.Command {
	return hostCommand(g, "clean", "remove a patch's file from a host's dom0 (deprecated; does nothing for a patch in a VDI)",
		func(ctx context.Context, c *client, patch, host string, rec record) error {
			fmt.Fprintf(os.Stderr, deprecation, "clean")
			if err := c.call(ctx, nil, "pool_patch.clean_on_host", patch, host); err != nil {
				return err
			}
			return g.done("cleaned", "pool_patch", rec)
		})
}

func newPatchPoolClean(g *global) *cobra.Command {
	return objectCommand(g, "pool_patch", "pool-clean PATCH", "remove a patch's file and VDI, keep its record (deprecated)",
		func(ctx context.Context, c *client, ref string, rec record) error {
			fmt.Fprintf(os.Stderr, deprecation, "pool-clean")
			if err := c.call(ctx, nil, "pool_patch.pool_clean", ref); err != nil {
				return err
			}
			return g.done("cleaned", "pool_patch", rec)
		})
}

func newPatchDestroy(g *global) *cobra.Command {
	return objectCommand(g, "pool_patch", "destroy PATCH", "remove a patch that no host has: file, VDI and record",
		func(ctx context.Context, c *client, ref string, rec record) error {
			if err := c.call(ctx, nil, "pool_patch.destroy", ref); err != nil {
				return err
			}
			return g.done("destroyed", "pool_patch", rec)
		})
}

func newPatchSettle(g *global) *cobra.Command {
	var applied, not bool
	cmd := hostCommand(g, "settle", "say how an apply ended whose outcome is unknown",
		func(ctx context.Context, c *client, patch, host string, rec record) error {
			if err := c.call(ctx, nil, "patchd.patch_settle", patch, host, applied); err != nil {
				return err
			}
			return g.done("settled", "pool_patch", rec)
		})
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if applied == not {
			return usagef("say either --applied or --not-applied")
		}
		return nil
	}
	cmd.Flags().BoolVar(&applied, "applied", false, "the host has the patch")
	cmd.Flags().BoolVar(&not, "not-applied", false, "the host does not have the patch")
	return cmd
}

package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"
)

// listCommand is "list" of a class.
func listCommand(g *global, class, short string, columns []column) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				all, err := c.all(ctx, class)
				if err != nil {
					return err
				}
				return g.printRecords(os.Stdout, all, columns)
			})
		},
	}
}

// showCommand is "show" of one object of a class.
func showCommand(g *global, class, short string) *cobra.Command {
	return &cobra.Command{
		Use: "show UUID|NAME", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: g.complete(class),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				ref, rec, err := c.find(ctx, class, args[0])
				if err != nil {
					return err
				}
				return g.printRecord(os.Stdout, ref, rec)
			})
		},
	}
}

// objectCommand does something with one object, named by uuid or name.
func objectCommand(g *global, class, use, short string, f func(ctx context.Context, c *client, ref string, rec record) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: g.complete(class),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				ref, rec, err := c.find(ctx, class, args[0])
				if err != nil {
					return err
				}
				return f(ctx, c, ref, rec)
			})
		},
	}
}

// complete offers the uuids of a class to the shell, over the unix socket only.
func (g *global) complete(class string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 || g.server != "" {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var out []cobra.Completion
		g.with(cmd.Context(), func(ctx context.Context, c *client) error {
			all, err := c.all(ctx, class)
			for _, rec := range all {
				out = append(out, cobra.CompletionWithDesc(rec.text("uuid"), rec.text("name_label")))
			}
			return err
		})
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

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
				if err := f(ctx, c, ref, rec); err != nil {
					what := strings.Join(strings.Fields(groupOf(class)+" "+rec.text("name_label")), " ")
					return fmt.Errorf("%s of %s (%s): %w", cmd.Name(), what, rec.text("uuid"), explain(ctx, c, err))
				}
				return nil
			})
		},
	}
}

// complete offers the uuids of a class to the shell, over the unix socket only.
func (g *global) complete(class string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if g.fromEnv() != nil || len(args) > 1 || len(args) == 1 && class != "pool_patch" || g.server != "" {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		if len(args) == 1 {
			class = "host" // as in apply PATCH HOST
		}
		return g.names(cmd.Context(), class)
	}
}

// completeHostPatch offers the uuids of hosts, then of patches, as in why HOST PATCH.
func (g *global) completeHostPatch(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if g.fromEnv() != nil || len(args) > 1 || g.server != "" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return g.names(cmd.Context(), []string{"host", "pool_patch"}[len(args)])
}

// completeFlag offers them as the value of a flag.
func (g *global) completeFlag(cmd *cobra.Command, flag, class string) {
	must(cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if g.fromEnv() != nil || g.server != "" {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return g.names(cmd.Context(), class)
	}))
}

// completeWords offers fixed words as the value of a flag.
func completeWords(cmd *cobra.Command, flag string, words ...cobra.Completion) {
	must(cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)))
}

// must is for what fails only when a command is put together wrongly.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func (g *global) names(ctx context.Context, class string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var out []cobra.Completion
	err := g.with(ctx, func(ctx context.Context, c *client) error {
		all, err := c.all(ctx, class)
		for _, rec := range all {
			out = append(out, cobra.CompletionWithDesc(rec.text("uuid"), rec.text("name_label")))
		}
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp // a shell has no place for errors
	}
	slices.Sort(out)
	return out, cobra.ShellCompDirectiveNoFileComp
}

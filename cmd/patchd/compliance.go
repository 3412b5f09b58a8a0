package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// newWhy prints the chain of reasons.
func newWhy(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "why HOST PATCH", Short: "tell why a host has or lacks a patch", Args: cobra.ExactArgs(2), ValidArgsFunction: g.completeHostPatch,
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				host, _, err := c.find(ctx, "host", args[0])
				if err != nil {
					return err
				}
				patch, _, err := c.find(ctx, "pool_patch", args[1])
				if err != nil {
					return err
				}
				lines := []string{}
				if err := c.call(ctx, &lines, "patchd.why", host, patch); err != nil {
					return err
				}
				if g.json() {
					return printJSON(os.Stdout, lines)
				}
				fmt.Println(strings.Join(lines, "\n"))
				return nil
			})
		},
	}
}

// newCompliance shows which host has which patch.
func newCompliance(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "compliance [PATCH]", Short: "show which host has which patch: yes, no, unknown or exempt", Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: g.complete("pool_patch"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				params := []any{}
				if len(args) == 1 {
					ref, _, err := c.find(ctx, "pool_patch", args[0])
					if err != nil {
						return err
					}
					params = append(params, ref)
				}
				all := []record{}
				if err := c.call(ctx, &all, "patchd.compliance", params...); err != nil {
					return err
				}
				if g.json() {
					return printJSON(os.Stdout, matrixOf(all))
				}
				m := matrixOf(all)
				for i, p := range m {
					if i > 0 {
						fmt.Println()
					}
					p.print(len(args) == 1)
				}
				return nil
			})
		},
	}
}

// patchCompliance is one patch on all hosts.
type patchCompliance struct {
	UUID  string   `json:"uuid"`
	Name  string   `json:"name_label"`
	Level string   `json:"level"` // see levelOf
	Hosts []record `json:"hosts"`
}

// matrixOf puts the values together by patch.
func matrixOf(all []record) []*patchCompliance {
	m := []*patchCompliance{}
	for _, r := range all {
		if len(m) == 0 || m[len(m)-1].UUID != r.text("patch") {
			m = append(m, &patchCompliance{UUID: r.text("patch"), Name: r.text("patch_name")})
		}
		p := m[len(m)-1]
		p.Hosts = append(p.Hosts, record{
			"host": r["host"], "name_label": r["host_name"], "value": r["value"], "since": r["since"], "note": r["note"],
		})
	}
	for _, p := range m {
		p.Level = levelOf(p.Hosts)
	}
	return m
}

// levelOf is the pool's level of a patch: "all" when every host that is not exempt has
// it, "none" when none has, "mixed" when some have, "unknown" when that cannot be said.
func levelOf(hosts []record) string {
	n := map[string]int{}
	for _, h := range hosts {
		n[h.text("value")]++
	}
	yes, no, unknown := n[pool.ComplianceYes], n[pool.ComplianceNo], n[pool.ComplianceUnknown]
	switch {
	case yes > 0 && no > 0:
		return "mixed"
	case unknown > 0:
		return "unknown"
	case yes > 0:
		return "all"
	}
	return "none"
}

// print shows a patch: all of its hosts, or only those that do not simply have it or not.
func (p *patchCompliance) print(all bool) {
	n := map[string]int{}
	var rows [][]string
	names := hostLabels(p.Hosts, "name_label")
	for i, h := range p.Hosts {
		n[h.text("value")]++
		if all || p.Level != "all" && p.Level != "none" || h.text("note") != "" {
			rows = append(rows, []string{names[i], h.text("value"), age(h), h.text("note")})
		}
	}
	fmt.Printf("%s (%s): %s; %d yes, %d no, %d unknown, %d exempt\n", p.Name, p.UUID, p.Level,
		n[pool.ComplianceYes], n[pool.ComplianceNo], n[pool.ComplianceUnknown], n[pool.ComplianceExempt])
	if len(rows) > 0 {
		printTable(os.Stdout, []string{"HOST", "HAS IT", "SINCE", "NOTE"}, rows)
	}
}

// age is the moment of what is known, and for what is unknown how old that is.
func age(h record) string {
	text := dateText(h.text("since"))
	if at, err := xapi.ParseTime(h.text("since")); err == nil && h.text("value") == pool.ComplianceUnknown {
		text += fmt.Sprintf(" (%s ago)", time.Since(at).Round(time.Second))
	}
	return text
}

func newHostExempt(g *global) *cobra.Command {
	var reason string
	var remove bool
	cmd := &cobra.Command{
		Use: "exempt HOST PATCH", Short: "say that a host shall not have a patch", Args: cobra.ExactArgs(2), ValidArgsFunction: g.completeHostPatch,
		PreRunE: func(*cobra.Command, []string) error {
			if remove == (reason != "") {
				return usagef("say either --reason TEXT or --remove")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				host, rec, err := c.find(ctx, "host", args[0])
				if err != nil {
					return err
				}
				patch, patchRec, err := c.find(ctx, "pool_patch", args[1])
				if err != nil {
					return err
				}
				if err := c.call(ctx, nil, "patchd.host_exempt", host, patch, !remove, reason); err != nil {
					return err
				}
				verb := "exempt from patch " + (&named{patchRec.text("uuid"), patchRec.text("name_label")}).String()
				if remove {
					verb = "no longer " + verb
				}
				return g.done(verb, "host", rec)
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; it is shown wherever the host is passed over")
	cmd.Flags().BoolVar(&remove, "remove", false, "take that back")
	return cmd
}

func newHostResync(g *global) *cobra.Command {
	var every bool
	cmd := &cobra.Command{
		Use: "resync [HOST]", Short: "have a host compare its stampfiles with the records", Args: cobra.MaximumNArgs(1), ValidArgsFunction: g.complete("host"),
		PreRunE: func(_ *cobra.Command, args []string) error {
			if every && len(args) > 0 {
				return usagef("say either HOST or --all")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				if every {
					return g.resyncAll(ctx, c)
				}
				ref, rec, err := c.hostOrOnly(ctx, strings.Join(args, ""))
				if err != nil {
					return err
				}
				if _, err := c.async(ctx, "resync", "patchd.host_resync", ref); err != nil {
					return err
				}
				return g.done("compared", "host", rec)
			})
		},
	}
	cmd.Flags().BoolVar(&every, "all", false, "every host of the pool")
	return cmd
}

// resyncAll asks one host after another; those that fail are told of, the others go on.
func (g *global) resyncAll(ctx context.Context, c *client) error {
	all, err := c.all(ctx, "host")
	if err != nil {
		return err
	}
	failed := 0
	list := []map[string]string{}
	for ref, rec := range all {
		_, err := c.async(ctx, "resync", "patchd.host_resync", ref)
		if ctx.Err() != nil {
			return err
		}
		entry := map[string]string{"uuid": rec.text("uuid"), "name_label": rec.text("name_label"), "error": ""}
		if err != nil {
			failed++
			entry["error"] = explain(ctx, c, err).Error()
		}
		list = append(list, entry)
		if !g.json() {
			fmt.Printf("%s (%s): %s\n", rec.text("name_label"), rec.text("uuid"), orText(entry["error"], "compared"))
		}
	}
	if g.json() {
		if err := printJSON(os.Stdout, list); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d hosts could not be asked", failed, len(all))
	}
	return nil
}

func orText(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

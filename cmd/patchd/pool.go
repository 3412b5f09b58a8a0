package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

func newHost(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "host", Short: "hosts of the pool"}
	cmd.AddCommand(
		listCommand(g, "host", "list the hosts", []column{
			field("UUID", "uuid"), field("NAME", "name_label"), field("ADDRESS", "address"), field("ENABLED", "enabled"),
			{"PATCHES", func(r record) string { p, _ := r["patches"].([]any); return fmt.Sprint(len(p)) }},
		}),
		showCommand(g, "host", "show one host"),
	)
	return cmd
}

func newPool(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "pool", Short: "the pool"}
	cmd.AddCommand(&cobra.Command{
		Use: "status", Short: "show the pool, its coordinator and its default SR", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				st, err := c.status(ctx)
				if err != nil {
					return err
				}
				return g.printStatus(st)
			})
		},
	})
	return cmd
}

// newStatus is what an admin asks first.
func newStatus(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "is patchd up, and how is the pool", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				st, err := c.status(ctx)
				if err != nil {
					return err
				}
				return g.printStatus(st)
			})
		},
	}
}

// status is the pool in a few figures.
type status struct {
	Pool        string `json:"pool"`
	Coordinator string `json:"coordinator"`
	Version     string `json:"version"`
	DefaultSR   string `json:"default_SR"`
	Hosts       int    `json:"hosts"`
	Patches     int    `json:"patches"`
	Running     int    `json:"running_tasks"`
	Unknown     int    `json:"unknown_outcomes"`
	Messages    int    `json:"messages"`
}

func (c *client) status(ctx context.Context) (st status, err error) {
	byClass := map[string]map[string]record{}
	for _, class := range []string{"pool", "host", "SR", "pool_patch", "host_patch", "task", "message"} {
		if byClass[class], err = c.all(ctx, class); err != nil {
			return st, err
		}
	}
	for _, p := range byClass["pool"] {
		st.Pool = p.text("uuid")
		host := byClass["host"][p.text("master")]
		st.Coordinator = fmt.Sprintf("%s (%s)", host.text("name_label"), host.text("uuid"))
		software, _ := host["software_version"].(map[string]any)
		st.Version, _ = software["patchd"].(string)
		st.DefaultSR = "none"
		if sr, ok := byClass["SR"][p.text("default_SR")]; ok {
			st.DefaultSR = fmt.Sprintf("%s (%s)", sr.text("name_label"), sr.text("uuid"))
		}
	}
	for _, hp := range byClass["host_patch"] {
		if stateOf(hp) == "unknown" {
			st.Unknown++
		}
	}
	for _, t := range byClass["task"] {
		if s := t.text("status"); s == "pending" || s == "cancelling" {
			st.Running++
		}
	}
	st.Hosts, st.Patches, st.Messages = len(byClass["host"]), len(byClass["pool_patch"]), len(byClass["message"])
	return st, nil
}

func (g *global) printStatus(st status) error {
	if g.json() {
		return printJSON(os.Stdout, st)
	}
	for _, line := range [][2]string{
		{"pool", st.Pool}, {"coordinator", st.Coordinator}, {"version", st.Version}, {"default SR", st.DefaultSR},
		{"hosts", fmt.Sprint(st.Hosts)}, {"patches", fmt.Sprint(st.Patches)}, {"running tasks", fmt.Sprint(st.Running)},
		{"unknown outcomes", fmt.Sprint(st.Unknown)}, {"messages", fmt.Sprint(st.Messages)},
	} {
		fmt.Printf("%-17s %s\n", line[0], line[1])
	}
	return nil
}

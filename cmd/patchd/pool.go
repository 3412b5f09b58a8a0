package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/xapi"
)

func newHost(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "host", Short: "hosts of the pool"}
	cmd.AddCommand(
		newHostList(g),
		showCommand(g, "host", "show one host"),
		newHostRename(g), newHostRevoke(g), newHostExempt(g), newHostResync(g),
	)
	return cmd
}

// newHostRename gives a host another name: at first each is called as its hostname.
func newHostRename(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "rename HOST NAME", Short: "give a host another name", Args: cobra.ExactArgs(2), ValidArgsFunction: g.complete("host"),
		PreRunE: func(_ *cobra.Command, args []string) error {
			if strings.TrimSpace(args[1]) == "" {
				return usagef("the name is empty")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				ref, rec, err := c.find(ctx, "host", args[0])
				if err != nil {
					return err
				}
				if err := c.call(ctx, nil, "host.set_name_label", ref, args[1]); err != nil {
					return err
				}
				rec["name_label"] = args[1]
				return g.done("renamed", "host", rec)
			})
		},
	}
}

// newHostList lists the hosts with what the coordinator knows of each now.
func newHostList(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "list the hosts", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				all, err := c.all(ctx, "host")
				if err != nil {
					return err
				}
				var states []map[string]any
				if err := c.call(ctx, &states, "patchd.host_states"); err != nil {
					return err
				}
				for _, st := range states {
					if rec := all[fmt.Sprint(st["ref"])]; rec != nil {
						rec["revoked"] = st["rank"] == "member" && st["keys"] == ""
						rec["rank"], rec["connected"], rec["since"], rec["jobs"] = st["rank"], st["connected"] == "true", st["since"], st["jobs"]
					}
				}
				return g.printRecords(os.Stdout, all, []column{
					field("UUID", "uuid"), field("NAME", "name_label"), field("ADDRESS", "address"), field("RANK", "rank"),
					{"STATE", hostState}, field("ENABLED", "enabled"),
					{"PATCHES", func(r record) string { p, _ := r["patches"].([]any); return fmt.Sprint(len(p)) }},
				})
			})
		},
	}
}

// hostState is whether a host is there, or how long it has been away.
func hostState(r record) string {
	if revoked, _ := r["revoked"].(bool); revoked {
		return "key revoked"
	}
	if there, _ := r["connected"].(bool); there {
		return "connected"
	}
	since, err := xapi.ParseTime(r.text("since"))
	if err != nil {
		return "away"
	}
	return "away for " + time.Since(since).Round(time.Second).String()
}

func newMessage(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "message", Short: "what the pool wants its admins to know"}
	cmd.AddCommand(
		listCommand(g, "message", "list the messages", []column{
			field("UUID", "uuid"), date("WHEN", "timestamp"), field("NAME", "name"), field("TEXT", "body"),
		}),
		objectCommand(g, "message", "destroy MESSAGE", "remove a message that is dealt with", func(ctx context.Context, c *client, ref string, rec record) error {
			if err := c.call(ctx, nil, "message.destroy", ref); err != nil {
				return err
			}
			rec["name_label"] = rec["name"]
			return g.done("destroyed", "message", rec)
		}),
	)
	return cmd
}

func newPool(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "pool", Short: "the pool"}
	status := newStatus(g)
	status.Short = "show the pool, its coordinator and its default SR"
	cmd.AddCommand(status, newPoolToken(g), newPoolJoin(g), newPoolEject(g), newPoolLeave(g), newPoolRotateKey(g), newCompliance(g))
	return cmd
}

// newStatus is what an admin asks first.
func newStatus(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "is patchd up, and how is the pool", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if done, err := g.statusElsewhere(cmd.Context()); done || err != nil {
				return err
			}
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				st, err := c.status(ctx)
				if err != nil {
					return err
				}
				if g.server == "" {
					st.Pin = g.localPin()
				}
				return g.printStatus(st)
			})
		},
	}
}

// named is an object in a few words.
type named struct {
	UUID      string `json:"uuid"`
	NameLabel string `json:"name_label"`
}

func (n *named) String() string {
	if n == nil {
		return "none"
	}
	if n.NameLabel == "" {
		return n.UUID
	}
	return fmt.Sprintf("%s (%s)", n.NameLabel, n.UUID)
}

// status is the pool in a few figures.
type status struct {
	Pool        named  `json:"pool"`
	Coordinator named  `json:"coordinator"`
	Version     string `json:"version"`
	// Pin is what --pin takes: the SHA-256 of the TLS key, where it can be read
	// from the state directory.
	Pin       string `json:"pin"`
	DefaultSR *named `json:"default_SR"` // null: there is none
	Hosts     int    `json:"hosts"`
	Patches   int    `json:"patches"`
	Running   int    `json:"running_tasks"`
	Unknown   int    `json:"unknown_outcomes"`
	Messages  int    `json:"messages"`
}

func (c *client) status(ctx context.Context) (st status, err error) {
	byClass := map[string]map[string]record{}
	for _, class := range []string{"pool", "host", "SR", "pool_patch", "host_patch", "task", "message"} {
		if byClass[class], err = c.all(ctx, class); err != nil {
			return st, err
		}
	}
	for _, p := range byClass["pool"] {
		st.Pool = named{p.text("uuid"), p.text("name_label")}
		host := byClass["host"][p.text("master")]
		st.Coordinator = named{host.text("uuid"), host.text("name_label")}
		software, _ := host["software_version"].(map[string]any)
		st.Version, _ = software["patchd"].(string)
		if sr, ok := byClass["SR"][p.text("default_SR")]; ok {
			st.DefaultSR = &named{sr.text("uuid"), sr.text("name_label")}
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

// roleStatus is what a host that does not lead tells of itself and the pool.
type roleStatus struct {
	Role        string `json:"role"`
	Pool        string `json:"pool"`
	Host        string `json:"host"`
	Coordinator *named `json:"coordinator"` // null: nobody leads just now
	Address     string `json:"coordinator_address"`
	// URL and CoordinatorPin are what --server and --pin take.
	URL            string `json:"coordinator_url"`
	CoordinatorPin string `json:"coordinator_pin"`
	// Link tells how the connection of a member to the coordinator is.
	Link string `json:"link"`
	Pin  string `json:"pin"`
}

// linkText tells how the link of a member is, "" of another host.
func linkText(role map[string]string) string {
	switch {
	case role["role"] != "member":
		return ""
	case role["connected"] == "true":
		return "connected since " + dateText(role["since"])
	case role["problem"] == "":
		return "not connected"
	}
	return "not connected: " + role["problem"]
}

// statusElsewhere prints the status of a host that does not lead; done is false
// where this one does.
func (g *global) statusElsewhere(ctx context.Context) (done bool, err error) {
	c, err := g.reach()
	if err != nil {
		return false, err
	}
	var role map[string]string
	// Who does not answer this is told of when the command logs in.
	if err := c.rpc(ctx, &role, "patchd.role"); err != nil || role["role"] == "" || role["role"] == "coordinator" {
		return false, nil
	}
	st := roleStatus{
		Role: role["role"], Pool: role["pool"], Host: role["host"], Address: role["coordinator_address"],
		URL: role["coordinator_url"], CoordinatorPin: role["coordinator_pin"], Link: linkText(role),
	}
	if role["coordinator"] != "" {
		st.Coordinator = &named{role["coordinator"], role["coordinator_name"]}
	}
	if g.server == "" {
		st.Pin = g.localPin()
	}
	return true, g.printRole(st)
}

func (g *global) printRole(st roleStatus) error {
	if g.json() {
		return printJSON(os.Stdout, st)
	}
	for _, line := range [][2]string{
		{"role", st.Role}, {"pool", st.Pool}, {"host", st.Host}, {"coordinator", st.Coordinator.String()},
		{"its address", st.Address}, {"its URL", st.URL}, {"pin of its key", st.CoordinatorPin},
		{"link to it", st.Link}, {"pin of this host", st.Pin},
	} {
		if line[1] != "" {
			fmt.Printf("%-18s %s\n", line[0], line[1])
		}
	}
	return nil
}

// localPin reads the pin from the certificate in the state directory; "" where
// only the daemon may read it.
func (g *global) localPin() string {
	b, err := os.ReadFile(filepath.Join(g.stateDir, "tls.pem"))
	if err != nil {
		return ""
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return ""
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256(cert.RawSubjectPublicKeyInfo))
}

func (g *global) printStatus(st status) error {
	if g.json() {
		return printJSON(os.Stdout, st)
	}
	lines := [][2]string{
		{"pool", st.Pool.String()}, {"coordinator", st.Coordinator.String()}, {"version", st.Version},
		{"pin of its TLS key", st.Pin}, {"default SR", st.DefaultSR.String()},
		{"hosts", fmt.Sprint(st.Hosts)}, {"patches", fmt.Sprint(st.Patches)}, {"running tasks", fmt.Sprint(st.Running)},
		{"unknown outcomes", fmt.Sprint(st.Unknown)}, {"messages", fmt.Sprint(st.Messages)},
	}
	for _, line := range lines {
		if line[1] != "" {
			fmt.Printf("%-18s %s\n", line[0], line[1])
		}
	}
	return nil
}

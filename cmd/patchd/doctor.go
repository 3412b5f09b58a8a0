package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// finding is one thing that was looked at.
type finding struct {
	Check string `json:"check"`
	OK    bool   `json:"ok"`
	Class string `json:"class"` // of the object it is about, or ""
	UUID  string `json:"uuid"`
	Name  string `json:"name_label"`
	Text  string `json:"text"`
}

// newDoctor looks for what keeps patches from working and says what helps.
func newDoctor(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "look for what is wrong, and say what helps", Args: cobra.NoArgs,
		Long: "Looks at keys, storage repositories and the files in them, disk room, what jobs left, outcomes that\n" +
			"are unknown, and the messages of the pool. It changes nothing. Exits with 1 when something needs an\n" +
			"admin.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				var found []map[string]string
				if err := c.call(ctx, &found, "patchd.doctor"); err != nil {
					return err
				}
				return g.printFindings(found)
			})
		},
	}
}

func (g *global) printFindings(found []map[string]string) error {
	bad := 0
	list := make([]finding, len(found))
	rows := make([][]string, len(found))
	for i, f := range found {
		list[i] = finding{f["check"], f["ok"] == "true", f["class"], f["uuid"], f["name"], f["text"]}
		state := "ok"
		if !list[i].OK {
			state, bad = "LOOK", bad+1
		}
		rows[i] = []string{state, f["check"], list[i].object(), f["text"]}
	}
	if g.json() {
		if err := printJSON(os.Stdout, list); err != nil {
			return err
		}
	} else {
		printTable(os.Stdout, []string{"STATE", "CHECK", "OBJECT", "FINDING"}, rows)
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d checks need an admin", bad, len(found))
	}
	return nil
}

// object names what a finding is about.
func (f finding) object() string {
	if f.UUID == "" {
		return ""
	}
	return strings.Join(strings.Fields(fmt.Sprintf("%s %s (%s)", groupOf(f.Class), f.Name, f.UUID)), " ")
}

package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

// finding is one thing that doctor looked at.
type finding struct {
	Check string `json:"check"`
	OK    bool   `json:"ok"`
	Text  string `json:"text"`
}

// newDoctor looks for what keeps patches from working and says what helps.
func newDoctor(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "look for what is wrong, and say what helps", Args: cobra.NoArgs,
		Long: "Looks at keys, storage repositories, outcomes that are unknown, files that belong to nobody, and the\n" +
			"messages of the pool. Exits with 1 when something needs an admin.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				found, err := g.examine(ctx, c)
				if err != nil {
					return err
				}
				return g.printFindings(found)
			})
		},
	}
}

func (g *global) printFindings(found []finding) error {
	bad := 0
	rows := make([][]string, len(found))
	for i, f := range found {
		state := "ok"
		if !f.OK {
			state, bad = "LOOK", bad+1
		}
		rows[i] = []string{state, f.Check, f.Text}
	}
	if g.json() {
		if err := printJSON(os.Stdout, found); err != nil {
			return err
		}
	} else {
		printTable(os.Stdout, []string{"STATE", "CHECK", "FINDING"}, rows)
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d checks need an admin", bad, len(found))
	}
	return nil
}

func (g *global) examine(ctx context.Context, c *client) ([]finding, error) {
	var out []finding
	st, err := c.status(ctx)
	if err != nil {
		return nil, err
	}
	out = append(out,
		judge("default SR", st.DefaultSR != "none", st.DefaultSR, "there is none: `patchd sr set-default` says where patches go"),
		judge("apply outcomes", st.Unknown == 0, "all known", fmt.Sprintf("%d are unknown: look at the hosts, then `patchd patch settle`", st.Unknown)),
	)
	if g.server == "" {
		out = append(out, g.examineKeys())
	}
	storage, err := examineStorage(ctx, c)
	if err != nil {
		return nil, err
	}
	out = append(out, storage...)
	messages, err := c.all(ctx, "message")
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		out = append(out, finding{"message " + m.text("name"), false, m.text("body")})
	}
	return out, nil
}

func judge(check string, ok bool, good, bad string) finding {
	if ok {
		return finding{check, true, good}
	}
	return finding{check, false, bad}
}

func (g *global) examineKeys() finding {
	ring, err := g.keyring()
	if err != nil {
		return finding{"trusted keys", false, err.Error()}
	}
	usable := 0
	for _, k := range ring.Keys() {
		if k.Usable {
			usable++
		}
	}
	if problems := ring.Problems(); len(problems) > 0 {
		return finding{"trusted keys", false, fmt.Sprint(problems[0])}
	}
	return judge("trusted keys", usable > 0, fmt.Sprintf("%d usable", usable), "none is usable: every patch will be refused; `patchd key trust FILE`")
}

func examineStorage(ctx context.Context, c *client) ([]finding, error) {
	srs, err := c.all(ctx, "SR")
	if err != nil {
		return nil, err
	}
	pbds, err := c.all(ctx, "PBD")
	if err != nil {
		return nil, err
	}
	var out []finding
	for _, p := range pbds {
		on, _ := p["currently_attached"].(bool)
		sr := srs[p.text("SR")]
		out = append(out, judge(fmt.Sprintf("SR %s (%s)", sr.text("name_label"), sr.text("uuid")), on, "plugged", "not plugged: `xe pbd-plug uuid="+p.text("uuid")+"` tells why"))
	}
	vdis, err := c.all(ctx, "VDI")
	if err != nil {
		return nil, err
	}
	for _, v := range vdis {
		if gone, _ := v["missing"].(bool); gone {
			out = append(out, finding{fmt.Sprintf("VDI %s (%s)", v.text("name_label"), v.text("uuid")), false, "its image is gone from the SR: `patchd vdi destroy` removes the record"})
		}
	}
	return out, nil
}

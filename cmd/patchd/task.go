package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/xapi"
)

func newTask(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "task", Short: "what the pool is doing"}
	cmd.AddCommand(
		listCommand(g, "task", "list the tasks", []column{
			field("UUID", "uuid"), field("NAME", "name_label"), field("STATUS", "status"),
			{"PROGRESS", func(r record) string { return percent(r) }}, date("CREATED", "created"), field("ERROR", "error_info"),
		}),
		showCommand(g, "task", "show one task, with the last output of its patch"),
		objectCommand(g, "task", "cancel TASK", "cancel a task", func(ctx context.Context, c *client, ref string, rec record) error {
			if err := c.call(ctx, nil, "task.cancel", ref); err != nil {
				return err
			}
			return g.done("cancel asked for", "task", rec)
		}),
	)
	return cmd
}

func percent(r record) string {
	f, ok := r["progress"].(float64)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%.0f %%", 100*f)
}

// follow waits for a task by its events, shows how it gets on, and gives its
// result. When the command is interrupted the task goes on.
func (c *client) follow(ctx context.Context, name, ref string) (string, error) {
	b := newBar(name, 0)
	defer b.done()
	token, shown := "", ref
	for {
		var batch struct {
			Token  string `json:"token"`
			Events []struct {
				Snapshot record `json:"snapshot"`
			} `json:"events"`
		}
		err := c.call(ctx, &batch, "event.from", []string{"task/" + ref}, token, 30.0)
		if ctx.Err() != nil {
			return "", fmt.Errorf("interrupted: the task goes on. `patchd task show %[1]s` tells how it is, `patchd task cancel %[1]s` ends it", shown)
		}
		if xapi.Is(err, xapi.EventsLost) {
			token = ""
			continue
		}
		if err != nil {
			return "", err
		}
		token = batch.Token
		for _, e := range batch.Events {
			if e.Snapshot == nil {
				return "", errors.New("the task was destroyed")
			}
			shown = orText(e.Snapshot.text("uuid"), shown)
			if f, ok := e.Snapshot["progress"].(float64); ok {
				b.fraction(f)
			}
			if done, text, err := ended(e.Snapshot); done {
				return text, err
			}
		}
	}
}

// ended reads the outcome of a finished task.
func ended(t record) (done bool, result string, err error) {
	switch t.text("status") {
	case "success":
		return true, unwrapValue(t.text("result")), nil
	case "failure", "cancelled":
		info, _ := t["error_info"].([]any)
		if len(info) == 0 {
			return true, "", xapi.NewError(xapi.TaskCancelled, "")
		}
		params := make([]string, 0, len(info)-1)
		for _, p := range info[1:] {
			params = append(params, fmt.Sprint(p))
		}
		e := xapi.NewError(fmt.Sprint(info[0]), params...)
		if other, ok := t["other_config"].(map[string]any); ok && e.Code == xapi.PrecheckFailedOutOfSpace {
			if said, _ := other["patchd-output"].(string); said != "" { // which storage that was
				e = e.Because(errors.New(said))
			}
		}
		return true, "", e
	}
	return false, "", nil
}

// unwrapValue takes the text out of <value>…</value>.
func unwrapValue(s string) string {
	var v struct {
		Text string `xml:",chardata"`
	}
	if xml.Unmarshal([]byte(s), &v) != nil {
		return s
	}
	return v.Text
}

// async makes an Async call and follows its task to the end.
func (c *client) async(ctx context.Context, name, method string, params ...any) (string, error) {
	var ref string
	if err := c.call(ctx, &ref, "Async."+method, params...); err != nil {
		return "", err
	}
	text, err := c.follow(ctx, name, ref)
	if ctx.Err() == nil {
		if derr := c.call(ctx, nil, "task.destroy", ref); derr != nil && err == nil {
			err = derr
		}
	}
	return text, err
}

// printText shows what a patch printed, when it printed anything.
func (g *global) printText(key, text string) error {
	if g.json() {
		return printJSON(os.Stdout, map[string]string{key: text})
	}
	if text = strings.TrimRight(text, "\n"); text != "" {
		fmt.Println(text)
	}
	return nil
}

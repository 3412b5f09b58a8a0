package main

import (
	"context"
	"os"
	"strconv"
	"strings"
)

// showSR prints the record of an SR with what its PBDs know: where it lies, and
// what was tried out when it was plugged; and with its room: what may still be
// written, and how much of that is promised.
func (g *global) showSR(ctx context.Context, c *client, ref string, rec record) error {
	pbds, err := c.all(ctx, "PBD")
	if err != nil {
		return err
	}
	for _, p := range pbds {
		if p.text("SR") != ref {
			continue
		}
		rec["device_config"], rec["plugged"] = p["device_config"], p["currently_attached"]
		if other, ok := p["other_config"].(map[string]any); ok {
			features, _ := other["patchd-features"].(string)
			words := []any{}
			for word := range strings.FieldsSeq(features) {
				words = append(words, word)
			}
			rec["features"] = words
			if why, failed := other["patchd-plug-failed"]; failed {
				rec["plug_failed"] = why
			}
		}
	}
	size, _ := strconv.ParseInt(rec.text("physical_size"), 10, 64)
	used, _ := strconv.ParseInt(rec.text("physical_utilisation"), 10, 64)
	rec["free"] = strconv.FormatInt(max(0, size-used), 10)
	if plugged, _ := rec["plugged"].(bool); plugged {
		var room map[string]string
		if err := c.call(ctx, &room, "patchd.sr_room", ref); err != nil {
			rec["room_failed"] = err.Error()
		} else {
			rec["free"], rec["promised"] = room["free"], room["promised"]
		}
	}
	return g.printRecord(os.Stdout, ref, rec)
}

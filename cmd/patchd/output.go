package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sort"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/patchd/patchd/pkg/xapi"
)

// column is one column of a list.
type column struct {
	title string
	value func(r record) string
}

func field(title, name string) column {
	return column{title, func(r record) string { return r.text(name) }}
}

// size shows a number of bytes for people.
func size(title, name string) column {
	return column{title, func(r record) string { return bytesText(r.text(name)) }}
}

// date shows a moment of the XenAPI for people.
func date(title, name string) column {
	return column{title, func(r record) string { return dateText(r.text(name)) }}
}

func dateText(text string) string {
	t, err := xapi.ParseTime(text)
	if err != nil {
		return text
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

func bytesText(text string) string {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return text
	}
	return humanize.IBytes(n)
}

// printRecords shows objects: a table of the columns, or the whole records as
// JSON, each with its ref.
func (g *global) printRecords(w io.Writer, all map[string]record, columns []column) error {
	refs := make([]string, 0, len(all))
	for ref := range all {
		refs = append(refs, ref)
	}
	sort.Slice(refs, func(i, j int) bool {
		a, b := all[refs[i]], all[refs[j]]
		if x, y := a.text("created"), b.text("created"); x != y {
			return x < y // tasks, oldest first
		}
		if x, y := a.text("name_label"), b.text("name_label"); x != y {
			return x < y
		}
		return a.text("uuid") < b.text("uuid")
	})
	if g.json() {
		list := make([]record, 0, len(refs))
		for _, ref := range refs {
			all[ref]["ref"] = ref
			list = append(list, all[ref])
		}
		return printJSON(w, list)
	}
	rows := make([][]string, 0, len(refs))
	for _, ref := range refs {
		row := make([]string, len(columns))
		for i, c := range columns {
			row[i] = c.value(all[ref])
		}
		rows = append(rows, row)
	}
	titles := make([]string, len(columns))
	for i, c := range columns {
		titles[i] = c.title
	}
	printTable(w, titles, rows)
	return nil
}

func printTable(w io.Writer, titles []string, rows [][]string) {
	t := table.NewWriter()
	t.SetOutputMirror(w)
	t.SetStyle(table.StyleLight)
	t.Style().Options = table.OptionsNoBordersAndSeparators
	t.Style().Box.PaddingLeft, t.Style().Box.PaddingRight = "", "  "
	t.SuppressTrailingSpaces()
	t.AppendHeader(row(titles))
	for _, r := range rows {
		t.AppendRow(row(r))
	}
	t.Render()
}

func row(cells []string) table.Row {
	out := make(table.Row, len(cells))
	for i, c := range cells {
		out[i] = c
	}
	return out
}

// sizes are the fields that hold bytes.
var sizes = map[string]bool{
	"size": true, "virtual_size": true, "physical_size": true, "physical_utilisation": true, "virtual_allocation": true,
	"free": true, "promised": true,
}

// printRecord shows one object with all its fields.
func (g *global) printRecord(w io.Writer, ref string, r record) error {
	r["ref"] = ref
	if g.json() {
		return printJSON(w, r)
	}
	names := make([]string, 0, len(r))
	width := 0
	for name := range r {
		names = append(names, name)
		width = max(width, len(name))
	}
	sort.Strings(names)
	for _, name := range names {
		text := valueText(r[name])
		if sizes[name] {
			text = fmt.Sprintf("%s (%s)", text, bytesText(text))
		}
		fmt.Fprintf(w, "%-*s  %s\n", width, name, text)
	}
	return nil
}

func valueText(v any) string {
	m, ok := v.(map[string]any)
	if !ok {
		return record{"v": v}.text("v")
	}
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	s := ""
	for i, k := range keys {
		if i > 0 {
			s += "; "
		}
		s += k + ": " + fmt.Sprint(m[k])
	}
	return s
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// done says that something was done with an object: a line for people, uuid
// and name_label as JSON.
func (g *global) done(verb, class string, rec record) error {
	if g.json() {
		return printJSON(os.Stdout, map[string]string{"uuid": rec.text("uuid"), "name_label": rec.text("name_label")})
	}
	fmt.Printf("%s: %s %s (%s)\n", verb, groupOf(class), rec.text("name_label"), rec.text("uuid"))
	return nil
}

// bar is a progress bar on a terminal, and nothing elsewhere.
type bar struct {
	p *mpb.Progress
	b *mpb.Bar
}

// newBar makes a bar of total bytes; with total 0 the bar shows a fraction.
func newBar(name string, total int64) *bar {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return nil
	}
	p := mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(40), mpb.WithRefreshRate(150*time.Millisecond))
	right := []decor.Decorator{decor.Percentage(decor.WC{W: 5})}
	if total > 0 {
		right = append(right, decor.CountersKibiByte(" % .1f / % .1f"), decor.AverageSpeed(decor.SizeB1024(0), " % .1f"))
	}
	began := time.Now()
	right = append(right, decor.Any(func(s decor.Statistics) string {
		if s.Current <= 0 {
			return "" // nothing can be said yet
		}
		left := float64(time.Since(began)) * float64(s.Total-s.Current) / float64(s.Current)
		return time.Duration(left).Round(time.Second).String()
	}, decor.WC{W: 8}))
	n := total
	if n == 0 {
		n = 1000
	}
	return &bar{p, p.AddBar(n, mpb.PrependDecorators(decor.Name(name+" ")), mpb.AppendDecorators(right...), mpb.BarRemoveOnComplete())}
}

func (b *bar) add(n int) {
	if b != nil {
		b.b.IncrBy(n)
	}
}

func (b *bar) fraction(f float64) {
	if b != nil {
		b.b.SetCurrent(int64(f * 1000))
	}
}

func (b *bar) done() {
	if b != nil {
		b.b.Abort(true)
		b.p.Wait()
	}
}

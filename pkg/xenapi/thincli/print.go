package thincli

import "strings"

// printer shows results. With --minimal everything is gathered into one line
// that only machines read.
type printer struct {
	conn    *conn
	minimal bool
	parts   []string
}

// cell is one line of a record: what stands left and right of the colon.
type cell struct{ key, value string }

// list shows lines.
func (p *printer) list(lines ...string) error {
	if p.minimal {
		p.parts = append(p.parts, joinMinimal(lines))
		return nil
	}
	for _, l := range lines {
		if err := p.conn.print(l); err != nil {
			return err
		}
	}
	return nil
}

// table shows records. Of each record the minimal form keeps the first cell.
func (p *printer) table(records [][]cell) error {
	if p.minimal {
		var first []string
		for _, rec := range records {
			if len(rec) > 0 {
				first = append(first, rec[0].value)
			}
		}
		if len(first) > 0 {
			p.parts = append(p.parts, joinMinimal(first))
		}
		return nil
	}
	for _, rec := range records {
		if err := p.conn.print(layout(rec) + "\n"); err != nil {
			return err
		}
	}
	return nil
}

// flush ends the output: the one line of the minimal form, also when it is empty.
func (p *printer) flush() error {
	if !p.minimal {
		return nil
	}
	return p.conn.print(strings.Join(p.parts, ","))
}

// layout is one record: the first key on the left, the others against the
// colon, which stands four columns right of the longest key.
func layout(rec []cell) string {
	width := 0
	for _, c := range rec {
		width = max(width, len(c.key))
	}
	width += 4
	lines := make([]string, len(rec))
	for i, c := range rec {
		pad := strings.Repeat(" ", width-len(c.key))
		if i == 0 {
			lines[i] = c.key + pad + ": " + c.value
		} else {
			lines[i] = pad + c.key + ": " + c.value
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

var minimalEscapes = strings.NewReplacer(",", `\,`, `\`, `\\`)

func joinMinimal(values []string) string {
	escaped := make([]string, len(values))
	for i, v := range values {
		escaped[i] = minimalEscapes.Replace(v)
	}
	return strings.Join(escaped, ",")
}

package thincli

import "strings"

const helpHead = `Usage:
  xe <command>
    [ -s <server> ] [ -p <port> ]
    [ -u <username> -pw <password> | -pwf <password file> ]
    [ --nossl ] [ --debug ] [ --minimal ]
    [ <name>=<value> ... ]

xe help <command> tells about one command.`

// helpIgnored are the parameters of xe help that are not names of commands.
var helpIgnored = map[string]bool{
	"server": true, "username": true, "password": true, "port": true, "minimal": true, "all": true, "trace": true,
}

// help answers `xe help`, `xe help --all` and `xe help COMMAND…`. It needs no login.
func (r *run) help() error {
	table := commandTable()
	asked := false
	for _, p := range r.line.params {
		if helpIgnored[p.key] {
			continue
		}
		asked = true
		if err := r.helpOn(table[p.key], p.key); err != nil {
			return err
		}
	}
	if asked {
		return r.out.flush()
	}
	all := r.line.params.flag("all")
	var names []string
	for _, n := range sortedKeys(table) {
		if all || table[n].standard {
			names = append(names, n)
		}
	}
	if r.out.minimal {
		return r.helpFlush(names...)
	}
	title := "Common commands (xe help --all shows every one)"
	if all {
		title = "All commands"
	}
	return r.helpFlush(helpHead, "", title, strings.Repeat("-", len(title)), "", wrap(names))
}

func (r *run) helpFlush(lines ...string) error {
	if err := r.out.list(lines...); err != nil {
		return err
	}
	return r.out.flush()
}

func (r *run) helpOn(c *command, name string) error {
	if c == nil {
		return r.out.list("Unknown command '" + name + "'")
	}
	return r.out.table([][]cell{{
		{"command name        ", c.name},
		{"reqd params     ", strings.Join(c.required, ", ")},
		{"optional params ", strings.Join(c.optional, ", ")},
		{"description     ", c.help},
	}})
}

// wrap joins names into lines of at most 78 columns.
func wrap(names []string) string {
	const indent, width = "    ", 78
	var lines []string
	line := ""
	for _, n := range names {
		switch {
		case line == "":
			line = indent + n
		case len(line)+2+len(n) > width:
			lines = append(lines, line+",")
			line = indent + n
		default:
			line += ", " + n
		}
	}
	return strings.Join(append(lines, line), "\n")
}

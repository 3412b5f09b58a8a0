package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/server"
)

// The tables of docs/operations.md are those of the program. PATCHD_DOCS=write
// writes them anew.
func TestOperationsDocHasTheTablesOfTheProgram(t *testing.T) {
	const path = "../../docs/operations.md"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for name, want := range map[string]string{"settings": settingsTable(), "troubles": troublesTable()} {
		begin, end := "<!-- "+name+": made from the program -->\n", "<!-- end of "+name+" -->"
		head, rest, ok := strings.Cut(text, begin)
		have, tail, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("%s has no place for the table of %s", path, name)
		}
		if have != want && os.Getenv("PATCHD_DOCS") != "write" {
			t.Errorf("the table of %s in %s is not that of the program: PATCHD_DOCS=write go test ./cmd/patchd -run Docs writes it", name, path)
		}
		text = head + begin + want + end + tail
	}
	if os.Getenv("PATCHD_DOCS") == "write" {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func settingsTable() string {
	var b strings.Builder
	b.WriteString("| key and flag | variable | default | what |\n|---|---|---|---|\n")
	c := server.DefaultConfig()
	for _, s := range c.Settings() {
		def := s.String()
		if def != "" {
			def = "`" + def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s |\n", s.Name, s.Env(), def, s.Help)
	}
	b.WriteString("| `pinned-sha256` | | | file only: list of SHA-256 of unsigned patch files that are accepted nonetheless |\n")
	return b.String()
}

var parameter = regexp.MustCompile(`%(\d)`)

func troublesTable() string {
	var b strings.Builder
	b.WriteString("| code | meaning | cure |\n|---|---|---|\n")
	for _, t := range troubles {
		row := fmt.Sprintf("| %s | %s | %s |", t.code, t.meaning, t.cure)
		row = strings.ReplaceAll(parameter.ReplaceAllString(row, "*$1*"), "\n", " ")
		b.WriteString(row + "\n")
	}
	return b.String()
}

// Every command of the documents exists, with its flags.
func TestCommandsInTheDocsExist(t *testing.T) {
	for _, path := range []string{"../../README.md", "../../docs/operations.md", "../../docs/patch-protocol.md", "../../docs/adding-an-sr-driver.md"} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("(?m)(?:`|^ *[$#] |^ExecStart=\\S*/)patchd ([a-z][^`\n]*)").FindAllStringSubmatch(string(b), -1) {
			words := strings.Fields(strings.Split(strings.Split(m[1], " #")[0], "&")[0])
			cmd, rest, err := newRoot().Find(words)
			if err != nil || cmd.HasSubCommands() && len(rest) > 0 && !strings.ContainsAny(rest[0], "…|") && cmd.Name() != "patchd" {
				t.Errorf("%s: there is no command `patchd %s`", path, m[1])
				continue
			}
			for _, w := range rest {
				name, ok := strings.CutPrefix(strings.Split(w, "=")[0], "--")
				if ok && cmd.Flags().Lookup(name) == nil && cmd.InheritedFlags().Lookup(name) == nil && name != "help" {
					t.Errorf("%s: `patchd %s`: there is no flag %s", path, m[1], w)
				}
			}
		}
	}
}

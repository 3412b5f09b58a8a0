package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
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
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) < 10 {
		t.Fatal(pages, err)
	}
	for _, path := range append(pages, "../../README.md") {
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

// The five commands of the README do what it says, word for word.
func TestReadmeCommandsWork(t *testing.T) {
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "## From upload to apply in five commands")
	block, _, _ := strings.Cut(rest, "\nThe same by clients")
	dir := t.TempDir()
	key := lab.NewKey(t, "Demo Signer <signer@example.test>")
	script := "set -e\n"
	for _, m := range regexp.MustCompile(`(?m)^    \$ (.*)$`).FindAllStringSubmatch(block, -1) {
		script += m[1] + "\n"
		if strings.HasSuffix(m[1], "&") {
			script += "trap 'kill $!; wait $!' EXIT\nuntil patchd status >/dev/null 2>&1; do sleep 0.05; done\n"
		}
	}
	for name, text := range map[string]string{
		"hello/info.toml": "name-label = \"hello\"\nname-description = \"greets\"\nversion = \"1.0\"\nafter-apply-guidance = [\"restartXAPI\"]\n",
		"hello/apply":     "#!/bin/sh\necho hello from the patch\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash", "-c", script)
	cmd.Dir = dir
	cmd.WaitDelay = time.Minute
	if err := os.Symlink(lab.Binary(t), filepath.Join(dir, "patchd")); err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "GNUPGHOME="+key.Home(), "PATCHD_STATE_DIR="+dir+"/state",
		"PATCHD_PATCH_DIR="+dir+"/patches", "PATCHD_LISTEN=127.0.0.1:0", "PATCHD_TLS_LISTEN=127.0.0.1:0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"hello.xsupdate: patch hello 1.0 (", "applied; it asks for: restartXAPI\nhello from the patch\n", "Patch hello  Local storage", "nothing is left of any"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the README's commands do not say %q:\n%s", want, out)
		}
	}
}

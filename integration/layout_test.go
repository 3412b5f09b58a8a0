package integration

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const module = "github.com/patchd/patchd/"

// arrows lists, for each package, what of our own it may import. An arrow that
// is not drawn here is not allowed.
var arrows = map[string][]string{
	"pkg/xapi":                  {},
	"pkg/fault":                 {},
	"pkg/dom0":                  {"pkg/xapi", "pkg/fault"},
	"pkg/dom0/dom0test":         {"pkg/xapi", "pkg/fault", "pkg/dom0"},
	"pkg/store":                 {"pkg/xapi", "pkg/fault"},
	"pkg/event":                 {"pkg/xapi", "pkg/store"},
	"pkg/session":               {"pkg/xapi", "pkg/store"},
	"pkg/task":                  {"pkg/xapi", "pkg/store"},
	"pkg/vdi":                   {"pkg/xapi", "pkg/fault", "pkg/dom0"},
	"pkg/patch":                 {"pkg/xapi", "pkg/dom0"},
	"pkg/sr":                    {"pkg/xapi", "pkg/fault", "pkg/dom0", "pkg/vdi"},
	"pkg/sr/file":               {"pkg/xapi", "pkg/fault", "pkg/vdi", "pkg/sr"},
	"pkg/sr/memory":             {"pkg/xapi", "pkg/fault", "pkg/vdi", "pkg/sr"},
	"pkg/sr/mounted":            {"pkg/xapi", "pkg/fault", "pkg/dom0", "pkg/sr", "pkg/sr/file"},
	"pkg/sr/ext":                {"pkg/xapi", "pkg/dom0", "pkg/sr", "pkg/sr/mounted"},
	"pkg/sr/xfs":                {"pkg/xapi", "pkg/dom0", "pkg/sr", "pkg/sr/mounted"},
	"pkg/sr/btrfs":              {"pkg/xapi", "pkg/dom0", "pkg/sr", "pkg/sr/mounted"},
	"pkg/sr/nfs":                {"pkg/xapi", "pkg/fault", "pkg/dom0", "pkg/sr", "pkg/sr/file", "pkg/sr/mounted"},
	"pkg/sr/lvm":                {"pkg/xapi", "pkg/fault", "pkg/dom0", "pkg/vdi", "pkg/sr"},
	"pkg/sr/srtest":             {"pkg/xapi", "pkg/dom0", "pkg/vdi", "pkg/sr"},
	"pkg/sr/all":                {"pkg/sr", "pkg/sr/file", "pkg/sr/ext", "pkg/sr/xfs", "pkg/sr/btrfs", "pkg/sr/nfs", "pkg/sr/lvm"},
	"pkg/delta":                 {"pkg/xapi"},
	"pkg/pool":                  {"pkg/xapi", "pkg/fault", "pkg/dom0", "pkg/store", "pkg/task", "pkg/event", "pkg/session", "pkg/vdi", "pkg/patch", "pkg/sr"},
	"pkg/peer":                  {"pkg/xapi", "pkg/fault", "pkg/vdi"},
	"pkg/trust":                 {"pkg/xapi"},
	"pkg/link":                  {"pkg/xapi", "pkg/store", "pkg/pool", "pkg/trust"},
	"pkg/agent":                 {"pkg/xapi", "pkg/fault", "pkg/dom0", "pkg/vdi", "pkg/patch", "pkg/sr", "pkg/pool"},
	"pkg/upload":                {"pkg/xapi", "pkg/fault", "pkg/dom0", "pkg/delta", "pkg/store", "pkg/task", "pkg/session", "pkg/vdi", "pkg/patch", "pkg/sr", "pkg/pool"},
	"pkg/xenapi":                {"pkg/xapi", "pkg/store", "pkg/task", "pkg/event", "pkg/session", "pkg/pool"},
	"pkg/xenapi/thincli":        {"pkg/xapi", "pkg/session", "pkg/xenapi"},
	"pkg/server":                nil, // wires everything
	"cmd/patchd":                nil,
	"integration":               nil,
	"integration/lab":           {"pkg/xapi"},
	"integration/lab/etcd":      {},
	"integration/vm":            nil, // its tests need a kernel of their own
	"pkg/xenapi/thincli/xetest": {},
}

// effects are packages of the standard library that only pkg/dom0 may use
// outside tests: it alone executes.
var effects = map[string]bool{"os/exec": true}

type source struct {
	folder, path string
	file         *ast.File
}

// sources parses every Go file that is not a test.
func sources(t *testing.T) []source {
	t.Helper()
	return filesOf(t, "_test.go")
}

// filesOf parses every Go file but those whose name ends in not.
func filesOf(t *testing.T, not string) []source {
	t.Helper()
	var out []source
	for _, top := range []string{"../cmd", "../pkg", "../integration"} {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && (d.Name() == "testdata" || d.Name() == "node_modules" || d.Name() == "clients") {
				return filepath.SkipDir
			}
			if d.IsDir() || !strings.HasSuffix(path, ".go") || not != "" && strings.HasSuffix(path, not) {
				return nil
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
			if err != nil {
				return err
			}
			folder := filepath.ToSlash(strings.TrimPrefix(filepath.Dir(path), "../"))
			out = append(out, source{folder, path, f})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(out) < 50 {
		t.Fatalf("only %d source files were found", len(out))
	}
	return out
}

func TestImportArrowsGoOneWay(t *testing.T) {
	for _, s := range sources(t) {
		allowed, known := arrows[s.folder]
		if !known {
			t.Errorf("%s: package %s has no line in arrows", s.path, s.folder)
			continue
		}
		for _, imp := range s.file.Imports {
			name := strings.Trim(imp.Path.Value, `"`)
			if effects[name] && s.folder != "pkg/dom0" && s.folder != "integration/lab" && !strings.HasSuffix(s.folder, "dom0test") {
				t.Errorf("%s imports %s: only pkg/dom0 runs programs", s.path, name)
			}
			ours, ok := strings.CutPrefix(name, module)
			if !ok || allowed == nil {
				continue
			}
			if !contains(allowed, ours) {
				t.Errorf("%s imports %s: that arrow is not drawn", s.path, ours)
			}
		}
	}
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

func TestEveryPackageSaysWhatItOwns(t *testing.T) {
	documented := map[string]bool{}
	for _, s := range sources(t) {
		documented[s.folder] = documented[s.folder] || s.file.Doc.Text() != ""
	}
	for folder, ok := range documented {
		if !ok && folder != "integration" {
			t.Errorf("package %s has no package comment", folder)
		}
	}
}

func TestEveryExportedNameIsDocumented(t *testing.T) {
	for _, s := range sources(t) {
		for _, d := range s.file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || !f.Name.IsExported() || f.Doc.Text() != "" || implementsSomething(f) {
				continue
			}
			t.Errorf("%s: %s has no comment", s.path, f.Name.Name)
		}
	}
}

// implementsSomething tells whether f is a method: those that fulfil a
// documented interface need no words of their own.
func implementsSomething(f *ast.FuncDecl) bool { return f.Recv != nil }

// A comment says what holds, and not where somebody has written it down: the
// reader has this repository and nothing else.
func TestNoUnfinishedWordsAndNoForeignPaths(t *testing.T) {
	elsewhere := regexp.MustCompile(`TODO|FIXME|XXX|README (section|fact|[0-9])|\b[Ff]act [0-9]|\bsection [0-9]|(design|storage|style)\.md|xenapi/README`)
	for _, s := range filesOf(t, "") {
		if s.path == "../integration/layout_test.go" {
			continue
		}
		for _, group := range s.file.Comments {
			if found := elsewhere.FindString(group.Text()); found != "" {
				t.Errorf("%s: a comment says %s", s.path, found)
			}
		}
	}
}

// Every document that a document of ours points to is there.
func TestLinksInTheDocsLeadSomewhere(t *testing.T) {
	docs, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	decisions, err := filepath.Glob("../docs/adr/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(append(docs, decisions...), "../README.md", "../ARCHITECTURE.md") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`).FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s points to %s, which is not there", path, m[1])
			}
		}
	}
}

// TestEveryModuleHasItsReason compares go.mod with the table of libraries.
func TestEveryModuleHasItsReason(t *testing.T) {
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`/v\d+$`)
	n := 0
	for _, line := range strings.Split(string(mod), "\n") {
		f := strings.Fields(line)
		if len(f) != 2 || !strings.HasPrefix(f[1], "v") || !strings.Contains(f[0], "/") {
			continue // not the requirement of a module that we import ourselves
		}
		n++
		name := strings.TrimPrefix(version.ReplaceAllString(f[0], ""), "github.com/")
		name = strings.Replace(name, "go.etcd.io/", "", 1)
		if !strings.Contains(string(page), name) {
			t.Errorf("ARCHITECTURE.md does not say why %s is there", f[0])
		}
	}
	if n < 15 {
		t.Errorf("only %d modules were found in go.mod", n)
	}
}

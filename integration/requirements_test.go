package integration

import (
	"fmt"
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

// TestRequirements checks docs/requirements.md: each row is there once, each
// names tests that exist and that name the row, and what differs from the
// proposal is told (S1-33).
func TestRequirements(t *testing.T) {
	doc, err := os.ReadFile("../docs/requirements.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := testFunctions(t)
	rows := regexp.MustCompile(`(?m)^\| (S1-\d\d) \| .+ \| (.+) \|$`).FindAllStringSubmatch(string(doc), -1)
	if len(rows) != 40 {
		t.Errorf("%d rows", len(rows))
	}
	for i, row := range rows {
		if want := fmt.Sprintf("S1-%02d", i+1); row[1] != want {
			t.Errorf("row %s stands where %s should", row[1], want)
		}
		names := regexp.MustCompile("`(Test[A-Za-z0-9_]+)`").FindAllStringSubmatch(row[2], -1)
		if len(names) == 0 {
			t.Errorf("row %s names no test", row[1])
		}
		named := false
		for _, name := range names {
			text, ok := tests[name[1]]
			if !ok {
				t.Errorf("row %s names %s, which is no test", row[1], name[1])
			}
			named = named || strings.Contains(text, row[1]) || strings.Contains(text, strings.ReplaceAll(row[1], "-", "_"))
		}
		if !named {
			t.Errorf("no test of row %s names it", row[1])
		}
	}
	storage := regexp.MustCompile(`(?m)^\| (B\d|ST-\d\d) \| .+ \| (.+) \|$`).FindAllStringSubmatch(string(doc), -1)
	if len(storage) != 9 {
		t.Errorf("%d rows of the storage engine", len(storage))
	}
	for _, row := range storage {
		for _, name := range regexp.MustCompile("`(Test[A-Za-z0-9_]+)`").FindAllStringSubmatch(row[2], -1) {
			if _, ok := tests[name[1]]; !ok {
				t.Errorf("row %s names %s, which is no test", row[1], name[1])
			}
		}
	}
	pool := regexp.MustCompile(`(?m)^\| C(\d+) \| .+ \| (.+) \|$`).FindAllStringSubmatch(string(doc), -1)
	if len(pool) != 11 {
		t.Errorf("%d rows of the pool", len(pool))
	}
	for i, row := range pool {
		if row[1] != fmt.Sprint(i+1) {
			t.Errorf("row C%s stands where C%d should", row[1], i+1)
		}
		for _, name := range regexp.MustCompile("`(Test[A-Za-z0-9_]+)`").FindAllStringSubmatch(row[2], -1) {
			if _, ok := tests[name[1]]; !ok {
				t.Errorf("row C%s names %s, which is no test", row[1], name[1])
			}
		}
	}
	_, differs, _ := strings.Cut(string(doc), "## What differs from the proposal")
	if strings.Count(differs, "\n- **") < 5 {
		t.Error("what differs from the proposal is not told")
	}
}

// testFunctions gives each test of the module: its name and comment.
func testFunctions(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				out[f.Name.Name] = f.Name.Name + " " + f.Doc.Text()
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

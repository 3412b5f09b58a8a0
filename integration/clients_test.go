package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// clientPatch is a patch in a file, for a client that is a program.
type clientPatch struct {
	File string `json:"file"`
	UUID string `json:"uuid"`

	signed []byte
}

// clientPatches signs one patch per name. Each prints a text for precheck and
// for apply that a careless encoding would spoil; "slow" does not end by
// itself, and "unsigned" has no signature.
func clientPatches(t testing.TB, names ...string) map[string]clientPatch {
	t.Helper()
	dir, out := t.TempDir(), map[string]clientPatch{}
	for _, name := range names {
		p := lab.Patch{Label: "client " + name, Precheck: `echo 'checked <ok> & "fine"'`, Apply: "echo applied " + name,
			Guidance: "restartHVM restartXAPI", Pad: 20000}
		if name == "slow" {
			p.Apply = "sleep 300"
		}
		data := p.Payload()
		if name != "unsigned" {
			data = lab.DefaultKey(t).Sign(t, data)
		}
		file := filepath.Join(dir, name+".xsupdate")
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
		out[name] = clientPatch{file, string(p.UUID), data}
	}
	return out
}

// plan is what a client program is told, as JSON in a file.
type plan struct {
	URL       string                 `json:"url"`
	Transport string                 `json:"transport,omitempty"`
	Debounce  int                    `json:"debounce,omitempty"`
	User      string                 `json:"user"`
	Password  string                 `json:"password"`
	Patches   map[string]clientPatch `json:"patches"`
	Extra     map[string]string      `json:"extra,omitempty"`
}

func (p plan) write(t testing.TB) string {
	t.Helper()
	p.User, p.Password = "root", lab.Password
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "plan.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// client runs a client program of integration/clients in its folder; it must
// end well within a minute, with "ok" as its last line's first word.
func client(t testing.TB, dir, stdin, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = filepath.Join("clients", dir)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String()
}

// clientOK is client for a flow that says ok at its end.
func clientOK(t testing.TB, dir, name string, args ...string) {
	t.Helper()
	if out := client(t, dir, "", name, args...); !strings.HasPrefix(out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:], "ok") {
		t.Errorf("%s %v did not come to its end:\n%s", name, args, out)
	}
}

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// A4: a client library that is generated from the API's data model and takes no
// value of another type. It is a module of its own, so that ours needs it not.
func TestA4_AGeneratedGoClient(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "client")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir = filepath.Join("clients", "go")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	h := lab.Start(t, lab.Options{})
	p := plan{URL: h.TLSURL, Patches: clientPatches(t, "first", "second")}
	clientOK(t, "go", program, p.write(t))
	assertNoTasks(h)
}

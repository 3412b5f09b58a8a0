package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// binaries builds each variant of patchd once in a test run.
var binaries struct {
	sync.Mutex
	dir   string
	built map[string]string
}

// Binary is the path of patchd as it is released.
func Binary(t testing.TB) string { return build(t, "patchd", patchdPackage) }

// FaultBinary is patchd with fault injection compiled in.
func FaultBinary(t testing.TB) string {
	return build(t, "patchd-faults", patchdPackage, "-tags", "faults")
}

// etcdBinary is a node of an etcd cluster.
func etcdBinary(t testing.TB) string {
	return build(t, "etcd", "github.com/patchd/patchd/integration/lab/etcd")
}

const patchdPackage = "github.com/patchd/patchd/cmd/patchd"

func build(t testing.TB, name, pkg string, flags ...string) string {
	t.Helper()
	binaries.Lock()
	defer binaries.Unlock()
	if path, ok := binaries.built[name]; ok {
		return path
	}
	if binaries.dir == "" {
		dir, err := os.MkdirTemp("", "patchd-bin-")
		if err != nil {
			t.Fatal(err)
		}
		binaries.dir, binaries.built = dir, map[string]string{}
	}
	path := filepath.Join(binaries.dir, name)
	args := append(append([]string{"build"}, flags...), "-o", path, pkg)
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	binaries.built[name] = path
	return path
}

// Main runs the tests of a package and removes what lab made for all of them.
func Main(m *testing.M) {
	code := m.Run()
	binaries.Lock()
	defer binaries.Unlock()
	if binaries.dir != "" {
		if err := os.RemoveAll(binaries.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	removeKeys()
	os.Exit(code)
}

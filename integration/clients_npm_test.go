package integration

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

var npmOnce sync.Once

// npmClients sees to it that the npm packages are installed.
func npmClients(t testing.TB) {
	t.Helper()
	npmOnce.Do(func() { run(t, filepath.Join("..", "scripts", "clients.sh")) })
}

// A3: the npm package xen-api 4.7.6 as it is, over both encodings, in the clear
// and over TLS.
func TestA3_XenAPIOfNpm(t *testing.T) {
	t.Parallel()
	npmClients(t)
	for _, c := range []struct {
		transport string
		debounce  int // between two event.from, ms; 200 is the default
		url       func(*lab.Host) string
	}{
		{"json-rpc", 200, func(h *lab.Host) string { return h.URL }},
		{"xml-rpc", 20, func(h *lab.Host) string { return h.TLSURL }},
	} {
		t.Run(c.transport, func(t *testing.T) {
			t.Parallel()
			h := lab.Start(t, lab.Options{})
			p := plan{URL: c.url(h), Transport: c.transport, Debounce: c.debounce,
				Patches: clientPatches(t, "buffer", "sized", "unsized", "slow", "unsigned")}
			clientOK(t, "npm", "node", "flow.mjs", p.write(t))
			assertNoTasks(h)
		})
	}
}

// assertNoTasks checks that a client that destroys its tasks leaves none.
func assertNoTasks(h *lab.Host) {
	h.T.Helper()
	s := h.Root()
	for ref, rec := range s.All("task") {
		h.T.Errorf("task %s is left: %v", ref, rec)
	}
	h.CheckNothingLeft()
}

// A3: the calls of Xen Orchestra's server for a classic patch.
func TestA3_XenOrchestraInstallsALegacyPatch(t *testing.T) {
	t.Parallel()
	npmClients(t)
	h := lab.Start(t, lab.Options{})
	p := plan{URL: h.URL, Transport: "auto", Patches: clientPatches(t, "legacy")}
	clientOK(t, "npm", "node", "xoserver.mjs", p.write(t))
	assertNoTasks(h)

	t.Run("the package's own command line", func(t *testing.T) { npmCommandLine(t, h, p.Patches["legacy"].UUID) })
	t.Run("a certificate that nobody vouches for is refused", func(t *testing.T) {
		out, _ := exec.Command("node", "clients/npm/node_modules/xen-api/cli.mjs", h.TLSURL, "root", lab.Password).CombinedOutput()
		if !strings.Contains(string(out), "self-signed certificate") {
			t.Errorf("got %s", out)
		}
	})
}

// A3: the xen-api of 2019.
func TestA3_XenAPIOf2019(t *testing.T) {
	t.Parallel()
	npmClients(t)
	h := lab.Start(t, lab.Options{})
	p := plan{URL: h.URL, Patches: clientPatches(t, "buffer", "sized", "unsized")}
	clientOK(t, "npm", "node", "old.mjs", p.write(t))
	assertNoTasks(h)
}

// npmCommandLine types into the package's own program, a line at a time, and
// waits for each answer: it evaluates what it reads at once.
func npmCommandLine(t *testing.T, h *lab.Host, uuid string) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", "node_modules/xen-api/cli.mjs", "--allow-unauthorized", h.TLSURL, "root", lab.Password)
	cmd.Dir = filepath.Join("clients", "npm")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := bufio.NewReader(out)
	for _, c := range []struct{ line, answer string }{
		{"call('host.get_all').then(_ => _.length + ' host')", "'1 host'"},
		{"xapi.objectsFetched.then(() => findAll({ $type: 'pool_patch' }).map(_ => _.uuid).join())", "'" + uuid + "'"},
		{"callAsync('pool_patch.precheck', find({ $type: 'pool_patch' }).$ref, xapi.pool.master)", `'checked <ok> & "fine"\n'`},
	} {
		fmt.Fprintln(in, c.line)
		for {
			got, err := said.ReadString('\n')
			if strings.Contains(got, c.answer) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v instead of %s", c.line, err, c.answer)
			}
		}
	}
	fmt.Fprintln(in, ".exit")
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

package integration

import (
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// A4: Python's own XML-RPC and HTTP clients, in the clear and over TLS.
func TestA4_PythonsOwnClients(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]func(*lab.Host) string{
		"http":  func(h *lab.Host) string { return h.URL },
		"https": func(h *lab.Host) string { return h.TLSURL },
	} {
		t.Run(name, func(t *testing.T) {
			h := lab.Start(t, lab.Options{})
			p := plan{URL: url(h), Patches: clientPatches(t, "first", "second", "third", "plain")}
			clientOK(t, "python", "python3", "flow.py", p.write(t))
		})
	}
}

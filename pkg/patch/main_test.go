package patch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
)

// The keys of the throw-away gpg of these tests.
const (
	keyA    = "alice@patch.test"   // ed25519, may sign
	keyB    = "bob@patch.test"     // rsa2048
	keySub  = "carol@patch.test"   // certifies only; a subkey signs
	keyWeak = "weak@patch.test"    // rsa1024
	keyDSA  = "dsa@patch.test"     // dsa2048
	keyGone = "revoked@patch.test" // revoked by its certificate
	keyOld  = "expired@patch.test" // made long ago, for a day
)

// longAgo is when keyOld was made and signed.
var longAgo = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// gpgHome is made, with the keys in it, when the first test needs it: workers
// of the fuzzer, which are killed in the end, never do.
var (
	gpgHome string
	gpgKeys = sync.OnceValue(makeHome)
)

func TestMain(m *testing.M) {
	dom0.MaybeShim()
	code := m.Run()
	if gpgHome != "" {
		removeHome(gpgHome)
	}
	os.Exit(code)
}

func makeHome() (err error) {
	// The path must be short: gpg puts sockets in it.
	if gpgHome, err = os.MkdirTemp("", "gpg"); err != nil {
		return err
	}
	return makeKeys()
}

// removeHome ends the agent of a gpg folder and removes it.
func removeHome(dir string) {
	exec.Command("gpgconf", "--homedir", dir, "--kill", "all").Run()
	os.RemoveAll(dir)
}

func makeKeys() error {
	for _, k := range []struct{ name, algo, usage string }{
		{keyA, "ed25519", "sign"}, {keyB, "rsa2048", "sign"}, {keySub, "ed25519", "cert"},
		{keyWeak, "rsa1024", "sign"}, {keyDSA, "dsa2048", "sign"}, {keyGone, "ed25519", "sign"},
	} {
		if _, err := execGPG(nil, "--quick-generate-key", k.name, k.algo, k.usage, "0"); err != nil {
			return err
		}
	}
	_, err := execGPG(nil, at(longAgo), "--quick-generate-key", keyOld, "ed25519", "sign", "1d")
	if err != nil {
		return err
	}
	fp, err := fingerprintOf(keySub, execGPG)
	if err != nil {
		return err
	}
	_, err = execGPG(nil, "--quick-add-key", fp, "ed25519", "sign", "0")
	return err
}

func at(t time.Time) string { return "--faked-system-time=" + t.UTC().Format("20060102T150405") + "!" }

func runGPG(stdin []byte, args ...string) ([]byte, error) {
	if err := gpgKeys(); err != nil {
		return nil, err
	}
	return execGPG(stdin, args...)
}

func execGPG(stdin []byte, args ...string) ([]byte, error) {
	args = append([]string{"--homedir", gpgHome, "--batch", "--quiet", "--no-tty", "--yes", "--passphrase", "", "--pinentry-mode", "loopback"}, args...)
	c := exec.Command("gpg", args...)
	var stderr bytes.Buffer
	c.Stdin, c.Stderr = bytes.NewReader(stdin), &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("gpg %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return out, nil
}

func gpg_(t testing.TB, stdin []byte, args ...string) []byte {
	t.Helper()
	out, err := runGPG(stdin, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func gpgFingerprint(key string) (string, error) { return fingerprintOf(key, runGPG) }

func fingerprintOf(key string, run func([]byte, ...string) ([]byte, error)) (string, error) {
	out, err := run(nil, "--with-colons", "--list-keys", key)
	if err != nil {
		return "", err
	}
	for _, line := range strings.Split(string(out), "\n") {
		if f := strings.Split(line, ":"); f[0] == "fpr" {
			return f[9], nil
		}
	}
	return "", errors.New("no fingerprint")
}

// export gives the public key, binary.
func export(t testing.TB, keys ...string) []byte {
	t.Helper()
	return gpg_(t, nil, append([]string{"--export"}, keys...)...)
}

// ringOf makes a keyring of those keys.
func ringOf(t testing.TB, keys ...string) *Keyring {
	t.Helper()
	k := NewKeyring("test", export(t, keys...))
	if p := k.Problems(); len(p) > 0 {
		t.Fatal(p)
	}
	return k
}

func writeFile(t testing.TB, name string, data []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// readMessage reads a whole patch file.
func readMessage(file []byte, keys *Keyring, o Options) ([]byte, *Message, error) {
	m, err := Open(bytes.NewReader(file), keys, o)
	if err != nil {
		return nil, nil, err
	}
	payload, err := io.ReadAll(m)
	return payload, m, err
}

// runner is a Dom0 that can only run programs, without a sandbox.
type runner struct {
	dom0.Dom0
	run func(ctx context.Context, c dom0.Cmd) (dom0.Result, error)
}

func (r runner) Run(ctx context.Context, c dom0.Cmd) (dom0.Result, error) { return r.run(ctx, c) }

// plainRun runs a program as it is.
func plainRun(ctx context.Context, c dom0.Cmd) (dom0.Result, error) {
	cmd := exec.CommandContext(ctx, c.Path, c.Args...)
	cmd.Env, cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Env, c.Dir, c.Stdin, c.Stdout, c.Stderr
	for _, f := range c.ExtraFiles {
		cmd.ExtraFiles = append(cmd.ExtraFiles, f.(*os.File))
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return dom0.Result{}, err
	}
	return dom0.Result{ExitCode: cmd.ProcessState.ExitCode()}, nil
}

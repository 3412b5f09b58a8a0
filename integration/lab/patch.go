package lab

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

// Key is a signing key that gpg made.
type Key struct {
	Fingerprint string
	Public      []byte
	home        string
}

var keys struct {
	sync.Mutex
	homes []string
}

var first struct {
	sync.Mutex
	key *Key
}

// DefaultKey is the key that every Host trusts; it is made once in a test run.
func DefaultKey(t testing.TB) *Key {
	t.Helper()
	first.Lock()
	defer first.Unlock()
	if first.key == nil {
		first.key = NewKey(t, "Lab <lab@example.test>")
	}
	return first.key
}

// NewKey makes an ed25519 key without a passphrase.
func NewKey(t testing.TB, uid string) *Key {
	t.Helper()
	home, err := os.MkdirTemp("", "patchd-gpg-")
	if err != nil {
		t.Fatal(err)
	}
	keys.Lock()
	keys.homes = append(keys.homes, home)
	keys.Unlock()
	k := &Key{home: home}
	k.GPG(t, nil, "--quick-generate-key", uid, "ed25519", "sign", "never")
	for _, line := range strings.Split(string(k.GPG(t, nil, "--with-colons", "--list-keys")), "\n") {
		if f := strings.Split(line, ":"); f[0] == "fpr" {
			k.Fingerprint = f[9]
			break
		}
	}
	k.Public = k.GPG(t, nil, "--export")
	return k
}

// Home is the GNUPGHOME of the key.
func (k *Key) Home() string { return k.home }

// GPG runs gpg with the key's home.
func (k *Key) GPG(t testing.TB, stdin []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("gpg", append([]string{"--batch", "--yes", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""}, args...)...)
	cmd.Env = append(os.Environ(), "GNUPGHOME="+k.home)
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("gpg %v: %v\n%s", args, err, errs.String())
	}
	return out.Bytes()
}

// Sign makes a binary signed message, uncompressed, as patches are.
func (k *Key) Sign(t testing.TB, payload []byte) []byte {
	t.Helper()
	return k.GPG(t, payload, "--sign", "-z", "0", "--digest-algo", "SHA256")
}

// removeKeys ends the agents gpg has started and removes the homes.
func removeKeys() {
	keys.Lock()
	defer keys.Unlock()
	for _, home := range keys.homes {
		cmd := exec.Command("gpgconf", "--kill", "all")
		cmd.Env = append(os.Environ(), "GNUPGHOME="+home)
		cmd.Run()
		os.RemoveAll(home)
	}
}

// Patch describes a patch made of shell.
type Patch struct {
	UUID        xapi.UUID // empty: a fresh one
	Label       string    // empty: "lab patch"
	Version     string    // empty: "1.0"
	Guidance    string
	Extra       string // further attributes of the info element
	Info        string // the whole text `info` prints; empty: made of the above
	InfoScript  string // shell that runs for `info` instead
	Precheck    string // shell; empty: succeeds
	Apply       string // shell; empty: succeeds
	Pad         int    // random bytes added behind the script
	Interpreter string // empty: /bin/sh
}

// XML is what `info` prints.
func (p *Patch) XML() string {
	if p.Info != "" {
		return p.Info
	}
	return fmt.Sprintf(`<info uuid="%s" version="%s" name-label="%s" name-description="made by the lab" after-apply-guidance="%s"%s/>`,
		p.UUID, p.Version, p.Label, p.Guidance, p.Extra)
}

// Payload is the executable. It fills in what p leaves open.
func (p *Patch) Payload() []byte {
	set := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	if p.UUID == "" {
		p.UUID = xapi.NewUUID()
	}
	set(&p.Label, "lab patch")
	set(&p.Version, "1.0")
	set(&p.Interpreter, "/bin/sh")
	set(&p.Precheck, ":")
	set(&p.Apply, ":")
	info := p.InfoScript
	if info == "" {
		info = "cat <<'INFO_END'\n" + p.XML() + "\nINFO_END"
	}
	script := fmt.Sprintf("#!%s\ncase \"$1\" in\ninfo)\n%s\n;;\nprecheck)\n%s\n;;\napply)\n%s\n;;\n*) exit 3 ;;\nesac\nexit 0\n",
		p.Interpreter, info, p.Precheck, p.Apply)
	pad := make([]byte, p.Pad)
	rand.Read(pad)
	return append([]byte(script), pad...)
}

// Signed is the payload signed with the lab's own key.
func (p *Patch) Signed(t testing.TB) []byte {
	t.Helper()
	return DefaultKey(t).Sign(t, p.Payload())
}

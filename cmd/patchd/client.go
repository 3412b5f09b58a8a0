package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/patchd/patchd/pkg/server"
	"github.com/patchd/patchd/pkg/xapi"
)

// global holds the flags of every command that talks to a daemon.
type global struct {
	stateDir, server, pin, user, passwordFile, output string
}

func (g *global) register(f *pflag.FlagSet) {
	def := func(env, value string) string {
		if v := os.Getenv(env); v != "" {
			return v
		}
		return value
	}
	f.StringVar(&g.stateDir, "state-dir", def("PATCHD_STATE_DIR", server.DefaultConfig().StateDir), "folder whose patchd.sock is used when there is no --server")
	f.StringVar(&g.server, "server", def("PATCHD_SERVER", ""), "URL of a patchd, such as https://host:8443")
	f.StringVar(&g.pin, "pin", def("PATCHD_PIN", ""), "SHA-256 of the server's public key (SPKI), in hexadecimal")
	f.StringVar(&g.user, "user", def("PATCHD_USER", "root"), "user name with --server")
	f.StringVar(&g.passwordFile, "password-file", def("PATCHD_PASSWORD_FILE", ""), "file with the password; else PATCHD_PASSWORD, else it is asked for")
	f.StringVarP(&g.output, "output", "o", def("PATCHD_OUTPUT", "table"), "table or json")
}

func (g *global) validate() error {
	if g.output != "table" && g.output != "json" {
		return usagef("--output: %q is neither table nor json", g.output)
	}
	return nil
}

func (g *global) json() bool { return g.output == "json" }

// client is one session with a daemon.
type client struct {
	base    string
	http    *http.Client
	session string
}

// connect logs in: over the unix socket as root, or at --server.
func (g *global) connect(ctx context.Context) (*client, error) {
	if g.server == "" {
		return g.connectSocket(ctx)
	}
	u, err := url.Parse(g.server)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" {
		return nil, usagef("--server: %q is not an http or https URL", g.server)
	}
	password, err := g.password()
	if err != nil {
		return nil, err
	}
	tlsConfig, err := g.tls()
	if err != nil {
		return nil, err
	}
	c := &client{
		base: strings.TrimSuffix(u.String(), "/"),
		http: &http.Client{Transport: &http.Transport{TLSClientConfig: tlsConfig, ExpectContinueTimeout: 30 * time.Second, MaxIdleConnsPerHost: 4}},
	}
	return c, c.login(ctx, g.user, password)
}

func (g *global) connectSocket(ctx context.Context) (*client, error) {
	path := filepath.Join(g.stateDir, "patchd.sock")
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	c := &client{
		base: "http://patchd",
		http: &http.Client{Transport: &http.Transport{DialContext: dial, ExpectContinueTimeout: 30 * time.Second, MaxIdleConnsPerHost: 4}},
	}
	err := c.login(ctx, "root", "")
	var unreachable unreachableError
	if errors.As(err, &unreachable) {
		return nil, unreachableError{fmt.Errorf("no patchd answers at %s (%w); start it with `patchd serve`, or name another with --server or --state-dir", path, unreachable.error)}
	}
	return c, err
}

func (g *global) password() (string, error) {
	if g.passwordFile != "" {
		b, err := os.ReadFile(g.passwordFile)
		return strings.TrimRight(string(b), "\r\n"), err
	}
	if v, ok := os.LookupEnv("PATCHD_PASSWORD"); ok {
		return v, nil
	}
	return askPassword(fmt.Sprintf("Password of %s: ", g.user))
}

// askPassword reads a password from the terminal without showing it.
func askPassword(prompt string) (string, error) {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return "", usagef("a password is needed: use --password-file or PATCHD_PASSWORD")
	}
	fmt.Fprint(os.Stderr, prompt)
	b, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(os.Stderr)
	return string(b), err
}

// tls checks the server by its pinned key, or else by the system's CAs.
func (g *global) tls() (*tls.Config, error) {
	if g.pin == "" {
		return &tls.Config{MinVersion: tls.VersionTLS12}, nil
	}
	want, err := hex.DecodeString(strings.ReplaceAll(strings.ToLower(g.pin), ":", ""))
	if err != nil || len(want) != sha256.Size {
		return nil, usagef("--pin: %q is not a SHA-256 in hexadecimal", g.pin)
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // the pin below is the check
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			cert, err := x509.ParseCertificate(raw[0])
			if err != nil {
				return err
			}
			if got := sha256.Sum256(cert.RawSubjectPublicKeyInfo); !bytes.Equal(got[:], want) {
				return fmt.Errorf("the server's key has SHA-256 %x, --pin says %x", got, want)
			}
			return nil
		},
	}, nil
}

func (c *client) login(ctx context.Context, user, password string) error {
	var session string
	if err := c.rpc(ctx, &session, "session.login_with_password", user, password, "2.5", "patchd-cli"); err != nil {
		return err
	}
	c.session = session
	return nil
}

// close logs out; the daemon forgets a session that is not closed by itself.
func (c *client) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := c.call(ctx, nil, "session.logout"); err != nil {
		return // the session expires
	}
}

// call makes one call with the session as its first parameter.
func (c *client) call(ctx context.Context, into any, method string, params ...any) error {
	return c.rpc(ctx, into, method, append([]any{c.session}, params...)...)
}

// maxAnswer bounds what is read of one answer, in bytes.
const maxAnswer = 256 << 20

func (c *client) rpc(ctx context.Context, into any, method string, params ...any) error {
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+"/jsonrpc", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return unreachableError{err}
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return unreachableError{err}
	}
	if res.StatusCode == http.StatusServiceUnavailable {
		return unreachableError{errors.New("patchd is still starting")}
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the server answers %s to %s", res.Status, method)
	}
	return decodeAnswer(b, into)
}

func decodeAnswer(b []byte, into any) error {
	var a struct {
		Result json.RawMessage `json:"result"`
		Error  *struct {
			Message string   `json:"message"`
			Data    []string `json:"data"`
		} `json:"error"`
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return fmt.Errorf("the answer is not JSON-RPC: %w", err)
	}
	if a.Error != nil {
		return xapi.NewError(a.Error.Message, a.Error.Data...)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(a.Result, into)
}

// with runs f with a session and explains the failure.
func (g *global) with(ctx context.Context, f func(ctx context.Context, c *client) error) error {
	c, err := g.connect(ctx)
	if err != nil {
		return explain(ctx, nil, err)
	}
	defer c.close()
	return explain(ctx, c, f(ctx, c))
}

// record is one object as it came over the wire.
type record map[string]any

func (r record) text(field string) string {
	switch v := r[field].(type) {
	case nil:
		return ""
	case string:
		return v
	case bool:
		if v {
			return "yes"
		}
		return "no"
	case []any:
		words := make([]string, len(v))
		for i, w := range v {
			words[i] = fmt.Sprint(w)
		}
		return strings.Join(words, " ")
	}
	return fmt.Sprint(r[field])
}

// all gives the records of a class by ref.
func (c *client) all(ctx context.Context, class string) (map[string]record, error) {
	out := map[string]record{}
	return out, c.call(ctx, &out, class+".get_all_records")
}

// find gives the one object of class that has this uuid, name-label or ref.
func (c *client) find(ctx context.Context, class, text string) (string, record, error) {
	all, err := c.all(ctx, class)
	if err != nil {
		return "", nil, err
	}
	if rec, ok := all[text]; ok {
		return text, rec, nil
	}
	var refs []string
	for ref, rec := range all {
		if rec.text("uuid") == strings.ToLower(text) {
			return ref, rec, nil
		}
		if rec.text("name_label") == text && text != "" {
			refs = append(refs, ref)
		}
	}
	switch len(refs) {
	case 1:
		return refs[0], all[refs[0]], nil
	case 0:
		return "", nil, fmt.Errorf("there is no %s with the uuid or name %q; `patchd %s list` shows them", class, text, groupOf(class))
	}
	return "", nil, fmt.Errorf("%d objects of class %s are called %q: use the uuid", len(refs), class, text)
}

// groupOf is the command group that lists a class.
func groupOf(class string) string {
	switch class {
	case "pool_patch":
		return "patch"
	case "SR", "VDI":
		return strings.ToLower(class)
	}
	return class
}

// hostOrOnly finds a host, or takes the only one when text is empty.
func (c *client) hostOrOnly(ctx context.Context, text string) (string, record, error) {
	if text != "" {
		return c.find(ctx, "host", text)
	}
	all, err := c.all(ctx, "host")
	if err != nil {
		return "", nil, err
	}
	if len(all) != 1 {
		return "", nil, usagef("the pool has %d hosts: name one", len(all))
	}
	for ref, rec := range all {
		return ref, rec, nil
	}
	return "", nil, nil
}

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
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/patchd/patchd/pkg/server"
	"github.com/patchd/patchd/pkg/xapi"
)

// global holds the flags of every command that talks to a daemon.
type global struct {
	stateDir, server, pin, user, passwordFile, output string

	flags *pflag.FlagSet
}

func (g *global) register(f *pflag.FlagSet) {
	g.flags = f
	f.StringVar(&g.stateDir, "state-dir", server.DefaultConfig().StateDir, "folder whose patchd.sock is used when there is no --server ($PATCHD_STATE_DIR)")
	f.StringVar(&g.server, "server", "", "URL of a patchd, such as https://host:8443 ($PATCHD_SERVER)")
	f.StringVar(&g.pin, "pin", "", "SHA-256 of the server's public key, as 'patchd status' on that host tells ($PATCHD_PIN)")
	f.StringVar(&g.user, "user", "root", "user name with --server ($PATCHD_USER)")
	f.StringVar(&g.passwordFile, "password-file", "", "file with the password ($PATCHD_PASSWORD_FILE); else $PATCHD_PASSWORD, else it is asked for")
	f.StringVarP(&g.output, "output", "o", "table", "table or json ($PATCHD_OUTPUT)")
}

// fromEnv takes each flag that was not given from its variable.
func (g *global) fromEnv() error {
	var failed error
	g.flags.VisitAll(func(f *pflag.Flag) {
		env := "PATCHD_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if text := os.Getenv(env); text != "" && !f.Changed && failed == nil {
			failed = f.Value.Set(text)
		}
	})
	return failed
}

func (g *global) validate() error {
	if err := g.fromEnv(); err != nil {
		return usageError{err}
	}
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
	again   func(ctx context.Context) error // logs in once more
}

// connect logs in: over the unix socket as root, or at --server.
func (g *global) connect(ctx context.Context) (*client, error) {
	c, err := g.reach()
	if err != nil {
		return nil, err
	}
	if g.server == "" {
		return g.loginSocket(ctx, c)
	}
	password, err := g.password(ctx)
	if err != nil {
		return nil, err
	}
	c.again = func(ctx context.Context) error { return g.explainServer(c.login(ctx, g.user, password)) }
	if err := c.again(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// reach makes the client of the unix socket or of --server, without a login.
func (g *global) reach() (*client, error) {
	if g.server == "" {
		dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return dialUnix(ctx, g.socket()) }
		return &client{
			base: "http://patchd",
			http: &http.Client{Transport: &http.Transport{DialContext: dial, ExpectContinueTimeout: 30 * time.Second, MaxIdleConnsPerHost: 4}},
		}, nil
	}
	u, err := url.Parse(g.server)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" {
		return nil, usagef("--server: %q is not an http or https URL", g.server)
	}
	tlsConfig, err := g.tls()
	if err != nil {
		return nil, err
	}
	return &client{
		base: strings.TrimSuffix(u.String(), "/"),
		http: &http.Client{Transport: &http.Transport{
			DialContext: dialTCP, TLSClientConfig: tlsConfig, ExpectContinueTimeout: 30 * time.Second, MaxIdleConnsPerHost: 4,
		}},
	}, nil
}

// socket is the path of the daemon's unix socket.
func (g *global) socket() string { return filepath.Join(g.stateDir, "patchd.sock") }

// explainServer says what helps when a server cannot be reached.
func (g *global) explainServer(err error) error {
	var unreachable unreachableError
	var untrusted *tls.CertificateVerificationError
	switch {
	case !errors.As(err, &unreachable):
		return err
	case errors.As(err, &untrusted):
		return unreachableError{fmt.Errorf("%s shows a certificate that this machine does not trust (%w): `patchd status` on that host tells its --pin", g.server, untrusted.Err)}
	}
	return unreachableError{fmt.Errorf("no patchd answers at %s: %w", g.server, reason(unreachable.error))}
}

// reason is the innermost cause of a failed connection.
func reason(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func (g *global) loginSocket(ctx context.Context, c *client) (*client, error) {
	c.again = func(ctx context.Context) error { return c.login(ctx, "root", "") }
	err := c.again(ctx)
	var unreachable unreachableError
	if errors.As(err, &unreachable) {
		if errors.Is(err, errStarting) {
			return nil, unreachableError{fmt.Errorf("the patchd at %s is still starting: try again in a moment; `GET /healthz` and its log tell how far it is", g.socket())}
		}
		cure := "start it with `patchd serve`, or name another with --server or --state-dir"
		if errors.Is(err, fs.ErrPermission) {
			cure = "only root may use the socket; others log in with --server and --user"
		}
		return nil, unreachableError{fmt.Errorf("no patchd answers at %s (%w): %s", g.socket(), reason(unreachable.error), cure)}
	}
	return c, err
}

func (g *global) password(ctx context.Context) (string, error) {
	if g.passwordFile != "" {
		b, err := os.ReadFile(g.passwordFile)
		return strings.TrimRight(string(b), "\r\n"), err
	}
	if v, ok := os.LookupEnv("PATCHD_PASSWORD"); ok {
		return v, nil
	}
	return askPassword(ctx, fmt.Sprintf("Password of %s: ", g.user))
}

// askPassword reads a password from the terminal without showing it. When the
// command is interrupted the terminal shows again what is typed.
func askPassword(ctx context.Context, prompt string) (password string, err error) {
	fd := int(os.Stdin.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", usagef("a password is needed: use --password-file or PATCHD_PASSWORD")
	}
	if err := hideTyping(fd); err != nil {
		return "", err
	}
	fmt.Fprint(os.Stderr, prompt)
	defer func() {
		fmt.Fprintln(os.Stderr)
		err = errors.Join(err, term.Restore(fd, before))
	}()
	type answer struct {
		text []byte
		err  error
	}
	typed := make(chan answer, 1)
	go func() { // reading a terminal cannot be ended: the process ends with it
		b, err := term.ReadPassword(fd)
		typed <- answer{b, err}
	}()
	select {
	case a := <-typed:
		return string(a.text), a.err
	case <-ctx.Done():
		return "", errors.New("interrupted")
	}
}

// hideTyping makes a terminal show nothing of what is typed, before it is asked for.
func hideTyping(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Lflag &^= unix.ECHO
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
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
				return fmt.Errorf("its public key has SHA-256 %x, --pin says %x: another server, or a new key", got, want)
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

// errStarting is what a daemon answers that repairs what an earlier one left.
var errStarting = errors.New("patchd is still starting")

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
		return unreachableError{errStarting}
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
		return explain(ctx, nil, g.leaderHint(ctx, err))
	}
	defer c.close()
	return explain(ctx, c, f(ctx, c))
}

// leaderHint adds to HOST_IS_SLAVE how the coordinator is reached from here.
func (g *global) leaderHint(ctx context.Context, err error) error {
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != xapi.HostIsSlave || len(e.Params) == 0 {
		return err
	}
	role, rerr := g.role(ctx)
	if rerr != nil || role["coordinator_url"] == "" {
		return err // the address alone has to do
	}
	hint := ", as with --server " + role["coordinator_url"]
	if role["coordinator_pin"] != "" {
		hint += " --pin " + role["coordinator_pin"]
	}
	return xapi.NewError(e.Code, e.Params[0]+hint)
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
		return "", nil, fmt.Errorf("there is no %s with the uuid or name %q; `patchd %[1]s list` shows them", groupOf(class), text)
	}
	return "", nil, fmt.Errorf("%d objects of `patchd %s list` are called %q: use the uuid", len(refs), groupOf(class), text)
}

// groupOf is the command group that lists a class.
func groupOf(class string) string {
	switch class {
	case "pool_patch":
		return "patch"
	case "host_patch":
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

package xetest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Step is a point of a conversation at which a Client can be told to die.
type Step string

// The steps, in the order they come by.
const (
	Posted     Step = "posted"      // the command line was sent
	HelloRead  Step = "hello-read"  // the server's version was read
	HelloSent  Step = "hello-sent"  // ours was sent
	Commanded  Step = "commanded"   // a transfer or a file was asked for
	PutDialed  Step = "put-dialed"  // the second connection is open
	PutAsked   Step = "put-asked"   // the request was sent on it, without a body
	PutStatus  Step = "put-status"  // its status and headers were read
	PutHalf    Step = "put-half"    // half of the file was sent
	PutDone    Step = "put-done"    // all of it was sent, OK was not
	OKSent     Step = "ok-sent"     // OK was sent
	PrintShown Step = "print-shown" // a line was printed
)

// errDied is the end of a client that its Hook killed.
var errDied = errors.New("the client was killed")

// Client is one call of xe. The zero value of every field but Args is usable.
type Client struct {
	Args []string // as typed behind "xe"
	Dir  string   // working directory, "": the process's

	Socket    string        // tried first where the server is 127.0.0.1
	TLS       *tls.Config   // for a server that is not 127.0.0.1, unless --nossl
	Heartbeat time.Duration // between two Wait messages of a transfer; 300 s
	Version   [2]int        // what it speaks; 0.2 when zero
	Block     int           // bytes copied at once; 65536
	// Hook is called at every step; an error kills the client there, with its
	// connections.
	Hook func(Step) error

	server, port, user, password string
	ssl                          bool
	rest                         []string
	permitted                    map[string]bool
	stdout, stderr               bytes.Buffer
	mu                           sync.Mutex
	open                         []net.Conn
	ctx                          context.Context
}

// Result is what a call of xe leaves behind. Exit is -1 when it was killed.
type Result struct {
	Exit           int
	Stdout, Stderr string
}

// Run is one call of the program. It fails only when ctx ends.
func (c *Client) Run(ctx context.Context) (Result, error) {
	c.ctx = ctx
	defer c.closeAll()
	stop := context.AfterFunc(ctx, c.closeAll)
	defer stop()
	code, err := c.main()
	if ctx.Err() != nil {
		return Result{}, context.Cause(ctx)
	}
	switch {
	case errors.Is(err, errDied):
		code = -1
	case err != nil:
		code = 1
		fmt.Fprintf(&c.stderr, "%v\n", err)
	}
	return Result{Exit: code, Stdout: c.stdout.String(), Stderr: c.stderr.String()}, nil
}

// opened notes a connection, so that a killed client takes it along.
func (c *Client) opened(nc net.Conn) net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open = append(c.open, nc)
	return nc
}

func (c *Client) closeAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, nc := range c.open {
		nc.Close()
	}
}

// parse takes the connection options off and notes every named argument as a
// file that the server may ask for.
func (c *Client) parse() {
	c.server, c.user, c.password, c.ssl = "127.0.0.1", "root", "null", true
	set := map[string]func(string){
		"server": func(v string) { c.server = v }, "port": func(v string) { c.port = v },
		"username": func(v string) { c.user = v }, "password": func(v string) { c.password = v },
		"nossl": func(v string) { c.ssl = v != "true" }, "debug": func(string) {},
	}
	short := map[string]string{"-s": "server", "-h": "server", "-p": "port", "-u": "username", "-pw": "password"}
	for args := c.Args; len(args) > 0; args = args[1:] {
		if key, ok := short[args[0]]; ok && len(args) > 1 {
			set[key](args[1])
			args = args[1:]
			continue
		}
		if args[0] == "--nossl" {
			c.ssl = false
			continue
		}
		key, value, named := strings.Cut(args[0], "=")
		if f, ok := set[key]; ok && named {
			f(value)
			continue
		}
		c.rest = append(c.rest, args[0])
	}
	c.permitted = map[string]bool{}
	for _, a := range c.rest {
		if _, v, ok := strings.Cut(a, "="); ok && strings.TrimSpace(v) != "" {
			c.permitted[c.path(v)] = true
		}
	}
}

func (c *Client) path(name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(c.Dir, name)
}

func (c *Client) step(s Step) error {
	if c.Hook == nil {
		return nil
	}
	if err := c.Hook(s); err != nil {
		c.closeAll()
		return errDied
	}
	return nil
}

// dial opens a connection to server as xe would.
func (c *Client) dial(server string) (net.Conn, error) {
	local := server == "127.0.0.1"
	if local && c.Socket != "" {
		if nc, err := net.Dial("unix", c.Socket); err == nil {
			return c.opened(nc), nil
		}
	}
	var d net.Dialer
	var nc net.Conn
	var err error
	if c.ssl && !local {
		nc, err = (&tls.Dialer{NetDialer: &d, Config: c.TLS}).DialContext(c.ctx, "tcp", net.JoinHostPort(server, orElse(c.port, "443")))
	} else {
		nc, err = d.DialContext(c.ctx, "tcp", net.JoinHostPort(server, orElse(c.port, "80")))
	}
	if err != nil {
		return nil, err
	}
	return c.opened(nc), nil
}

func orElse(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

func (c *Client) main() (int, error) {
	c.parse()
	if len(c.rest) == 0 {
		return 0, nil
	}
	if c.Version == [2]int{} {
		c.Version = [2]int{0, 2}
	}
	nc, err := c.dial(c.server)
	if err != nil {
		return 1, err
	}
	body := strings.Join(append(c.rest, "username="+c.user, "password="+c.password), "\n")
	if _, err := fmt.Fprintf(nc, "POST /cli HTTP/1.0\r\nUser-agent: xe-cli/Unix/%d.%d\r\noriginator: cli\r\ncontent-length: %d\r\n\r\n%s",
		c.Version[0], c.Version[1], len(body), body); err != nil {
		return 1, err
	}
	if err := c.step(Posted); err != nil {
		return 1, err
	}
	return c.converse(nc, bufio.NewReader(nc))
}

// converse is the client's main loop.
func (c *Client) converse(nc net.Conn, r *bufio.Reader) (int, error) {
	if err := c.hello(nc, r); err != nil {
		return 1, err
	}
	for {
		m, err := readMessage(r)
		if err != nil {
			return 1, fmt.Errorf("Lost connection to the server: %w", err)
		}
		switch m.tag {
		case 0:
			fmt.Fprintln(&c.stdout, m.texts[0])
			err = c.step(PrintShown)
		case 16:
			c.stderr.WriteString(m.texts[0])
		case 15:
		case 14:
			fmt.Fprintf(&c.stderr, "Error code: %s\nError parameters: %s\n", m.texts[0], strings.Join(m.texts[1:], ", "))
		case 4:
			return m.code, nil
		case 1:
			err = c.load(nc, m.texts[0])
		case 12:
			err = c.transfer(nc, m.texts[0], m.texts[1], c.get)
		case 13:
			err = c.transfer(nc, m.texts[0], m.texts[1], c.put)
		}
		if err != nil {
			return 1, err
		}
	}
}

func (c *Client) hello(nc net.Conn, r *bufio.Reader) error {
	first, err := r.Peek(len(magic) + 8)
	if bytes.HasPrefix(bytes.ToUpper(first), []byte("HTTP")) {
		return errors.New("Server internal error.")
	}
	if err != nil {
		return fmt.Errorf("Unable to contact server: %w", err)
	}
	if string(first[:len(magic)]) != magic {
		return fmt.Errorf("not a thin CLI server: %q", first)
	}
	if major := getInt(first[len(magic):]); major != c.Version[0] {
		return fmt.Errorf("Protocol version mismatch: the server has %d", major)
	}
	r.Discard(len(magic) + 8)
	if err := c.step(HelloRead); err != nil {
		return err
	}
	if _, err := nc.Write(putInt(putInt([]byte(magic), c.Version[0]), c.Version[1])); err != nil {
		return err
	}
	return c.step(HelloSent)
}

func (c *Client) permit(name string) error {
	if !c.permitted[c.path(name)] {
		return fmt.Errorf("File not permitted: %s does not stand on the command line", name)
	}
	return nil
}

// load answers a request for the content of a file.
func (c *Client) load(nc net.Conn, name string) error {
	if err := c.step(Commanded); err != nil {
		return err
	}
	if err := c.permit(name); err != nil {
		return err
	}
	data, err := os.ReadFile(c.path(name))
	if err != nil {
		return send(nc, 10, 6)
	}
	if err := send(nc, 10, 5); err != nil {
		return err
	}
	if err := send(nc, 11, 7, len(data)); err != nil {
		return err
	}
	if _, err := nc.Write(data); err != nil {
		return err
	}
	return send(nc, 11, 8)
}

// clientSide is a failure that ends the client after it told the server.
type clientSide struct{ error }

// transfer runs one PUT or GET and tells the server how it went.
func (c *Client) transfer(nc net.Conn, name, url string, do func(nc net.Conn, name, url string) error) error {
	if err := c.step(Commanded); err != nil {
		return err
	}
	err := do(nc, name, url)
	var side clientSide
	switch {
	case err == nil:
		if err := send(nc, 10, 5); err != nil {
			return err
		}
		return c.step(OKSent)
	case errors.Is(err, errDied), errors.Is(err, errPermit):
		return err
	case errors.As(err, &side):
		_ = send(nc, 10, 6)
		return fmt.Errorf("Operation failed. Error: %w", side.error)
	}
	return send(nc, 10, 6)
}

var errPermit = errors.New("File not permitted")

// splitURL gives the server and the path of a url; a bare path is on the same
// server.
func (c *Client) splitURL(url string) (server, path string) {
	if rest, ok := strings.CutPrefix(url, "https://"); ok {
		host, path, _ := strings.Cut(rest, "/")
		return host, "/" + path
	}
	return c.server, url
}

// exchange sends a request head on a new connection and reads the answer's.
func (c *Client) exchange(head string, server string) (nc net.Conn, r *bufio.Reader, status int, location string, err error) {
	if nc, err = c.dial(server); err != nil {
		return nil, nil, 0, "", err
	}
	if err = c.step(PutDialed); err != nil {
		return nil, nil, 0, "", err
	}
	if _, err = io.WriteString(nc, head); err != nil {
		return nil, nil, 0, "", err
	}
	if err = c.step(PutAsked); err != nil {
		return nil, nil, 0, "", err
	}
	r = bufio.NewReader(nc)
	status, location, err = readHead(r)
	if err != nil {
		return nil, nil, 0, "", err
	}
	return nc, r, status, location, c.step(PutStatus)
}

func (c *Client) put(main net.Conn, name, url string) error {
	if err := c.permit(name); err != nil {
		return fmt.Errorf("%w: %s", errPermit, name)
	}
	st, err := os.Stat(c.path(name))
	if err != nil {
		return clientSide{fmt.Errorf("file '%s' does not exist", name)}
	}
	length := ""
	if st.Mode().IsRegular() {
		length = fmt.Sprintf("\r\nContent-length: %d", st.Size())
	}
	f, err := os.Open(c.path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	server, path := c.splitURL(url)
	nc, _, status, location, err := c.exchange("PUT "+path+" HTTP/1.0"+length+"\r\n\r\n", server)
	if err != nil {
		return err
	}
	defer nc.Close()
	switch status {
	case 200:
		if err := c.copy(main, nc, f, st.Size()/2); err != nil {
			return err
		}
		return c.step(PutDone)
	case 302:
		return c.put(main, name, location)
	}
	return fmt.Errorf("unhandled status %d", status)
}

func (c *Client) get(main net.Conn, name, url string) error {
	server, path := c.splitURL(url)
	nc, r, status, location, err := c.exchange("GET "+path+" HTTP/1.0\r\n\r\n", server)
	if err != nil {
		return err
	}
	defer nc.Close()
	switch status {
	case 200:
		if name == "" {
			return c.copy(main, &c.stdout, r, -1)
		}
		if err := c.permit(name); err != nil {
			return fmt.Errorf("%w: %s", errPermit, name)
		}
		f, err := os.OpenFile(c.path(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return clientSide{err}
		}
		return errors.Join(c.copy(main, f, r, -1), f.Close())
	case 302:
		return c.get(main, name, location)
	}
	return fmt.Errorf("unhandled status %d", status)
}

// copy moves everything, with heartbeats to the server in between.
func (c *Client) copy(main net.Conn, dst io.Writer, src io.Reader, half int64) error {
	every := c.Heartbeat
	if every == 0 {
		every = 300 * time.Second
	}
	block := c.Block
	if block == 0 {
		block = 65536
	}
	buf := make([]byte, block)
	last, done := time.Now(), int64(0)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
			if before := done; half >= 0 && before <= half && before+int64(n) > half {
				if err := c.step(PutHalf); err != nil {
					return err
				}
			}
			done += int64(n)
		}
		if time.Since(last) >= every && (c.Version[0] > 0 || c.Version[1] >= 2) {
			if err := send(main, 10, 18); err != nil {
				return err
			}
			last = time.Now()
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

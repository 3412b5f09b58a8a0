package thincli

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi"
)

// API is what the command line needs of the server behind it. Errors carry
// the codes of the XenAPI.
type API interface {
	// Login opens a session with a password: SESSION_AUTHENTICATION_FAILED,
	// HOST_IS_SLAVE. addr is the client's address, for limits and logs.
	Login(ctx context.Context, user, password, originator, addr string) (xapi.Ref, error)
	// LoginLocal opens a session for whoever may use the local socket.
	LoginLocal(ctx context.Context, originator string) (xapi.Ref, error)
	// Logout ends a session that Login or LoginLocal opened.
	Logout(ctx context.Context, session xapi.Ref) error
	// Call runs class.message with the session's rights, as the wire would.
	// params leave the session out. Values in both directions are canonical:
	// string (also for ints, enums, refs and dates), bool, float64, []any and
	// map[string]any. A call that changes something may run on after ctx has
	// ended; nobody waits for its result then.
	Call(ctx context.Context, session xapi.Ref, method string, params []any) (any, error)
}

// Options bounds what a client can ask for. A zero field means its default.
type Options struct {
	Log logrus.FieldLogger
	// Local tells whether a request came by the socket that stands for a login
	// as root; nil: none does.
	Local func(*http.Request) bool

	MaxBody          int64 // bytes of a command line; 200 KiB
	MaxFile          int64 // bytes of a client's file read into memory; 1 MiB
	MaxFrames        int   // frames from one client; 65536 (a heartbeat comes every 300 s)
	MaxConversations int   // at the same time; 4096
	MaxCommands      int   // at the same time, of clients that have logged in; 256

	BodyTimeout   time.Duration // for the whole command line; 20 s
	HelloTimeout  time.Duration // for the client's version; 20 s
	WriteTimeout  time.Duration // for one frame; 60 s
	IdleTimeout   time.Duration // a transfer without a heartbeat; 30 min
	SettleTimeout time.Duration // for a task to say why its transfer failed; 2 s
	LingerTimeout time.Duration // for the client to read the last frames; 5 s
	EventTimeout  time.Duration // one wait for events; 30 s
}

// Handler answers POST /cli. It is safe for concurrent use.
type Handler struct {
	api API
	o   Options
	log logrus.FieldLogger

	base context.Context
	end  context.CancelCauseFunc
	free chan struct{} // one element for each running conversation
	busy chan struct{} // one element for each running command

	intake *xenapi.Intake

	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup // conversations
	calls   sync.WaitGroup // calls, also those whose client has gone
}

var errShutdown = errors.New("the server is shutting down")

// New makes a handler over api.
func New(api API, o Options) *Handler {
	o.setDefaults()
	h := &Handler{api: api, o: o, log: o.Log, free: make(chan struct{}, o.MaxConversations)}
	h.busy = make(chan struct{}, o.MaxCommands)
	h.intake = xenapi.NewIntake(o.BodyTimeout)
	h.base, h.end = context.WithCancelCause(context.Background())
	return h
}

func (o *Options) setDefaults() {
	if o.Log == nil {
		l := logrus.New()
		l.SetOutput(io.Discard)
		o.Log = l
	}
	size := func(p *int64, def int64) {
		if *p == 0 {
			*p = def
		}
	}
	count := func(p *int, def int) {
		if *p == 0 {
			*p = def
		}
	}
	after := func(p *time.Duration, def time.Duration) {
		if *p == 0 {
			*p = def
		}
	}
	size(&o.MaxBody, 200<<10)
	size(&o.MaxFile, 1<<20)
	count(&o.MaxFrames, 1<<16)
	count(&o.MaxConversations, 4096)
	count(&o.MaxCommands, 256)
	after(&o.BodyTimeout, 20*time.Second)
	after(&o.HelloTimeout, 20*time.Second)
	after(&o.WriteTimeout, time.Minute)
	after(&o.IdleTimeout, 30*time.Minute)
	after(&o.SettleTimeout, 2*time.Second)
	after(&o.LingerTimeout, 5*time.Second)
	after(&o.EventTimeout, 30*time.Second)
}

// Close ends every conversation and waits for them and for the calls they
// made. Later requests get 503. A call that changes something ends with its
// task, so stop the task manager first. http.Server does not know hijacked
// connections: its Shutdown waits for none of this.
func (h *Handler) Close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.end(errShutdown)
	h.running.Wait()
	h.calls.Wait()
}

// call runs an API call until it returns or ctx ends: the work of a client
// that has gone is not waited for.
func (h *Handler) call(ctx context.Context, session xapi.Ref, method string, params []any) (any, error) {
	type result struct {
		value any
		err   error
	}
	done := make(chan result, 1)
	h.calls.Go(func() {
		v, err := h.api.Call(ctx, session, method, params)
		done <- result{v, err}
	})
	select {
	case res := <-done:
		return res.value, res.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

type addressKey struct{}

// addressOf is the address of the client that a call is made for.
func addressOf(ctx context.Context) string {
	addr, _ := ctx.Value(addressKey{}).(string)
	return addr
}

// enter counts a conversation in, or refuses it.
func (h *Handler) enter() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	select {
	case h.free <- struct{}{}:
		h.running.Add(1)
		return true
	default:
		return false
	}
}

func (h *Handler) leave() {
	<-h.free
	h.running.Done()
}

// ServeHTTP runs one conversation. It answers in HTTP only what goes wrong
// before the protocol begins; xe calls that a server internal error.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int) {
		w.Header().Set("Connection", "close")
		http.Error(w, http.StatusText(status), status)
	}
	switch {
	case r.Method != http.MethodPost:
		refuse(http.StatusMethodNotAllowed)
		return
	case r.ContentLength < 0:
		refuse(http.StatusLengthRequired)
		return
	case r.ContentLength > h.o.MaxBody:
		refuse(http.StatusRequestEntityTooLarge)
		return
	case !h.enter():
		refuse(http.StatusServiceUnavailable)
		return
	}
	defer h.leave()
	rc := http.NewResponseController(w)
	body, release, status, err := h.intake.Read(w, r, h.o.MaxBody)
	defer release()
	if err != nil {
		refuse(status)
		return
	}
	nc, rw, err := rc.Hijack()
	if err != nil {
		refuse(http.StatusHTTPVersionNotSupported)
		return
	}
	defer nc.Close()
	local := h.o.Local != nil && h.o.Local(r)
	who := client{addr: r.RemoteAddr, local: local, proven: func() { session.Proven(r.Context()) }}
	h.converse(nc, rw.Reader, who, string(body))
}

// client is who sent a command line.
type client struct {
	addr   string
	local  bool
	proven func() // says that the client has logged in
}

// converse speaks the protocol on a hijacked connection until it is closed.
func (h *Handler) converse(nc net.Conn, r *bufio.Reader, who client, body string) {
	log := h.log.WithField("client", who.addr)
	nc.SetDeadline(time.Now().Add(h.o.HelloTimeout))
	if _, err := nc.Write(hello(majorVersion, minorVersion)); err != nil {
		log.WithError(err).Debug("thin CLI client left before its version was known")
		return
	}
	major, minor, err := readHello(r)
	if err != nil {
		log.WithError(err).Info("thin CLI conversation refused")
		return
	}
	if major != majorVersion {
		log.WithField("version", major).Info("thin CLI conversation refused: the client speaks another major version")
		return
	}
	nc.SetDeadline(time.Time{})
	ctx, gone := context.WithCancelCause(context.WithValue(h.base, addressKey{}, who.addr))
	defer gone(nil)
	c := newConn(nc, r, &h.o, gone)
	go c.read(ctx)
	defer c.close()
	run := &run{h: h, conn: c, who: who, minor: minor, log: log}
	run.command(ctx, body)
}

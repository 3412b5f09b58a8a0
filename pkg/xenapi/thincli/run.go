package thincli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/xapi"
)

// originator is what sessions of the command line are counted under.
const originator = "cli"

// cleanupTimeout bounds what is done after a command: logging out, removing
// its task.
const cleanupTimeout = 10 * time.Second

// command is one entry of the command table.
type command struct {
	name     string
	required []string
	optional []string
	help     string
	standard bool // shown by a bare `xe help`
	// notice is shown on standard error before the command runs, nil: none.
	notice func(r *run) string
	do     func(r *run) error
}

// run is one command of one client.
type run struct {
	h     *Handler
	conn  *conn
	who   client
	minor int
	log   logrus.FieldLogger

	ctx     context.Context
	line    commandLine
	session xapi.Ref
	logout  func() // closes the session, nil: none was opened
	out     *printer
	cache   map[string]*classCache
}

// command runs one command line and sends the exit code: 0, or 1 with a text
// on standard error.
func (r *run) command(ctx context.Context, body string) {
	r.ctx = ctx
	var err error
	r.line, err = parseCommandLine(body)
	r.out = &printer{conn: r.conn, minimal: r.line.params.flag("minimal")}
	if err == nil {
		err = r.perform()
	}
	code := 0
	if err != nil {
		code = 1
		r.explain(err)
	}
	if r.logout != nil {
		r.logout()
	}
	if r.ended(errClientGone) {
		return
	}
	if err := r.conn.exit(code); err != nil {
		r.log.WithError(err).Debug("thin CLI client left before the exit code")
	}
}

func (r *run) perform() error {
	if r.line.name == "help" {
		return r.help()
	}
	cmd, ok := commandTable()[r.line.name]
	if !ok {
		return usagef("Unknown command: %s", r.line.name)
	}
	for _, key := range cmd.required {
		if _, ok := r.line.params.lookup(key); !ok {
			return usagef("Required parameter not found: %s", key)
		}
	}
	r.log.WithFields(logrus.Fields{"command": r.line.name, "parameters": r.line.params.censored()}).Info("xe")
	if err := r.login(); err != nil {
		return err
	}
	select {
	case r.h.busy <- struct{}{}:
		defer func() { <-r.h.busy }()
	default:
		return refusef("Too many commands are running: try again later")
	}
	if cmd.notice != nil {
		if err := r.conn.stderr(cmd.notice(r)); err != nil {
			return err
		}
	}
	if err := cmd.do(r); err != nil {
		return err
	}
	return r.out.flush()
}

// login opens the session of this command, unless the caller brought one.
func (r *run) login() (err error) {
	if r.line.session != "" {
		r.session = r.line.session
		return nil
	}
	user, password := r.line.params.get("username"), r.line.params.get("password")
	if r.who.local && (user == "" || user == "root") {
		r.session, err = r.h.api.LoginLocal(r.ctx, originator)
	} else {
		r.session, err = r.h.api.Login(r.ctx, user, password, originator, r.who.addr)
	}
	if err != nil {
		return err
	}
	r.who.proven()
	r.logout = func() {
		ctx, cancel := r.cleanup()
		defer cancel()
		if err := r.h.api.Logout(ctx, r.session); err != nil && !xapi.Is(err, xapi.SessionInvalid) {
			r.log.WithError(err).Warn("session of a command was not closed")
		}
	}
	return nil
}

// cleanup is a context for what has to be done even though the client is gone.
func (r *run) cleanup() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(r.ctx), cleanupTimeout)
}

// call runs one API call and gives its result.
func (r *run) call(method string, params ...any) (any, error) {
	return r.h.call(r.ctx, r.session, method, params)
}

// callText is call for a string result: refs, ints and enums, too.
func (r *run) callText(method string, params ...any) (string, error) {
	v, err := r.call(method, params...)
	if err != nil {
		return "", err
	}
	return toText(v), nil
}

// byUUID finds the object that the parameter key names.
func (r *run) byUUID(class, key string) (string, error) {
	return r.callText(class+".get_by_uuid", r.line.params.get(key))
}

// printUUID shows the uuid of an object.
func (r *run) printUUID(class, ref string) error {
	uuid, err := r.callText(class+".get_uuid", ref)
	if err != nil {
		return err
	}
	return r.out.list(uuid)
}

// explain shows a failure on the client's standard error. Failures to show it
// have no one to be shown to.
func (r *run) explain(err error) {
	if errors.Is(err, errClientGone) || r.ended(errClientGone) {
		r.log.WithError(err).Info("thin CLI client left while its command ran")
		return
	}
	if r.ended(errShutdown) {
		_ = r.conn.stderr("Error: " + errShutdown.Error())
		return
	}
	var usage *usageError
	var refused *refusal
	switch {
	case errors.As(err, &usage):
		_ = r.conn.stderr(usage.text)
		_ = r.conn.stderr("For usage run: 'xe help'")
	case errors.As(err, &refused):
		_ = r.conn.stderr("Error: " + refused.text)
	default:
		r.explainCode(xapi.AsError(err))
	}
	if r.line.params.flag("trace") {
		_ = r.conn.stderr("Raised " + oneLine(err))
	}
	r.log.WithError(err).WithField("command", r.line.name).Info("xe command failed")
}

// oneLine is the failure as code and parameters, or its text.
func oneLine(err error) string {
	var e *xapi.Error
	if !errors.As(err, &e) {
		return err.Error()
	}
	return fmt.Sprintf("%s [ %s ]", e.Code, strings.Join(e.Params, "; "))
}

// secrets are words in the key of a parameter whose value is never logged.
var secrets = []string{"password", "secret", "passwd", "token"}

// censored is the command line for the log.
func (ps params) censored() string {
	words := make([]string, 0, len(ps))
	for _, p := range ps {
		value := p.value
		key := strings.ToLower(p.key)
		if key == "old" || key == "new" {
			value = "(omitted)"
		}
		for _, s := range secrets {
			if strings.Contains(key, s) {
				value = "(omitted)"
			}
		}
		words = append(words, p.key+"="+value)
	}
	return strings.Join(words, " ")
}

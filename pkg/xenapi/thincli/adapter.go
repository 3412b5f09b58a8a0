package thincli

import (
	"context"
	"net/http"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi"
)

// served is API over a server of this process.
type served struct{ s *xenapi.Server }

var _ API = served{}

// Over is the API of s. Logins, calls, roles, tasks and audit lines are those
// of the wire.
func Over(s *xenapi.Server) API { return served{s} }

// TrustedRequest is Options.Local for requests whose context session.WithTrusted
// has marked.
func TrustedRequest(r *http.Request) bool { return session.Trusted(r.Context()) }

// apiVersion is what the command line logs in with; servers ignore it.
const apiVersion = "2.5"

func (a served) Login(ctx context.Context, user, password, originator, addr string) (xapi.Ref, error) {
	v, err := a.s.Call(xenapi.WithAddress(ctx, addr), nil, "session.login_with_password",
		[]any{user, password, apiVersion, originator})
	return xapi.Ref(toText(v)), err
}

func (a served) LoginLocal(ctx context.Context, originator string) (xapi.Ref, error) {
	return a.s.Sessions.LoginLocal(ctx, originator)
}

func (a served) Logout(ctx context.Context, ref xapi.Ref) error {
	_, err := a.Call(ctx, ref, "session.logout", nil)
	return err
}

func (a served) Call(ctx context.Context, ref xapi.Ref, method string, params []any) (any, error) {
	sess, err := a.s.Sessions.Get(ref)
	if err != nil {
		return nil, err
	}
	return a.s.Call(xenapi.WithAddress(ctx, addressOf(ctx)), sess, method, params)
}

package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// joinPath is where a coordinator is asked to take a host in.
const joinPath = "/patchd/join"

const (
	// maxJoin bounds a request to join and its answer, in bytes.
	maxJoin = 64 << 20
	// joinTime bounds the request.
	joinTime = 2 * time.Minute
	// joinsAtOnce is how many requests are read at once.
	joinsAtOnce = 2
	// tlsPort is where a patchd is that nothing else is said of.
	tlsPort = "8443"
)

// errReopen ends Run when the process is to open again in another role.
var errReopen = errors.New("this host changes its role in the pool")

// JoinToken makes a token for one host: its id, its secret and the SHA-256 of
// this host's key, joined by dots.
func (s *Server) JoinToken(ctx context.Context) (string, error) {
	id, secret, err := s.pool.NewJoinToken(ctx)
	if err != nil {
		return "", err
	}
	return strings.Join([]string{string(id), secret, s.identity.Pin()}, "."), nil
}

// RotateKey gives this host another key, which the old one signs for, and tells
// its SHA-256.
func (s *Server) RotateKey(ctx context.Context) (string, error) {
	if err := s.identity.Rotate(time.Now()); err != nil {
		return "", err
	}
	s.log.WithField("pin", s.identity.Pin()).Info("this host has another key")
	if s.link != nil {
		s.link.Reconnect()
	}
	return s.identity.Pin(), s.pool.HostAddKey(ctx, s.pool.Self, s.identity.SPKI())
}

// errNoToken is what becomes of a text that is no token, perhaps cut off.
var errNoToken = xapi.NewError(xapi.ValueNotSupported, "token", "this text", "it is not what `patchd pool token` has printed, or not all of it")

// parseToken takes apart what JoinToken gave.
func parseToken(text string) (id xapi.UUID, secret, pin string, err error) {
	f := strings.Split(strings.TrimSpace(text), ".")
	if len(f) != 3 || !xapi.UUID(f[0]).Valid() || f[1] == "" {
		return "", "", "", errNoToken
	}
	if pin, err = trust.ParsePin(f[2]); err != nil {
		return "", "", "", errNoToken
	}
	return xapi.UUID(f[0]), f[1], pin, nil
}

// target is where a JoinSpec points: the URL of the coordinator and the SHA-256 of
// its key, "" when that was not said.
func joinTarget(spec pool.JoinSpec) (base, pin string, err error) {
	address, fragment, _ := strings.Cut(spec.Address, "#")
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
		return "", "", xapi.NewError(xapi.ValueNotSupported, "address", fmt.Sprintf("%.100q", spec.Address), "https://host:port is wanted, the TLS port of the coordinator")
	}
	port := u.Port()
	if port == "" {
		port = tlsPort
	}
	base = "https://" + net.JoinHostPort(u.Hostname(), port)
	for _, text := range []string{spec.Fingerprint, fragment} {
		if text != "" && pin == "" {
			if pin, err = trust.ParsePin(text); err != nil {
				return "", "", xapi.NewError(xapi.ValueNotSupported, "fingerprint", fmt.Sprintf("%.80q", text), "it is the 64 hexadecimal digits that `patchd status` shows on the coordinator")
			}
		}
	}
	return base, pin, nil
}

// Join makes this host a member of the pool whose coordinator spec names. It asks
// to be taken in, writes down that it was, and has the process open again as a
// member: from then on the answer holds, also after a crash. What this host had
// applied, its storage and its patches come along; its users go, and its store is
// backed up. Codes: OPERATION_NOT_ALLOWED, OTHER_OPERATION_IN_PROGRESS,
// VALUE_NOT_SUPPORTED, SESSION_AUTHENTICATION_FAILED, CANNOT_CONTACT_HOST, HOST_IS_SLAVE.
func (s *Server) Join(ctx context.Context, spec pool.JoinSpec) (a pool.JoinAnswer, err error) {
	if s.config.Store != "" {
		return a, xapi.NewError(xapi.OperationNotAllowed, "this host has the database of a pool (--store): it is a coordinator there")
	}
	if !s.joining.CompareAndSwap(false, true) {
		return a, xapi.NewError(xapi.OtherOperationInProgress, pool.ClassHost, string(s.pool.Self), "this host is joining a pool already")
	}
	defer func() {
		if err != nil {
			s.joining.Store(false)
		}
	}()
	if err := s.pool.AssertAlone(); err != nil {
		return a, err
	}
	req, err := s.joinRequest()
	if err != nil {
		return a, err
	}
	base, pin, err := joinTarget(spec)
	if err != nil {
		return a, err
	}
	req.User, req.Password, req.Align = spec.User, spec.Password, spec.Align
	if spec.Token != "" {
		req.User, req.Password = "", ""
		if req.Token, req.Secret, pin, err = parseToken(spec.Token); err != nil {
			return a, err
		}
	}
	if a, err = s.askToJoin(ctx, base, pin, req); err != nil {
		return a, err
	}
	// From here on nobody is served any more, and what has come meanwhile goes along.
	defer func(served http.Handler) {
		if err != nil {
			s.ways.setHandler(served)
		}
	}(s.ways.swapHandler(http.HandlerFunc(booting)))
	if a, err = s.bringTheRest(ctx, base, pin, req, a); err != nil {
		return a, err
	}
	if spec.TrustKeys {
		if err := s.takeKeys(a.Keys); err != nil {
			return a, err
		}
	}
	m := membership{Phase: phaseJoining, Answer: a, Joined: base, Coordinators: a.Coordinators, PoolName: a.PoolName}
	m.Answer.Keys = nil
	if err := s.state.setMembership(m); err != nil {
		return a, err
	}
	s.log.WithField("pool", a.Pool).Info("this host was taken into the pool, and opens again as its member")
	s.reopenSoon()
	return a, nil
}

// bringTheRest asks once more when this host has more to bring than it said in
// before. Code: OTHER_OPERATION_IN_PROGRESS when something has begun meanwhile: the
// same credentials are good for the next try.
func (s *Server) bringTheRest(ctx context.Context, base, pin string, before pool.JoinRequest, a pool.JoinAnswer) (pool.JoinAnswer, error) {
	if err := s.pool.AssertAlone(); err != nil {
		return a, err
	}
	now, err := s.joinRequest()
	if err != nil {
		return a, err
	}
	now.Token, now.Secret, now.User, now.Password, now.Align = before.Token, before.Secret, before.User, before.Password, before.Align
	same, err := sameJoin(before, now)
	if same || err != nil {
		return a, err
	}
	news, err := s.askToJoin(ctx, base, pin, now)
	news.Patches = append(a.Patches, news.Patches...)
	return news, err
}

// sameJoin tells whether two requests bring the same.
func sameJoin(a, b pool.JoinRequest) (bool, error) {
	x, err := json.Marshal(a)
	if err != nil {
		return false, err
	}
	y, err := json.Marshal(b)
	return bytes.Equal(x, y), err
}

// reopenSoon ends this role; cmd opens the process again in the one that holds.
func (s *Server) reopenSoon() { time.AfterFunc(reopenPause, func() { s.reopen(errReopen) }) }

// reopenPause lets the answer of the call go out that ends this role.
const reopenPause = 200 * time.Millisecond

// joinRequest is what this host brings.
func (s *Server) joinRequest() (pool.JoinRequest, error) {
	req, err := s.pool.JoinFacts()
	if err != nil {
		return req, err
	}
	req.Facts = s.facts()
	req.Stamps, err = s.agent.Stamps()
	return req, err
}

// facts are what this host says of itself to a coordinator.
func (s *Server) facts() pool.Facts {
	return pool.Facts{
		Hostname: s.hostname, Address: s.address(), URL: s.url(),
		SoftwareVersion: pool.SoftwareVersion(s.version), Standby: s.config.Store != "",
	}
}

// askToJoin sends the request to a coordinator whose key has that SHA-256.
func (s *Server) askToJoin(ctx context.Context, base, pin string, req pool.JoinRequest) (a pool.JoinAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	shown := ""
	client := link.NewHTTP(s.identity, base, func(spki []byte) bool {
		if shown == "" {
			shown = trust.Pin(spki)
		}
		return pin != "" && trust.Pin(spki) == pin
	})
	defer client.CloseIdleConnections()
	body, err := json.Marshal(req)
	if err != nil {
		return a, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, base+joinPath, bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	setCredentials(r, req)
	r.Header.Set("Expect", "100-continue") // what is refused need not be sent
	res, err := client.Do(r)
	switch {
	case errors.Is(err, trust.ErrUntrusted) && pin == "":
		return a, xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf(
			"the coordinator at %s shows a key with SHA-256 %s: compare it with what `patchd status` tells there, then name it (--fingerprint, or #%[2]s behind the address)", base, shown))
	case errors.Is(err, trust.ErrUntrusted):
		return a, xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf("%s shows a key with SHA-256 %s, not %s: another host, or somebody in between", base, shown, pin))
	case err != nil:
		return a, xapi.NewError(xapi.CannotContactHost, base, dialText(err)).Because(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxJoin))
	if err != nil {
		return a, xapi.NewError(xapi.CannotContactHost, base).Because(err)
	}
	if res.StatusCode != http.StatusOK {
		return a, refusal(base, res.StatusCode, b)
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return a, fmt.Errorf("the answer of %s: %w", base, err)
	}
	if !a.Pool.Valid() || a.Host != req.Ref {
		return a, fmt.Errorf("the answer of %s is of pool %.64q and host %.64q: it makes no sense", base, a.Pool, a.Host)
	}
	return a, nil
}

// setCredentials puts those of a JoinRequest into the header.
func setCredentials(r *http.Request, q pool.JoinRequest) {
	if q.Token != "" {
		r.Header.Set("Authorization", bearer+string(q.Token)+"."+q.Secret)
		return
	}
	r.SetBasicAuth(q.User, q.Password)
}

const bearer = "Bearer "

// credentials takes them out of it.
func credentials(r *http.Request) (q pool.JoinRequest) {
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), bearer); ok {
		id, secret, _ := strings.Cut(token, ".")
		q.Token, q.Secret = xapi.UUID(id), secret
		return q
	}
	q.User, q.Password, _ = r.BasicAuth()
	return q
}

// problem is an error as it goes over the wire between hosts.
type problem struct {
	Code   string   `json:"code"`
	Params []string `json:"params"`
}

// dialText is why nobody answered, without what the code says already.
func dialText(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return err.Error()
}

// refusal reads what a coordinator says when it does not answer 200.
func refusal(base string, status int, b []byte) error {
	var p problem
	if json.Unmarshal(b, &p) == nil && p.Code != "" {
		return xapi.NewError(p.Code, p.Params...)
	}
	return fmt.Errorf("%s answers %d to a request to join: %.200s", base, status, b)
}

// serveJoin takes a host in: POST /patchd/join by a host, whose key is that of
// its connection. A header has the credentials, so a stranger is refused before
// anything of the body is read. 400 for what cannot be read, 401, 403, 409, 421 when another
// host leads.
func (s *Server) serveJoin(w http.ResponseWriter, r *http.Request) {
	a, err := s.admit(w, r)
	if err != nil {
		s.log.WithError(err).WithField("address", r.RemoteAddr).Warn("a host was not taken into the pool")
		answerProblem(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(a); err != nil {
		s.log.WithError(err).Debug("the answer to a joiner was not sent")
	}
}

func answerProblem(w http.ResponseWriter, err error) {
	e := xapi.AsError(err)
	status := http.StatusConflict
	switch e.Code {
	case xapi.SessionAuthenticationFailed:
		status = http.StatusUnauthorized
	case xapi.RBACPermissionDenied:
		status = http.StatusForbidden
	case xapi.InvalidValue:
		status = http.StatusBadRequest
	case xapi.HostIsSlave, xapi.HostStillBooting:
		status = http.StatusMisdirectedRequest
	case xapi.InternalError:
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(problem{e.Code, e.Params}); err != nil {
		return // whoever asked is gone
	}
}

// admit checks who asks and takes them in.
func (s *Server) admit(w http.ResponseWriter, r *http.Request) (a pool.JoinAnswer, err error) {
	if r.TLS == nil || trust.PeerKey(*r.TLS) == nil {
		return a, xapi.NewError(xapi.OperationNotAllowed, "only a patchd can join")
	}
	if address, here := s.coordinator(); !here {
		if address == "" {
			return a, xapi.NewError(xapi.HostStillBooting)
		}
		return a, xapi.NewError(xapi.HostIsSlave, address)
	}
	req := credentials(r)
	byUser := req.Token == ""
	if byUser {
		err = s.checkAdmin(r, req.User, req.Password)
	} else {
		err = s.pool.CheckJoinToken(req.Token, req.Secret)
	}
	if err != nil {
		return a, err
	}
	if err := s.readJoin(w, r, &req); err != nil {
		return a, err
	}
	ctx := context.WithoutCancel(r.Context()) // what was begun is done, whether or not they wait
	if a, err = s.pool.Admit(ctx, req, trust.PeerKey(*r.TLS), byUser); err != nil {
		return a, err
	}
	boundMemory(s.hosts())
	if req.Align {
		s.align(req.Ref)
	}
	a.Keys, err = s.signingKeys()
	return a, err
}

// readJoin reads what a host says that has shown its credentials. Codes:
// INVALID_VALUE, OTHER_OPERATION_IN_PROGRESS while others are read.
func (s *Server) readJoin(w http.ResponseWriter, r *http.Request, into *pool.JoinRequest) error {
	ctx, cancel := context.WithTimeout(r.Context(), joinTime)
	defer cancel()
	select {
	case s.joins <- struct{}{}:
		defer func() { <-s.joins }()
	case <-ctx.Done():
		return xapi.NewError(xapi.OtherOperationInProgress, pool.ClassPool, string(s.pool.PoolUUID), "other hosts are joining: try again")
	}
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(joinTime)) //nolint:errcheck // it is a limit, not needed
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxJoin)).Decode(into); err != nil {
		return xapi.NewError(xapi.InvalidValue, "request", "cannot be read").Because(err)
	}
	return nil
}

// checkAdmin is nil when user and password are those of an admin.
func (s *Server) checkAdmin(r *http.Request, user, password string) error {
	ref, err := s.sessions.Login(r.Context(), user, password, "pool join", r.RemoteAddr)
	if err != nil {
		return err
	}
	sess, err := s.sessions.Get(ref)
	if err == nil {
		err = sess.Require(session.PoolAdmin, "pool.join")
	}
	return errors.Join(err, s.sessions.Logout(context.WithoutCancel(r.Context()), ref))
}

// maxSigningKeys bounds what is told of trusted keys, in bytes.
const maxSigningKeys = 4 << 20

// signingKeys are the files in trusted-keys and what is in them.
func (s *Server) signingKeys() (out []pool.SigningKey, err error) {
	names, err := filepath.Glob(filepath.Join(s.keysDir(), "*"))
	if err != nil {
		return nil, err
	}
	total := 0
	for _, name := range names {
		b, err := patch.ReadKeyFile(name)
		if err != nil || total+len(b) > maxSigningKeys {
			continue // no key that anybody could take over
		}
		total += len(b)
		for _, k := range patch.NewKeyring(filepath.Base(name), b).Keys() {
			out = append(out, pool.SigningKey{Fingerprint: k.Fingerprint, Name: strings.Join(k.UserIDs, ", "), Public: b})
			b = nil // a file goes over once, with its first key
		}
	}
	return out, nil
}

// takeKeys puts keys into trusted-keys, under names that say nothing but what is
// in them.
func (s *Server) takeKeys(keys []pool.SigningKey) error {
	for _, k := range keys {
		if len(k.Public) == 0 {
			continue
		}
		if len(patch.NewKeyring("key", k.Public).Keys()) == 0 {
			return xapi.NewError(xapi.InvalidValue, "keys", "the coordinator has sent something that is no public key")
		}
		sum := sha256.Sum256(k.Public)
		name := filepath.Join("trusted-keys", "pool-"+hex.EncodeToString(sum[:8])+".gpg")
		if err := s.state.write(name, k.Public); err != nil {
			return err
		}
	}
	return nil
}

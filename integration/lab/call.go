package lab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// Session is a login at a host, over JSON-RPC 2.0.
type Session struct {
	H   *Host
	Ref string
}

// Login logs in with a password.
func (h *Host) Login(user, password string) (*Session, error) {
	v, err := h.RPC("session.login_with_password", user, password, "2.5", "lab")
	if err != nil {
		return nil, err
	}
	return &Session{h, v.(string)}, nil
}

// Root logs in as root, or fails the test.
func (h *Host) Root() *Session {
	h.T.Helper()
	s, err := h.Login("root", Password)
	if err != nil {
		h.T.Fatal(err)
	}
	return s
}

// RPC makes one call; the error is an *xapi.Error when the API refused.
func (h *Host) RPC(method string, params ...any) (any, error) {
	if params == nil {
		params = []any{}
	}
	b, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
	if err != nil {
		return nil, err
	}
	res, err := h.HTTP.Post(h.URL+"/jsonrpc", "application/json", bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var a struct {
		Result any
		Error  *struct {
			Message string
			Data    []string
		}
	}
	if b, err = io.ReadAll(res.Body); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &a); err != nil || res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s %.200s", method, res.Status, b)
	}
	if a.Error != nil {
		return nil, xapi.NewError(a.Error.Message, a.Error.Data...)
	}
	return a.Result, nil
}

// Try makes a call with the session as first parameter.
func (s *Session) Try(method string, params ...any) (any, error) {
	return s.H.RPC(method, append([]any{s.Ref}, params...)...)
}

// Call is Try that fails the test on an error.
func (s *Session) Call(method string, params ...any) any {
	s.H.T.Helper()
	v, err := s.Try(method, params...)
	if err != nil {
		s.H.T.Fatalf("%s: %v", method, err)
	}
	return v
}

// Record is an object as it is on the wire.
type Record = map[string]any

// All gives the records of a class by ref.
func (s *Session) All(class string) map[string]Record {
	s.H.T.Helper()
	out := map[string]Record{}
	for ref, rec := range s.Call(class + ".get_all_records").(map[string]any) {
		out[ref] = rec.(map[string]any)
	}
	return out
}

// One gives the only object of a class, or fails the test.
func (s *Session) One(class string) (string, Record) {
	s.H.T.Helper()
	all := s.All(class)
	if len(all) != 1 {
		s.H.T.Fatalf("there are %d objects of class %s", len(all), class)
	}
	for ref, rec := range all {
		return ref, rec
	}
	return "", nil
}

// Host is the ref of the only host.
func (s *Session) Host() string {
	s.H.T.Helper()
	ref, _ := s.One("host")
	return ref
}

// Wait follows a task to its end and gives its record.
func (s *Session) Wait(task string) Record {
	s.H.T.Helper()
	for range 3000 {
		rec := s.Call("task.get_record", task).(map[string]any)
		switch rec["status"] {
		case "pending", "cancelling":
			time.Sleep(20 * time.Millisecond)
		default:
			return rec
		}
	}
	s.H.T.Fatalf("task %s does not end", task)
	return nil
}

// roundTrip sends a request and follows no redirect.
func (h *Host) roundTrip(req *http.Request) (*http.Response, error) {
	if h.HTTP.Transport == nil {
		return http.DefaultTransport.RoundTrip(req)
	}
	return h.HTTP.Transport.RoundTrip(req)
}

// Answer is what a PUT was answered.
type Answer struct {
	Status int
	Body   []byte
	Header http.Header
}

// Err is the refusal in the body, or nil.
func (a Answer) Err() *xapi.Error {
	var e struct {
		Code   string
		Params []string
	}
	if a.Status < 400 || json.Unmarshal(a.Body, &e) != nil || e.Code == "" {
		return nil
	}
	return xapi.NewError(e.Code, e.Params...)
}

// Record is the record in the body.
func (a Answer) Record() Record {
	rec := Record{}
	json.Unmarshal(a.Body, &rec)
	return rec
}

// Put uploads body without a task, with root's session in a cookie. length -1
// sends it in chunks.
func (s *Session) Put(path string, query url.Values, body io.Reader, length int64) (Answer, error) {
	req, err := http.NewRequest(http.MethodPut, s.H.URL+path+"?"+query.Encode(), body)
	if err != nil {
		return Answer{}, err
	}
	req.ContentLength = length
	req.AddCookie(&http.Cookie{Name: "session_id", Value: s.Ref})
	res, err := s.H.roundTrip(req)
	if err != nil {
		return Answer{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return Answer{res.StatusCode, b, res.Header}, err
}

// Upload puts a signed patch and gives the answer.
func (s *Session) Upload(signed []byte) Answer {
	s.H.T.Helper()
	a, err := s.Put("/pool_patch_upload", nil, bytes.NewReader(signed), int64(len(signed)))
	if err != nil {
		s.H.T.Fatal(err)
	}
	return a
}

// MustUpload uploads p and gives the ref of its pool_patch.
func (s *Session) MustUpload(p *Patch) string {
	s.H.T.Helper()
	a := s.Upload(p.Signed(s.H.T))
	if a.Status != http.StatusCreated {
		s.H.T.Fatalf("upload: %d %s", a.Status, a.Body)
	}
	return s.Call("pool_patch.get_by_uuid", string(p.UUID)).(string)
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

const location = uploadsPath + "/8f0e4c3a-5b1d-4c3e-9a57-1f2e3d4c5b6a"

// fakeServer speaks just enough of the wire, and fails as it is told.
type fakeServer struct {
	t   *testing.T
	old bool // without resumable uploads

	mu       sync.Mutex
	got      []byte
	length   int64
	begun    int
	logins   int
	put      int
	take     int64                         // a request may bring so many bytes, then its connection breaks; 0: all
	before   func(r *http.Request) int     // a status to answer with instead; 0: none
	received func(offset int64)            // hears of each request that broke
	calls    map[string]func() (any, bool) // further calls
}

func (f *fakeServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.URL.Path == "/jsonrpc" {
		f.rpc(w, r)
		return
	}
	if f.before != nil {
		if status := f.before(r); status != 0 {
			w.WriteHeader(status)
			return
		}
	}
	switch {
	case r.URL.Path == "/pool_patch_upload":
		f.put++
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintln(w, `{"uuid":"put"}`)
	case f.old:
		http.NotFound(w, r)
	case r.Method == http.MethodPost:
		f.begun++
		f.got = nil
		f.length, _ = strconv.ParseInt(r.Header.Get("Upload-Length"), 10, 64)
		w.Header().Set("Location", location)
		w.Header().Set("Task-Id", "OpaqueRef:task")
		w.WriteHeader(http.StatusCreated)
	case f.begun == 0:
		http.NotFound(w, r)
	case r.Method == http.MethodHead:
		f.headers(w)
		w.WriteHeader(http.StatusOK)
	case r.Method == http.MethodPatch:
		f.patch(w, r)
	case r.Method == http.MethodDelete:
		f.begun = 0
		w.WriteHeader(http.StatusNoContent)
	}
}

func (f *fakeServer) headers(w http.ResponseWriter) {
	w.Header().Set("Upload-Offset", strconv.Itoa(len(f.got)))
	w.Header().Set("Upload-Length", strconv.FormatInt(f.length, 10))
	if int64(len(f.got)) == f.length {
		w.Header().Set("Patchd-Pool-Patch", "OpaqueRef:made")
	}
}

func (f *fakeServer) patch(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upload-Offset") != strconv.Itoa(len(f.got)) {
		w.WriteHeader(http.StatusConflict)
		return
	}
	in := io.Reader(r.Body)
	if f.take > 0 {
		in = io.LimitReader(in, f.take)
	}
	b, err := io.ReadAll(in)
	f.got = append(f.got, b...)
	if err != nil || int64(len(f.got)) < f.length {
		if f.received != nil {
			f.received(int64(len(f.got)))
		}
		panic(http.ErrAbortHandler)
	}
	f.headers(w)
	w.WriteHeader(http.StatusNoContent)
}

func (f *fakeServer) rpc(w http.ResponseWriter, r *http.Request) {
	var call struct{ Method string }
	json.NewDecoder(r.Body).Decode(&call)
	var result any = ""
	refused := false
	switch known := f.calls[call.Method]; {
	case known != nil:
		result, refused = known()
	case call.Method == "session.login_with_password":
		f.logins++
		result = fmt.Sprintf("OpaqueRef:session-%d", f.logins)
	case call.Method == "pool.get_all_records":
		result = map[string]any{"OpaqueRef:pool": map[string]string{"uuid": "the-pool"}}
	case call.Method == "pool_patch.get_record":
		result = map[string]string{"uuid": "made"}
	default:
		result, refused = []string{xapi.HandleInvalid}, true
	}
	if refused {
		data := result.([]string)
		json.NewEncoder(w).Encode(map[string]any{"error": map[string]any{"code": 1, "message": data[0], "data": data[1:]}})
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"result": result})
}

// fakes gives a fake server, a client that is logged in, and a file.
func fakes(t *testing.T) (*fakeServer, *client, string) {
	t.Helper()
	f := &fakeServer{t: t}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	c := &client{base: server.URL, http: &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Second}}}
	t.Cleanup(c.http.CloseIdleConnections)
	c.again = func(ctx context.Context) error { return c.login(ctx, "root", "x") }
	if err := c.again(context.Background()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "a.xsupdate")
	if err := os.WriteFile(path, bytes.Repeat([]byte("not signed\n"), 10_000), 0o644); err != nil {
		t.Fatal(err)
	}
	return f, c, path
}

var patient = uploadOptions{base: baseAuto, retryFor: time.Minute}

// wantSent checks that the server has the whole file.
func (f *fakeServer) wantSent(path string) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if want, err := os.ReadFile(path); err != nil || !bytes.Equal(f.got, want) {
		f.t.Errorf("%d bytes of %d, %v", len(f.got), len(want), err)
	}
}

func TestUploadGoesOnAfterEveryBreak(t *testing.T) {
	f, c, path := fakes(t)
	f.take = 30_000
	rec, err := c.upload(context.Background(), path, patient)
	if err != nil || rec.text("uuid") != "made" || rec.text("ref") != "OpaqueRef:made" || f.begun != 1 {
		t.Fatalf("%v, %v, begun %d times", rec, err, f.begun)
	}
	f.wantSent(path)
}

func TestUploadOutlivesWhatPasses(t *testing.T) {
	for name, status := range map[string]int{
		"starting": http.StatusServiceUnavailable, "a proxy": http.StatusBadGateway, "the session is gone": http.StatusUnauthorized,
		"busy": http.StatusLocked, "too many": http.StatusTooManyRequests,
	} {
		t.Run(name, func(t *testing.T) {
			f, c, path := fakes(t)
			seen := map[string]bool{}
			f.before = func(r *http.Request) int { // each kind of request fails once
				if seen[r.Method] {
					return 0
				}
				seen[r.Method] = true
				return status
			}
			if rec, err := c.upload(context.Background(), path, patient); err != nil || rec.text("uuid") != "made" {
				t.Fatalf("%v, %v", rec, err)
			}
			f.wantSent(path)
			if want := status == http.StatusUnauthorized; (f.logins > 1) != want {
				t.Errorf("%d logins", f.logins)
			}
		})
	}
}

func TestAnOldServerIsSentEverythingAtOnce(t *testing.T) {
	f, c, path := fakes(t)
	f.old = true
	if rec, err := c.upload(context.Background(), path, patient); err != nil || rec.text("uuid") != "put" || f.put != 1 {
		t.Errorf("%v, %v, %d", rec, err, f.put)
	}
}

// An upload that the server has lost begins again, unless its task says how it
// has ended.
func TestALostUploadBeginsAgain(t *testing.T) {
	f, c, path := fakes(t)
	f.take = 30_000
	f.received = func(int64) {
		if f.begun == 1 {
			f.begun, f.take = 0, 0 // forgotten
		}
	}
	if rec, err := c.upload(context.Background(), path, patient); err != nil || rec.text("uuid") != "made" {
		t.Fatalf("%v, %v", rec, err)
	}
	f.wantSent(path)

	f, c, path = fakes(t)
	f.take = 30_000
	f.received = func(int64) { f.begun = 0 }
	f.calls = map[string]func() (any, bool){"task.get_record": func() (any, bool) {
		return map[string]any{"status": "failure", "error_info": []string{xapi.OutOfSpace, "the SR"}}, false
	}}
	if _, err := c.upload(context.Background(), path, patient); !isCode(err, xapi.OutOfSpace) {
		t.Errorf("%v", err)
	}
}

// An interrupted upload says how far it is, and the next one goes on from there.
func TestInterruptedAndGoneOnWith(t *testing.T) {
	f, c, path := fakes(t)
	f.take = 30_000
	ctx, interrupt := context.WithCancel(context.Background())
	f.received = func(int64) { interrupt() }
	_, err := c.upload(ctx, path, patient)
	if err == nil || !strings.Contains(err.Error(), "interrupted: 29 KiB of 107 KiB are there, and the same command goes on from there until ") {
		t.Fatalf("%v", err)
	}
	f.take, f.received = 0, nil
	if rec, err := c.upload(context.Background(), path, patient); err != nil || rec.text("uuid") != "made" || f.begun != 1 {
		t.Fatalf("%v, %v, begun %d times", rec, err, f.begun)
	}
	f.wantSent(path)

	// A server that is silent is given up, in time.
	f, c, path = fakes(t)
	f.before = func(r *http.Request) int {
		if r.Method == http.MethodPatch {
			return http.StatusServiceUnavailable
		}
		return 0
	}
	_, err = c.upload(context.Background(), path, uploadOptions{base: baseAuto, retryFor: 100 * time.Millisecond})
	if exitCode(err) != exitUnreachable || !strings.Contains(err.Error(), "503") || !strings.Contains(err.Error(), "goes on from there") {
		t.Errorf("%v", err)
	}
}

func TestTheMemoryOfUploads(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	m, err := newMemory()
	if err != nil {
		t.Fatal(err)
	}
	b := begun{Location: location, Expires: time.Now().Add(time.Hour).Round(0)}
	if _, ok := m.recall("a"); ok {
		t.Error("there is a memory of nothing")
	}
	old := b
	old.Expires = time.Now().Add(-time.Second)
	if err := errors.Join(m.remember("a", b), m.remember("old", old), m.remember("b", b), m.forget("b")); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]bool{"a": true, "b": false, "old": false} {
		if got, ok := m.recall(key); ok != want || ok && got.Location != location {
			t.Errorf("%s: %+v %v", key, got, ok)
		}
	}
	if st, err := os.Stat(m.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st, err)
	}
	if err := os.WriteFile(m.path, []byte("{broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ok := m.recall("a"); ok {
		t.Error("what is broken is believed")
	}
	if err := m.remember("a", b); err != nil {
		t.Error(err)
	}
}

// A long delta is made again for each request, from where it is to go on.
func TestADeltaIsMadeFromAnOffset(t *testing.T) {
	text := bytes.Repeat([]byte("0123456789"), 1000)
	for _, offset := range []int64{0, 1, 9999, 10_000} {
		r, err := encodeFrom(offset, func(w io.Writer) error { _, err := w.Write(text); return err })
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, text[offset:]) {
			t.Errorf("from %d: %d bytes, %v", offset, len(got), err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := encodeFrom(10_001, func(w io.Writer) error { _, err := w.Write(text); return err }); !errors.Is(err, io.EOF) {
		t.Errorf("behind the end: %v", err)
	}
	r, err := encodeFrom(1, func(w io.Writer) error { _, err := w.Write(text); return err })
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil { // in the middle
		t.Error(err)
	}
}

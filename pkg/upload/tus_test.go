package upload

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// finished checks the answer to the last request of an upload.
func (e *tusEnv) finished(a answer, uuid xapi.UUID, payload []byte, length int) {
	e.t.Helper()
	if a.status != http.StatusNoContent {
		e.t.Fatalf("the last request: %d %s", a.status, a.text)
	}
	ref, rec := e.patchOf(uuid)
	if got := a.header.Get(PatchHeader); got != string(ref) {
		e.t.Errorf("%s: %s, want %s", PatchHeader, got, ref)
	}
	sum := sha256.Sum256(payload)
	if rec.Size != int64(length) || rec.PayloadSize != int64(len(payload)) || rec.Digest != hex.EncodeToString(sum[:]) {
		e.t.Errorf("record %+v of %d bytes, payload %d", rec, length, len(payload))
	}
	e.checkPatch(rec, payload)
}

func (e *tusEnv) checkPatch(rec pool.Patch, payload []byte) {
	e.t.Helper()
	repo, err := e.pool.Repository(e.sr)
	if err != nil {
		e.t.Fatal(err)
	}
	e.env.pool.repo = repo
	m, err := e.pool.VDIMap(e.t.Context(), rec.VDI)
	if err != nil {
		e.t.Fatal(err)
	}
	e.checkImage(rec, payload, m.Size)
	f, release, err := e.pool.VDIForExport(e.t.Context(), string(rec.VDI))
	if err != nil {
		e.t.Fatal(err)
	}
	defer release()
	if err := m.Verify(e.t.Context(), f, nil); err != nil {
		e.t.Errorf("the block map: %v", err)
	}
}

func TestTusUploadInParts(t *testing.T) {
	e := newTusEnv(t)
	for name, shape := range shapes {
		t.Run(name, func(t *testing.T) {
			e.env.t = t
			uuid := xapi.NewUUID()
			payload := payloadFor(name, uuid, 3*mib)
			message := shape(t, payload)
			location := e.create(len(message), "filename", "../x/a patch.asc")
			part := len(message)/3 + 1
			var last answer
			for at := 0; at < len(message); at += part {
				if got := e.head(location); got.status != 200 || got.offset(t) != int64(at) || got.header.Get("Upload-Length") != strconv.Itoa(len(message)) ||
					!strings.Contains(got.header.Get("Cache-Control"), "no-store") {
					t.Fatalf("HEAD: %d %v", got.status, got.header)
				}
				last = e.send(location, int64(at), message[at:min(at+part, len(message))])
				if last.status != 204 || last.offset(t) != int64(min(at+part, len(message))) {
					t.Fatalf("at %d: %d %s", at, last.status, last.text)
				}
			}
			e.finished(last, uuid, payload, len(message))
			if got := e.head(location); got.status != 200 || got.offset(t) != int64(len(message)) || got.header.Get(PatchHeader) != last.header.Get(PatchHeader) {
				t.Errorf("HEAD of a finished upload: %d %v", got.status, got.header)
			}
			if rec := e.task(last.header.Get("Task-Id")); rec.Status != task.Success || rec.NameDescription != "a patch.asc" || rec.NameLabel != "pool_patch_upload" {
				t.Errorf("task %+v", rec)
			}
		})
	}
	e.env.t = t
	e.clean(len(shapes))
}

func TestTusKnownDigestSendsNothing(t *testing.T) {
	e := newTusEnv(t)
	uuid := xapi.NewUUID()
	payload := program(uuid, 0)
	message := sign(t, payload, "-z", "0")
	e.finished(e.send(e.create(len(message)), 0, message), uuid, payload, len(message))
	ref, rec := e.patchOf(uuid)
	a := e.do(http.MethodPost, tusPath, nil, "Upload-Length", "10", "Upload-Metadata", metadata("digest", rec.Digest))
	if a.status != 200 || !bytes.Contains(a.text, []byte(ref)) {
		t.Errorf("%d %s, want the record", a.status, a.text)
	}
	e.clean(1)
	again := e.send(e.create(len(message)), 0, message)
	if again.status != 409 || again.problem.Code != xapi.PatchAlreadyExists || !slices.Equal(again.problem.Params, []string{string(uuid)}) {
		t.Errorf("the same patch once more: %d %s", again.status, again.text)
	}
	e.clean(1)
}

func TestTusRefusals(t *testing.T) {
	e := newTusEnv(t)
	message := sign(t, program(xapi.NewUUID(), mib), "-z", "0")
	length := strconv.Itoa(len(message))
	for _, c := range []struct {
		name    string
		headers []string
		status  int
	}{
		{"no length", nil, 400},
		{"a length that is none", []string{"Upload-Length", "-1"}, 400},
		{"nothing", []string{"Upload-Length", "0"}, 400},
		{"too much", []string{"Upload-Length", "999999999999999"}, 413},
		{"more than a number", []string{"Upload-Length", "99999999999999999999999999"}, 413},
		{"a length that comes later", []string{"Upload-Defer-Length", "1"}, 400},
		{"another version", []string{"Upload-Length", length, "Tus-Resumable", "0.2.2"}, 412},
		{"no version", []string{"Upload-Length", length, "Tus-Resumable", ""}, 412},
		{"metadata that is not base64", []string{"Upload-Length", length, "Upload-Metadata", "filename !!!"}, 400},
		{"metadata twice", []string{"Upload-Length", length, "Upload-Metadata", "a YQ==,a YQ=="}, 400},
		{"too much metadata", []string{"Upload-Length", length, "Upload-Metadata", "a " + strings.Repeat("A", 5000)}, 413},
		{"a digest that is none", []string{"Upload-Length", length, "Upload-Metadata", metadata("digest", "beef")}, 400},
		{"an SR that is not there", []string{"Upload-Length", length, "Upload-Metadata", metadata("sr", string(xapi.NewUUID()))}, 404},
		{"an encoding nobody knows", []string{"Upload-Length", length, "Upload-Metadata", metadata("encoding", "zip")}, 400},
		{"a delta to nothing", []string{"Upload-Length", length, "Upload-Metadata", metadata("encoding", "delta", "size", "9")}, 400},
		{"a delta to what is not there", []string{"Upload-Length", length, "Upload-Metadata", metadata("encoding", "delta", "size", "9", "base", string(xapi.NewUUID()))}, 404},
	} {
		if a := e.do(http.MethodPost, tusPath, nil, c.headers...); a.status != c.status || a.problem.Code == "" {
			t.Errorf("create with %s: %d %s, want %d", c.name, a.status, a.text, c.status)
		}
	}
	e.clean(0)

	location := e.create(len(message))
	sum := func(p []byte) string {
		s := sha256.Sum256(p)
		return "sha256 " + base64.StdEncoding.EncodeToString(s[:])
	}
	for _, c := range []struct {
		name    string
		body    []byte
		headers []string
		status  int
	}{
		{"another offset", message, []string{"Upload-Offset", "1"}, 409},
		{"no offset", message, []string{"Upload-Offset", ""}, 400},
		{"an offset that is none", message, []string{"Upload-Offset", "-1"}, 400},
		{"another type", message, []string{"Content-Type", "text/plain"}, 415},
		{"more than there is to come", append(bytes.Clone(message), 0), nil, 413},
		{"a wrong checksum", message[:100], []string{"Upload-Checksum", sum(nil)}, 460},
		{"a checksum of no kind", message[:100], []string{"Upload-Checksum", "sha3 AAAA"}, 400},
		{"a checksum of another length", message[:100], []string{"Upload-Checksum", "sha256 AAAA"}, 400},
	} {
		if a := e.send(location, 0, c.body, c.headers...); a.status != c.status || a.problem.Code == "" {
			t.Errorf("PATCH with %s: %d %s, want %d", c.name, a.status, a.text, c.status)
		}
		if a := e.head(location); a.status != 200 || a.offset(t) != 0 {
			t.Errorf("after %s: %d %v", c.name, a.status, a.header)
		}
	}
	if a := e.send(location, 0, message[:100], "Upload-Checksum", sum(message[:100])); a.status != 204 || a.offset(t) != 100 {
		t.Errorf("the right checksum: %d %s", a.status, a.text)
	}
	if a := e.do(http.MethodDelete, location, nil); a.status != 204 {
		t.Errorf("DELETE: %d %s", a.status, a.text)
	}
	if a := e.head(location); a.status != 410 {
		t.Errorf("HEAD after DELETE: %d", a.status)
	}
	if a := e.send(location, 100, message[100:]); a.status != 410 {
		t.Errorf("PATCH after DELETE: %d", a.status)
	}
	if a := e.head(tusPath + "/" + string(xapi.NewUUID())); a.status != 404 {
		t.Errorf("HEAD of nothing: %d", a.status)
	}
	e.clean(0)
}

func TestTusChecksumOfTooMuch(t *testing.T) {
	e := newTusEnv(t)
	location := e.create(20 * mib)
	zero := "sha256 " + base64.StdEncoding.EncodeToString(make([]byte, 32))
	if a := e.send(location, 0, make([]byte, maxChecked+1), "Upload-Checksum", zero); a.status != 413 || !strings.Contains(a.problem.Message, "send more requests") {
		t.Errorf("%d %s", a.status, a.text)
	}
}

func TestTusOptions(t *testing.T) {
	e := newTusEnv(t)
	a := e.do(http.MethodOptions, tusPath+"?nobody", nil, "Tus-Resumable", "")
	if a.status != 204 || a.header.Get("Tus-Version") != "1.0.0" || a.header.Get("Tus-Resumable") != "1.0.0" || a.header.Get("Tus-Max-Size") == "" ||
		!strings.Contains(a.header.Get("Tus-Extension"), "checksum") || !strings.Contains(a.header.Get("Tus-Checksum-Algorithm"), "sha256") {
		t.Errorf("%d %v", a.status, a.header)
	}
}

func TestTusBadMessagesLeaveNothing(t *testing.T) {
	e := newTusEnv(t)
	good := sign(t, program(xapi.NewUUID(), mib), "-z", "0")
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	for name, message := range map[string][]byte{
		"a byte is changed": bad,
		"cut short":         good[:len(good)-1],
		"data after it":     append(bytes.Clone(good), 'x'),
		"no message":        []byte("hello"),
		"not a patch":       sign(t, []byte("#!/bin/sh\nexit 1\n"), "-z", "0"),
	} {
		location := e.create(len(message))
		half := len(message) / 2
		if a := e.send(location, 0, message[:half]); a.status == 204 {
			a = e.send(location, int64(half), message[half:])
			if a.status != 422 || !strings.HasPrefix(a.problem.Code, "INVALID_PATCH") {
				t.Errorf("%s: %d %s", name, a.status, a.text)
			}
		} else if a.status != 422 {
			t.Errorf("%s, first half: %d %s", name, a.status, a.text)
		}
		if a := e.head(location); a.status != 422 || !strings.HasPrefix(a.header.Get(ErrorHeader), "INVALID_PATCH") {
			t.Errorf("%s: HEAD %d %v", name, a.status, a.header)
		}
	}
	e.clean(0)
}

func TestTusExpiry(t *testing.T) {
	e := newTusEnv(t)
	message := sign(t, program(xapi.NewUUID(), mib), "-z", "0")
	parked, live := e.create(len(message)), e.create(len(message))
	e.send(live, 0, message[:1000])
	e.clock.Store(int64(DefaultUploadExpiry - time.Hour))
	e.handler.tidy()
	at := e.head(live).offset(t)
	if at > 1000 {
		t.Fatalf("parked at %d", at)
	}
	if a := e.send(live, at, message[at:2000]); a.status != 204 || a.offset(t) != 2000 {
		t.Fatalf("after parking: %d %s", a.status, a.text)
	}
	e.clock.Store(int64(DefaultUploadExpiry + time.Minute))
	e.handler.tidy()
	if a := e.head(parked); a.status != 410 {
		t.Errorf("HEAD of an expired upload: %d", a.status)
	}
	if a := e.head(live); a.status != 200 || a.offset(t) > 2000 {
		t.Errorf("HEAD of one that went on: %d %v", a.status, a.header)
	}
	e.clock.Store(int64(3 * DefaultUploadExpiry))
	e.handler.tidy()
	e.clean(0)
	e.clock.Store(int64(4 * DefaultUploadExpiry))
	e.handler.tidy()
	if a := e.head(live); a.status != 404 {
		t.Errorf("HEAD long after: %d", a.status)
	}
}

func TestTusTaskCancelDiscards(t *testing.T) {
	e := newTusEnv(t)
	message := sign(t, program(xapi.NewUUID(), mib), "-z", "0")
	fresh, begun := e.create(len(message)), e.create(len(message))
	e.send(begun, 0, message[:500000])
	for _, location := range []string{fresh, begun} {
		ref := e.head(location).header.Get("Task-Id")
		if err := e.tasks.Cancel(t.Context(), xapi.Ref(ref)); err != nil {
			t.Fatal(err)
		}
		if rec := e.outcome(xapi.Ref(ref)); rec.Status != task.Cancelled {
			t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
		}
		e.await("the end", func() bool { return e.head(location).status == 410 })
	}
	e.clean(0)
}

func TestTusOwner(t *testing.T) {
	e := newTusEnv(t)
	ctx := t.Context()
	login := func(name string, role session.Role) string {
		if err := e.sessions.AddUser(ctx, name, "a long password", role); err != nil {
			t.Fatal(err)
		}
		ref, err := e.sessions.Login(ctx, name, "a long password", "test", "127.0.0.1:1")
		if err != nil {
			t.Fatal(err)
		}
		return "?session_id=" + string(ref)
	}
	ann, bob, reader := login("ann", session.PoolOperator), login("bob", session.PoolOperator), login("reader", session.ReadOnly)
	a := e.do(http.MethodPost, tusPath+ann, nil, "Upload-Length", "1000")
	location := a.header.Get("Location")
	for who, want := range map[string]int{ann: 200, bob: 403, reader: 403, "?nobody": 401, "?session_id=" + string(e.session): 200} {
		if a := e.do(http.MethodHead, location+who, nil); a.status != want {
			t.Errorf("HEAD by %s: %d, want %d", who, a.status, want)
		}
	}
	for who, want := range map[string]int{bob: 403, reader: 403, "?nobody": 401} {
		if a := e.do(http.MethodDelete, location+who, nil); a.status != want {
			t.Errorf("DELETE by %s: %d, want %d", who, a.status, want)
		}
		if a := e.do(http.MethodPatch, location+who, strings.NewReader("x"), "Content-Type", offsetStream, "Upload-Offset", "0"); a.status != want {
			t.Errorf("PATCH by %s: %d, want %d", who, a.status, want)
		}
	}
	if a := e.do(http.MethodPost, tusPath+reader, nil, "Upload-Length", "1000"); a.status != 403 {
		t.Errorf("POST by a reader: %d", a.status)
	}
	for n := 1; n < maxPerUser; n++ {
		if a := e.do(http.MethodPost, tusPath+ann, nil, "Upload-Length", "1000"); a.status != 201 {
			t.Fatalf("upload %d: %d %s", n, a.status, a.text)
		}
	}
	if a := e.do(http.MethodPost, tusPath+ann, nil, "Upload-Length", "1000"); a.status != 429 || a.problem.Code != xapi.OperationNotAllowed {
		t.Errorf("one too many: %d %s", a.status, a.text)
	}
	if a := e.do(http.MethodPost, tusPath+bob, nil, "Upload-Length", "1000"); a.status != 201 {
		t.Errorf("another user's: %d %s", a.status, a.text)
	}
}

func TestTusRoomIsPromised(t *testing.T) {
	e := newTusEnv(t)
	repo, err := e.pool.Repository(e.sr)
	if err != nil {
		t.Fatal(err)
	}
	st, err := repo.Stat(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	half := strconv.FormatInt(min(st.Free*6/10, maxUpload), 10)
	first := e.do(http.MethodPost, tusPath, nil, "Upload-Length", half)
	second := e.do(http.MethodPost, tusPath, nil, "Upload-Length", half)
	if st.Free*6/10 < maxUpload && (first.status != 201 || second.status != 507 || second.problem.Code != xapi.OutOfSpace) {
		t.Errorf("two uploads that have room only one by one: %d, %d %s", first.status, second.status, second.text)
	}
	e.do(http.MethodDelete, first.header.Get("Location"), nil)
	e.clean(0)
}

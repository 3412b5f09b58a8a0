package upload

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// checkImage mounts the VDI of a patch and compares what is in it.
func (e *env) checkImage(rec pool.Patch, payload []byte, virtualSize int64) {
	e.t.Helper()
	ctx := context.Background()
	var v pool.VDI
	err := e.store.View(func(view *store.View) (err error) {
		v, err = store.Get[pool.VDI](view, pool.ClassVDI, rec.VDI)
		return err
	})
	if err != nil {
		e.t.Fatal(err)
	}
	path, err := e.pool.repo.Path(ctx, sr.Live(v.UUID))
	if err != nil {
		e.t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		e.t.Errorf("e2fsck: %v\n%s", err, out)
	}
	dir := e.t.TempDir()
	d := e.options.Dom0
	dev, err := d.Attach(ctx, path, true)
	if err != nil {
		e.t.Fatal(err)
	}
	defer dev.Close()
	if err := d.Mount(ctx, dom0.Mount{Source: dev.Path(), Target: dir, Type: "ext4", ReadOnly: true, Options: "noload"}); err != nil {
		e.t.Fatal(err)
	}
	defer d.Unmount(ctx, dir)
	got, err := os.ReadFile(filepath.Join(dir, vdi.FileName))
	if err != nil || !bytes.Equal(got, payload) {
		e.t.Errorf("the image holds %d bytes (%v), want the payload of %d", len(got), err, len(payload))
	}
	if v.VirtualSize != virtualSize {
		e.t.Errorf("virtual size %d, want %d", v.VirtualSize, virtualSize)
	}
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func TestUploadMakesVDIAndPatch(t *testing.T) {
	e := newEnv(t)
	for _, c := range []struct {
		name    string
		size    int
		gpg     []string
		chunked bool
		virtual func(length int) int64
	}{
		{"binary, uncompressed", 3 * mib, []string{"-z", "0"}, false, func(n int) int64 { return vdi.Size(int64(n)) }},
		{"armoured", 100, []string{"-z", "0", "--armor"}, false, func(int) int64 { return 4 * mib }},
		{"compressed as gpg does by itself is sized as of unknown length", 3 * mib, nil, false, func(int) int64 { return 4 << 30 }},
		{"chunked is sized as of unknown length", 2 * mib, []string{"-z", "0"}, true, func(int) int64 { return 4 << 30 }},
		{"cleartext, as classic hotfixes", 0, []string{"--clearsign"}, false, func(int) int64 { return 4 * mib }},
	} {
		t.Run(c.name, func(t *testing.T) {
			e.t = t
			uuid := xapi.NewUUID()
			payload := program(uuid, c.size)
			message := sign(t, payload, c.gpg...)
			var body io.Reader = bytes.NewReader(message)
			if c.chunked {
				body = io.MultiReader(body)
			}
			status, _, text := e.put(e.url("/pool_patch_upload"), body)
			if status != http.StatusCreated {
				t.Fatalf("status %d: %s", status, text)
			}
			var shown struct {
				Ref  xapi.Ref  `json:"ref"`
				UUID xapi.UUID `json:"uuid"`
			}
			if err := json.Unmarshal(text, &shown); err != nil || shown.UUID != uuid || strings.Contains(string(text), `"_`) {
				t.Errorf("answer %s", text)
			}
			ref, rec := e.patchOf(uuid)
			if ref != shown.Ref || rec.Size != int64(len(message)) || rec.PayloadSize != int64(len(payload)) || rec.Digest != digestOf(payload) {
				t.Errorf("record %s %+v", ref, rec)
			}
			if rec.Signer == "" || rec.SignatureKind == "" || rec.InfoXML == "" || !slices.Equal(rec.AfterApplyGuidance, []xapi.Guidance{xapi.RestartXAPI}) {
				t.Errorf("record %+v", rec)
			}
			sig := patch.Signature{Kind: patch.SignatureKind(rec.SignatureKind), Packet: rec.Signature}
			if d, err := patch.VerifyDetached(context.Background(), bytes.NewReader(payload), sig, patch.NewKeyring("k", publicKey), nil); err != nil || d != rec.Digest {
				t.Errorf("the stored signature does not verify the payload: %v", err)
			}
			e.checkImage(rec, payload, c.virtual(len(message)))
		})
	}
	e.t = t
}

func TestUploadRefuses(t *testing.T) {
	e := newEnv(t)
	good := sign(t, program(xapi.NewUUID(), mib), "-z", "0")
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	for _, c := range []struct {
		name   string
		body   []byte
		query  []string
		status int
		code   string
	}{
		{"an unsigned file", program(xapi.NewUUID(), 100), nil, 422, xapi.InvalidPatch},
		{"a flipped bit", flipped, nil, 422, xapi.InvalidPatch},
		{"a message cut short", good[:len(good)-10], nil, 422, xapi.InvalidPatch},
		{"data after the message", append(bytes.Clone(good), "more"...), nil, 422, xapi.InvalidPatch},
		{"what is no program", sign(t, []byte("hello\n"), "-z", "0"), nil, 422, xapi.InvalidPatch},
		{"info without XML", sign(t, []byte("#!/bin/sh\necho hi\n"), "-z", "0"), nil, 422, xapi.InvalidPatch},
		{"bad line endings", sign(t, []byte("#!/bin/sh\nexit 2\n"), "-z", "0"), nil, 422, xapi.InvalidPatchWithLog},
		{"an unknown SR uuid", good, []string{"sr_uuid", string(xapi.NewUUID())}, 404, xapi.UUIDInvalid},
		{"an unknown SR ref", good, []string{"sr_id", string(xapi.NewRef())}, 404, xapi.HandleInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			e.t = t
			status, p, text := e.put(e.url("/pool_patch_upload", c.query...), bytes.NewReader(c.body))
			if status != c.status || p.Code != c.code || p.Message == "" || p.Params == nil {
				t.Errorf("%d %s, want %d %s", status, text, c.status, c.code)
			}
			e.nothing()

			ref := e.newTask()
			status, _, text = e.put(e.url("/pool_patch_upload/", append(c.query, "task_id", string(ref))...), bytes.NewReader(c.body))
			if status != 200 || len(text) > 0 {
				t.Errorf("with a task: %d %s, want 200", status, text)
			}
			if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != c.code {
				t.Errorf("task %s %v, want failure %s", rec.Status, rec.ErrorInfo, c.code)
			}
			e.nothing()
		})
	}
	e.t = t
}

func TestUploadOfAKnownUUID(t *testing.T) {
	e := newEnv(t)
	uuid := xapi.NewUUID()
	message := sign(t, program(uuid, 0), "-z", "0")
	if status, _, text := e.put(e.url("/pool_patch_upload"), bytes.NewReader(message)); status != 201 {
		t.Fatalf("%d %s", status, text)
	}
	status, p, _ := e.put(e.url("/pool_patch_upload"), bytes.NewReader(message))
	if status != 409 || p.Code != xapi.PatchAlreadyExists || !slices.Equal(p.Params, []string{string(uuid)}) {
		t.Errorf("%d %+v", status, p)
	}
	if vols, _ := e.pool.repo.Scan(context.Background()); len(vols) != 1 {
		t.Errorf("volumes after the second upload: %v", vols)
	}
}

func TestUploadWithoutRoomIsRefusedBeforeTheBody(t *testing.T) {
	e := newEnv(t)
	st, err := e.pool.repo.Stat(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	e.keepFree.Store(st.Free - 5*mib)
	var read atomic.Int64
	body := readerFunc(func(p []byte) (int, error) { read.Add(int64(len(p))); return len(p), nil })
	status, p, text := e.put(e.url("/pool_patch_upload"), body, func(r *http.Request) {
		r.ContentLength = 100 * mib
		r.Header.Set("Expect", "100-continue")
	})
	want := "Local (" + string(e.pool.uuid) + ")"
	if status != 507 || p.Code != xapi.OutOfSpace || !slices.Equal(p.Params, []string{want}) {
		t.Errorf("%d %s", status, text)
	}
	if n := read.Load(); n > 50*mib {
		t.Errorf("%d bytes were sent", n)
	}
	e.keepFree.Store(0)
	e.pool.plugged = false
	if status, p, _ := e.put(e.url("/pool_patch_upload"), strings.NewReader("x")); status != 409 || p.Code != xapi.DefaultSRNotFound {
		t.Errorf("without an SR: %d %+v", status, p)
	}
	e.nothing()
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestProbesMakeNothing(t *testing.T) {
	e := newEnv(t)
	if status, _, _ := e.put(e.url("/pool_patch_upload/"), nil); status != 200 {
		t.Errorf("probe of length 0: %d", status)
	}
	e.nothing()
	e.store.View(func(v *store.View) error {
		if v.Count(task.Class) > 0 {
			t.Error("a probe makes a task")
		}
		return nil
	})
	ref := e.newTask()
	if status, _, _ := e.put(e.url("/pool_patch_upload/", "task_id", string(ref)), nil); status != 200 {
		t.Errorf("length 0 with a task: %d", status)
	}
	if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.InvalidPatch {
		t.Errorf("length 0 with a task: %v %v", rec.Status, rec.ErrorInfo)
	}
}

func TestCredentials(t *testing.T) {
	e := newEnv(t)
	ctx := context.Background()
	if err := e.sessions.AddUser(ctx, "reader", "a long password", session.ReadOnly); err != nil {
		t.Fatal(err)
	}
	if err := e.sessions.AddUser(ctx, "operator", "a long password", session.PoolOperator); err != nil {
		t.Fatal(err)
	}
	reader, err := e.sessions.Login(ctx, "reader", "a long password", "test", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	operator, err := e.sessions.Login(ctx, "operator", "a long password", "test", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		session xapi.Ref
		status  int
		code    string
	}{
		{"a session that is not there", xapi.NewRef(), 401, xapi.SessionAuthenticationFailed},
		{"no credentials", "", 401, xapi.SessionAuthenticationFailed},
		{"a role that is too low", reader, 403, xapi.RBACPermissionDenied},
	} {
		t.Run(c.name, func(t *testing.T) {
			e.t = t
			ref := e.newTask()
			if c.session == reader {
				var err error
				if ref, err = e.tasks.Create(ctx, task.Spec{Label: "x", User: "reader"}); err != nil {
					t.Fatal(err)
				}
			}
			q := "?task_id=" + string(ref)
			if c.session != "" {
				q += "&session_id=" + string(c.session)
			}
			status, p, _ := e.put(e.server.URL+"/pool_patch_upload"+q, strings.NewReader("x"))
			if status != c.status || p.Code != c.code {
				t.Errorf("%d %+v", status, p)
			}
			if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != c.code {
				t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
			}
		})
	}
	e.t = t
	t.Run("another user's task is refused and goes on", func(t *testing.T) {
		ref := e.newTask()
		status, _, _ := e.put(e.server.URL+"/pool_patch_upload?session_id="+string(operator)+"&task_id="+string(ref), strings.NewReader("x"))
		if rec, err := e.tasks.Get(ref); status != 403 || err != nil || rec.Status != task.Pending {
			t.Errorf("%d, task %v %v", status, rec.Status, err)
		}
	})
	t.Run("Basic, and parameters as cookies", func(t *testing.T) {
		uuid := xapi.NewUUID()
		ref, err := e.tasks.Create(ctx, task.Spec{Label: "x", User: "operator"})
		if err != nil {
			t.Fatal(err)
		}
		status, _, text := e.put(e.server.URL+"/pool_patch_upload", bytes.NewReader(sign(t, program(uuid, 0), "-z", "0")), func(r *http.Request) {
			r.SetBasicAuth("operator", "a long password")
			r.AddCookie(&http.Cookie{Name: "task_id", Value: string(ref)})
			r.AddCookie(&http.Cookie{Name: "sr_uuid", Value: string(e.pool.uuid)})
		})
		if rec := e.outcome(ref); status != 200 || rec.Status != task.Success {
			t.Errorf("%d %s, task %v %v", status, text, rec.Status, rec.ErrorInfo)
		}
	})
	t.Run("a task that is not there", func(t *testing.T) {
		if status, p, _ := e.put(e.url("/pool_patch_upload", "task_id", string(xapi.NewRef())), strings.NewReader("x")); status != 404 || p.Code != xapi.HandleInvalid {
			t.Errorf("%d %+v", status, p)
		}
	})
	t.Run("a task that was cancelled before", func(t *testing.T) {
		ref := e.newTask()
		if err := e.tasks.Cancel(ctx, ref); err != nil {
			t.Fatal(err)
		}
		if status, _, _ := e.put(e.url("/pool_patch_upload", "task_id", string(ref)), strings.NewReader("x")); status != 200 {
			t.Errorf("%d", status)
		}
	})
}

func TestAFullDiskWhileStreamingIsOutOfSpace(t *testing.T) {
	e := newEnv(t)
	message := sign(t, program(xapi.NewUUID(), 70*mib), "-z", "0")
	half := make(chan struct{})
	st, _ := e.pool.repo.Stat(context.Background())
	sent := 0
	body := readerFunc(func(p []byte) (int, error) {
		if sent == len(message) {
			return 0, io.EOF
		}
		if sent > mib && half != nil {
			e.keepFree.Store(st.Free + 1<<40)
			close(half)
			half = nil
		}
		n := copy(p, message[sent:])
		sent += n
		return n, nil
	})
	ref := e.newTask()
	e.put(e.url("/pool_patch_upload", "task_id", string(ref)), body, func(r *http.Request) { r.ContentLength = int64(len(message)) })
	if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.OutOfSpace {
		t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
	}
	e.nothing()
}

func TestUploadTime(t *testing.T) { // bounds of waiting, without waiting long
	e := newEnv(t, func(o *Options) { o.Stall = 100 * time.Millisecond })
	pr, pw := io.Pipe()
	defer pw.Close()
	status, p, _ := e.put(e.url("/pool_patch_upload"), pr)
	if status != 408 || p.Code != xapi.Timeout {
		t.Errorf("a client that sends nothing: %d %+v", status, p)
	}
	e.nothing()
}

package upload

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/mux"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// tusEnv is an env with the real pool and resumable uploads.
type tusEnv struct {
	*env
	root    *testing.T // that everything ends with
	pool    *pool.Pool
	sr      xapi.Ref
	handler *Handler
	clock   atomic.Int64 // how far the clock of the uploads is ahead
}

func newTusEnv(t *testing.T) *tusEnv {
	t.Helper()
	e := &tusEnv{env: newEnv(t), root: t}
	e.pool = e.withPool()
	e.sr = e.env.pool.sr
	if err := e.pool.SetDefaultSR(context.Background(), e.sr); err != nil {
		t.Fatal(err)
	}
	e.options.Pool, e.options.Drafts, e.options.UploadsDir = e.pool, e.pool, filepath.Join(t.TempDir(), "uploads")
	e.options.Now = func() time.Time { return time.Now().Add(time.Duration(e.clock.Load())) }
	e.begin()
	t.Cleanup(func() { e.handler.Close() })
	return e
}

// begin starts a handler and a server over what there is.
func (e *tusEnv) begin() {
	e.t.Helper()
	defer func(t *testing.T) { e.env.t = t }(e.t)
	e.env.t = e.root
	e.options.Tasks = e.tasks
	e.handler = New(e.options)
	if err := e.handler.Start(context.Background()); err != nil {
		e.t.Fatal(err)
	}
	router := mux.NewRouter().SkipClean(true)
	e.handler.Routes(router)
	e.env.start(router)
}

// restart ends everything that is in memory and begins again.
func (e *tusEnv) restart() {
	e.t.Helper()
	e.tasks.Stop()
	e.handler.Close()
	e.server.CloseClientConnections()
	e.server.Close()
	e.tasks = task.NewManager(e.store, nil, e.handler.Log)
	e.root.Cleanup(e.tasks.Stop)
	e.begin()
	drafts, err := e.pool.Drafts()
	if err != nil {
		e.t.Fatal(err)
	}
	owned := DraftTasks(drafts)
	if err := e.tasks.Repair(context.Background(), func(ref xapi.Ref) bool { return owned[ref] }); err != nil {
		e.t.Fatal(err)
	}
}

// answer is what a request was answered.
type answer struct {
	status  int
	header  http.Header
	problem problem
	text    []byte
}

func (a answer) offset(t *testing.T) int64 {
	t.Helper()
	n, err := strconv.ParseInt(a.header.Get("Upload-Offset"), 10, 64)
	if err != nil {
		t.Fatalf("status %d %s: no Upload-Offset: %v", a.status, a.text, a.header)
	}
	return n
}

// do sends a request of the protocol; headers is a row of names and values.
func (e *tusEnv) do(method, path string, body io.Reader, headers ...string) answer {
	e.t.Helper()
	a, err := e.try(context.Background(), method, path, body, headers...)
	if err != nil {
		e.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

func (e *tusEnv) try(ctx context.Context, method, path string, body io.Reader, headers ...string) (a answer, err error) {
	address := path
	if !strings.Contains(path, "?") {
		address = path + "?session_id=" + string(e.session)
	}
	r, err := http.NewRequestWithContext(ctx, method, e.server.URL+address, body)
	if err != nil {
		return a, err
	}
	r.Header.Set("Tus-Resumable", "1.0.0")
	for i := 0; i < len(headers); i += 2 {
		if headers[i+1] == "" {
			r.Header.Del(headers[i])
			continue
		}
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	a.status, a.header = resp.StatusCode, resp.Header
	if a.text, err = io.ReadAll(resp.Body); err != nil {
		return a, err
	}
	json.Unmarshal(a.text, &a.problem)
	return a, nil
}

func metadata(pairs ...string) string {
	var parts []string
	for i := 0; i < len(pairs); i += 2 {
		parts = append(parts, pairs[i]+" "+base64.StdEncoding.EncodeToString([]byte(pairs[i+1])))
	}
	return strings.Join(parts, ",")
}

// create begins an upload and gives its path.
func (e *tusEnv) create(length int, meta ...string) string {
	e.t.Helper()
	a := e.do(http.MethodPost, tusPath, nil, "Upload-Length", strconv.Itoa(length), "Upload-Metadata", metadata(meta...))
	if a.status != http.StatusCreated || a.header.Get("Location") == "" || a.header.Get("Upload-Expires") == "" || a.header.Get("Task-Id") == "" {
		e.t.Fatalf("create: %d %v %s", a.status, a.header, a.text)
	}
	return a.header.Get("Location")
}

func (e *tusEnv) send(location string, offset int64, body []byte, headers ...string) answer {
	e.t.Helper()
	headers = append([]string{"Content-Type", offsetStream, "Upload-Offset", strconv.FormatInt(offset, 10)}, headers...)
	return e.do(http.MethodPatch, location, bytes.NewReader(body), headers...)
}

func (e *tusEnv) head(location string) answer {
	e.t.Helper()
	return e.do(http.MethodHead, location, nil)
}

// sendPart sends the first bytes of a request whose body is longer, and breaks
// the connection; it returns when the server has them all.
func (e *tusEnv) sendPart(location string, offset int64, part []byte, promised int64) {
	e.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pr, pw := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r, _ := http.NewRequestWithContext(ctx, http.MethodPatch, e.server.URL+location+"?session_id="+string(e.session), pr)
		r.ContentLength = promised
		r.Header.Set("Tus-Resumable", "1.0.0")
		r.Header.Set("Content-Type", offsetStream)
		r.Header.Set("Upload-Offset", strconv.FormatInt(offset, 10))
		if resp, err := http.DefaultClient.Do(r); err == nil {
			resp.Body.Close()
		}
	}()
	if _, err := pw.Write(part); err != nil {
		e.t.Fatal(err)
	}
	e.await("the server to take what was sent", func() bool { return e.head(location).offset(e.t) == offset+int64(len(part)) })
	cancel()
	pw.CloseWithError(io.ErrClosedPipe)
	<-ended
}

// await looks until something is so.
func (e *tusEnv) await(what string, is func() bool) {
	e.t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); {
		if time.Now().After(end) {
			e.t.Fatalf("no sign of %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// task is the record of the upload's task.
func (e *tusEnv) task(ref string) task.Record {
	e.t.Helper()
	rec, err := e.tasks.Get(xapi.Ref(ref))
	if err != nil {
		e.t.Fatal(err)
	}
	return rec
}

// clean checks that nothing is there but so many VDIs with their maps: no
// volume, draft, log or unfinished task.
func (e *tusEnv) clean(images int) {
	e.t.Helper()
	ctx := context.Background()
	repo, err := e.pool.Repository(e.sr)
	if err != nil {
		e.t.Fatal(err)
	}
	vols, err := repo.Scan(ctx)
	live := 0
	for _, v := range vols {
		if v.Name.Kind == sr.KindLive {
			live++
		}
	}
	if err != nil || live != images || len(vols) != 2*images {
		e.t.Errorf("volumes: %v %v, want %d images with their maps", vols, err, images)
	}
	if drafts, err := e.pool.Drafts(); err != nil || len(drafts) > 0 {
		e.t.Errorf("drafts are left: %v %v", drafts, err)
	}
	if logs, err := os.ReadDir(e.options.UploadsDir); err != nil || len(logs) > 0 {
		e.t.Errorf("logs are left: %v %v", logs, err)
	}
	e.store.View(func(v *store.View) error {
		for _, it := range v.List(task.Class) {
			var rec task.Record
			if it.Decode(&rec); !rec.Status.Finished() {
				e.t.Errorf("a task goes on: %+v", rec)
			}
		}
		if n := v.Count(pool.ClassIntent); n > 0 {
			e.t.Errorf("%d intents are left", n)
		}
		if n := v.Count(pool.ClassPatch); n != images {
			e.t.Errorf("%d patches, want %d", n, images)
		}
		return nil
	})
}

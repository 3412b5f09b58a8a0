package upload

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

func (e *env) get(address string) (int, http.Header, []byte) {
	e.t.Helper()
	resp, err := http.Get(address)
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, b
}

func TestImportAndExport(t *testing.T) {
	e := newEnv(t)
	data := append(program(xapi.NewUUID(), 3*mib+7), make([]byte, 4*mib)...)
	ref := e.newTask()
	status, _, _ := e.put(e.url("/import_raw_vdi", "task_id", string(ref), "sr_uuid", string(e.pool.uuid), "format", "raw"), bytes.NewReader(data))
	rec := e.outcome(ref)
	if status != 200 || rec.Status != task.Success {
		t.Fatalf("%d, task %v %v", status, rec.Status, rec.ErrorInfo)
	}
	made := strings.TrimSuffix(strings.TrimPrefix(rec.Result, "<value>"), "</value>")

	status, h, got := e.get(e.url("/export_raw_vdi", "vdi", made))
	if status != 200 || !bytes.Equal(got[:len(data)], data) || len(got) != 8*mib || h.Get("Task-Id") == "" {
		t.Errorf("export: %d, %d bytes", status, len(got))
	}
	vols, _ := e.pool.repo.Scan(context.Background())
	f, err := e.pool.repo.Open(context.Background(), sr.Live(vols[0].Name.VDI), sr.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if a, _ := vdi.Allocated(f); a > 5*mib {
		t.Errorf("zeros take room: %d bytes", a)
	}

	t.Run("over a VDI that is there", func(t *testing.T) {
		ref := e.newTask()
		e.put(e.url("/import_raw_vdi", "task_id", string(ref), "vdi", string(vols[0].Name.VDI)), bytes.NewReader(make([]byte, 2*mib)))
		if rec := e.outcome(ref); rec.Status != task.Success || rec.Result != "<value>"+made+"</value>" {
			t.Errorf("task %v %v %v", rec.Status, rec.ErrorInfo, rec.Result)
		}
		copy(data, make([]byte, 2*mib))
		if _, _, got := e.get(e.url("/export_raw_vdi", "vdi", made)); !bytes.Equal(got[:len(data)], data) {
			t.Error("the VDI does not hold what was imported")
		}
	})
	t.Run("more than the VDI holds", func(t *testing.T) {
		for _, body := range []io.Reader{bytes.NewReader(make([]byte, 9*mib))} {
			ref := e.newTask()
			e.put(e.url("/import_raw_vdi", "task_id", string(ref), "vdi", made), body)
			if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.VDITooSmall {
				t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
			}
		}
	})
	t.Run("cut short", func(t *testing.T) {
		ref := e.newTask()
		c := e.dial()
		c.send(fmt.Appendf(nil, "PUT /import_raw_vdi?session_id=%s&task_id=%s&sr_id=%s HTTP/1.0\r\nContent-Length: %d\r\n\r\n", e.session, ref, e.pool.sr, 5*mib))
		c.status()
		c.send(data[:mib])
		c.conn.CloseWrite()
		if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.VDIIOError {
			t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
		}
		if vols, _ := e.pool.repo.Scan(context.Background()); len(vols) != 1 {
			t.Errorf("volumes: %v", vols)
		}
	})
	for name, c := range map[string]struct {
		query  []string
		body   io.Reader
		status int
	}{
		"neither VDI nor SR":           {nil, strings.NewReader("x"), 400},
		"a new VDI without a length":   {[]string{"sr_id", "x"}, http.NoBody, 400},
		"another format":               {[]string{"vdi", made, "format", "vhd"}, strings.NewReader("x"), 404},
		"chunked transfer":             {[]string{"vdi", made}, io.MultiReader(strings.NewReader("x")), 404},
		"chunks in the way of the API": {[]string{"vdi", made, "chunked", ""}, strings.NewReader("x"), 404},
	} {
		t.Run(name, func(t *testing.T) {
			if status, p, _ := e.put(e.url("/import_raw_vdi", c.query...), c.body); status != c.status || p.Message == "" {
				t.Errorf("%d %+v, want %d", status, p, c.status)
			}
		})
	}
	if status, _, _ := e.get(e.url("/export_raw_vdi")); status != 400 {
		t.Errorf("export of nothing: %d", status)
	}
	if status, _, _ := e.get(e.url("/export_raw_vdi", "vdi", string(xapi.NewUUID()))); status != 404 {
		t.Errorf("export of an unknown VDI: %d", status)
	}
}

func TestDownload(t *testing.T) {
	e := newEnv(t)
	uuid := string(xapi.NewUUID())
	if status, _, _ := e.get(e.url("/pool_patch_download")); status != 400 {
		t.Errorf("without a uuid: %d", status)
	}
	ref := e.newTask()
	if status, _, _ := e.get(e.url("/pool_patch_download", "uuid", uuid, "task_id", string(ref))); status != 404 {
		t.Errorf("without a file: %d", status)
	}
	if rec := e.outcome(ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.CannotFindPatch {
		t.Errorf("without a file: task %v %v", rec.Status, rec.ErrorInfo)
	}
	e.pool.file = filepath.Join(t.TempDir(), "x")
	data := program(xapi.NewUUID(), 5*mib)
	if err := os.WriteFile(e.pool.file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	ref = e.newTask()
	status, h, got := e.get(e.url("/pool_patch_download", "uuid", uuid, "task_id", string(ref)))
	if status != 200 || !bytes.Equal(got, data) || h.Get("Content-Length") != fmt.Sprint(len(data)) {
		t.Errorf("%d, %d bytes", status, len(got))
	}
	if rec := e.outcome(ref); rec.Status != task.Success || rec.Result != "<value></value>" {
		t.Errorf("task %v %v", rec.Status, rec.Result)
	}
}

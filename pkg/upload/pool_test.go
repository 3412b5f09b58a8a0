package upload

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/file"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// patchPool is the real pool where patches are concerned.
type patchPool struct{ *pool.Pool }

func (patchPool) VDIForImport(context.Context, string) (*os.File, func(), error) {
	return nil, nil, xapi.NewError(xapi.NotImplemented, "import")
}

func (patchPool) VDIForExport(context.Context, string) (*os.File, func(), error) {
	return nil, nil, xapi.NewError(xapi.NotImplemented, "export")
}

// withPool gives e the real pool with one file SR in place of the fake one.
func (e *env) withPool() *pool.Pool {
	e.t.Helper()
	ctx := context.Background()
	p, err := pool.Open(ctx, pool.Options{
		Store: e.store, Log: logrus.StandardLogger(), Drivers: []sr.Driver{&file.Driver{}}, Now: time.Now,
		HostUUID: xapi.NewUUID(), Hostname: "test", PatchDir: e.t.TempDir(),
	})
	if err != nil {
		e.t.Fatal(err)
	}
	ref, err := p.SRCreate(ctx, pool.SRSpec{
		Host: p.Self, Type: "file", NameLabel: "Pool SR", DeviceConfig: map[string]string{"location": filepath.Join(e.t.TempDir(), "sr")},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	repo, err := p.Repository(ref)
	if err != nil {
		e.t.Fatal(err)
	}
	e.pool.sr, e.pool.repo = ref, repo
	return p
}

func TestUploadWithTheRealPool(t *testing.T) {
	e := newEnv(t)
	p := e.withPool()
	o := e.options
	o.Pool = patchPool{p}
	e.serve(o)
	uuid := xapi.NewUUID()
	payload := program(uuid, mib)
	message := sign(t, payload, "-z", "0")
	upload := func() task.Record {
		ref := e.newTask()
		e.put(e.url("/pool_patch_upload", "task_id", string(ref), "sr_id", string(e.pool.sr)), bytes.NewReader(message))
		return e.outcome(ref)
	}
	if rec := upload(); rec.Status != task.Success {
		t.Fatalf("task %v %v", rec.Status, rec.ErrorInfo)
	}
	first, rec := e.patchOf(uuid)
	e.checkImage(rec, payload, int64(len(message)*4+mib-1)/mib*mib)

	if rec := upload(); rec.Status != task.Failure || !slices.Equal(rec.ErrorInfo, []string{xapi.PatchAlreadyExists, string(uuid)}) {
		t.Errorf("a second upload: %v %v", rec.Status, rec.ErrorInfo)
	}
	if vols, _ := e.pool.repo.Scan(context.Background()); len(vols) != 2 || vols[1].Name != vols[0].Name.Map() {
		t.Errorf("not just an image and its block map: %v", vols)
	}
	if err := p.VDIDestroy(context.Background(), rec.VDI); err != nil {
		t.Fatal(err)
	}
	if rec := upload(); rec.Status != task.Success || rec.Result != "<value>"+string(first)+"</value>" {
		t.Errorf("an upload of a cleaned patch: %v %v %s, want %s again", rec.Status, rec.ErrorInfo, rec.Result, first)
	}
}

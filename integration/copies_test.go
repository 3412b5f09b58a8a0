package integration

import (
	"bytes"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// hostAt is the ref of a host by its address.
func hostAt(s *lab.Session, h *lab.Host) string {
	s.H.T.Helper()
	for ref, rec := range s.All("host") {
		if rec["address"] == h.IP {
			return ref
		}
	}
	s.H.T.Fatalf("no host at %s", h.IP)
	return ""
}

// srOn is the SR that is plugged on a host.
func srOn(s *lab.Session, h *lab.Host) string {
	s.H.T.Helper()
	host := hostAt(s, h)
	for _, pbd := range s.All("PBD") {
		if pbd["host"] == host {
			return pbd["SR"].(string)
		}
	}
	s.H.T.Fatalf("no SR on host %s", h.IP)
	return ""
}

// imagesOf lists the VDIs of a golden image and its replicas by the SR each lies in.
func imagesOf(s *lab.Session, uuid string) map[string]string {
	s.H.T.Helper()
	out := map[string]string{}
	for ref, rec := range s.All("VDI") {
		other := rec["other_config"].(map[string]any)
		if rec["uuid"] == uuid || other["patchd-replica"] == uuid {
			out[rec["SR"].(string)] = ref
		}
	}
	return out
}

// get fetches a path with root's session and gives its status and body.
func get(s *lab.Session, path string, query url.Values) (int, []byte) {
	s.H.T.Helper()
	query.Set("session_id", s.Ref)
	res, err := s.H.HTTP.Get(s.H.URL + path + "?" + query.Encode())
	if err != nil {
		s.H.T.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		s.H.T.Fatal(err)
	}
	return res.StatusCode, b
}

// An upload is acknowledged when a second host has it: the death of the leader
// right after that takes nothing.
func TestC4_AnUploadSurvivesItsLeader(t *testing.T) {
	t.Parallel()
	c := startCoordinators(t, 3, lab.Options{})
	leader, s, _ := c.leader()
	for _, h := range c.others(leader) {
		standsBy(t, h, leader)
	}
	w := lab.NewWork(t, lab.Patch{Pad: 5 << 20})
	payload := w.Payload()
	if a := s.Upload(lab.DefaultKey(t).Sign(t, payload)); a.Status != http.StatusCreated {
		t.Fatalf("upload: %d %s", a.Status, a.Body)
	}
	leader.Kill()

	c.hosts = c.others(leader)
	next, _, _ := c.leader()
	s = &lab.Session{H: next, Ref: s.Ref}
	patch := s.Call("pool_patch.get_by_uuid", string(w.UUID)).(string)
	rec := s.Call("pool_patch.get_record", patch).(map[string]any)
	golden := s.Call("VDI.get_record", rec["VDI"]).(map[string]any)
	images := imagesOf(s, golden["uuid"].(string))
	if golden["SR"] != srOn(s, leader) || len(images) < 2 {
		t.Fatalf("the image lies in %v, the golden one in %s", images, golden["SR"])
	}
	for _, h := range c.hosts {
		if rec := s.Wait(s.Call("Async.pool_patch.apply", patch, hostAt(s, h)).(string)); rec["status"] != "success" {
			t.Fatalf("apply on %s: %v", h.IP, rec["error_info"])
		}
		if n := w.Effects(h); n != 1 {
			t.Errorf("%d effects on %s", n, h.IP)
		}
	}
	reads(t, s, golden["uuid"].(string), payload)
	if status, body := get(s, "/pool_patch_chunks", url.Values{"uuid": {string(w.UUID)}}); status != http.StatusOK || len(body) == 0 {
		t.Errorf("chunks: %d %.300s", status, body)
	}
	twin := s.Call("VDI.copy", rec["VDI"], srOn(s, next)).(string)
	reads(t, s, s.Call("VDI.get_uuid", twin).(string), payload)

	leader.Launch()
	if err := leader.Ready(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	standsBy(t, leader, next)
	if rec := s.Wait(s.Call("Async.pool_patch.apply", patch, hostAt(s, leader)).(string)); rec["status"] != "success" {
		t.Fatalf("apply on the host that came back: %v", rec["error_info"])
	}
	if hps := s.All("host_patch"); len(hps) != 3 {
		t.Errorf("%d host_patches", len(hps))
	}
	if n := w.Effects(leader); n != 1 {
		t.Errorf("%d effects on the host that came back", n)
	}
}

// tasksSay tells whether the output of a task holds a text.
func tasksSay(s *lab.Session, text string) bool {
	s.H.T.Helper()
	for _, rec := range s.All("task") {
		if out, _ := rec["other_config"].(map[string]any)["patchd-output"].(string); strings.Contains(out, text) {
			return true
		}
	}
	return false
}

// How many hosts have to have an upload depends on who is there: alone one is
// enough, and the task says so; an SR that two have plugged is two; and while one
// that should come does not, the upload is undone.
func TestC4_CopiesOfAnUpload(t *testing.T) {
	t.Parallel()
	etcd := lab.StartEtcd(t, 1)
	o := lab.Options{Flags: []string{"--store", etcd.URL(""), "--copies-timeout", "6s"}}
	c := &coordinators{t: t, etcd: etcd, hosts: []*lab.Host{lab.Start(t, o)}}
	leader, s, _ := c.leader()
	s.MustUpload(&lab.Patch{})
	if !tasksSay(s, "the image is on 1 of 2 hosts: no other host is there") {
		t.Errorf("no task says that there is one copy only: %v", s.All("task"))
	}

	other := lab.Start(t, o)
	c.hosts = append(c.hosts, other)
	standsBy(t, other, leader)
	copies := func(patch string) int {
		t.Helper()
		return len(imagesOf(s, s.Call("VDI.get_uuid", vdiOf(s, patch)).(string)))
	}
	if n := copies(s.MustUpload(&lab.Patch{})); n != 2 {
		t.Errorf("%d images of an upload with two hosts", n)
	}
	local, pool := srOn(s, leader), lab.Pool{T: t, Hosts: c.hosts}
	shared := pool.Share(s, "shared", t.TempDir(), leader, other)
	s.Call("pool.set_default_SR", onlyPool(s), shared)
	if n := copies(s.MustUpload(&lab.Patch{})); n != 1 {
		t.Errorf("%d images of an upload to an SR that both hosts have plugged", n)
	}

	s.Call("pool.set_default_SR", onlyPool(s), local)
	other.Kill()
	before := len(s.All("VDI"))
	hasCode(t, uploadErr(s, (&lab.Patch{}).Signed(t)), xapi.OperationNotAllowed)
	if n := len(s.All("VDI")); n != before || len(s.All("pool_patch")) != 3 {
		t.Errorf("%d VDIs, %d before; %d patches", n, before, len(s.All("pool_patch")))
	}
	other.Up()
	standsBy(t, other, leader)
	last := s.MustUpload(&lab.Patch{})
	if n := copies(last); n != 2 {
		t.Errorf("%d images of an upload after the host came back", n)
	}

	// It is destroyed while the host with the golden image is away.
	golden := image(s, vdiOf(s, last))
	vdis := len(s.All("VDI"))
	leader.Kill()
	c.hosts = []*lab.Host{other}
	c.leader()
	s = &lab.Session{H: other, Ref: s.Ref}
	s.Call("pool_patch.destroy", last)
	if !exists(golden) {
		t.Error("the golden image is not on the host that is away")
	}
	leader.Launch()
	if err := leader.Ready(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	until(t, "the image on the host that is back to go", func() bool { return !exists(golden) && len(s.All("VDI")) == vdis-2 })
}

// A leader that dies before its upload is confirmed leaves no half: the next one
// undoes it when nobody has the image, and the host that has it destroys it when it
// is back. The same patch can be uploaded meanwhile.
func TestC4_AnUploadThatWasNotConfirmedIsUndone(t *testing.T) {
	t.Parallel()
	etcd := lab.StartEtcd(t, 1)
	o := lab.Options{Flags: []string{"--store", etcd.URL("")}}
	c := &coordinators{t: t, etcd: etcd, hosts: lab.StartAll(t, o, o)}
	leader, s, _ := c.leader()
	other := c.others(leader)[0]
	standsBy(t, other, leader)
	p := &lab.Patch{Pad: 3 << 20}
	signed := p.Signed(t)

	other.Pause() // it does not take its copy
	ended := make(chan error, 1)
	go func() {
		_, err := s.Put("/pool_patch_upload", nil, bytes.NewReader(signed), int64(len(signed)))
		ended <- err
	}()
	until(t, "the leader to have the image", func() bool { return len(s.All("pool_patch")) == 1 })
	leader.Kill()
	if err := <-ended; err == nil {
		t.Error("the upload was answered")
	}
	other.Resume()
	c.hosts = []*lab.Host{other}
	c.leader()
	s = &lab.Session{H: other, Ref: s.Ref}
	until(t, "the upload to be undone", func() bool { return len(s.All("pool_patch"))+len(s.All("VDI")) == 0 })
	if len(staged(leader)) != 2 {
		t.Errorf("the host that is away has %v", staged(leader))
	}

	leader.Launch()
	if err := leader.Ready(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	until(t, "the image on the host that is back to go", func() bool { return len(staged(leader)) == 0 })
	standsBy(t, leader, other)
	if a := s.Upload(signed); a.Status != http.StatusCreated {
		t.Fatalf("uploaded again: %d %s", a.Status, a.Body)
	}
	until(t, "both hosts to have it", func() bool { return len(staged(leader)) == 2 && len(staged(other)) == 2 })
}

func onlyPool(s *lab.Session) string {
	s.H.T.Helper()
	ref, _ := s.One("pool")
	return ref
}

// reads checks that the image of a patch can be exported, is what its block map
// says, and holds payload.
func reads(t *testing.T, s *lab.Session, uuid string, payload []byte) {
	t.Helper()
	status, raw := get(s, "/export_raw_vdi", url.Values{"vdi": {uuid}, "format": {"raw"}})
	if status != http.StatusOK {
		t.Fatalf("export: %d %.300s", status, raw)
	}
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := vdi.OpenPayload(f)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(p, 0, p.Size()))
	if err != nil || !bytes.Equal(got, payload) {
		t.Errorf("the image holds another patch: %v", err)
	}
	m, err := vdi.BuildMap(t.Context(), f, int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := m.Encode(&want); err != nil {
		t.Fatal(err)
	}
	if status, body := get(s, "/vdi_block_map", url.Values{"vdi": {uuid}}); status != http.StatusOK || !bytes.Equal(body, want.Bytes()) {
		t.Errorf("the block map is of another image: %d, %d bytes", status, len(body))
	}
}

package integration

import (
	"bytes"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/vdi"
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

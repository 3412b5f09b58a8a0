package integration

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// A base whose image was changed on the SR hands nothing down to what is made
// over a clone of it: its filesystem would not be of the upload.
func TestSecurity_storage_base_with_something_beside(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{Dir: xfsFS(t, gib)})
	s := h.Root()
	c := countTo(t, h)
	dir := t.TempDir()
	data := random(8 << 20)
	apply := "if [ -e helper ]; then echo trapped; else echo alone; fi"
	send := func(version string, data []byte, flags ...string) (*lab.Patch, int64, string) {
		t.Helper()
		p := &lab.Patch{Label: "revised", Version: version, Apply: apply}
		path := filepath.Join(dir, version)
		if err := os.WriteFile(path, lab.DefaultKey(t).Sign(t, append(p.Payload(), data...)), 0o600); err != nil {
			t.Fatal(err)
		}
		sent, _, _, stderr, code := c.upload(h, append(flags, path)...)
		if code != 0 {
			return p, sent, stderr
		}
		return p, sent, ""
	}
	first, _, stderr := send("1", data)
	if stderr != "" {
		t.Fatal(stderr)
	}
	golden := image(s, vdiOf(s, s.Call("pool_patch.get_by_uuid", string(first.UUID)).(string)))
	evil := filepath.Join(dir, "evil")
	if err := os.WriteFile(evil, []byte("evil"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "debugfs", "-w", "-R", "write "+evil+" helper", golden)
	copy(data[1<<20:], random(1<<16))
	second, sent, stderr := send("2", data, "--base", string(first.UUID))
	if stderr != "" || sent > 2<<20 {
		t.Fatalf("%d bytes sent, %s", sent, stderr)
	}
	fresh := image(s, vdiOf(s, s.Call("pool_patch.get_by_uuid", string(second.UUID)).(string)))
	out, err := exec.Command("debugfs", "-R", "ls -l /", fresh).CombinedOutput()
	if err != nil || strings.Contains(string(out), "helper") {
		t.Errorf("what lay beside the base lies beside the new patch: %v\n%s", err, out)
	}
	if out, stderr, code := h.CLI("patch", "apply", string(second.UUID)); code != 0 || strings.TrimSpace(out) != "alone" {
		t.Errorf("apply: %d %q %s", code, out, stderr)
	}
}

// tusOf is a client that dresses its requests; every answer is read whole.
type tusOf struct {
	h     *lab.Host
	dress func(*http.Request)
}

func (c tusOf) ask(method, path string, body []byte, headers ...string) (status int, header http.Header, text string) {
	c.h.T.Helper()
	r, err := http.NewRequest(method, c.h.URL+path, bytes.NewReader(body))
	if err != nil {
		c.h.T.Fatal(err)
	}
	r.Header.Set("Tus-Resumable", "1.0.0")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	if c.dress != nil {
		c.dress(r)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		c.h.T.Fatalf("%s %s %v: %v", method, path, headers, err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	res.Header.Del("Date")
	return res.StatusCode, res.Header, string(b)
}

func (c tusOf) begin(length int64) string {
	c.h.T.Helper()
	status, header, text := c.ask(http.MethodPost, "/pool_patch_uploads", nil, "Upload-Length", fmt.Sprint(length))
	if status != http.StatusCreated {
		c.h.T.Fatalf("begin an upload: %d %s", status, text)
	}
	return header.Get("Location")
}

func (c tusOf) send(location string, offset int, body []byte) (status int, text string) {
	c.h.T.Helper()
	status, _, text = c.ask(http.MethodPatch, location, body, "Content-Type", "application/offset+octet-stream", "Upload-Offset", fmt.Sprint(offset))
	return status, text
}

func as(s *lab.Session) func(*http.Request) {
	return func(r *http.Request) { r.AddCookie(&http.Cookie{Name: "session_id", Value: s.Ref}) }
}

// TestSecurity_storage_http_roles: the paths of storage are for operators, an
// upload is for whoever made it, and who is not known learns nothing.
func TestSecurity_storage_http_roles(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	root := h.Root()
	patch := root.MustUpload(&lab.Patch{})
	uuid, vdi := root.Call("pool_patch.get_uuid", patch).(string), vdiOf(root, patch)
	dead := h.Root()
	dead.Call("session.logout")
	reader, operator := user(h, session.ReadOnly), user(h, session.PoolOperator)
	mine := tusOf{h, as(root)}.begin(1000)
	own := tusOf{h, as(operator)}.begin(1000)
	missing := string(xapi.NewUUID())
	offset := []string{"Content-Type", "application/offset+octet-stream", "Upload-Offset", "0", "Upload-Length", "1000"}
	for _, p := range []struct{ method, there, missing string }{
		{"GET", "/pool_patch_chunks?uuid=" + uuid, "/pool_patch_chunks?uuid=" + missing},
		{"GET", "/vdi_block_map?vdi=" + vdi, "/vdi_block_map?vdi=" + missing},
		{"GET", "/export_raw_vdi?format=extents&vdi=" + vdi, "/export_raw_vdi?format=extents&vdi=" + missing},
		{"GET", "/export_raw_vdi?format=blocks&blocks=0&vdi=" + vdi, "/export_raw_vdi?format=blocks&blocks=0&vdi=" + missing},
		{"POST", "/export_raw_vdi?format=blocks&vdi=" + vdi, "/export_raw_vdi?format=blocks&vdi=" + missing},
		{"PUT", "/import_raw_vdi?format=extents&vdi=" + vdi, "/import_raw_vdi?format=extents&vdi=" + missing},
		{"POST", "/pool_patch_uploads", "/pool_patch_uploads/"},
		{"HEAD", mine, "/pool_patch_uploads/" + missing},
		{"PATCH", mine, "/pool_patch_uploads/" + missing},
		{"DELETE", mine, "/pool_patch_uploads/" + missing},
	} {
		for who, dress := range map[string]func(*http.Request){
			"nobody": nil, "a dead session": as(dead),
			"a wrong password": func(r *http.Request) { r.SetBasicAuth("root", "x") },
			"a wrong secret":   func(r *http.Request) { r.AddCookie(&http.Cookie{Name: "pool_secret", Value: "x"}) },
		} {
			status, head, text := tusOf{h, dress}.ask(p.method, p.there, []byte("[0]"), offset...)
			_, otherHead, otherText := tusOf{h, dress}.ask(p.method, p.missing, []byte("[0]"), offset...)
			if status != http.StatusUnauthorized || fmt.Sprint(head)+text != fmt.Sprint(otherHead)+otherText {
				t.Errorf("%s %s by %s: %d\n%v %s\n%v %s", p.method, p.there, who, status, head, text, otherHead, otherText)
			}
		}
		if status, _, text := (tusOf{h, as(reader)}).ask(p.method, p.there, []byte("[0]"), offset...); status != http.StatusForbidden {
			t.Errorf("%s %s by a reader: %d %s", p.method, p.there, status, text)
		}
		status, _, text := tusOf{h, as(operator)}.ask(p.method, p.there, []byte("[0]"), offset...)
		if foreign := p.there == mine; (status == http.StatusForbidden) != foreign || status == http.StatusUnauthorized {
			t.Errorf("%s %s by an operator: %d %s", p.method, p.there, status, text)
		}
	}
	// What was allowed a moment ago is not any more.
	operator.Call("session.logout")
	if status, text := (tusOf{h, as(operator)}).send(own, 0, []byte("x")); status != http.StatusUnauthorized {
		t.Errorf("PATCH after a logout: %d %s", status, text)
	}
	if status, _ := (tusOf{h, as(reader)}).send(own, 0, []byte("x")); status != http.StatusForbidden {
		t.Errorf("PATCH by a reader: %d", status)
	}
	for _, location := range []string{mine, own} {
		if status, _, text := (tusOf{h, as(root)}).ask(http.MethodDelete, location, nil); status != http.StatusNoContent {
			t.Errorf("DELETE by an admin: %d %s", status, text)
		}
	}
	cancelUploads(root)
}

// cancelUploads ends all unfinished uploads by their tasks, as an admin may, and
// waits until nothing of them is left. It gives how many there were.
func cancelUploads(s *lab.Session) (n int) {
	s.H.T.Helper()
	for ref, rec := range s.All("task") {
		if rec["name_label"] == "pool_patch_upload" && rec["status"] == "pending" {
			s.Call("task.cancel", ref)
			n++
		}
	}
	until(s.H.T, "the end of all uploads", func() bool {
		logs, err := os.ReadDir(filepath.Join(s.H.StateDir, "uploads"))
		parts, _ := filepath.Glob(filepath.Join(s.H.StateDir, "sr", "part.*"))
		return err == nil && len(logs)+len(parts) == 0
	})
	return n
}

// TestSecurity_storage_flood: what an operator takes from the others, an admin
// gives back.
func TestSecurity_storage_flood(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{Dir: ext4FS(t, gib)})
	root, operator := h.Root(), user(h, session.PoolOperator)
	eve, ann := tusOf{h, as(operator)}, tusOf{h, as(root)}
	begin := func(c tusOf) (int, string) {
		status, _, text := c.ask(http.MethodPost, "/pool_patch_uploads", nil, "Upload-Length", fmt.Sprint(40<<20))
		return status, text
	}
	made := 0
	for ; made < 100; made++ {
		status, text := begin(eve)
		if status == http.StatusInsufficientStorage && strings.Contains(text, xapi.OutOfSpace) {
			break
		}
		if status != http.StatusCreated {
			t.Fatalf("upload %d: %d %s", made, status, text)
		}
	}
	if made == 0 || made == 100 {
		t.Fatalf("%d uploads of 40 MiB have room on 1 GiB", made)
	}
	if status, _ := begin(ann); status != http.StatusInsufficientStorage {
		t.Errorf("there is room left: %d", status)
	}
	if _, err := operator.Try("task.cancel", "OpaqueRef:x"); !isCode(err, xapi.HandleInvalid) {
		t.Error(err)
	}
	if cancelled := cancelUploads(root); cancelled != made {
		t.Errorf("%d tasks of %d uploads", cancelled, made)
	}
	if status, text := begin(ann); status != http.StatusCreated {
		t.Errorf("the room is not there again: %d %s", status, text)
	}
	cancelUploads(root)
}

// tampered is an unfinished upload whose remains somebody changes.
type tampered struct {
	what     string
	change   func(t *testing.T, image, log string)
	patch    *lab.Patch
	message  []byte
	location string
	image    string // the part volume
}

func overwrite(t *testing.T, path string, b []byte, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// tamperings are what can be done to an image and the log of an upload.
var tamperings = map[string]func(t *testing.T, image, log string){
	"a letter of the script": func(t *testing.T, image, _ string) { poke(t, image, "echo good >>", "echo evil >>") },
	"a filesystem planted": func(t *testing.T, image, _ string) {
		run(t, "mkfs.ext4", "-q", "-F", image)
	},
	"a larger image":  func(_ *testing.T, image, _ string) { os.Truncate(image, 1<<40) },
	"a smaller image": func(_ *testing.T, image, _ string) { os.Truncate(image, 4096) },
	"no image":        func(_ *testing.T, image, _ string) { os.Remove(image) },
	"a link":          func(_ *testing.T, image, _ string) { os.Remove(image); os.Symlink("/dev/zero", image) },
	"a pipe":          func(t *testing.T, image, _ string) { os.Remove(image); run(t, "mkfifo", image) },
	"the log":         func(t *testing.T, _, log string) { overwrite(t, log, []byte("garbage"), 4<<20+20) },
	"the ring":        func(t *testing.T, _, log string) { overwrite(t, log, random(4<<20), 0) },
	"no log":          func(_ *testing.T, _, log string) { os.Remove(log) },
	"a log of zeros":  func(_ *testing.T, _, log string) { os.Truncate(log, 0); os.Truncate(log, 1<<40) },
	"both":            func(_ *testing.T, image, log string) { os.Truncate(log, 1<<20); os.Truncate(image, 1<<20) },
}

// TestSecurity_storage_tampered_upload changes what unfinished uploads have on
// disk while patchd is down. Nothing of that is ever taken for the patch.
func TestSecurity_storage_tampered_upload(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	c := tusOf{h, func(r *http.Request) { r.SetBasicAuth("root", lab.Password) }}
	mark := filepath.Join(t.TempDir(), "mark")
	var all []tampered
	for what, change := range tamperings {
		u := tampered{what: what, change: change, patch: &lab.Patch{Apply: "echo good >> " + mark, Pad: 2 << 20}}
		u.message = lab.DefaultKey(t).GPG(t, u.patch.Payload(), "--sign", "-z", "0")
		before, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "part.*"))
		u.location = c.begin(int64(len(u.message)))
		after, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "part.*"))
		for _, name := range after {
			if !slices.Contains(before, name) {
				u.image = name
			}
		}
		if status, text := c.send(u.location, 0, u.message[:len(u.message)/2]); status != http.StatusNoContent || u.image == "" {
			t.Fatalf("%s: %d %s", what, status, text)
		}
		all = append(all, u)
	}
	h.Kill()
	for _, u := range all {
		u.change(t, u.image, filepath.Join(h.StateDir, "uploads", filepath.Base(u.location)))
	}
	h.Up()
	s := h.Root()
	for _, u := range all {
		status, header, _ := c.ask(http.MethodHead, u.location, nil)
		at := 0
		if status == http.StatusOK {
			fmt.Sscan(header.Get("Upload-Offset"), &at)
		}
		status, text := c.send(u.location, at, u.message[at:])
		if status == http.StatusNoContent { // what counted was good, and what was not was sent again
			if _, err := apply(s, s.Call("pool_patch.get_by_uuid", string(u.patch.UUID)).(string)); err != nil {
				t.Errorf("%s: %v", u.what, err)
			}
			if b, err := os.ReadFile(mark); err != nil || string(b) != "good\n" {
				t.Errorf("%s: executed %q, %v", u.what, b, err)
			}
		} else if _, err := s.Try("pool_patch.get_by_uuid", string(u.patch.UUID)); err == nil {
			t.Errorf("%s: %d %s, and there is a patch", u.what, status, text)
		}
		if exists(mark) != (status == http.StatusNoContent) {
			t.Errorf("%s: %d %s, executed: %v", u.what, status, text, exists(mark))
		}
		os.Remove(mark)
		c.ask(http.MethodDelete, u.location, nil)
		if st, err := os.Lstat(u.image); err == nil && !st.Mode().IsRegular() {
			os.Remove(u.image) // it is no volume, and nobody's
		}
	}
	for _, name := range []string{"uploads", "attested", "sr"} {
		filepath.Walk(filepath.Join(h.StateDir, name), func(path string, st os.FileInfo, err error) error {
			if err == nil && st.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s has mode %v", path, st.Mode())
			}
			return nil
		})
	}
}

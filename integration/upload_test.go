package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// curl uploads a file as an admin would, and gives status and body.
func curl(t *testing.T, h *lab.Host, stdin io.Reader, file string, args ...string) (int, []byte) {
	t.Helper()
	body := filepath.Join(t.TempDir(), "body")
	args = append([]string{"-sS", "-u", "root:" + lab.Password, "-T", file, "-o", body, "-w", "%{http_code}"}, args...)
	cmd := exec.Command("curl", append(args, h.URL+"/pool_patch_upload")...)
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("curl: %v\n%s", err, out)
	}
	status, err := strconv.Atoi(string(out))
	if err != nil {
		t.Fatalf("curl says %q", out)
	}
	b, err := os.ReadFile(body)
	if err != nil {
		t.Fatal(err)
	}
	return status, b
}

// checkImage compares the file in a golden image with the payload, by way of a
// mount, and has the filesystem checked.
func checkImage(t *testing.T, path string, payload []byte) {
	t.Helper()
	run(t, "e2fsck", "-fn", path)
	mnt := t.TempDir()
	run(t, "mount", "-o", "ro,noload,loop", path, mnt)
	defer run(t, "umount", mnt)
	names, err := os.ReadDir(mnt)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if n.Name() != "patch" && n.Name() != "lost+found" {
			t.Errorf("the image holds %s beside patch", n.Name())
		}
	}
	st, err := os.Lstat(filepath.Join(mnt, "patch"))
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode() != 0o755 {
		t.Errorf("patch has mode %s", st.Mode())
	}
	if got, err := os.ReadFile(filepath.Join(mnt, "patch")); err != nil || !bytes.Equal(got, payload) {
		t.Errorf("patch is not the payload: %d bytes of %d, %v", len(got), len(payload), err)
	}
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// A2 and the rows about what an upload makes: S1-03, S1-06, S1-09, S1-15, S1-24,
// S1-27.
func TestA2_CurlUploadOf200MB(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{Label: "two hundred", Pad: 200_000_000}
	payload := p.Payload()
	file := filepath.Join(t.TempDir(), "big.patch")
	signed := lab.DefaultKey(t).Sign(t, payload)
	if err := os.WriteFile(file, signed, 0o600); err != nil {
		t.Fatal(err)
	}
	status, body := curl(t, h, nil, file)
	if status != http.StatusCreated {
		t.Fatalf("%d %s", status, body)
	}
	var answer lab.Record
	if err := json.Unmarshal(body, &answer); err != nil {
		t.Fatal(err)
	}
	ref, rec := s.One("pool_patch")
	if answer["uuid"] != string(p.UUID) || answer["ref"] != ref || answer["VDI"] != rec["VDI"] || rec["VDI"] == nullRef {
		t.Errorf("the answer is %s, the record %v", body, rec)
	}
	if n := number(t, rec["size"]); n != int64(len(signed)) {
		t.Errorf("size is %d, uploaded were %d", n, len(signed))
	}
	vdi, vrec := s.One("VDI")
	if vdi != rec["VDI"] {
		t.Errorf("VDI field %v, the VDI is %s", rec["VDI"], vdi)
	}
	want := roundUp(4*int64(len(signed)), mib)
	if n := number(t, vrec["virtual_size"]); n != want {
		t.Errorf("virtual_size %d, want %d", n, want)
	}
	path := image(s, vdi)
	if st, err := os.Stat(path); err != nil || st.Size() != want {
		t.Errorf("the image: %v, %v", st, err)
	}
	checkImage(t, path, payload)
	limit := int64(len(payload)) * 105 / 100
	if n := allocated(t, path); n > limit {
		t.Errorf("the image takes %d bytes, the payload has %d", n, len(payload))
	}
	if n := number(t, vrec["physical_utilisation"]); n > limit || n < int64(len(payload)) {
		t.Errorf("physical_utilisation is %d, the payload has %d", n, len(payload))
	}
	if files, _ := filepath.Glob(filepath.Join(h.PatchDir, "*")); len(files) > 0 {
		t.Errorf("in the patch-dir: %v", files)
	}
}

// S1-16: without a length the image has 4 GiB, however small the patch is.
func TestA2_S1_16_ChunkedUploadHas4GiB(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{Pad: 300_000}
	payload := p.Payload()
	status, body := curl(t, h, bytes.NewReader(lab.DefaultKey(t).Sign(t, payload)), "-")
	if status != http.StatusCreated {
		t.Fatalf("%d %s", status, body)
	}
	vdi, rec := s.One("VDI")
	if n := number(t, rec["virtual_size"]); n != 4*gib {
		t.Errorf("virtual_size %d", n)
	}
	checkImage(t, image(s, vdi), payload)
	if n := allocated(t, image(s, vdi)); n > 4*mib {
		t.Errorf("the image takes %d bytes", n)
	}
}

// S1-15: four times the upload, at least 4 MiB, rounded up to 1 MiB.
func TestS1_15_VDIHasFourTimesTheSize(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	for _, pad := range []int{0, 1_000_000, 1_048_576, 3_333_333} {
		p := &lab.Patch{Pad: pad}
		signed := p.Signed(t)
		a := s.Upload(signed)
		if a.Status != http.StatusCreated {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		got := number(t, s.Call("VDI.get_virtual_size", a.Record()["VDI"]))
		if want := max(4*mib, roundUp(4*int64(len(signed)), mib)); got != want {
			t.Errorf("upload of %d: virtual_size %d, want %d", len(signed), got, want)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// S1-17: a stream without length that does not fit into 4 GiB is refused with
// the cure, and leaves nothing.
func TestS1_17_StreamLargerThanTheImage(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	err := refused(s, func() lab.Answer {
		a, err := s.Put("/pool_patch_upload", nil, endless(t, 5), -1)
		if err != nil {
			t.Fatal(err)
		}
		return a
	})
	params := hasCode(t, err, "MESSAGE_TOO_LARGE")
	if !strings.Contains(params[0], "Content-Length") {
		t.Errorf("no cure in %q", params)
	}
}

// endless is a signed message without compression that brings n GiB of zeros
// and then ends in the middle: a one-pass signature of the lab's key, then
// literal data in parts of 1 GiB.
func endless(t *testing.T, n int) io.Reader { return openMessage(t, n, zeros{}) }

// noise is the same of n bytes that no filesystem can leave out.
func noise(t *testing.T, n int64) io.Reader {
	return io.LimitReader(openMessage(t, 1+int(n/gib), mathrand.NewChaCha8([32]byte{})), n)
}

func openMessage(t *testing.T, n int, source io.Reader) io.Reader {
	t.Helper()
	signed := lab.DefaultKey(t).Sign(t, []byte("x"))
	const onePass = 15 // bytes: old format, length in one byte
	if signed[0] != 0x90 || signed[1] != onePass-2 {
		t.Fatalf("gpg begins with %x", signed[:2])
	}
	const part = 0xe0 + 30
	literal := "b\x00\x00\x00\x00\x00"
	parts := []io.Reader{
		bytes.NewReader(signed[:onePass]), bytes.NewReader([]byte{0xc0 + 11, part}), strings.NewReader(literal), io.LimitReader(source, gib-int64(len(literal))),
	}
	for range n - 1 {
		parts = append(parts, bytes.NewReader([]byte{part}), io.LimitReader(source, gib))
	}
	return io.MultiReader(parts...)
}

// S1-18: a Content-Length that is not the truth is refused, whichever way it
// lies, and also when the connection just ends.
func TestS1_18_LyingContentLength(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	signed := (&lab.Patch{Pad: 100_000}).Signed(t)
	put := func(length int64, body []byte) lab.Answer {
		return rawPut(t, h, "/pool_patch_upload?session_id="+url.QueryEscape(s.Ref), length, body)
	}
	err := refused(s, func() lab.Answer { return put(int64(len(signed))+1000, signed) })
	hasCode(t, err, "INVALID_PATCH")
	err = refused(s, func() lab.Answer { return put(int64(len(signed))-1000, signed) })
	hasCode(t, err, "INVALID_PATCH")
	// Half of it, then the client is gone: nobody is left to be told.
	err = refused(s, func() lab.Answer { return put(int64(len(signed)), signed[:len(signed)/2]) })
	hasCode(t, err, "INVALID_PATCH")
}

// A stream of xen-api claims 1 PiB and ends early: with a task that is the end
// of the data, and the signature decides.
func TestS1_18_LengthlessStreamOfXenAPI(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	for _, whole := range []bool{true, false} {
		p := &lab.Patch{Pad: 50_000}
		signed := p.Signed(t)
		if !whole {
			signed = signed[:len(signed)-20]
		}
		task := s.Call("task.create", "upload", "").(string)
		a := rawPut(t, h, "/pool_patch_upload/?session_id="+url.QueryEscape(s.Ref)+"&task_id="+url.QueryEscape(task), 1125899906842624, signed)
		if a.Status != http.StatusOK {
			t.Errorf("status %d", a.Status)
		}
		rec := s.Wait(task)
		if whole && rec["status"] != "success" || !whole && (rec["status"] != "failure" || rec["error_info"].([]any)[0] != "INVALID_PATCH") {
			t.Errorf("whole %v: %v", whole, rec)
		}
		if whole {
			vdi := s.Call("pool_patch.get_VDI", s.Call("pool_patch.get_by_uuid", string(p.UUID))).(string)
			if n := number(t, s.Call("VDI.get_virtual_size", vdi)); n != 4*gib {
				t.Errorf("virtual_size %d", n)
			}
		}
	}
}

// S1-31: the mechanism sets no limit. An SR that has the room takes a patch of
// 20 GiB: the image is made four times as large and the stream begins.
func TestS1_31_TwentyGiBIsNotRefused(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{Dir: xfsFS(t, 200*gib)})
	s := h.Root()
	task := s.Call("task.create", "upload", "").(string)
	req, err := http.NewRequest(http.MethodPut, h.URL+"/pool_patch_upload?task_id="+url.QueryEscape(task), io.MultiReader(io.LimitReader(endless(t, 1), mib), blocked(t)))
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = 20 * gib
	req.AddCookie(&http.Cookie{Name: "session_id", Value: s.Ref})
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	part := filepath.Join(h.StateDir, "sr", "*.img*")
	until(t, "an image of 80 GiB", func() bool {
		names, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "*"))
		for _, n := range names {
			if st, err := os.Stat(n); err == nil && st.Size() == 80*gib {
				return true
			}
		}
		if rec := s.Call("task.get_record", task).(map[string]any); rec["status"] != "pending" {
			t.Fatalf("%v (%s)", rec, part)
		}
		return false
	})
	s.Call("task.cancel", task)
	if rec := s.Wait(task); rec["status"] != "cancelled" {
		t.Errorf("%v", rec)
	}
	h.CheckNothingLeft()
}

// blocked is a reader that gives nothing until the test ends.
func blocked(t *testing.T) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	return r
}

// S1-09: another method is refused, in the way of the XenAPI.
func TestS1_09_OnlyPUTUploads(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	for method, want := range map[string]int{http.MethodGet: 404, http.MethodPost: 500, http.MethodDelete: 501} {
		req, _ := http.NewRequest(method, h.URL+"/pool_patch_upload", strings.NewReader("x"))
		req.AddCookie(&http.Cookie{Name: "session_id", Value: s.Ref})
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s: %s, want %d", method, res.Status, want)
		}
	}
	if n := len(s.All("pool_patch")); n != 0 {
		t.Errorf("%d patches", n)
	}
}

// S1-40: a client without a task learns its status only after verification;
// one with a task gets 200 before the body, and the task tells the truth.
func TestS1_40_StatusOnlyAfterVerification(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	bad := (&lab.Patch{Pad: 10_000}).Signed(t)
	bad[5000] ^= 1
	a := s.Upload(bad)
	if a.Status != http.StatusUnprocessableEntity {
		t.Errorf("status %d", a.Status)
	}
	wantCode(t, a.Err(), "INVALID_PATCH")

	task := s.Call("task.create", "upload", "").(string)
	body, w := io.Pipe()
	req, _ := http.NewRequest(http.MethodPut, h.URL+"/pool_patch_upload?task_id="+url.QueryEscape(task), body)
	req.ContentLength = int64(len(bad))
	req.AddCookie(&http.Cookie{Name: "session_id", Value: s.Ref})
	res, err := http.DefaultTransport.RoundTrip(req) // not a byte of the body is sent
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Errorf("status %s", res.Status)
	}
	if st := s.Call("task.get_status", task); st != "pending" {
		t.Errorf("the task is %v before the body came", st)
	}
	w.Write(bad)
	w.Close()
	rec := s.Wait(task)
	if rec["status"] != "failure" || fmt.Sprint(rec["error_info"]) != "[INVALID_PATCH]" {
		t.Errorf("%v", rec)
	}
}

// rawPut writes a request by hand, ends its side of the connection after the
// body, and reads what comes back.
func rawPut(t *testing.T, h *lab.Host, target string, length int64, body []byte) lab.Answer {
	t.Helper()
	a, err := rawRequest(h, fmt.Sprintf("PUT %s HTTP/1.1\r\nHost: lab\r\nContent-Length: %d\r\n\r\n", target, length), body, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

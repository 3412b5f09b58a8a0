package integration

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// curlPost posts a body and gives the answer's body.
func curlPost(t testing.TB, body string, args ...string) string {
	t.Helper()
	return client(t, ".", body, "curl", append([]string{"-sS", "--data-binary", "@-"}, args...)...)
}

// rpc is one call by curl over the unmatched path, or by any other.
type rawRPC struct {
	t    testing.TB
	url  string
	id   int
	two  bool // JSON-RPC 2.0
	sess string
}

// call makes a JSON-RPC call with the session before the params; refused is
// code and parameters.
func (r *rawRPC) call(method string, params ...any) (result any, refused []string) {
	r.t.Helper()
	if r.sess != "" {
		params = append([]any{r.sess}, params...)
	}
	r.id++
	req := map[string]any{"method": method, "params": params, "id": r.id}
	if r.two {
		req["jsonrpc"] = "2.0"
	}
	b, err := json.Marshal(req)
	if err != nil {
		r.t.Fatal(err)
	}
	out := curlPost(r.t, string(b), "-k", "-H", "Content-Type: text/plain", r.url)
	var a map[string]any
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		r.t.Fatalf("%s: %v %s", method, err, out)
	}
	if a["id"] != float64(r.id) {
		r.t.Errorf("%s: the id is %v, not %d", method, a["id"], r.id)
	}
	if r.two {
		return a["result"], r.refused20(a)
	}
	return a["result"], r.refused10(a)
}

// A 1.0 answer has result and error always, one of them null; the error is an
// array.
func (r *rawRPC) refused10(a map[string]any) []string {
	_, hasError := a["error"]
	_, hasResult := a["result"]
	if len(a) != 3 || !hasError || !hasResult || (a["error"] == nil) == (a["result"] == nil) {
		r.t.Errorf("not an answer of 1.0: %v", a)
	}
	return texts(a["error"])
}

// A 2.0 answer has one of the two; the error has code 1, the API's code as
// message and its parameters as data.
func (r *rawRPC) refused20(a map[string]any) []string {
	e, ok := a["error"].(map[string]any)
	if _, hasResult := a["result"]; len(a) != 3 || a["jsonrpc"] != "2.0" || ok == hasResult {
		r.t.Errorf("not an answer of 2.0: %v", a)
	}
	if !ok {
		return nil
	}
	if e["code"] != 1.0 {
		r.t.Errorf("the error is %v", e)
	}
	return append([]string{e["message"].(string)}, texts(e["data"])...)
}

func texts(v any) (out []string) {
	list, _ := v.([]any)
	for _, e := range list {
		out = append(out, e.(string))
	}
	return out
}

// must is call that may not be refused.
func (r *rawRPC) must(method string, params ...any) any {
	r.t.Helper()
	v, refused := r.call(method, params...)
	if refused != nil {
		r.t.Fatalf("%s: %v", method, refused)
	}
	return v
}

// A4: raw JSON of both versions by curl, from login to logout.
func TestA4_RawJSONByCurl(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	patches := clientPatches(t, "json10", "json20")
	for name, r := range map[string]*rawRPC{
		"json10": {t: t, url: h.URL + "/jsonrpc"},
		"json20": {t: t, url: h.TLSURL + "/jsonrpc", two: true},
	} {
		r.sess = r.must("session.login_with_password", "root", lab.Password).(string)
		r.jsonFlow(strings.TrimSuffix(r.url, "/jsonrpc"), patches[name])
	}
}

func (r *rawRPC) jsonFlow(base string, p clientPatch) {
	t := r.t
	t.Helper()
	host := texts(r.must("host.get_all"))[0]
	token := r.must("event.from", []string{"task"}, "", 0.1).(map[string]any)["token"]
	task := r.must("task.create", "upload", "by curl").(string)
	query := url.Values{"session_id": {r.sess}, "task_id": {task}}
	client(t, ".", "", "curl", "-sSfk", "-T", p.File, base+"/pool_patch_upload/?"+query.Encode())
	batch := r.must("event.from", []string{"task/" + task}, token, 5).(map[string]any)
	if n, ok := batch["valid_ref_counts"].(map[string]any)["task"].(float64); !ok || n < 1 {
		t.Errorf("valid_ref_counts are %v", batch["valid_ref_counts"])
	}
	snapshot := batch["events"].([]any)[0].(map[string]any)["snapshot"].(map[string]any)
	patch := strings.TrimSuffix(strings.TrimPrefix(snapshot["result"].(string), "<value>"), "</value>")
	if snapshot["status"] != "success" || snapshot["progress"] != 1.0 || !xapi.Ref(patch).Valid() {
		t.Fatalf("the task is %v", snapshot)
	}
	r.must("task.destroy", task)
	if rec := r.must("pool_patch.get_record", patch).(map[string]any); rec["uuid"] != p.UUID || rec["size"] == 1.0 {
		t.Errorf("the patch is %v", rec)
	}
	if out := r.must("pool_patch.apply", patch, host); !strings.HasPrefix(out.(string), "applied ") {
		t.Errorf("apply: %q", out)
	}
	if _, refused := r.call("pool_patch.apply", patch, host); strings.Join(refused, " ") != "PATCH_ALREADY_APPLIED "+patch {
		t.Errorf("again: %v", refused)
	}
	task = r.must("Async.pool_patch.pool_clean", patch).(string)
	for range 500 {
		if r.must("task.get_status", task) != "pending" {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if rec := r.must("pool_patch.get_record", patch).(map[string]any); rec["VDI"] != nullRef || rec["pool_applied"] != true {
		t.Errorf("after pool_clean: %v", rec)
	}
	if _, refused := r.call("pool_patch.destroy", patch); strings.Join(refused, " ") != "PATCH_IS_APPLIED" {
		t.Errorf("destroy: %v", refused)
	}
	r.must("session.logout")
	if _, refused := r.call("pool.get_all"); strings.Join(refused, " ") != "SESSION_INVALID "+r.sess {
		t.Errorf("after logout: %v", refused)
	}
}

// xmlCall posts XML-RPC as the C SDK does: labelled as a form, to the root.
func xmlCall(t testing.TB, base, method string, params ...string) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("<?xml version='1.0'?><methodCall><methodName>" + method + "</methodName><params>")
	for _, p := range params {
		if !strings.HasPrefix(p, "<") {
			p = "<string>" + p + "</string>"
		}
		b.WriteString("<param><value>" + p + "</value></param>")
	}
	b.WriteString("</params></methodCall>")
	return curlPost(t, b.String(), "-k", "-H", "Content-Type: application/x-www-form-urlencoded", base)
}

var xmlValueOf = regexp.MustCompile(`<name>Value</name><value>([^<]*)</value>`)

func xmlText(t testing.TB, answer string) string {
	t.Helper()
	m := xmlValueOf.FindStringSubmatch(answer)
	if m == nil {
		t.Fatalf("no value in %s", answer)
	}
	return m[1]
}

// A4: the C SDK: three parameters at login, the session asked about itself, old
// events.
func TestA4_TheCallsOfTheCSDK(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	call := func(method string, params ...string) string { return xmlCall(t, h.TLSURL, method, params...) }
	s := xmlText(t, call("session.login_with_password", "root", lab.Password, "1.10"))
	host := xmlText(t, call("session.get_this_host", s, s))
	version := xmlText(t, call("host.get_API_version_major", s, host)) + "." + xmlText(t, call("host.get_API_version_minor", s, host))
	if version != "2.5" {
		t.Errorf("API version %s", version)
	}
	if rec := call("session.get_record", s, s); !strings.Contains(rec, "<name>this_host</name><value>"+host+"</value>") {
		t.Errorf("the session is %s", rec)
	}
	if uuid := xmlText(t, call("session.get_uuid", s, s)); xmlText(t, call("session.get_by_uuid", s, uuid)) != s {
		t.Error("the session is not found by its uuid")
	}
	if got := call("event.next", s); !strings.Contains(got, "SESSION_NOT_REGISTERED") {
		t.Errorf("event.next without event.register: %s", got)
	}
	call("event.register", s, "<array><data><value><string>*</string></value></data></array>")
	task := xmlText(t, call("task.create", s, "a task", ""))
	if got := call("event.next", s); !strings.Contains(got, "<name>ref</name><value>"+task+"</value>") || !strings.Contains(got, "<value>add</value>") {
		t.Errorf("event.next: %s", got)
	}
	for _, old := range []string{"VM", "VBD", "VIF", "network", "PIF", "host_metrics", "host_cpu", "console", "user"} {
		if got := call(old+".get_all", s); !strings.Contains(got, "<array><data></data></array>") && !strings.Contains(got, "<array><data/></array>") {
			t.Errorf("%s.get_all: %s", old, got)
		}
	}
	call("session.logout", s)
	if got := call("pool.get_all", s); !strings.Contains(got, "<value>SESSION_INVALID</value><value>"+s+"</value>") {
		t.Errorf("after logout: %s", got)
	}
}

// xenCenterPut is an upload by XenCenter: HTTP/1.0, and not a byte of the body
// before the status line has come.
func xenCenterPut(h *lab.Host, path string, body []byte) error {
	c, err := tls.Dial("tcp", strings.TrimPrefix(h.TLSURL, "https://"), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "PUT %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n", path, len(body))
	r := bufio.NewReader(c)
	status, err := r.ReadString('\n')
	if err != nil || !strings.HasPrefix(status, "HTTP/1.0 200 ") {
		return fmt.Errorf("status %q %v", status, err)
	}
	for line := ""; line != "\r\n"; {
		if line, err = r.ReadString('\n'); err != nil {
			return err
		}
		if strings.HasPrefix(strings.ToLower(line), "transfer-encoding") {
			return fmt.Errorf("%q in an answer of HTTP/1.0", line)
		}
	}
	if _, err = c.Write(body); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

// A4: XenCenter: polls the task over XML, meets a patch that is there already,
// fetches a patch for another pool, prechecks, applies, cleans.
func TestA4_TheCallsOfXenCenter(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	p := clientPatches(t, "xencenter")["xencenter"]
	s := h.Root()
	put := func() lab.Record {
		t.Helper()
		task := s.Call("task.create", "uploading", "").(string)
		if err := xenCenterPut(h, "/pool_patch_upload?task_id="+task+"&session_id="+s.Ref, p.signed); err != nil {
			t.Fatal(err)
		}
		for range 500 {
			rec := xmlCall(t, h.TLSURL+"/", "task.get_record", s.Ref, task)
			if !strings.Contains(rec, "<name>status</name><value>pending</value>") {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		defer s.Call("task.destroy", task)
		return s.Call("task.get_record", task).(map[string]any)
	}
	rec := put()
	patch := s.Call("pool_patch.get_by_uuid", p.UUID).(string)
	if rec["status"] != "success" || rec["result"] != "<value>"+patch+"</value>" {
		t.Errorf("the task is %v", rec)
	}
	rec = put()
	if info := texts(rec["error_info"]); strings.Join(info, " ") != "PATCH_ALREADY_EXISTS "+p.UUID {
		t.Errorf("the second upload: %v", rec)
	}
	if out, err := precheck(s, patch); err != nil || out != "checked <ok> & \"fine\"\n" {
		t.Errorf("precheck: %q %v", out, err)
	}
	for _, call := range []struct {
		method string
		params []any
	}{
		{"Async.pool_patch.apply", []any{patch, s.Host()}}, {"Async.pool_patch.pool_clean", []any{patch}},
	} {
		task := s.Call(call.method, call.params...).(string)
		if rec := s.Wait(task); rec["status"] != "success" {
			t.Errorf("%s: %v", call.method, rec)
		}
		s.Call("task.destroy", task)
	}
	xenCenterDownload(t, h, s)
}

// xenCenterDownload fetches a patch that lies in the patch folder as a file.
func xenCenterDownload(t *testing.T, h *lab.Host, s *lab.Session) {
	t.Helper()
	p := clientPatches(t, "classic")["classic"]
	file := filepath.Join(h.PatchDir, "classic-hotfix")
	if err := os.WriteFile(file, p.signed, 0o440); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := h.CLI("patch", "import", file); code != 0 {
		t.Fatalf("import: %s", errs)
	}
	task := s.Call("task.create", "downloading", "").(string)
	got := client(t, ".", "", "curl", "-sSfk", "--http1.0", h.TLSURL+"/pool_patch_download?task_id="+task+"&session_id="+s.Ref+"&uuid="+p.UUID)
	if !bytes.Equal([]byte(got), p.signed) {
		t.Errorf("%d bytes of %d came down", len(got), len(p.signed))
	}
	if rec := s.Wait(task); rec["status"] != "success" {
		t.Errorf("the download's task: %v", rec)
	}
}

// A4: curl with a user and a password, and nothing else.
func TestA4_CurlWithBasicAuth(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	p := clientPatches(t, "basic")["basic"]
	out := client(t, ".", "", "curl", "-sSk", "-u", "root:"+lab.Password, "-w", "\n%{http_code}", "-T", p.File, h.TLSURL+"/pool_patch_upload")
	if !strings.HasSuffix(out, "\n201") || !strings.Contains(out, p.UUID) {
		t.Errorf("got %s", out)
	}
	out = client(t, ".", "", "curl", "-sSk", "-u", "root:wrong", "-w", "\n%{http_code}", "-T", p.File, h.TLSURL+"/pool_patch_upload")
	if !strings.HasSuffix(out, "\n401") {
		t.Errorf("a wrong password: %s", out)
	}
}

// The TLS port: 1.2 with forward secrecy and AEAD, and 1.3; nothing older.
func TestA4_TLSVersionsAndCiphers(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	addr := strings.TrimPrefix(h.TLSURL, "https://")
	for name, c := range map[string]struct {
		min, max uint16
		suites   []uint16
		ok       bool
	}{
		"1.3":                {tls.VersionTLS13, tls.VersionTLS13, nil, true},
		"1.2":                {tls.VersionTLS12, tls.VersionTLS12, nil, true},
		"1.2 AES-128-GCM":    {tls.VersionTLS12, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}, true},
		"1.2 CBC":            {tls.VersionTLS12, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA}, false},
		"1.2 CBC SHA256":     {tls.VersionTLS12, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256}, false},
		"1.2 RC4":            {tls.VersionTLS12, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_RC4_128_SHA, tls.TLS_ECDHE_RSA_WITH_RC4_128_SHA, tls.TLS_RSA_WITH_RC4_128_SHA}, false},
		"1.2 RSA key change": {tls.VersionTLS12, tls.VersionTLS12, []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_RSA_WITH_AES_256_GCM_SHA384}, false},
		"1.1":                {tls.VersionTLS10, tls.VersionTLS11, nil, false},
		"1.0":                {tls.VersionTLS10, tls.VersionTLS10, nil, false},
	} {
		conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr,
			&tls.Config{InsecureSkipVerify: true, MinVersion: c.min, MaxVersion: c.max, CipherSuites: c.suites})
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			conn.Close()
		}
	}
	if res, err := http.Get("http://" + addr + "/"); err == nil {
		res.Body.Close()
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("plain HTTP on the TLS port: %s", res.Status)
		}
	}
}

package xenapi

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

func xmlCall(method string, params ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `<?xml version='1.0'?><methodCall><methodName>%s</methodName><params>`, method)
	for _, p := range params {
		fmt.Fprintf(&b, "<param><value><string>%s</string></value></param>", p)
	}
	b.WriteString("</params></methodCall>")
	return b.String()
}

// XML-RPC on every path, whatever the content type says.
func TestEveryPathIsXMLRPC(t *testing.T) {
	r := newRig(t)
	ref := string(r.root.Ref)
	want := XMLValue(map[string]any{"Status": "Success", "Value": []any{string(r.poolRef)}})
	for _, path := range []string{"/", "/RPC2", "/xmlrpc", "/json", "/any/where?x=1", "//x/../y"} {
		for _, contentType := range []string{"text/xml", "application/x-www-form-urlencoded", ""} {
			res, body := r.post(path, contentType, xmlCall("pool.get_all", ref))
			if res.StatusCode != 200 || !strings.Contains(body, want) {
				t.Errorf("%s %q: %s %s", path, contentType, res.Status, body)
			}
		}
	}
	if res, _ := r.post("/jsonrpc/", "text/xml", `{"jsonrpc":"2.0","method":"pool.get_all","params":["`+ref+`"],"id":0}`); res.StatusCode != 200 {
		t.Error("a trailing slash after /jsonrpc:", res.Status)
	}
}

// The headers, which clients compare whole.
func TestHeadersOfAnswers(t *testing.T) {
	r := newRig(t)
	for path, want := range map[string]string{"/jsonrpc": "application/json", "/": "text/xml"} {
		body := xmlCall("pool.get_all", "x")
		if path == "/jsonrpc" {
			body = `{"jsonrpc":"2.0","method":"pool.get_all","params":["x"],"id":0}`
		}
		res, text := r.post(path, "x", body)
		h := res.Header
		if h.Get("Content-Type") != want || h.Get("Cache-Control") != "no-cache, no-store" || h.Get("Connection") != "keep-alive" ||
			h.Get("Access-Control-Allow-Origin") != "*" || h.Get("Access-Control-Allow-Headers") != "X-Requested-With" ||
			h.Get("Content-Length") != fmt.Sprint(len(text)) {
			t.Errorf("%s: %v", path, h)
		}
	}
}

// Facts 3 and 4: ints are texts, and no field of a record is missing or null.
func TestRecordsOverBothEncodings(t *testing.T) {
	r := newRig(t)
	v, failure := r.json("pool_patch.get_record", string(r.root.Ref), string(r.patch))
	rec, _ := v.(map[string]any)
	if failure != nil || rec["size"] != "5000000000" || rec["VDI"] != string(r.vdi) || rec["pool_applied"] != false {
		t.Errorf("%v %v", v, failure)
	}
	v, _ = r.json("host_patch.get_record", string(r.root.Ref), string(r.hostPatch))
	rec, _ = v.(map[string]any)
	if rec["timestamp_applied"] != "19700101T00:00:00Z" || rec["size"] != "0" {
		t.Errorf("%v", rec)
	}
	_, body := r.post("/", "", xmlCall("pool_patch.get_size", string(r.root.Ref), string(r.patch)))
	if !strings.Contains(body, "<name>Value</name><value>5000000000</value>") {
		t.Error(body)
	}
	v, _ = r.json("pool.get_suspend_image_SR", string(r.root.Ref), string(r.poolRef))
	if v != "OpaqueRef:NULL" {
		t.Error(v)
	}
}

// A failure of the API is HTTP 200; what is no call is 500 in HTML.
func TestFailuresAndMalformedRequests(t *testing.T) {
	r := newRig(t)
	res, body := r.post("/", "", xmlCall("pool.get_all", "OpaqueRef:bad"))
	want := `<value>SESSION_INVALID</value><value>OpaqueRef:bad</value>`
	if res.StatusCode != 200 || !strings.Contains(body, want) || strings.Contains(body, "fault") {
		t.Errorf("%s %s", res.Status, body)
	}
	res, body = r.post("/jsonrpc", "", `{"method":"pool.get_all","params":["x"],"id":3}`)
	if res.StatusCode != 200 || body != `{"result":null,"error":["SESSION_INVALID","x"],"id":3}` {
		t.Errorf("%s %s", res.Status, body)
	}
	for path, bad := range map[string]string{"/": "<nonsense/>", "/jsonrpc": `{"jsonrpc":"2.0","method":"a"}`} {
		res, body = r.post(path, "", bad)
		if res.StatusCode != 500 || res.Header.Get("Content-Type") != "text/html" || !res.Close && res.Header.Get("Connection") != "close" {
			t.Errorf("%s: %s %v", path, res.Status, res.Header)
		}
		if !strings.Contains(body, "Internal Error") || strings.Contains(body, "nonsense") {
			t.Error(body)
		}
	}
	for _, path := range []string{"/", "/jsonrpc"} {
		res, _ = r.post(path, "", strings.Repeat(" ", 2<<20))
		if res.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("2 MiB to %s: %s", path, res.Status)
		}
	}
}

func TestMethodsAndPathsWithoutACall(t *testing.T) {
	r := newRig(t)
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/", 404}, {"GET", "/jsonrpc", 404}, {"GET", "/a/b", 404}, {"PUT", "/x", 403}, {"PUT", "/jsonrpc", 403},
		{"DELETE", "/", 501}, {"HEAD", "/", 501}, {"PATCH", "/jsonrpc", 501}, {"OPTIONS", "/", 200}, {"OPTIONS", "/jsonrpc", 200},
	} {
		req, err := http.NewRequest(tt.method, r.http.URL+tt.path, nil)
		r.must(err)
		req.Header.Set("Access-Control-Request-Headers", "content-type")
		res, err := http.DefaultClient.Do(req)
		r.must(err)
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != tt.want {
			t.Errorf("%s %s: %s", tt.method, tt.path, res.Status)
		}
		h := res.Header
		if tt.method == "OPTIONS" && (len(body) != 0 || h.Get("Access-Control-Allow-Methods") != "PUT" ||
			h.Get("Access-Control-Allow-Headers") != "content-type, X-Requested-With" || h.Get("Access-Control-Allow-Origin") != "*") {
			t.Errorf("preflight: %v", h)
		}
	}
}

// A request of HTTP/1.0, and one in chunks.
func TestOldAndChunkedRequests(t *testing.T) {
	r := newRig(t)
	body := xmlCall("pool.get_all", string(r.root.Ref))
	for _, tt := range []struct{ head, want string }{
		{fmt.Sprintf("POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s", len(body), body), "HTTP/1.0 200 OK"},
		{fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body), "HTTP/1.1 200 OK"},
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(r.http.URL, "http://"))
		r.must(err)
		_, err = io.WriteString(conn, tt.head)
		r.must(err)
		line, err := bufio.NewReader(conn).ReadString('\n')
		if strings.TrimSpace(line) != tt.want {
			t.Errorf("%q %v, want %s", line, err, tt.want)
		}
		conn.Close()
	}
}

// The result of a task is an encoded value; a caller who waits gets it
// as it is.
func TestResultsOfTasks(t *testing.T) {
	r := newRig(t)
	ref := r.good("Async.pool_patch.apply", r.patch, r.host).(string)
	rec, err := r.Tasks.Wait(t.Context(), xapi.Ref(ref))
	if err != nil || rec.Status != task.Success || rec.Result != "<value>done &lt;&amp;&gt;</value>" || rec.NameLabel != "Async.pool_patch.apply" {
		t.Errorf("%+v %v", rec, err)
	}
	ref = r.good("Async.pool_patch.pool_apply", r.patch).(string)
	if rec, _ = r.Tasks.Wait(t.Context(), xapi.Ref(ref)); rec.Result != "<value></value>" {
		t.Errorf("void: %q", rec.Result)
	}
	made := r.good("Async.VDI.create", map[string]any{"SR": string(r.sr), "virtual_size": "1"}).(string)
	if rec, _ = r.Tasks.Wait(t.Context(), xapi.Ref(made)); !regexp.MustCompile(`^<value>OpaqueRef:[0-9a-f-]{36}</value>$`).MatchString(rec.Result) {
		t.Errorf("ref: %q", rec.Result)
	}
	failed := r.good("Async.pool_patch.destroy", r.patch).(string)
	if rec, _ = r.Tasks.Wait(t.Context(), xapi.Ref(failed)); rec.Status != task.Failure || !slices.Equal(rec.ErrorInfo, []string{"PATCH_IS_APPLIED"}) {
		t.Errorf("failure: %+v", rec)
	}
	if got := r.good("pool_patch.apply", r.patch, r.host); got != "done <&>" {
		t.Errorf("sync: %v", got)
	}
	v, _ := r.json("task.get_all_records_where", string(r.root.Ref), `field "name_label"="pool_patch.apply"`)
	if recs := v.(map[string]any); len(recs) != 0 {
		t.Errorf("an answered call leaves its task: %v", recs)
	}
}

// A flat array without a session, of what is really served.
func TestListMethodsWithoutASession(t *testing.T) {
	r := newRig(t)
	_, body := r.post("/", "", xmlCall("system.listMethods"))
	head := `<?xml version="1.0"?><methodResponse><params><param><value><array><data><value>`
	if !strings.HasPrefix(body, head) || strings.Contains(body, "Status") {
		t.Error(body[:200])
	}
	v, _ := r.json("system.listMethods")
	var classes []string
	for _, m := range v.([]any) {
		name := m.(string)
		if strings.Contains(name, "pool_update") || name == "host.reboot" || name == "message.get_uuid" || name == "Async.pool.get_all" {
			t.Error("listed:", name)
		}
		if class, ok := strings.CutSuffix(name, ".get_all_records"); ok {
			classes = append(classes, class)
		}
	}
	want := "task pool pool_patch host host_patch SM SR VDI PBD message VM VBD VIF network PIF host_metrics host_cpu console user subject role"
	slices.Sort(classes)
	expect := strings.Fields(want)
	slices.Sort(expect)
	if !slices.Equal(classes, expect) {
		t.Errorf("%q", classes)
	}
	if got, err := r.Call(context.Background(), nil, "system.listMethods", nil); err != nil || len(got.([]any)) < 300 {
		t.Errorf("%v", err)
	}
}

// A client of another language, with its own idea of everything.
func TestPythonsOwnClient(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Fatal("python3 is needed for this test")
	}
	r := newRig(t)
	cmd := exec.CommandContext(t.Context(), python, "testdata/client.py", r.http.URL, "root", password)
	cmd.Env = append(os.Environ(), "http_proxy=", "no_proxy=*")
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "ok" {
		t.Errorf("%v\n%s", err, out)
	}
}

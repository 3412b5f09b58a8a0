package upload

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// FuzzRequest reads what clients put into cookies, queries and lengths.
func FuzzRequest(f *testing.F) {
	for _, head := range []string{
		"PUT /pool_patch_upload?session_id=OpaqueRef:1&task_id=OpaqueRef%3A2&sr_id=x HTTP/1.0\r\nContent-Length: 5\r\n\r\n",
		"PUT /pool_patch_upload/?sr_uuid=%zz&sr_uuid=a;b HTTP/1.1\r\nHost: h\r\nContent-Length: 1125899906842624\r\n\r\n",
		"PUT /pool_patch_upload HTTP/1.1\r\nHost: h\r\nCookie: session_id=OpaqueRef%3A1; task_id=\"q\"\r\nTransfer-Encoding: chunked\r\n\r\n",
		"GET /pool_patch_download?uuid=../../etc/passwd HTTP/1.1\r\nHost: h\r\nRange: bytes=0-\r\n\r\n",
		"PUT /import_raw_vdi?vdi=%00&format=raw HTTP/1.1\r\nHost: h\r\nContent-Length: 9223372036854775807\r\n\r\n",
	} {
		f.Add(head)
	}
	f.Fuzz(func(t *testing.T, head string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head)))
		if err != nil {
			return
		}
		for _, name := range []string{"session_id", "task_id", "sr_id", "uuid", "vdi", "format"} {
			if v := param(r, name); len(v) > len(head) {
				t.Errorf("param %s is longer than the request: %q", name, v)
			}
		}
		if id := requestedSR(r); id != "" && id != param(r, "sr_id") && id != param(r, "sr_uuid") {
			t.Errorf("SR %q was asked for by nobody", id)
		}
		if id, err := xapi.ParseUUID(param(r, "uuid")); err == nil && filepath.Base(string(id)) != string(id) {
			t.Errorf("uuid %q is a path", id)
		}
		if n := r.ContentLength; n >= 0 && n <= 1<<40 { // beyond 1 TiB the image stays at 4 TiB
			if size := vdi.Size(n); size < 4*n || size%mib != 0 {
				t.Errorf("%d bytes get an image of %d", n, size)
			}
		}
	})
}

// FuzzRange asks for parts of a file.
func FuzzRange(f *testing.F) {
	content := []byte("0123456789abcdefghijklmnopqrstuvwxyz")
	path := filepath.Join(f.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		f.Fatal(err)
	}
	for _, r := range []string{"", "bytes=0-", "bytes=5-9", "bytes=-3", "bytes=36-", "bytes=0-1,3-4", "bytes=9-5", "bytes=18446744073709551615-", "lines=1-2", "bytes="} {
		f.Add(r)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	h := &Handler{Options: Options{Stall: time.Minute, Log: log}}
	f.Fuzz(func(t *testing.T, spec string) {
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		w := httptest.NewRecorder()
		r := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: "/"}, Header: http.Header{"Range": {spec}}}
		c := &call{h: h, w: w, r: r, rc: http.NewResponseController(w), log: log}
		err = c.sendFile(context.Background(), nil, file)
		body := w.Body.Bytes()
		switch w.Code {
		case http.StatusOK:
			if !bytes.Equal(body, content) {
				t.Errorf("range %q: the whole file is %q", spec, body)
			}
		case http.StatusPartialContent:
			if !strings.Contains(w.Header().Get("Content-Type"), "multipart") && !bytes.Contains(content, body) {
				t.Errorf("range %q gives %q", spec, body)
			}
		case http.StatusRequestedRangeNotSatisfiable:
			if err == nil {
				t.Errorf("range %q is refused and the task succeeds", spec)
			}
		default:
			t.Errorf("range %q: status %d", spec, w.Code)
		}
	})
}

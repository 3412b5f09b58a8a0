package upload

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/gorilla/mux"
)

// TestRedirect: a host that does not lead sends every request of this package
// to the one that does, whoever comes, with path and query as they are.
func TestRedirect(t *testing.T) {
	leader := "https://192.0.2.1:8443"
	r := mux.NewRouter().SkipClean(true).UseEncodedPath()
	Redirect(r, func(*http.Request) (string, bool) { return leader, leader != "" })
	s := httptest.NewServer(r)
	defer s.Close()
	ask := func(method, path, body string) *http.Response {
		t.Helper()
		req, err := http.NewRequest(method, s.URL+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		return res
	}
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"PUT", "/pool_patch_upload?session_id=OpaqueRef%3Ax&task_id=y", http.StatusFound},
		{"PUT", "/pool_patch_upload/name%20of%20a%20file", http.StatusFound},
		{"GET", "/pool_patch_download?uuid=1", http.StatusFound},
		{"GET", "/export_raw_vdi/?vdi=1", http.StatusFound},
		{"PUT", "/import_raw_vdi?vdi=1", http.StatusFound},
		{"POST", tusPath, http.StatusTemporaryRedirect},
		{"PATCH", tusPath + "/1", http.StatusTemporaryRedirect},
		{"HEAD", tusPath + "/1", http.StatusTemporaryRedirect},
	} {
		res := ask(c.method, c.path, "")
		if res.StatusCode != c.status || res.Header.Get("Location") != leader+c.path {
			t.Errorf("%s %s: %d %s", c.method, c.path, res.StatusCode, res.Header.Get("Location"))
		}
	}
	if res := ask("PUT", "/pool_patch_upload", strings.Repeat("x", 4<<20)); res.StatusCode != http.StatusFound {
		t.Errorf("a body that nobody wants: %d", res.StatusCode)
	}
	leader = ""
	if res := ask("PUT", "/pool_patch_upload", ""); res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Location") != "" {
		t.Errorf("nobody leads: %d %s", res.StatusCode, res.Header.Get("Location"))
	}
}

package upload

import (
	"io"
	"net/http"
	"time"

	"github.com/gorilla/mux"

	"github.com/patchd/patchd/pkg/xapi"
)

// Redirect adds the paths of this package to r, on a host that is not the
// coordinator: whoever comes is sent to the URL that to gives, with path and
// query as they are. PUT and GET are answered 302, which classic clients look
// for, everything else 307. Where to knows nobody the answer is 503.
//
// Nobody has to log in for it: HOST_IS_SLAVE tells as much.
func Redirect(r *mux.Router, to func(r *http.Request) (base string, ok bool)) {
	send := func(w http.ResponseWriter, r *http.Request) { redirect(w, r, to) }
	for _, path := range []string{
		tusPath, "/pool_patch_upload", "/pool_patch_download", "/pool_patch_chunks",
		"/import_raw_vdi", "/export_raw_vdi", "/vdi_block_map",
	} {
		r.HandleFunc(path, send)
		r.PathPrefix(path + "/").HandlerFunc(send)
	}
}

// lingerRedirected is how long the body of a request that is sent elsewhere is
// read, so that its client sees the answer.
const lingerRedirected = 2 * time.Second

func redirect(w http.ResponseWriter, r *http.Request, to func(r *http.Request) (string, bool)) {
	rc := http.NewResponseController(w)
	rc.EnableFullDuplex() //nolint:errcheck // not there: the body is read first, for a while
	h := w.Header()
	h.Set("Connection", "close")
	h.Set("Cache-Control", "no-cache, no-store")
	base, ok := to(r)
	if !ok {
		status, _ := describe(xapi.NewError(xapi.HostStillBooting))
		h.Set("Retry-After", "1")
		http.Error(w, "nobody leads the pool at this moment: "+xapi.HostStillBooting, status)
		return
	}
	h.Set("Location", base+r.URL.RequestURI())
	h.Set("Content-Length", "0")
	status := http.StatusTemporaryRedirect
	if r.Method == http.MethodPut || r.Method == http.MethodGet {
		status = http.StatusFound
	}
	w.WriteHeader(status)
	rc.Flush() //nolint:errcheck // the client is gone: nothing to tell
	asks := r.Header.Get("Expect") != ""
	if asks || r.Body == nil || rc.SetReadDeadline(time.Now().Add(lingerRedirected)) != nil {
		return
	}
	io.Copy(io.Discard, r.Body) //nolint:errcheck // whatever it is, it is not wanted
}

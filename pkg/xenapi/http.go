package xenapi

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/mux"

	"github.com/patchd/patchd/pkg/xapi"
)

// Content types, exactly: clients compare the whole header.
const (
	contentXML  = "text/xml"
	contentJSON = "application/json"
	contentHTML = "text/html"
)

// Routes adds the RPC endpoints to r. It has to come last: whatever no other
// route takes ends here, for a POST on any path without a better match is
// XML-RPC. r should not clean paths.
func (s *Server) Routes(r *mux.Router) {
	r.PathPrefix("/jsonrpc").Methods(http.MethodPost).HandlerFunc(s.serveJSON)
	r.PathPrefix("/").HandlerFunc(s.serveRest)
	r.NotFoundHandler = http.HandlerFunc(s.serveRest)
	r.MethodNotAllowedHandler = http.HandlerFunc(s.serveRest)
}

// serveRest is what real servers do with paths they do not know, by method.
func (s *Server) serveRest(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodPost:
		s.serveXML(w, r)
	case http.MethodOptions:
		s.servePreflight(w, r)
	case http.MethodGet:
		refuse(w, http.StatusNotFound)
	case http.MethodPut:
		refuse(w, http.StatusForbidden)
	default:
		refuse(w, http.StatusNotImplemented)
	}
}

// servePreflight answers the CORS question of a browser.
func (s *Server) servePreflight(w http.ResponseWriter, r *http.Request) {
	allowed := "X-Requested-With"
	if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
		allowed = clip(asked, 1024) + ", " + allowed
	}
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Headers", allowed)
	h.Set("Access-Control-Allow-Methods", "PUT")
	h.Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
}

func (s *Server) serveXML(w http.ResponseWriter, r *http.Request) {
	body, release, ok := s.body(w, r)
	if !ok {
		return
	}
	defer release()
	var method string
	var params []any
	var err error
	s.intake.decode(body, func() { method, params, err = decodeXML(body, s.Limits) })
	if err != nil {
		s.refuseMalformed(w, r, err)
		return
	}
	if method == listMethods {
		respond(w, r, contentXML, s.namesXML)
		return
	}
	v, err := s.dispatch(WithAddress(r.Context(), r.RemoteAddr), method, params)
	if err != nil {
		respond(w, r, contentXML, xmlFailure(xapi.AsError(err)))
		return
	}
	respond(w, r, contentXML, xmlSuccess(v))
}

func (s *Server) serveJSON(w http.ResponseWriter, r *http.Request) {
	body, release, ok := s.body(w, r)
	if !ok {
		return
	}
	defer release()
	var call *jsonCall
	var err error
	s.intake.decode(body, func() { call, err = decodeJSON(body, s.Limits) })
	if err != nil {
		s.refuseMalformed(w, r, err)
		return
	}
	if call.method == listMethods {
		respond(w, r, contentJSON, call.success(s.namesJSON))
		return
	}
	v, err := s.dispatch(WithAddress(r.Context(), r.RemoteAddr), call.method, call.params)
	if err != nil {
		respond(w, r, contentJSON, call.failure(xapi.AsError(err)))
		return
	}
	respond(w, r, contentJSON, call.success(v))
}

// body reads the whole request, up to the limit. Whether it came with a length
// or in chunks does not matter. release is to be called when the call is done.
func (s *Server) body(w http.ResponseWriter, r *http.Request) (body []byte, release func(), ok bool) {
	body, release, status, err := s.intake.Read(w, r, s.Limits.Body)
	if err == nil {
		return body, release, true
	}
	release()
	s.Log.WithError(err).WithField("address", r.RemoteAddr).Debug("request not read")
	refuse(w, status)
	return nil, release, false
}

func (s *Server) refuseMalformed(w http.ResponseWriter, r *http.Request, err error) {
	s.Log.WithError(err).WithField("address", r.RemoteAddr).Debug("malformed request")
	refuse(w, http.StatusInternalServerError)
}

// respond sends the answer of a call: 200, also when the call failed, for the
// error is in the body. That a client is gone is no concern of ours.
func respond(w http.ResponseWriter, r *http.Request, contentType string, body []byte) {
	// A client that does not read its answer is cut off.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-cache, no-store")
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Headers", "X-Requested-With")
	if r.ProtoMajor == 1 && !r.Close && h.Get("Connection") == "" {
		h.Set("Connection", "keep-alive")
	}
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(body)
}

// refuse ends a request that is no call, with a page for people. It never
// repeats what the client sent.
func refuse(w http.ResponseWriter, status int) {
	title := http.StatusText(status)
	if status == http.StatusInternalServerError {
		title = "Internal Error"
	}
	page := fmt.Sprintf("<html><head><title>%[2]s</title></head><body><h1>%[1]d %[2]s</h1></body></html>\n", status, title)
	h := w.Header()
	h.Set("Content-Type", contentHTML)
	h.Set("Content-Length", strconv.Itoa(len(page)))
	h.Set("Cache-Control", "no-cache, no-store")
	h.Set("Connection", "close")
	w.WriteHeader(status)
	_, _ = io.Copy(w, strings.NewReader(page))
}

package server

import (
	"context"
	"encoding/json"
	"fmt"
	stdlog "log"
	"net/http"
	"time"

	"github.com/gorilla/mux"
	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/event"
	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/peer"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/upload"
	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi"
	"github.com/patchd/patchd/pkg/xenapi/thincli"
)

// apiRoutes makes the API and the routes that every role has. The caller adds
// those of the API last.
func (s *Server) apiRoutes() (*xenapi.Server, *mux.Router, error) {
	model := xenapi.NewModel()
	api, err := xenapi.New(xenapi.Options{
		Store: s.store, Pool: s.pool, Tasks: s.tasks, Sessions: s.sessions,
		Events: event.New(s.store, model.EventClasses()), Log: s.log,
		Coordinator: s.coordinator, Role: s.role, Members: s,
	})
	if err != nil {
		return nil, nil, err
	}
	r := mux.NewRouter().SkipClean(true).UseEncodedPath()
	r.HandleFunc("/healthz", s.healthz).Methods(http.MethodGet, http.MethodHead)
	s.cli = thincli.New(thincli.Over(api), thincli.Options{Log: s.log, Local: thincli.TrustedRequest})
	r.Handle("/cli", s.cli).Methods(http.MethodPost)
	r.HandleFunc(joinPath, s.serveJoin).Methods(http.MethodPost)
	r.Handle(peer.PathBlocks, s.node)
	r.Handle(peer.PathMap, s.node)
	return api, r, nil
}

// routes binds the wire of the coordinator to the services.
func (s *Server) routes(ctx context.Context) (http.Handler, error) {
	api, r, err := s.apiRoutes()
	if err != nil {
		return nil, err
	}
	r.Handle(linkPath, s.hub).Methods(http.MethodPost)
	r.Handle("/pool_patch_download", s.hub.Authenticated(s.sendPatchFile)).Methods(http.MethodGet).MatcherFunc(fromHost)
	s.uploads = upload.New(upload.Options{
		Pool: s.pool, Store: s.store, Tasks: s.tasks, Sessions: s.sessions, Dom0: s.dom0, Log: s.log,
		Keys:     func() (*patch.Keyring, error) { return patch.LoadKeyring(s.keysDir()) },
		Check:    patch.Options{Pinned: s.config.PinnedSHA256, Limits: patch.Limits{Cleartext: s.config.MaxCleartext}},
		Attested: s.attested(),
		Stall:    time.Duration(s.config.StallTimeout), Render: s.render(api.Model()), Layout: s.layout,
		Drafts: s.pool, UploadsDir: s.state.path("uploads"), UploadExpiry: time.Duration(s.config.UploadExpiry),
		LogRoom: func() int64 { return s.state.roomLeft(s.dom0) },
		Confirm: s.confirm(),
	})
	if err := s.uploads.Start(ctx); err != nil {
		return nil, fmt.Errorf("take up unfinished uploads: %w", err)
	}
	s.uploads.Routes(r)
	api.Routes(r)
	return r, nil
}

// openHub makes what other hosts connect to. Work that goes on from before asks
// it who is there.
func (s *Server) openHub() {
	s.hub = link.NewHub(link.Options{
		Store: s.store, Pool: s.pool, Log: s.log, Version: s.version, Self: s.pool.Self,
		Term: func() int64 { return s.leader.Revision }, Known: session.Proven,
	})
	s.pool.Connected, s.pool.Seen = s.hub.Connected, s.hub.Seen
}

// fromHost tells whether a request was made as hosts make them to each other.
func fromHost(r *http.Request, _ *mux.RouteMatch) bool {
	return r.TLS != nil && r.TLS.NegotiatedProtocol == trust.Protocol
}

// sendPatchFile gives a host of the pool the classic file of a patch that a job of it
// is about. 404 when it is gone, 403 when there is no such job.
func (s *Server) sendPatchFile(w http.ResponseWriter, r *http.Request, host xapi.Ref) {
	id := xapi.UUID(r.URL.Query().Get("uuid"))
	if err := s.pool.AssertWorksWith(host, id); err != nil {
		s.log.WithError(err).WithField("host", host).Warn("a host asked for what it may not have")
		http.Error(w, xapi.AsError(err).Code, http.StatusForbidden)
		return
	}
	f, _, err := s.pool.PatchFile(id)
	if err != nil {
		http.Error(w, xapi.AsError(err).Code, http.StatusNotFound)
		return
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, f)
}

// confirm is what ends an upload; nil where one copy of it is enough.
func (s *Server) confirm() func(ctx context.Context, patch xapi.Ref) error {
	if s.pool.Copies <= 1 {
		return nil
	}
	return s.pool.Confirm
}

// render gives a record as the API shows it, for answers outside the API.
func (s *Server) render(m *xenapi.Model) func(class string, ref xapi.Ref) (json.RawMessage, error) {
	return func(class string, ref xapi.Ref) (raw json.RawMessage, err error) {
		c, ok := m.Class(class)
		if !ok {
			return nil, fmt.Errorf("there is no class %s", class)
		}
		err = s.store.View(func(v *store.View) error {
			it, ok := v.Get(class, ref)
			if !ok {
				return xapi.NewError(xapi.HandleInvalid, class, string(ref))
			}
			rec, err := c.Render(v, it)
			if err != nil {
				return err
			}
			rec["ref"] = string(ref)
			raw, err = json.Marshal(rec)
			return err
		})
		return raw, err
	}
}

func xmlValue(text string) string {
	if text == "" {
		return xenapi.XMLValue(nil)
	}
	return xenapi.XMLValue(text)
}

// quiet sends what net/http says of single connections to the debug level.
func quiet(log logrus.FieldLogger) *stdlog.Logger {
	return stdlog.New(debugWriter{log}, "", 0)
}

type debugWriter struct{ log logrus.FieldLogger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.Debug(string(p))
	return len(p), nil
}

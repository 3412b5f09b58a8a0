package server

import (
	"time"

	"github.com/patchd/patchd/pkg/patch"
)

// attested is this host's own memory of what it has verified.
func (s *Server) attested() patch.Attestations { return patch.Attestations(s.state.path("attested")) }

// attestedKeep is how long an attestation stays whose image is in no record:
// an upload attests before its records are written.
const attestedKeep = 24 * time.Hour

// forgetAttested drops the attestations of images that are gone.
func (s *Server) forgetAttested() error {
	checks, err := s.pool.VDIChecks()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, c := range checks {
		known[c.Map] = true
	}
	return s.attested().Forget(time.Now().Add(-attestedKeep), func(m string) bool { return known[m] })
}

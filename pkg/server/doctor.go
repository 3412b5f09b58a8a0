package server

import (
	"context"
	"fmt"
	"os"

	"github.com/dustin/go-humanize"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
)

// examine looks at this host for pool.Examine: the trusted keys, the room for
// the pool database, and what jobs left.
func (s *Server) examine(context.Context) ([]pool.Finding, error) {
	room, err := s.examineRoom()
	if err != nil {
		return nil, err
	}
	jobs, err := s.agent.Examine()
	if err != nil {
		return nil, err
	}
	return append([]pool.Finding{s.examineKeys(), room}, jobs...), nil
}

func (s *Server) examineKeys() pool.Finding {
	f := pool.Finding{Check: "trusted keys"}
	ring, err := patch.LoadKeyring(s.keysDir())
	if err != nil {
		f.Text = err.Error()
		return f
	}
	usable := 0
	for _, k := range ring.Keys() {
		if k.Usable {
			usable++
		}
	}
	problems := ring.Problems()
	switch {
	case len(problems) > 0:
		f.Text = fmt.Sprintf("%s in %s is no trusted key (%v): remove it, or put the exported public key there (%d files in all)", problems[0].File, s.keysDir(), problems[0].Err, len(problems))
	case usable == 0:
		f.Text = "none is usable, so every patch is refused: `patchd key trust FILE` trusts the keys in a file"
	default:
		f.OK, f.Text = true, fmt.Sprintf("%d usable", usable)
	}
	return f
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

// examineRoom looks at the filesystem of the state directory, which must never
// be full: the pool database ends the process then.
func (s *Server) examineRoom() (pool.Finding, error) {
	f := pool.Finding{Check: "room for the pool database"}
	space, err := s.dom0.Space(s.config.StateDir)
	if err != nil {
		return f, err
	}
	keep := s.state.keepFree(s.dom0)(s.config.StateDir)
	_, reserve := os.Stat(s.state.path("reserve"))
	switch {
	case space.Free < keep:
		f.Text = fmt.Sprintf("only %s are free on the filesystem of %s, and uploads stop at %s: make room there", bytesText(space.Free), s.config.StateDir, bytesText(keep))
	case os.IsNotExist(reserve) && space.Free < 4*reserveSize:
		f.Text = fmt.Sprintf("the reserve in %s is used up: make room there and start patchd again", s.config.StateDir)
	default:
		f.OK, f.Text = true, fmt.Sprintf("%s are free on the filesystem of %s", bytesText(space.Free), s.config.StateDir)
	}
	return f, nil
}

package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/pool"
)

// memberFile says, in the state directory, that this host is a member.
const memberFile = "member.json"

// phase is how far a host has come on its way into a pool or out of it.
type phase string

// The phases. In the first and the last the store is not that of a member; the
// next start makes it so, or a pool of its own again.
const (
	phaseJoining phase = "joining"
	phaseMember  phase = "member"
	phaseLeaving phase = "leaving"
)

// membership is what a member knows of its pool without being told anew.
type membership struct {
	Phase  phase           `json:"phase"`
	Answer pool.JoinAnswer `json:"answer"`
	// Joined is the URL at which the coordinator was found: tried, too, where its
	// record names an address that nobody reaches.
	Joined string `json:"joined"`
	// Term is the highest one that orders were accepted of.
	Term link.Term `json:"term"`
	// Coordinators are the hosts that may lead, as was last told.
	Coordinators []pool.Peer `json:"coordinators"`
	PoolName     string      `json:"pool_name"`
}

// membership reads the file; nil when this host is no member.
func (s stateDir) membership() (*membership, error) {
	b, err := os.ReadFile(s.path(memberFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var m membership
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%s makes no sense, and without it nobody knows which pool this host belongs to: put it back from a back-up, or remove it to make the host a pool of its own: %w",
			s.path(memberFile), err)
	}
	return &m, nil
}

// setMembership writes the file durably.
func (s stateDir) setMembership(m membership) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return s.write(memberFile, append(b, '\n'))
}

// endMembership removes the file durably.
func (s stateDir) endMembership() error {
	err := os.Remove(s.path(memberFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

package pool

import (
	"encoding/json"

	"github.com/patchd/patchd/pkg/xapi"
)

// What goes between a coordinator and the other hosts. The JSON names are the
// protocol: fields may be added, those a side does not know it ignores.

// Peer is a host as another one must know it to connect to it.
type Peer struct {
	Host xapi.UUID `json:"host"`
	URL  string    `json:"url"`  // of its TLS listener, without a slash at the end
	Keys [][]byte  `json:"keys"` // its public keys, DER of SubjectPublicKeyInfo
}

// Facts are what a host says of itself when it connects.
type Facts struct {
	Hostname        string            `json:"hostname"`
	Address         string            `json:"address"`
	URL             string            `json:"url"`
	SoftwareVersion map[string]string `json:"software_version"`
	CPUInfo         map[string]string `json:"cpu_info,omitempty"`
	// Standby tells that the host has the pool database: its jobs and records do
	// not go over the link, only that it is there, and who has blocks.
	Standby bool `json:"standby,omitempty"`
}

// Orders are all that a coordinator wants of one host. Each replaces the one
// before it.
type Orders struct {
	// Term is the revision of the coordinator's election: a host refuses orders
	// of a lower one than it has seen.
	Term     int64     `json:"term"`
	Revision int64     `json:"revision"` // of the records these were made from
	Pool     xapi.UUID `json:"pool"`
	PoolName string    `json:"pool_name"`
	Host     xapi.Ref  `json:"host"` // the record of the host that these are for
	// Jobs are the open ones of the host, the oldest first.
	Jobs []Assignment `json:"jobs"`
	// Coordinators are the hosts that lead or may lead, the leader first.
	Coordinators []Peer `json:"coordinators"`
	// Revoked are the keys, as the SHA-256 of their SPKI in lower-case
	// hexadecimal, that no host of the pool may let in any more.
	Revoked []string `json:"revoked"`
}

// Inventory is what a host has on its storage: records of the classes SR, PBD
// and VDI as its own store has them.
type Inventory struct {
	// Full tells that Put is all there is, where a record without content only
	// names what was told before; else Put and Gone are what changed.
	Full bool              `json:"full"`
	Put  []InventoryRecord `json:"put"`
	Gone []InventoryRecord `json:"gone"` // without Record
}

// InventoryRecord is one record of an Inventory.
type InventoryRecord struct {
	Class  string          `json:"class"`
	Ref    xapi.Ref        `json:"ref"`
	Record json.RawMessage `json:"record,omitempty"`
}

// Sources are the hosts that have blocks of the images with one map, or are
// fetching them, and the right to ask them.
type Sources struct {
	Peers  []SourcePeer `json:"peers"`
	Ticket []byte       `json:"ticket"` // see trust.Ticket
}

// SourcePeer is one of them.
type SourcePeer struct {
	Peer
	Name     string `json:"name"`               // name_label of the host, for people
	Partial  bool   `json:"partial,omitempty"`  // it is fetching itself
	Reserved bool   `json:"reserved,omitempty"` // the coordinator: ask it only for what no other has
}

package peer

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// The paths that a Node serves.
const (
	PathBlocks = "/patchd/blocks"
	PathMap    = "/patchd/map"
)

// HeaderTicket carries the ticket, in base64.
const HeaderTicket = "X-Patchd-Ticket"

// Source is another host that has blocks of an image, or is fetching them.
type Source struct {
	Host xapi.UUID
	Name string // for people
	URL  string // without a slash at the end
	Keys [][]byte
	// Partial tells that it is fetching the image itself.
	Partial bool
	// Reserved tells that it is asked only for what no other one has.
	Reserved bool
}

// Images gives the images on the storage of this host.
type Images interface {
	// OpenImages opens those whose block map has that digest. None is no error.
	// They are to be closed, also when ctx has ended before.
	OpenImages(ctx context.Context, digest string) ([]vdi.Stored, error)
}

// Options is what a Node works with.
type Options struct {
	Images Images // nil: there are none
	// Reader tells who makes a request, as Verify knows it, "" when that is
	// not known.
	Reader func(r *http.Request) string
	// Verify holds a ticket: that reader may read the image of that map now.
	Verify func(ticket []byte, reader, digest string) error
	// Client speaks to a source; it is asked for each pull, and keeps connections
	// for the next one.
	Client func(s Source) *http.Client
	// Bad hears of a source that has sent a block that is not as the map says;
	// nil: nobody does.
	Bad func(ctx context.Context, s Source, digest string, block int64)
	Log logrus.FieldLogger
	// Readers bounds the requests for blocks that are served at once; 0: 4.
	Readers int
	// Stall is how long one block may take on the wire; 0: 10 s.
	Stall time.Duration
	// GiveUp is how long a pull goes on while no block comes; 0: 60 s.
	GiveUp time.Duration
}

// Node is the side of one host: http.Handler and puller.
type Node struct {
	Options
	readers chan struct{} // one for each that is served
	waiting chan struct{} // one for each that waits for its turn
	buffers sync.Pool     // of *[]byte, MapBlock each

	mu    sync.Mutex
	pulls map[string][]*pull // that run, by digest
	given map[string]*given  // by digest
	stats Stats
}

// Stats counts what a Node has moved since it was made.
type Stats struct {
	BytesSent     int64 // of blocks
	BytesReceived int64 // of blocks that were good
	BlocksBad     int64 // that sources have sent
	Refused       int64 // requests that were refused as too many
}

// The defaults of Options.
const (
	defaultReaders = 4
	defaultStall   = 10 * time.Second
	defaultGiveUp  = 60 * time.Second
)

// New makes a Node.
func New(o Options) *Node {
	if o.Readers <= 0 {
		o.Readers = defaultReaders
	}
	if o.Stall <= 0 {
		o.Stall = defaultStall
	}
	if o.GiveUp <= 0 {
		o.GiveUp = defaultGiveUp
	}
	n := &Node{
		Options: o, readers: make(chan struct{}, o.Readers), waiting: make(chan struct{}, maxWaiting),
		pulls: map[string][]*pull{}, given: map[string]*given{},
	}
	n.buffers.New = func() any { b := make([]byte, vdi.MapBlock); return &b }
	return n
}

// Stats gives the counts up to now.
func (n *Node) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stats
}

func (n *Node) count(f func(*Stats)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(&n.stats)
}

// running gives the pulls of an image that go on here.
func (n *Node) running(digest string) []*pull {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]*pull(nil), n.pulls[digest]...)
}

package link

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// Proto is the version of what goes over a link. Sides whose versions are one
// step apart work together: each ignores fields that it does not know, and a
// method that it does not know it refuses by MESSAGE_METHOD_UNKNOWN.
const Proto = 1

// Path is where links begin.
const Path = "/patchd/link"

// upgrade is the name of the protocol in the headers of HTTP.
const upgrade = "patchd-link"

// The longest lines, in bytes, without the line feed.
const (
	maxOrders  = 16 << 20 // from a coordinator
	maxRequest = 8 << 20  // from a host
	maxHello   = 64 << 10 // from a host, before it was let in
)

// The times of a link. They are variables of a side so that tests need not wait.
type times struct {
	beat     time.Duration // between two beats of an idle host; jitter is added
	busyBeat time.Duration // while it waits for an answer
	answer   time.Duration // within which a beat is answered
	silence  time.Duration // after which a coordinator cuts a host
	hello    time.Duration // for the first message, and its answer
	write    time.Duration // for the other side to take the next part of a line
	line     time.Duration // for the rest of a long line
	grace    time.Duration // after which a host that is not connected is away
	gather   time.Duration // for which such changes are gathered before they are stored
	retry    time.Duration // the first pause before a host dials again
	maxRetry time.Duration
}

var defaultTimes = times{
	beat: 45 * time.Second, busyBeat: 5 * time.Second, answer: 10 * time.Second, silence: 110 * time.Second,
	hello: 10 * time.Second, write: 10 * time.Second, line: time.Minute, grace: 45 * time.Second, gather: time.Second,
	retry: 200 * time.Millisecond, maxRetry: 5 * time.Second,
}

// message is one line.
type message struct {
	ID     uint64          `json:"id,omitempty"`
	Method string          `json:"method,omitempty"`
	Params json.RawMessage `json:"params,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *failure        `json:"error,omitempty"`
}

// failure is an xapi.Error on the wire.
type failure struct {
	Code   string   `json:"code"`
	Params []string `json:"params,omitempty"`
}

func failed(err error) *failure {
	if err == nil {
		return nil
	}
	e := xapi.AsError(err)
	return &failure{e.Code, e.Params}
}

func (f *failure) err() error { return xapi.NewError(f.Code, f.Params...) }

// The methods of a host.
const (
	methodHello     = "hello"
	methodBeat      = "beat"
	methodInventory = "inventory"
	methodPromise   = "promise"
	methodClaim     = "claim"
	methodReport    = "report"
	methodRequeue   = "requeue"
	methodFinish    = "finish"
	methodJob       = "job"
	methodDamaged   = "damaged"
	methodResync    = "resync"
	methodMessage   = "message"
	methodSources   = "sources"
)

// pushOrders is what a coordinator sends unasked; its parameter is pool.Orders.
const pushOrders = "orders"

type helloParams struct {
	Proto   int        `json:"proto"`
	Version string     `json:"version"` // of patchd, for people
	Facts   pool.Facts `json:"facts"`
	// Process is another one for each start of patchd; "": the host does not say.
	Process string `json:"process,omitempty"`
}

type helloResult struct {
	Proto   int       `json:"proto"`
	Version string    `json:"version"`
	Store   string    `json:"store"` // identity of the pool database
	Term    int64     `json:"term"`
	Pool    xapi.UUID `json:"pool"`
	Host    xapi.Ref  `json:"host"`
}

// jobParams are those of every method about one job; each takes what it needs.
type jobParams struct {
	Job      xapi.Ref      `json:"job,omitempty"`
	UUID     xapi.UUID     `json:"uuid,omitempty"`
	Promise  *pool.Promise `json:"promise,omitempty"`
	Progress float64       `json:"progress,omitempty"`
	Tail     string        `json:"tail,omitempty"`
	Outcome  *outcome      `json:"outcome,omitempty"`
}

// outcome is pool.Outcome.
type outcome struct {
	Output  string    `json:"output,omitempty"`
	Error   *failure  `json:"error,omitempty"`
	Unknown bool      `json:"unknown,omitempty"`
	At      time.Time `json:"at,omitzero"`
	Attempt int64     `json:"attempt"`
	// Proof is missing in reports of a version that knew of none: such an apply
	// counts as unknown.
	Proof *pool.Proof `json:"proof,omitempty"`
}

func outcomeOf(o pool.Outcome) *outcome {
	w := &outcome{Output: o.Output, Unknown: o.Unknown, At: o.At, Attempt: o.Attempt, Proof: o.Proof}
	if o.Err != nil {
		w.Error = failed(o.Err)
	}
	return w
}

func (w outcome) outcome() pool.Outcome {
	o := pool.Outcome{Output: ending(w.Output, maxText), Unknown: w.Unknown, At: w.At, Attempt: w.Attempt, Proof: w.Proof}
	if w.Error != nil {
		o.Err = w.Error.bounded()
	}
	if p := w.Proof; p != nil && len(p.Stamp)+len(p.Payload)+len(p.UUID)+len(p.Version) > maxParam {
		o.Proof = nil // it proves nothing
	}
	return o
}

// Bounds of what a host says at the end of a job or in a notice: of a text and of one
// parameter, in bytes, and of the parameters of an error.
const (
	maxText   = 256 << 10
	maxParam  = 32 << 10
	maxParams = 16
)

// ending is the end of a text that is too long: there stands what has happened last.
func ending(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[len(text)-limit:], "")
}

// bounded is the error of a host as it may be recorded.
func (f *failure) bounded() *xapi.Error {
	if len(f.Code) > 64 || strings.Trim(f.Code, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" || f.Code == "" {
		return xapi.NewError(xapi.InternalError, fmt.Sprintf("the host has reported the error %.64q", f.Code))
	}
	var params []string
	for _, p := range f.Params[:min(len(f.Params), maxParams)] {
		params = append(params, ending(p, maxParam))
	}
	return xapi.NewError(f.Code, params...)
}

type jobResult struct {
	Job   pool.Job `json:"job"`
	There bool     `json:"there"`
}

type damagedParams struct {
	VDI  xapi.Ref `json:"VDI"`
	Text string   `json:"text"`
}

type resyncParams struct {
	Host   xapi.Ref `json:"host"`
	Stamps stamps   `json:"stamps"`
}

// stamps are as many as one host may have.
type stamps []stamp

// UnmarshalJSON decodes no more of them than that.
func (s *stamps) UnmarshalJSON(b []byte) (err error) {
	*s, err = pool.DecodeList[stamp](b, pool.MaxStamps)
	return err
}

// stamp is pool.Stamp.
type stamp struct {
	Patch   pool.Patch `json:"patch"`
	Applied time.Time  `json:"applied"`
	Garbled bool       `json:"garbled,omitempty"`
}

type messageParams struct {
	Name     string    `json:"name"`
	Priority int64     `json:"priority"`
	Cls      string    `json:"cls"`
	Object   xapi.UUID `json:"object"`
	Body     string    `json:"body"`
}

type sourcesParams struct {
	Map      string `json:"map"`
	Fetching bool   `json:"fetching"`
}

// notLeading is the body of an answer by a host that does not lead.
type notLeading struct {
	Error  failure    `json:"error"` // HOST_IS_SLAVE [address]
	Leader *pool.Peer `json:"leader,omitempty"`
}

package peer

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// maxWaiting is how many requests may wait for their turn.
	maxWaiting = 64
	// turnWait is how long one of them does.
	turnWait = 2 * time.Second
	// maxTicket bounds a ticket in base64, in bytes.
	maxTicket = 8 << 10
)

// refusal is the body of an answer that is no 200.
type refusal struct {
	Code    string   `json:"code"`
	Params  []string `json:"params"`
	Message string   `json:"message"`
	Missing []int64  `json:"missing,omitempty"` // blocks that are not here
	Given   []int64  `json:"given,omitempty"`   // blocks that another host was given
}

func refuse(w http.ResponseWriter, status int, code, text string) {
	answer(w, status, refusal{Code: code, Params: []string{text}, Message: text})
}

func answer(w http.ResponseWriter, status int, body refusal) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body) //nolint:errcheck // the client is gone, then
}

// ServeHTTP serves PathBlocks and PathMap.
func (n *Node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	digest := q.Get("map")
	switch {
	case r.Method != http.MethodGet:
		refuse(w, http.StatusMethodNotAllowed, xapi.InvalidValue, "only GET")
		return
	case !isDigest(digest):
		refuse(w, http.StatusBadRequest, xapi.InvalidValue, "map is no SHA-256 in lower-case hexadecimal")
		return
	}
	reader, err := n.admit(r, digest)
	if err != nil {
		n.Log.WithError(err).WithField("map", digest).WithField("reader", reader).Warn("a reader of blocks was refused")
		refuse(w, http.StatusForbidden, xapi.RBACPermissionDenied, "the ticket does not allow to read this image: "+err.Error())
		return
	}
	list := q.Get("blocks")
	serve := func(w http.ResponseWriter, s *shelf) {
		n.sendBlocks(w, r, s, list, reader, q.Get("first") == "1")
	}
	switch {
	case r.URL.Path == PathMap:
		serve = n.sendMap
	case r.URL.Path != PathBlocks:
		http.NotFound(w, r)
		return
	case q.Get("have") == "1":
		serve = n.sendHave
	case list == "":
		refuse(w, http.StatusBadRequest, xapi.InvalidValue, "neither have nor blocks is said")
		return
	default:
		leave, ok := n.turn(r.Context())
		if !ok {
			n.count(func(s *Stats) { s.Refused++ })
			w.Header().Set("Retry-After", "1")
			refuse(w, http.StatusServiceUnavailable, xapi.OtherOperationInProgress, "too many read from this host at once")
			return
		}
		defer leave()
	}
	s, err := n.shelf(r.Context(), digest)
	if err != nil {
		n.Log.WithError(err).WithField("map", digest).Warn("an image that another host asks for cannot be opened")
		refuse(w, http.StatusInternalServerError, xapi.InternalError, "the image cannot be opened")
		return
	}
	defer s.close()
	if s.m == nil {
		refuse(w, http.StatusNotFound, xapi.VDINotAvailable, "nothing of this image is here")
		return
	}
	serve(w, s)
}

func isDigest(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == 32 && s == hex.EncodeToString(raw)
}

// admit tells who reads, when the ticket allows it.
func (n *Node) admit(r *http.Request, digest string) (reader string, err error) {
	if n.Reader != nil {
		reader = n.Reader(r)
	}
	text := r.Header.Get(HeaderTicket)
	if text == "" || len(text) > maxTicket {
		return reader, errors.New("there is no ticket")
	}
	ticket, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return reader, errors.New("the ticket is no base64")
	}
	return reader, n.Verify(ticket, reader, digest)
}

// turn waits until one more may read.
func (n *Node) turn(ctx context.Context) (leave func(), ok bool) {
	leave = func() { <-n.readers }
	select {
	case n.readers <- struct{}{}:
		return leave, true
	default:
	}
	select {
	case n.waiting <- struct{}{}:
		defer func() { <-n.waiting }()
	default:
		return nil, false
	}
	t := time.NewTimer(turnWait)
	defer t.Stop()
	select {
	case n.readers <- struct{}{}:
		return leave, true
	case <-t.C:
	case <-ctx.Done():
	}
	return nil, false
}

// shelf is all that is here of one image.
type shelf struct {
	m       *vdi.Map // nil: nothing is
	images  []vdi.Stored
	pulls   []*pull
	release []func()
}

// shelf opens what there is of an image.
func (n *Node) shelf(ctx context.Context, digest string) (*shelf, error) {
	s := &shelf{}
	for _, p := range n.running(digest) {
		if leave, ok := p.enter(); ok {
			s.pulls, s.release, s.m = append(s.pulls, p), append(s.release, leave), p.m
		}
	}
	if n.Images == nil {
		return s, nil
	}
	var err error
	if s.images, err = n.Images.OpenImages(ctx, digest); err != nil && len(s.pulls) == 0 {
		return nil, err
	}
	for _, i := range s.images {
		s.m, s.release = i.Map, append(s.release, i.Close)
	}
	return s, nil
}

func (s *shelf) close() {
	for _, f := range s.release {
		f()
	}
}

// have tells which blocks are here.
func (s *shelf) have() bitset {
	b := newBits(len(s.m.Blocks))
	if len(s.images) > 0 {
		b.fill(len(s.m.Blocks))
		return b
	}
	for _, p := range s.pulls {
		b.or(p.doneBits())
	}
	return b
}

// read reads a block, by its place in the map, from whatever has it as it must be.
func (s *shelf) read(at int, data []byte) error {
	err := error(vdi.ErrWrongBlock)
	for _, i := range s.images {
		if isClosed(i.Gone) {
			continue // somebody waits for it
		}
		if err = s.m.ReadBlock(i.File, s.m.Blocks[at].Index, data); err == nil {
			return nil
		}
		if i.Damaged != nil {
			i.Damaged(s.m.Blocks[at].Index)
		}
	}
	for _, p := range s.pulls {
		if p.hasDone(at) {
			if err = p.fill.Get(at, data); err == nil {
				return nil
			}
		}
	}
	return err
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (n *Node) sendMap(w http.ResponseWriter, s *shelf) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(s.m.EncodedSize(), 10))
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(n.Stall + 50*time.Microsecond*time.Duration(len(s.m.Blocks)))) //nolint:errcheck // not every writer has deadlines
	s.m.Encode(w)                                                                                                                //nolint:errcheck // the client is gone, then
}

func (n *Node) sendHave(w http.ResponseWriter, s *shelf) {
	raw := s.have().encode(len(s.m.Blocks))
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(n.Stall)) //nolint:errcheck // not every writer has deadlines
	w.Write(raw)                                                            //nolint:errcheck // the client is gone, then
}

// sendBlocks sends the blocks of a list. The first one that cannot be had as the
// map says is refused with 409; at a later one the answer is cut off.
func (n *Node) sendBlocks(w http.ResponseWriter, r *http.Request, s *shelf, list, reader string, first bool) {
	blocks, places, missing, err := s.find(list)
	if err != nil {
		refuse(w, http.StatusBadRequest, xapi.InvalidValue, err.Error())
		return
	}
	if len(missing) > 0 {
		answer(w, http.StatusConflict, refusal{Code: xapi.VDINotAvailable, Params: []string{}, Message: "not all of these blocks are here", Missing: missing})
		return
	}
	g := n.remember(r.URL.Query().Get("map"))
	if given := g.take(blocks, reader, first); len(given) == len(blocks) {
		answer(w, http.StatusConflict, refusal{Code: xapi.OtherOperationInProgress, Params: []string{}, Message: "other hosts were given these blocks", Given: given})
		return
	} else if len(given) > 0 {
		w.Header().Set(headerGiven, formatList(given))
		blocks, places = without(blocks, places, given)
	}
	sent, err := n.stream(w, s, places)
	n.count(func(st *Stats) { st.BytesSent += sent.bytes })
	g.sent(blocks, reader, sent.blocks)
	if sent.blocks == len(places) {
		return
	}
	if sent.blocks == 0 && errors.Is(err, errRead) {
		answer(w, http.StatusConflict, refusal{Code: xapi.VDINotAvailable, Params: []string{}, Message: "the block is damaged", Missing: blocks[:1]})
		return
	}
	panic(http.ErrAbortHandler) // an answer that is too short is how a reader learns of it
}

// without leaves out the blocks that were given to others.
func without(blocks []int64, places []int, given []int64) (b []int64, p []int) {
	for i := range blocks {
		if !slices.Contains(given, blocks[i]) {
			b, p = append(b, blocks[i]), append(p, places[i])
		}
	}
	return b, p
}

// find gives the blocks of a list, their places in the map, and those that are
// not here.
func (s *shelf) find(list string) (blocks []int64, places []int, missing []int64, err error) {
	if blocks, err = parseList(list); err != nil {
		return nil, nil, nil, err
	}
	have := s.have()
	for _, b := range blocks {
		at, ok := s.m.Find(b)
		if !ok {
			return nil, nil, nil, fmt.Errorf("the map has no block %d", b)
		}
		places = append(places, at)
		if !have.has(at) {
			missing = append(missing, b)
		}
	}
	return blocks, places, missing, nil
}

// errRead is the failure of this host's own storage.
var errRead = errors.New("the block cannot be read")

// sent is how far an answer came.
type sent struct {
	blocks int
	bytes  int64
}

// stream writes blocks one after the other.
func (n *Node) stream(w http.ResponseWriter, s *shelf, places []int) (done sent, err error) {
	buf := n.buffers.Get().(*[]byte)
	defer n.buffers.Put(buf)
	var total int64
	for _, at := range places {
		_, length := s.m.Span(s.m.Blocks[at].Index)
		total += length
	}
	control := http.NewResponseController(w)
	for i, at := range places {
		_, length := s.m.Span(s.m.Blocks[at].Index)
		data := (*buf)[:length]
		if err := s.read(at, data); err != nil {
			n.Log.WithError(err).WithField("block", s.m.Blocks[at].Index).Warn("a block that another host asks for cannot be had")
			return done, errors.Join(errRead, err)
		}
		if i == 0 {
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Length", strconv.FormatInt(total, 10))
		}
		control.SetWriteDeadline(time.Now().Add(n.Stall)) //nolint:errcheck // not every writer has deadlines
		k, err := w.Write(data)
		done.bytes += int64(k)
		if err != nil {
			return done, err
		}
		done.blocks++
	}
	return done, nil
}

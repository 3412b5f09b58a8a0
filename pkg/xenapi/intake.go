package xenapi

import (
	"errors"
	"io"
	"net/http"
	"os"
	"sync"
	"time"
)

const (
	// smallBody is how much of a body every client may send on credit; what is
	// larger takes of the one budget for all.
	smallBody = 16 << 10
	// bodyTimeout is how long a whole body may take. Its length is bounded, so
	// an honest client needs far less.
	bodyTimeout = 20 * time.Second
	// bodyBudget is what all bodies together may hold, beyond smallBody each.
	bodyBudget = 24 << 20
	// decodesAtOnce is how many large bodies are decoded at the same time: what
	// is made of them is several times as large.
	decodesAtOnce = 2
)

// Intake reads the bodies of requests so that the sum of them stays bounded
// however many clients send at once, and however slowly. The zero value is not
// usable; see NewIntake.
type Intake struct {
	timeout  time.Duration
	decoding chan struct{} // one element for each large body that is decoded

	mu   sync.Mutex
	free int64
}

// NewIntake makes an intake. timeout is for one body, from its first byte to
// its last; 0 is the default of 20 seconds.
func NewIntake(timeout time.Duration) *Intake {
	if timeout <= 0 {
		timeout = bodyTimeout
	}
	return &Intake{timeout: timeout, free: bodyBudget, decoding: make(chan struct{}, decodesAtOnce)}
}

// Read reads the whole body, of at most limit bytes. On failure body is nil and
// status says why: 413 too large, 408 too slow, 503 too many others, 400 cut
// short. release is to be called, in every case, when nothing made of the body
// is needed any more.
func (in *Intake) Read(w http.ResponseWriter, r *http.Request, limit int64) (body []byte, release func(), status int, err error) {
	held := int64(0)
	release = func() { in.give(held); held = 0 }
	if r.ContentLength > limit {
		return nil, release, http.StatusRequestEntityTooLarge, errors.New("the body is too large")
	}
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(in.timeout)) // a writer without deadlines is bounded by its server
	src := http.MaxBytesReader(w, r.Body, limit)
	buf := make([]byte, 0, min(max(r.ContentLength, 512), 4096)+1)
	for {
		n, err := src.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if errors.Is(err, io.EOF) {
			_ = rc.SetReadDeadline(time.Time{})
			return buf, release, 0, nil
		}
		if err != nil {
			return nil, release, bodyStatus(err), err
		}
		if len(buf) < cap(buf) {
			continue
		}
		size := min(int64(cap(buf))*2, limit+1)
		if need := size - smallBody - held; need > 0 {
			if !in.take(need) {
				return nil, release, http.StatusServiceUnavailable, errors.New("too many large bodies at once")
			}
			held += need
		}
		grown := make([]byte, len(buf), size)
		copy(grown, buf)
		buf = grown
	}
}

func bodyStatus(err error) int {
	tooLarge := new(http.MaxBytesError)
	switch {
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		return http.StatusRequestTimeout
	}
	return http.StatusBadRequest
}

// decode runs f, which makes values of a body, when its turn has come.
func (in *Intake) decode(body []byte, f func()) {
	if len(body) > smallBody {
		in.decoding <- struct{}{}
		defer func() { <-in.decoding }()
	}
	f()
}

func (in *Intake) take(n int64) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.free < n {
		return false
	}
	in.free -= n
	return true
}

func (in *Intake) give(n int64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.free += n
}

package upload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// unknownLength is the Content-Length with which xen-api announces a stream
// whose length it does not know: 1 PiB.
const unknownLength = 1 << 50

// The rest of an unwanted stream whose end only the client knows is read for so
// long.
const drainFor = 10 * time.Minute

// reportEvery is how many bytes lie between two reports of progress.
const reportEvery = 1 << 20

// body reads a request's body under the context of a task. Its errors have a
// code, but for io.ErrUnexpectedEOF.
type body struct {
	ctx     context.Context
	r       io.Reader
	rc      *http.ResponseController
	stall   time.Duration
	length  int64 // what the client says; -1: it does not
	openEnd bool  // EOF before the length is the end of the data
	task    *task.Handle

	n        int64 // bytes read
	reported int64
	deadline time.Time
	err      error
	cancel   context.CancelFunc
	unhook   func() bool
}

// newBody wraps the body of c. close is to be called when it is no longer read.
func (c *call) newBody(ctx context.Context, t *task.Handle) *body {
	c.invited = true
	b := &body{ctx: ctx, r: c.r.Body, rc: c.rc, stall: c.h.Stall, length: c.r.ContentLength, task: t}
	if b.length == unknownLength {
		b.length, b.openEnd = -1, true
	}
	b.ctx, b.cancel = context.WithCancel(ctx)
	// A Read that waits for the client ends when the task does.
	b.unhook = context.AfterFunc(b.ctx, func() { b.rc.SetReadDeadline(time.Unix(1, 0)) })
	return b
}

func (b *body) close() {
	b.unhook()
	b.cancel()
}

// stop ends a Read that waits for the client, and all later ones.
func (b *body) stop() {
	hooked := b.unhook()
	b.cancel()
	if hooked {
		b.rc.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // as in newBody
	}
}

func (b *body) size() int64 { return b.n }

// Read reads on, or gives the error of the context, TIMEOUT when the client
// stalls, io.ErrUnexpectedEOF when it ends early.
func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if now := time.Now(); b.deadline.Sub(now) < b.stall*7/8 {
		b.deadline = now.Add(b.stall)
		b.rc.SetReadDeadline(b.deadline) //nolint:errcheck // a server without deadlines does not stall out
	}
	if b.ctx.Err() != nil {
		b.err = context.Cause(b.ctx)
		return 0, b.err
	}
	n, err := b.r.Read(p)
	b.n += int64(n)
	if b.n-b.reported >= reportEvery && b.length > 0 {
		b.reported = b.n
		b.task.Progress(0.95 * float64(b.n) / float64(b.length))
	}
	if err != nil {
		b.err = b.judge(err)
	}
	return n, b.err
}

func (b *body) judge(err error) error {
	cut := errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
	switch {
	case err == io.EOF:
		return io.EOF
	case b.ctx.Err() != nil:
		return context.Cause(b.ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return xapi.NewError(xapi.Timeout, fmt.Sprintf("the client sent nothing for %s", b.stall)).Because(err)
	case cut && b.openEnd:
		return io.EOF
	case cut:
		return io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read request: %w", err)
}

// end makes sure that the body ends here, as its length said.
func (b *body) end() error { return ends(b) }

func ends(r io.Reader) error {
	var one [1]byte
	n, err := r.Read(one[:])
	switch {
	case n > 0:
		return errors.New("data after the end")
	case err == io.EOF:
		return nil
	}
	return err
}

// drain reads what a refused client still sends, when only the client knows the
// end: xen-api looks at its task no sooner than it has sent everything, and a
// failure that comes earlier ends its whole process. Every other client is told
// at once.
func (b *body) drain() {
	if !b.openEnd {
		return
	}
	buf := make([]byte, copyChunk)
	for end := time.Now().Add(drainFor); time.Now().Before(end); {
		if _, err := b.Read(buf); err != nil {
			return
		}
	}
}

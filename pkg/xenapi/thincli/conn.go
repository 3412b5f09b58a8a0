package thincli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// errClientGone is the cause of a command's context once its client closed
// the connection, broke the protocol or stopped reading.
var errClientGone = errors.New("the client has gone away")

// conn is one conversation after the hand-shake. One goroutine reads for the
// whole of its life, so that a client that goes away is noticed at once, also
// while a call runs.
type conn struct {
	nc net.Conn
	r  *bufio.Reader
	o  *Options

	// gone ends the command's context with a cause.
	gone context.CancelCauseFunc
	done chan struct{} // closed when the reader has returned

	wmu sync.Mutex // one frame at a time

	mu      sync.Mutex
	pending *request // what the client has been asked for, nil: nothing
}

// request is one thing the client was asked to do, until its final answer.
type request struct {
	answers chan answer
	dropped chan struct{} // closed once nobody waits for the answers any more
	room    int64         // how many bytes of blob may still come
	loading bool          // a blob follows OK
}

func newConn(nc net.Conn, r *bufio.Reader, o *Options, gone context.CancelCauseFunc) *conn {
	return &conn{nc: nc, r: r, o: o, gone: gone, done: make(chan struct{})}
}

// read is the reader: it hands answers to the request they belong to and
// returns when the client has gone, for whatever reason.
func (c *conn) read(ctx context.Context) {
	defer close(c.done)
	for n := 0; n < c.o.MaxFrames; n++ {
		a, err := readAnswer(c.r)
		if err == nil {
			err = c.deliver(ctx, a)
		}
		if err != nil {
			c.gone(fmt.Errorf("%w: %w", errClientGone, err))
			return
		}
	}
	c.gone(fmt.Errorf("%w: more than %d frames", errClientGone, c.o.MaxFrames))
}

// deliver passes a on. An answer that nobody asked for is a breach of the
// protocol; only heartbeats may come late.
func (c *conn) deliver(ctx context.Context, a answer) error {
	c.mu.Lock()
	req := c.pending
	if req == nil {
		c.mu.Unlock()
		if a.tag == tagWait {
			return nil
		}
		return fmt.Errorf("%w: answer %d to no question", errProtocol, a.tag)
	}
	last := a.tag == tagFailed || a.tag == tagEnd || a.tag == tagOK && !req.loading
	if (a.tag == tagChunk || a.tag == tagEnd) && !req.loading {
		c.mu.Unlock()
		return fmt.Errorf("%w: a blob instead of an answer", errProtocol)
	}
	if last {
		c.pending = nil
	}
	c.mu.Unlock()
	if a.tag == tagChunk {
		if a.length > req.room {
			return fmt.Errorf("%w: a blob of more than %d bytes", errProtocol, c.o.MaxFile)
		}
		req.room -= a.length
		a.data = make([]byte, a.length)
		if _, err := io.ReadFull(c.r, a.data); err != nil {
			return fmt.Errorf("blob cut short: %w", err)
		}
	}
	select {
	case req.answers <- a:
	case <-req.dropped: // a late answer is no breach
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// drop says that nobody waits for the answers to req any more. Those that
// still come are read and forgotten.
func (r *request) drop() { close(r.dropped) }

// ask sends f; the answers come by the request's channel. Whoever asks drops
// the request when he stops waiting.
func (c *conn) ask(f *frame, loading bool) (*request, error) {
	req := &request{answers: make(chan answer), dropped: make(chan struct{}), room: c.o.MaxFile, loading: loading}
	c.mu.Lock()
	c.pending = req
	c.mu.Unlock()
	return req, c.write(f.bytes())
}

// write sends b whole or declares the client gone.
func (c *conn) write(b []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.nc.SetWriteDeadline(time.Now().Add(c.o.WriteTimeout))
	if _, err := c.nc.Write(b); err != nil {
		err = fmt.Errorf("%w: %w", errClientGone, err)
		c.gone(err)
		return err
	}
	return nil
}

// print shows one line on the client's standard output; the client adds the
// line feed.
func (c *conn) print(s string) error { return c.write(newFrame(tagPrint).string(s).bytes()) }

// stderr shows a line on the client's standard error.
func (c *conn) stderr(line string) error {
	return c.write(newFrame(tagPrintStderr).string(line + "\n").bytes())
}

// exit ends the conversation for the client.
func (c *conn) exit(code int) error { return c.write(newFrame(tagExit).int(code).bytes()) }

// load asks for a file of the client's, at most MaxFile bytes. found is false
// where the client could not read it; a client only opens files that stand on
// its own command line.
func (c *conn) load(ctx context.Context, name string) (data []byte, found bool, err error) {
	req, err := c.ask(newFrame(tagLoad).string(name), true)
	defer req.drop()
	if err != nil {
		return nil, false, err
	}
	for {
		select {
		case <-ctx.Done():
			return nil, false, context.Cause(ctx)
		case a := <-req.answers:
			switch a.tag {
			case tagFailed:
				return nil, false, nil
			case tagEnd:
				return data, true, nil
			case tagChunk:
				data = append(data, a.data...)
			}
		}
	}
}

// close lets the client read what was written, then closes and waits for the
// reader.
func (c *conn) close() {
	if h, ok := c.nc.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
		c.nc.SetReadDeadline(time.Now().Add(c.o.LingerTimeout))
		<-c.done
	}
	c.nc.Close()
	<-c.done
}

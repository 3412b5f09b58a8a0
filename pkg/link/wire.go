package link

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errTooLong is the end of a link whose other side sent a longer line than it may.
var errTooLong = errors.New("a line is too long")

// wire reads and writes the lines of one connection. One goroutine reads, and
// one at a time writes.
type wire struct {
	conn  net.Conn
	in    *bufio.Reader
	times *times
	// big bounds how many long lines the process holds at once; nil: it does not.
	big chan struct{}
	// own bounds how many of these this connection holds; nil: nothing does.
	own chan struct{}
}

// Sizes in bytes: of what is kept for reading, of what is written at once, and
// of what is still a short line.
const (
	readBuffer = 1 << 10
	writePart  = 64 << 10
	shortLine  = 64 << 10
)

// newWire takes over a connection of which buffered bytes may have been read.
func newWire(conn net.Conn, in *bufio.Reader, t *times) *wire {
	if in == nil || in.Buffered() == 0 {
		in = bufio.NewReaderSize(conn, readBuffer)
	}
	return &wire{conn: conn, in: in, times: t}
}

// read gives the next line, which must begin within silence, without its line
// feed. It is valid until the next read. release, when not nil, must be called
// when the line is not needed any more.
func (w *wire) read(limit int, silence time.Duration) (line []byte, release func(), err error) {
	if err := w.conn.SetReadDeadline(time.Now().Add(silence)); err != nil {
		return nil, nil, err
	}
	line, err = w.in.ReadSlice('\n')
	if err == nil {
		return line[:len(line)-1], nil, nil
	}
	line = append([]byte(nil), line...)
	_ = w.conn.SetReadDeadline(time.Now().Add(w.times.line))
	for errors.Is(err, bufio.ErrBufferFull) {
		if release == nil && len(line) > shortLine && w.big != nil {
			release = w.place()
			_ = w.conn.SetReadDeadline(time.Now().Add(w.times.line))
		}
		var more []byte
		more, err = w.in.ReadSlice('\n')
		if line = append(line, more...); len(line) > limit+1 {
			err = fmt.Errorf("%w: more than %d bytes", errTooLong, limit)
		}
	}
	if err != nil {
		if release != nil {
			release()
		}
		return nil, nil, err
	}
	return line[:len(line)-1], release, nil
}

// place waits until one more long line may be held. release gives the place back.
func (w *wire) place() (release func()) {
	if w.own != nil {
		w.own <- struct{}{}
	}
	w.big <- struct{}{}
	return func() {
		<-w.big
		if w.own != nil {
			<-w.own
		}
	}
}

// write sends one line, which ends with its line feed. The error when the other
// side does not take it, part by part, within the time for that is the end of
// the link.
func (w *wire) write(line []byte) error {
	for len(line) > 0 {
		part := line[:min(len(line), writePart)]
		if err := w.conn.SetWriteDeadline(time.Now().Add(w.times.write)); err != nil {
			return err
		}
		if _, err := w.conn.Write(part); err != nil {
			return err
		}
		line = line[len(part):]
	}
	return nil
}

// cut closes the connection at once. TLS would want to say goodbye first, and
// wait for a side that takes nothing.
func (w *wire) cut() { under(w.conn).Close() }

// under is the connection at the bottom of c.
func under(c net.Conn) net.Conn {
	for {
		u, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return c
		}
		c = u.NetConn()
	}
}

// How a side that vanished is noticed: by probes after some silence, and by
// bytes that nobody has confirmed.
const (
	probeAfter  = 15 * time.Second
	probeEvery  = 5 * time.Second
	userTimeout = 10 * time.Second
)

// watchPeer lets the kernel end the connection when the other side has vanished.
func watchPeer(c net.Conn) error {
	t, ok := under(c).(*net.TCPConn)
	if !ok {
		return nil
	}
	err := t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: probeAfter, Interval: probeEvery, Count: 2})
	if err != nil {
		return err
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond))
	})
	return errors.Join(err, failed)
}

// encode gives the line of a message, with its line feed.
func encode(m message) ([]byte, error) {
	b, err := json.Marshal(m)
	return append(b, '\n'), err
}

// raw encodes the parameters or the result of a message.
func raw(v any) (json.RawMessage, error) {
	if v == nil {
		return nil, nil
	}
	return json.Marshal(v)
}

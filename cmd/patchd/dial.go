package main

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// unsent is how much may wait in a socket to be sent, in bytes. What waits there
// is lost when the server dies, and sent again.
const unsent = 256 << 10

// dialTCP connects with little that waits to be sent. What is on its way is not
// limited: far servers would be slow.
func dialTCP(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{
		Timeout: 30 * time.Second,
		Control: func(_, _ string, c syscall.RawConn) error {
			var failed error
			err := c.Control(func(fd uintptr) {
				failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent)
			})
			return errors.Join(err, failed)
		},
	}
	return d.DialContext(ctx, network, address)
}

// dialUnix is the same for the socket of this machine.
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if u, ok := conn.(*net.UnixConn); ok {
		if err := u.SetWriteBuffer(unsent); err != nil {
			conn.Close()
			return nil, err
		}
	}
	return conn, nil
}

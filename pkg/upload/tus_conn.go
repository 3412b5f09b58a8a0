package upload

import (
	"context"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type connKey struct{}

// WithConn lets the handlers of a connection's requests reach the connection,
// under TLS.
func WithConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

const (
	// nearby is the round trip up to which a small window is no bottleneck.
	nearby       = 2 * time.Millisecond
	nearbyWindow = 128 << 10 // bytes
)

// narrow keeps little in the kernel on its way from a client that is near: when
// this process dies, that is lost. A client far away needs the large window.
func narrow(ctx context.Context) {
	c, _ := ctx.Value(connKey{}).(net.Conn)
	s, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return
	}
	//nolint:errcheck // without it more is sent again after a crash
	raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil && time.Duration(info.Rtt)*time.Microsecond <= nearby {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, nearbyWindow)
		}
	})
}

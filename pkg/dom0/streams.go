package dom0

import (
	"fmt"
	"io"
	"os"
	"reflect"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// streams are the standard streams of one program: the child's ends, and the
// goroutines that feed and drain them.
type streams struct {
	child []*os.File // descriptors 0, 1, 2
	own   []*os.File // those of child that we opened

	in   *os.File // our end of stdin, or nil
	from io.Reader
	fed  chan struct{} // nil, or closed when stdin is fed
	out  []outlet
	wait sync.WaitGroup
}

// outlet is our end of one output pipe.
type outlet struct {
	r *os.File
	w io.Writer
}

func openStreams(c Cmd) (s *streams, err error) {
	s = &streams{child: make([]*os.File, 3)}
	defer func() {
		if err != nil {
			s.closeChild()
			s.abort()
		}
	}()
	if err := s.openIn(c.Stdin); err != nil {
		return s, err
	}
	if s.child[1], err = s.openOut(c.Stdout); err != nil {
		return s, err
	}
	if same(c.Stdout, c.Stderr) {
		s.child[2] = s.child[1]
		return s, nil
	}
	s.child[2], err = s.openOut(c.Stderr)
	return s, err
}

// same tells whether two writers are one, also when their type cannot be compared.
func same(a, b io.Writer) bool {
	if a == nil || b == nil {
		return false
	}
	va, vb := reflect.ValueOf(a), reflect.ValueOf(b)
	return va.Type() == vb.Type() && va.Comparable() && a == b
}

func (s *streams) openIn(r io.Reader) (err error) {
	if f, ok := r.(*os.File); ok && f != nil {
		s.child[0] = f
		return nil
	}
	if r == nil {
		s.child[0], err = s.openNull(os.O_RDONLY)
		return err
	}
	theirs, ours, err := pipe(false)
	if err != nil {
		return err
	}
	s.child[0], s.in, s.from = theirs, ours, r
	s.own = append(s.own, theirs)
	return nil
}

func (s *streams) openNull(flag int) (*os.File, error) {
	f, err := os.OpenFile(os.DevNull, flag, 0)
	if err != nil {
		return nil, fmt.Errorf("open standard stream: %w", err)
	}
	s.own = append(s.own, f)
	return f, nil
}

func (s *streams) openOut(w io.Writer) (*os.File, error) {
	if f, ok := w.(*os.File); ok && f != nil {
		return f, nil
	}
	if w == nil {
		return s.openNull(os.O_WRONLY)
	}
	theirs, ours, err := pipe(true)
	if err != nil {
		return nil, err
	}
	s.own = append(s.own, theirs)
	s.out = append(s.out, outlet{ours, w})
	return theirs, nil
}

// pipe makes a pipe for a child: its end blocks, as programs expect; ours does
// not, so that a deadline ends a read or write. childWrites says which is which.
func pipe(childWrites bool) (theirs, ours *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	t, o := fds[0], fds[1]
	if childWrites {
		t, o = fds[1], fds[0]
	}
	if err := unix.SetNonblock(o, true); err != nil {
		unix.Close(t)
		unix.Close(o)
		return nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	return os.NewFile(uintptr(t), "pipe"), os.NewFile(uintptr(o), "pipe"), nil
}

// pump starts to feed and to drain.
func (s *streams) pump() {
	for _, o := range s.out {
		s.wait.Go(func() {
			io.Copy(&sink{w: o.w}, o.r)
			o.r.Close()
		})
	}
	if s.in == nil {
		return
	}
	s.fed = make(chan struct{})
	go func() { // awaited in drain, unless its reader blocks for ever
		defer close(s.fed)
		io.Copy(s.in, s.from)
		s.in.Close()
	}()
}

// drain waits until all output is read. It tells whether it gave up because
// somebody still held a pipe after patience.
func (s *streams) drain(patience time.Duration) (gaveUp bool) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.wait.Wait()
	}()
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		gaveUp = true
		for _, o := range s.out {
			o.r.SetReadDeadline(time.Unix(1, 0))
		}
		<-done
	}
	if s.fed != nil {
		s.in.SetWriteDeadline(time.Unix(1, 0))
		late := time.NewTimer(patience)
		defer late.Stop()
		select {
		case <-s.fed:
		case <-late.C:
		}
	}
	return gaveUp
}

// closeChild closes the child's ends that we opened.
func (s *streams) closeChild() {
	for _, f := range s.own {
		f.Close()
	}
	s.own = nil
}

// abort closes our ends when nothing was started.
func (s *streams) abort() {
	for _, o := range s.out {
		o.r.Close()
	}
	if s.in != nil {
		s.in.Close()
	}
}

// sink takes everything: a writer that fails must not stop the program by a
// closed pipe.
type sink struct {
	w      io.Writer
	failed bool
}

// Write implements io.Writer.
func (s *sink) Write(p []byte) (int, error) {
	if !s.failed {
		n, err := s.w.Write(p)
		s.failed = err != nil || n < len(p)
	}
	return len(p), nil
}

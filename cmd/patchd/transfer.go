package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// transfer counts bytes, and on a terminal shows them in a bar with rate and
// time left.
type transfer struct {
	n atomic.Int64 // bytes, with those of before
	p *mpb.Progress
	b *mpb.Bar

	mu    sync.Mutex
	phase string // what is done when it is not sending
	from  int64  // bytes that were there before
	began time.Time
}

// newTransfer begins with from of total bytes; total 0 is not known.
func newTransfer(name, phase string, total, from int64) *transfer {
	t := &transfer{from: from, began: time.Now(), phase: phase}
	t.n.Store(from)
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return t
	}
	t.p = mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(40), mpb.WithRefreshRate(150*time.Millisecond))
	t.b = t.p.AddBar(total, mpb.PrependDecorators(decor.Name(name+" ")), mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string { return t.text(s.Current, s.Total) })))
	t.b.SetCurrent(from)
	return t
}

// text is what stands behind the bar.
func (t *transfer) text(current, total int64) string {
	text := " " + humanize.IBytes(uint64(current))
	if total > 0 {
		text = fmt.Sprintf(" %d %% of %s", current*100/total, humanize.IBytes(uint64(total)))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.phase != "" {
		return text + ", " + t.phase
	}
	seconds := time.Since(t.began).Seconds()
	rate := float64(current-t.from) / max(seconds, 0.001)
	if rate < 1 {
		return text
	}
	text += ", " + humanize.IBytes(uint64(rate)) + "/s"
	if total > current {
		left := time.Duration(float64(total-current) / rate * float64(time.Second))
		text += ", " + left.Round(time.Second).String() + " left"
	}
	return text
}

// at sets what was sent, after a look at what has arrived, and says what is done
// now; "" is sending.
func (t *transfer) at(n int64, phase string) {
	t.mu.Lock()
	if t.phase != phase || n < t.n.Load() {
		t.from, t.began = n, time.Now()
	}
	t.phase = phase
	t.mu.Unlock()
	t.n.Store(n)
	if t.b != nil {
		t.b.SetCurrent(n)
	}
}

func (t *transfer) add(n int) {
	t.n.Add(int64(n))
	if t.b != nil {
		t.b.IncrBy(n)
	}
}

// sent is how many bytes were counted.
func (t *transfer) sent() int64 { return t.n.Load() }

// say writes a line to the standard error, above the bar.
func (t *transfer) say(format string, args ...any) {
	line := fmt.Sprintf("patchd: "+format+"\n", args...)
	if t.p != nil {
		io.WriteString(t.p, line) //nolint:errcheck // the terminal is gone
		return
	}
	fmt.Fprint(os.Stderr, line)
}

func (t *transfer) done() {
	if t.b != nil {
		t.b.Abort(true)
		t.p.Wait()
	}
}

// shown counts what is read.
type shown struct {
	r io.Reader
	t *transfer
}

func (s *shown) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.t.add(n)
	return n, err
}

package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// maxOutputFile is how much of what a patch prints is kept in the journal.
	maxOutputFile = 16 << 20
	// maxText is how much of it a record or an answer holds: the end.
	maxText = 16 << 10
	// maxStdout is how much of precheck's stdout is looked at for error XML.
	maxStdout = 64 << 10
	// maxProgressLine bounds a line on descriptor 3.
	maxProgressLine = 1 << 10
)

// output takes all that a verb prints, stdout and stderr mixed. It never
// returns short and never grows: the file holds the beginning up to its cap,
// the tail the end.
type output struct {
	mu    sync.Mutex
	file  *os.File
	room  int64
	tail  []byte
	total int64
	err   error // the first write error; the patch never sees it
}

func newOutput(path string) (*output, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return &output{file: f, room: maxOutputFile}, nil
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := min(int64(len(p)), o.room); n > 0 {
		o.room -= n
		if _, err := o.file.Write(p[:n]); err != nil && o.err == nil {
			o.err, o.room = err, 0
		}
	}
	o.total += int64(len(p))
	o.tail = append(o.tail, p[max(0, len(p)-maxText):]...)
	if len(o.tail) > 2*maxText {
		o.tail = append(o.tail[:0], o.tail[len(o.tail)-maxText:]...)
	}
	return len(p), nil
}

// Restart forgets the tail: the next verb's text begins afresh.
func (o *output) Restart() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tail, o.total = nil, 0
}

// Text is the last maxText bytes as valid UTF-8 without NUL, with a note of
// what was left out.
func (o *output) Text() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := o.tail[max(0, len(o.tail)-maxText):]
	text := cleanText(b)
	if left := o.total - int64(len(b)); left > 0 {
		text = fmt.Sprintf("[%d bytes left out]\n%s", left, text)
	}
	return text
}

func cleanText(b []byte) string {
	return strings.ReplaceAll(strings.ToValidUTF8(string(b), "\uFFFD"), "\x00", "")
}

func (o *output) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return errors.Join(o.err, o.file.Close())
}

func (o *output) tee(w io.Writer) io.Writer { return io.MultiWriter(o, w) }

// capped keeps the first max bytes and takes the rest.
type capped struct {
	mu  sync.Mutex
	buf bytes.Buffer
	max int
}

func (c *capped) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf.Write(p[:min(len(p), max(0, c.max-c.buf.Len()))])
	return len(p), nil
}

func (c *capped) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cleanText(c.buf.Bytes())
}

// progress is descriptor 3 of a patch: lines "0.25 what it does". The last one
// lies in a file, for the agent to show.
type progress struct {
	w    *os.File
	r    *os.File
	path string
	done chan struct{}
}

func newProgress(path string) (*progress, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p := &progress{w: w, r: r, path: path, done: make(chan struct{})}
	go p.read()
	return p, nil
}

// progressEvery limits how often the file is written.
const progressEvery = 200 * time.Millisecond

func (p *progress) read() {
	defer close(p.done)
	in := bufio.NewReaderSize(p.r, maxProgressLine)
	var last time.Time
	for {
		line, more, err := in.ReadLine()
		if err != nil {
			return
		}
		for more && err == nil {
			_, more, err = in.ReadLine()
		}
		if time.Since(last) < progressEvery {
			continue
		}
		if fraction, text, ok := parseProgress(string(line)); ok {
			last = time.Now()
			p.store(fraction, text)
		}
	}
}

// store shows one line; it is for display, so a failure only means that less
// is shown.
func (p *progress) store(fraction float64, text string) {
	tmp := p.path + ".new"
	if os.WriteFile(tmp, []byte(strconv.FormatFloat(fraction, 'f', 3, 64)+" "+text), 0o600) == nil {
		os.Rename(tmp, p.path)
	}
}

// parseProgress reads "0.0"-"1.0", then text.
func parseProgress(line string) (fraction float64, text string, ok bool) {
	number, text, _ := strings.Cut(strings.TrimSpace(line), " ")
	fraction, err := strconv.ParseFloat(number, 64)
	if err != nil || !(fraction >= 0 && fraction <= 1) {
		return 0, "", false
	}
	return fraction, cleanText([]byte(text)), true
}

// close ends the reader once the last writer is gone; the patch's group is
// dead by now, but a descriptor may have been handed out of it.
func (p *progress) close() error {
	err := p.w.Close()
	p.r.SetReadDeadline(time.Now().Add(time.Second))
	<-p.done
	return errors.Join(err, p.r.Close())
}

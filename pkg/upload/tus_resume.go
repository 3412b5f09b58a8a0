package upload

import (
	"bufio"
	"fmt"
	"io"
)

// resumePoint is how far an upload can be had again from log and image.
type resumePoint struct {
	offset  int64 // bytes received
	payload int64 // bytes of payload among them that are not in the log
	done    int64 // bytes of payload, whole blocks, that stand in the image
	boot    string
}

// findResumePoint reads a log. What was written before another boot of the
// system than boot counts as far as it was synced, which the ring is not.
func findResumePoint(log io.ReaderAt, boot string) (resumePoint, error) {
	var p, synced resumePoint // done: as flushed, in bytes
	r := newLogReader(log)
	for {
		e, err := r.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return resumePoint{}, fmt.Errorf("read the log of the upload: %w", err)
		}
		switch e.kind {
		case entryBytes:
			p.offset += e.n
		case entryPayload:
			p.offset, p.payload = p.offset+e.n, p.payload+e.n
		case entryFlushed:
			p.done = e.n
		case entrySynced:
			synced = p
		case entryBoot:
			p.boot = string(e.data)
		}
	}
	ring := int64(ringSize)
	if p.boot != boot {
		p, ring = synced, 0
	}
	p.done -= p.done % blockSize
	if p.payload-p.done <= ring {
		return p, nil
	}
	return cutAtPayload(log, p)
}

// blockSize is the unit in which payload stands in an image.
const blockSize = 4096

// cutAtPayload takes off what follows the payload that the image holds.
func cutAtPayload(log io.ReaderAt, p resumePoint) (resumePoint, error) {
	r := newLogReader(log)
	at := resumePoint{done: p.done, boot: p.boot}
	for {
		e, err := r.next()
		if err != nil {
			return resumePoint{}, fmt.Errorf("read the log of the upload once more: %w", err)
		}
		switch e.kind {
		case entryBytes:
			at.offset += e.n
		case entryPayload:
			n := min(e.n, p.done-at.payload)
			at.offset, at.payload = at.offset+n, at.payload+n
			if n < e.n {
				return at, nil
			}
		}
	}
}

// copyTo writes what counts of a log into a new one.
func (p resumePoint) copyTo(l *uploadLog, log io.ReaderAt) error {
	for at := p.done; at < p.payload; {
		n := min(p.payload-at, ringSize-at%ringSize)
		if _, err := io.Copy(io.NewOffsetWriter(l.f, at%ringSize), io.NewSectionReader(log, at%ringSize, n)); err != nil {
			return fmt.Errorf("copy the log of the upload: %w", err)
		}
		at += n
	}
	r := newLogReader(log)
	for at := int64(0); at < p.offset; {
		e, err := r.next()
		if err != nil {
			return fmt.Errorf("copy the log of the upload: %w", err)
		}
		n := min(e.n, p.offset-at)
		switch e.kind {
		case entryBytes:
			l.bytes(e.data[:n])
			at += n
		case entryPayload:
			l.payload(n)
			at += n
		case entryFlushed:
			l.close()
			l.entry(entryFlushed, min(e.n, p.done))
		case entrySynced:
			l.close()
			l.entry(entrySynced, 0)
		case entryBoot:
			l.close()
			l.boot(string(e.data))
		}
		if len(l.pend) >= maxRun {
			if err := l.batch(); err != nil {
				return err
			}
		}
	}
	return l.write(p.done)
}

// replay gives the bytes that were received again: those that are not payload
// from the log, the others from the image and, at last, from the ring.
type replay struct {
	log   *logReader
	image io.Reader
	left  int64 // bytes still to come
	data  []byte
	pay   int64 // bytes of the present entry that are payload
}

// newReplay begins at the first byte. image reads the payload that stands in
// the image.
func newReplay(log io.ReaderAt, p resumePoint, image io.Reader) *replay {
	stands := io.MultiReader(io.LimitReader(image, p.done), &ringReader{log, p.done})
	return &replay{log: newLogReader(log), image: bufio.NewReaderSize(stands, mib), left: p.offset}
}

func (r *replay) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if int64(len(b)) > r.left {
		b = b[:r.left]
	}
	done := 0
	for done < len(b) {
		n, err := r.some(b[done:])
		done += n
		r.left -= int64(n)
		if err != nil {
			return done, fmt.Errorf("read again what was received: %w", err)
		}
	}
	return done, nil
}

func (r *replay) some(b []byte) (n int, err error) {
	switch {
	case len(r.data) > 0:
		n = copy(b, r.data)
		r.data = r.data[n:]
		return n, nil
	case r.pay > 0:
		n, err = r.image.Read(b[:min(int64(len(b)), r.pay)])
		r.pay -= int64(n)
		if err == io.EOF && n > 0 {
			err = nil
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return n, err
	}
	e, err := r.log.next()
	if err != nil {
		return 0, io.ErrUnexpectedEOF
	}
	switch e.kind {
	case entryBytes:
		r.data = e.data
	case entryPayload:
		r.pay = e.n
	}
	return 0, nil
}

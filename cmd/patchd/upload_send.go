package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/xapi"
)

// sending is one file on its way to the pool, over all interruptions.
type sending struct {
	c    *client
	o    uploadOptions
	file *os.File
	name string
	sr   string // uuid, or ""

	outline patch.Outline
	memory  *memory // nil: nothing can be remembered
	key     string

	at      begun
	content *content
	bar     *transfer

	failing time.Time // since when nothing has gone on; zero: it does
	wait    time.Duration
}

// maxBeginnings is how often an upload is begun again that the server has lost.
const maxBeginnings = 3

// run gives the record of the patch.
func (s *sending) run(ctx context.Context) (record, error) {
	var err error
	if s.outline, err = outline(ctx, s.file, s.name); err != nil {
		return nil, s.explain(ctx, err)
	}
	s.bar = newTransfer(s.name, "asking the pool", s.outline.Size, 0)
	defer func() { s.bar.done() }()
	if err := s.identify(ctx); err != nil {
		return nil, s.explain(ctx, err)
	}
	for range maxBeginnings {
		rec, err := s.once(ctx)
		switch {
		case err == nil:
			return rec, s.forget()
		case s.content != nil && s.content.base != "" && s.o.base == baseAuto && isCode(err, xapi.VDIContentChanged):
			s.bar.say("%s does not fit as a base any more: all of %s is sent", s.content.base, s.name)
			s.o.base = baseNone
		case !errors.Is(err, errGone):
			return nil, s.explain(ctx, err)
		}
		if err := s.forget(); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("the server has lost the upload %d times: its log says why", maxBeginnings)
}

func isCode(err error, code string) bool {
	var e *xapi.Error
	return errors.As(err, &e) && e.Code == code
}

// identify finds the name under which this upload is remembered.
func (s *sending) identify(ctx context.Context) error {
	pools := map[string]record{}
	if err := s.call(ctx, &pools, "pool.get_all_records"); err != nil {
		return err
	}
	for _, p := range pools {
		s.key = uploadKey(p.text("uuid"), hex.EncodeToString(s.outline.Sum[:]), s.sr)
	}
	if m, err := newMemory(); err == nil {
		s.memory = &m
	}
	return nil
}

// once goes on with the upload that is remembered, or begins one, and sees it
// through.
func (s *sending) once(ctx context.Context) (record, error) {
	from, ok, err := s.recall(ctx)
	if err != nil {
		return nil, err
	}
	if !ok {
		have, err := s.begin(ctx)
		if err != nil || have != nil {
			return have, err
		}
		from = progress{length: s.content.length}
	}
	rec, err := s.send(ctx, from)
	if isFinal(ctx, err) {
		// A server keeps nothing of what it has refused; but should it do.
		err = errors.Join(err, s.forget())
		s.c.drop(ctx, s.at.Location) //nolint:errcheck // it expires
	}
	return rec, err
}

// isFinal tells whether another attempt would end in the same way.
func isFinal(ctx context.Context, err error) bool {
	var p passing
	return err != nil && ctx.Err() == nil && !errors.As(err, &p) && !errors.Is(err, errGone)
}

// recall takes up an upload that an earlier command has begun.
func (s *sending) recall(ctx context.Context) (p progress, ok bool, err error) {
	if s.memory == nil {
		return p, false, nil
	}
	b, ok := s.memory.recall(s.key)
	if !ok {
		return p, false, nil
	}
	err = s.patiently(ctx, func() error {
		p, err = s.c.look(ctx, b.Location)
		return err
	})
	var ended endedError
	if errors.Is(err, errGone) || errors.As(err, &ended) {
		return p, false, s.forget() // perhaps it goes better now
	}
	if err != nil {
		return p, false, err
	}
	if p.patch != "" {
		s.at, s.content = b, whole(s.file, s.outline.Size)
		return p, true, nil
	}
	content, err := s.contentOf(ctx, b)
	if err != nil {
		return p, false, err
	}
	if content == nil || content.length != p.length {
		if err := s.c.drop(ctx, b.Location); err != nil && ctx.Err() != nil {
			return p, false, err
		}
		return p, false, s.forget()
	}
	s.at, s.content = b, content
	return p, true, nil
}

// contentOf makes again what an earlier command has sent; nil: that cannot be,
// or is not wanted any more.
func (s *sending) contentOf(ctx context.Context, b begun) (*content, error) {
	if b.Base == "" {
		if s.o.base != baseAuto && s.o.base != baseNone {
			return nil, nil
		}
		return whole(s.file, s.outline.Size), nil
	}
	if s.o.base == baseNone {
		return nil, nil
	}
	if s.o.base != baseAuto {
		_, rec, err := s.c.find(ctx, "pool_patch", s.o.base)
		if err != nil || rec.text("uuid") != b.Base {
			return nil, err
		}
	}
	d, err := s.deltaTo(ctx, b.Base, "")
	if err != nil && isFinal(ctx, err) || d != nil && d.sum != b.Sum {
		return nil, nil
	}
	return d, err
}

// begin announces the upload, and remembers it. It gives the record when the pool
// has the patch.
func (s *sending) begin(ctx context.Context) (record, error) {
	var err error
	if s.content, err = s.delta(ctx); err != nil {
		return nil, err
	}
	if s.content == nil {
		s.content = whole(s.file, s.outline.Size)
	}
	var a announced
	err = s.patiently(ctx, func() error {
		a, err = s.c.announce(ctx, s.announcement())
		return err
	})
	if s.content.base != "" && s.o.base == baseAuto && isFinal(ctx, err) && !errors.Is(err, errNotResumable) {
		s.content = whole(s.file, s.outline.Size) // whatever is wrong with it
		err = s.patiently(ctx, func() error {
			a, err = s.c.announce(ctx, s.announcement())
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	s.progressed()
	if a.have != nil {
		s.bar.say("the pool has %s already: nothing was sent", s.name)
		return a.have, nil
	}
	s.at = begun{Location: a.location, Task: a.task, Name: s.name, Expires: a.expires, Base: s.content.base, Sum: s.content.sum}
	if s.memory != nil {
		if err := s.memory.remember(s.key, s.at); err != nil {
			s.memory = nil // it can be gone on with as long as this command runs
		}
	}
	return nil, nil
}

func (s *sending) announcement() announcement {
	m := map[string]string{"filename": s.name, "digest": s.outline.Digest, "sr": s.sr}
	if s.outline.PayloadSize > 0 {
		m["payload_size"] = strconv.FormatInt(s.outline.PayloadSize, 10)
	}
	if s.content.base != "" {
		m["encoding"], m["base"], m["size"] = "delta", s.content.base, strconv.FormatInt(s.outline.Size, 10)
	}
	return announcement{s.content.length, m}
}

// delta makes the delta that is sent instead of the file; nil: the file is sent.
func (s *sending) delta(ctx context.Context) (*content, error) {
	o := s.outline
	switch {
	case s.o.base == baseNone:
		return nil, nil
	case s.o.base != baseAuto:
		_, rec, err := s.c.find(ctx, "pool_patch", s.o.base)
		if err != nil {
			return nil, err
		}
		if !o.Segmented {
			s.bar.say("--base is of no use: %s is armoured, compressed or clear-signed", s.name)
			return nil, nil
		}
		d, err := s.deltaTo(ctx, rec.text("uuid"), "")
		if d == nil && err == nil {
			s.bar.say("%s has too little in common with %s: all of it is sent", s.name, s.o.base)
		}
		return d, err
	case !o.Segmented || o.Info == nil || o.PayloadSize < deltaLeast:
		return nil, nil
	}
	// A patch of the same uuid is most likely this one.
	err := s.call(ctx, nil, "pool_patch.get_by_uuid", o.Info.UUID)
	if err == nil || !isCode(err, xapi.UUIDInvalid) {
		return nil, passingOnly(ctx, err)
	}
	d, err := s.deltaTo(ctx, "", o.Info.NameLabel)
	return d, passingOnly(ctx, err)
}

// passingOnly drops errors that say that something is not there, or cannot be had.
func passingOnly(ctx context.Context, err error) error {
	if isFinal(ctx, err) {
		return nil
	}
	return err
}

// deltaTo makes the delta to one base; nil when it is too long.
func (s *sending) deltaTo(ctx context.Context, uuid, label string) (d *content, err error) {
	err = s.patiently(ctx, func() error {
		ix, base, err := s.c.chunks(ctx, uuid, label)
		if err != nil {
			return err
		}
		s.bar.done()
		d, err = deltaOf(ctx, s.file, s.name, s.outline, ix, base)
		s.bar = newTransfer(s.name, "asking the pool", s.outline.Size, 0)
		return err
	})
	return d, err
}

// send brings what is missing, until the patch is there.
func (s *sending) send(ctx context.Context, p progress) (record, error) {
	s.bar.done()
	s.bar = newTransfer(s.name, "", p.length, p.offset)
	for p.patch == "" {
		ref, err := s.push(ctx, p)
		if ref != "" {
			p.patch = ref
			break
		}
		if err == nil {
			err = passing{errors.New("the server has not finished")}
		}
		if !errors.Is(err, errGone) {
			err = s.pause(ctx, err)
		}
		if err == nil {
			p, err = s.lookAgain(ctx, p)
		}
		var ended endedError
		if errors.Is(err, errGone) || errors.As(err, &ended) {
			return s.lost(ctx, err)
		}
		if err != nil {
			return nil, err
		}
	}
	s.bar.at(p.length, "")
	return s.record(ctx, p.patch)
}

// lookAgain asks how far the upload is after a request that has ended too early.
func (s *sending) lookAgain(ctx context.Context, before progress) (p progress, err error) {
	err = s.patiently(ctx, func() error {
		p, err = s.c.look(ctx, s.at.Location)
		return err
	})
	if err != nil {
		return p, err
	}
	if p.length != s.content.length {
		return p, fmt.Errorf("the server says that the upload has %d bytes, not %d", p.length, s.content.length)
	}
	if p.offset > before.offset {
		s.progressed()
	}
	s.bar.at(p.offset, "")
	return p, nil
}

// push makes one request of all that is missing.
func (s *sending) push(ctx context.Context, p progress) (string, error) {
	in, err := s.content.open(p.offset)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	limit := max(s.o.retryFor, time.Minute)
	body := &watched{Reader: &shown{in, s.bar}, in: in, limit: limit}
	body.timer = time.AfterFunc(limit, func() { cancel(passing{fmt.Errorf("the server took nothing for %s", limit)}) })
	defer body.timer.Stop()
	return s.c.push(ctx, s.at.Location, p.offset, body, p.length-p.offset)
}

// watched ends a request whose body is not taken any more.
type watched struct {
	io.Reader
	in    io.Closer
	limit time.Duration
	timer *time.Timer
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	if err == nil {
		w.timer.Reset(w.limit)
	} else {
		w.timer.Stop() // the rest is the server's, and may take its time
	}
	return n, err
}

func (w *watched) Close() error {
	w.timer.Stop()
	return w.in.Close()
}

// call is client.call that goes on when the server does.
func (s *sending) call(ctx context.Context, into any, method string, params ...any) error {
	return s.patiently(ctx, func() error {
		err := s.c.call(ctx, into, method, params...)
		var unreachable unreachableError
		if isCode(err, xapi.SessionInvalid) {
			if err = s.c.again(ctx); err == nil {
				return passing{errors.New("the session had ended")}
			}
		}
		if errors.As(err, &unreachable) || isCode(err, xapi.HostStillBooting) {
			return passing{err}
		}
		return err
	})
}

// patiently does f again as long as its failures may pass.
func (s *sending) patiently(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		if err := s.pause(ctx, err); err != nil {
			return err
		}
	}
}

// The waits between attempts.
const (
	firstWait = 50 * time.Millisecond
	longWait  = 5 * time.Second
)

// pause waits after a failure that may pass; it gives the others, and gives up
// when nothing has gone on for too long.
func (s *sending) pause(ctx context.Context, err error) error {
	var p passing
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if !errors.As(err, &p) {
		return err
	}
	if s.failing.IsZero() {
		s.failing, s.wait = time.Now(), firstWait
	}
	if time.Since(s.failing)+s.wait > s.o.retryFor {
		return passing{fmt.Errorf("%w (nothing has gone on for %s)", p.error, time.Since(s.failing).Round(time.Second))}
	}
	s.bar.at(s.bar.sent(), "waiting for the server")
	timer := time.NewTimer(s.wait)
	defer timer.Stop()
	s.wait = min(2*s.wait, longWait)
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// progressed ends a time in which nothing went on.
func (s *sending) progressed() { s.failing = time.Time{} }

func (s *sending) forget() error {
	if s.memory == nil {
		return nil
	}
	return s.memory.forget(s.key)
}

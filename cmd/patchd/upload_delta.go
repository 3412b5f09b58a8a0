package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"

	"github.com/patchd/patchd/pkg/delta"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// deltaLeast is how long a payload must be for a base to be looked for, in
	// bytes.
	deltaLeast = 1 << 20
	// deltaKept is how long a delta may be to be kept in memory, in bytes. A
	// longer one is made again to be sent.
	deltaKept = 32 << 20
)

// content is what is sent of a file: all of it, or its delta to a base.
type content struct {
	base   string // uuid; "" for the whole file
	length int64  // in bytes
	sum    string // of a delta, hexadecimal
	// open gives what follows offset. What it gives does not change.
	open func(offset int64) (io.ReadCloser, error)
}

// whole is the file as it is.
func whole(f *os.File, size int64) *content {
	return &content{length: size, open: func(offset int64) (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(f, offset, size-offset)), nil
	}}
}

// chunks fetches the index of a base: of the patch with that uuid, or of the
// newest with that name.
func (c *client) chunks(ctx context.Context, uuid, label string) (*delta.Index, string, error) {
	query := url.Values{}
	if uuid != "" {
		query.Set("uuid", uuid)
	} else {
		query.Set("name_label", label)
	}
	res, err := c.raw(ctx, http.MethodGet, "/pool_patch_chunks?"+query.Encode(), nil, nil, 0)
	if err != nil {
		return nil, "", err
	}
	if res.StatusCode != http.StatusOK {
		err := judge(res)
		var coded *xapi.Error
		switch {
		case !errors.Is(err, errGone):
		case errors.As(err, &coded):
			err = coded
		default:
			err = errors.New("the server knows nothing of deltas")
		}
		return nil, "", err
	}
	defer res.Body.Close()
	base := res.Header.Get("Patchd-Base")
	if !xapi.UUID(base).Valid() {
		return nil, "", fmt.Errorf("the server names the base %.64q", base)
	}
	ix, err := delta.ReadIndex(io.LimitReader(res.Body, int64(delta.MaxIndex)+1))
	if err != nil && ctx.Err() == nil {
		err = passing{err}
	}
	return ix, base, err
}

// deltaOf makes the delta of a file to a base, or nil when it is longer than
// half of the file.
func deltaOf(ctx context.Context, f *os.File, name string, o patch.Outline, ix *delta.Index, base string) (*content, error) {
	b := newTransfer(name, "comparing", o.Size, 0)
	defer b.done()
	encode := func(w io.Writer, b *transfer) error {
		in := &shown{&untilDone{ctx, io.NewSectionReader(f, 0, o.Size)}, b}
		what := delta.File{Source: patch.NewSegments(bufio.NewReaderSize(in, 1<<20)), Size: o.Size, Sum: o.Sum}
		return delta.Encode(w, what, ix)
	}
	k := &keeper{most: o.Size / 2, sum: sha256.New()}
	if err := encode(k, b); errors.Is(err, errTooLong) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	d := &content{base: base, length: k.n, sum: hex.EncodeToString(k.sum.Sum(nil))}
	if k.n <= deltaKept {
		d.open = func(offset int64) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(k.kept.Bytes()[offset:])), nil
		}
		return d, nil
	}
	d.open = func(offset int64) (io.ReadCloser, error) {
		return encodeFrom(offset, func(w io.Writer) error { return encode(w, &transfer{}) })
	}
	return d, nil
}

// encodeFrom gives what encode writes, from offset on. Close ends it.
func encodeFrom(offset int64, encode func(io.Writer) error) (io.ReadCloser, error) {
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.CloseWithError(encode(w))
	}()
	c := closing{r, func() error {
		err := r.Close()
		<-done
		return err
	}}
	if _, err := io.CopyN(io.Discard, r, offset); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

type closing struct {
	io.Reader
	close func() error
}

func (c closing) Close() error { return c.close() }

var errTooLong = errors.New("the delta is not worth it")

// keeper measures a delta and keeps it as long as it is short.
type keeper struct {
	most int64 // bytes; more is errTooLong
	n    int64
	sum  hash.Hash
	kept bytes.Buffer
}

func (k *keeper) Write(p []byte) (int, error) {
	if k.n += int64(len(p)); k.n > k.most {
		return 0, errTooLong
	}
	k.sum.Write(p)
	if k.n > deltaKept {
		k.kept = bytes.Buffer{}
		return len(p), nil
	}
	return k.kept.Write(p)
}

// untilDone reads until its context ends.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u *untilDone) Read(p []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.r.Read(p)
}

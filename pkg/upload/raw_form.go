package upload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// The forms in which the content of a VDI goes over the wire.
const (
	formRaw     = "raw"     // every byte
	formExtents = "extents" // frames of what is data
	formBlocks  = "blocks"  // frames of blocks that were asked for
)

// zstdWindow is the largest window of a compressed body, in bytes; RFC 9659.
const zstdWindow = 8 << 20

// formOf is the form a request names.
func formOf(r *http.Request) (string, bool) {
	switch format := param(r, "format"); format {
	case "", formRaw:
		return formRaw, true
	case formExtents, formBlocks:
		return format, true
	}
	return "", false
}

// importForm says how a body is to be read.
type importForm struct {
	format string
	zstd   bool
	size   int64 // of the content, in bytes; -1: the body tells or nobody
}

// judgeImport tells whether the request says enough.
func judgeImport(r *http.Request, into string) (f importForm, status int, text string) {
	_, framed := r.URL.Query()["chunked"]
	format, known := formOf(r)
	encoding := strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding")))
	f = importForm{format: format, zstd: encoding == "zstd", size: -1}
	plain := format == formRaw && !f.zstd
	if size := param(r, "virtual_size"); size != "" && format == formRaw {
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil || n <= 0 {
			return f, http.StatusBadRequest, "virtual_size is not a number of bytes"
		}
		f.size = n
	}
	if plain {
		f.size = r.ContentLength
	}
	switch {
	case !known:
		return f, http.StatusNotFound, fmt.Sprintf("format %.32q is not supported, only raw, extents and blocks are", param(r, "format"))
	case framed || plain && len(r.TransferEncoding) > 0:
		return f, http.StatusNotFound, "chunked data is not supported: send Content-Length"
	case encoding != "" && encoding != "identity" && !f.zstd:
		return f, http.StatusUnsupportedMediaType, fmt.Sprintf("Content-Encoding %.32q is not supported, only zstd is", encoding)
	case into == "" && requestedSR(r) == "":
		return f, http.StatusBadRequest, "name the VDI (vdi) or the SR for a new one (sr_id or sr_uuid)"
	case into == "" && plain && (r.ContentLength <= 0 || r.ContentLength == unknownLength):
		return f, http.StatusBadRequest, "a new VDI needs Content-Length: it is its size"
	case into == "" && format == formRaw && f.size <= 0:
		return f, http.StatusBadRequest, "a new VDI of compressed bytes needs virtual_size: the bytes there are"
	}
	return f, http.StatusOK, ""
}

// content is what a VDI is to hold.
type content interface {
	// size is how long it is, in bytes; at most 0 when that is not known.
	size() int64
	// write writes it into f, a VDI of have bytes, and syncs f. A fresh one
	// reads as zeros.
	write(ctx context.Context, f *os.File, have int64, fresh bool) error
}

// importForm reads a body and makes or changes a VDI.
func (h *Handler) importForm(ctx context.Context, b *body, form importForm, into, requested string) (xapi.Ref, error) {
	in, done, err := form.open(b)
	if err != nil {
		return "", err
	}
	defer done()
	if into != "" {
		return h.importInto(ctx, in, into)
	}
	return h.importNew(ctx, in, requested)
}

// open begins to read a body.
func (f importForm) open(b *body) (in content, done func(), err error) {
	r, done := io.Reader(b), func() {}
	if f.zstd {
		d, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, nil, decoded(b, err)
		}
		r, done = d, d.Close
	}
	if f.format == formRaw {
		return &rawContent{b, r, f.size, f.zstd && f.size >= 0}, done, nil
	}
	frames, err := vdi.NewFrameReader(r)
	if err != nil {
		done()
		return nil, nil, decoded(b, err)
	}
	if (frames.Kind == vdi.FrameExtents) != (f.format == formExtents) {
		done()
		return nil, nil, xapi.NewError(xapi.ImportError, "the frames are not of the form "+f.format)
	}
	return &frameContent{b, r, frames}, done, nil
}

// decoded gives an error that came while b was read and taken apart its code.
func decoded(b *body, err error) error {
	switch {
	case err == nil:
		return nil
	case b.err != nil && b.err != io.EOF && !errors.Is(b.err, io.ErrUnexpectedEOF):
		return b.err
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(b.err, io.ErrUnexpectedEOF):
		return xapi.NewError(xapi.VDIIOError, "the data ended too early").Because(err)
	case errors.Is(err, vdi.ErrFrames):
		return xapi.NewError(xapi.ImportError, err.Error()).Because(err)
	}
	return xapi.NewError(xapi.ImportError, "the data cannot be decompressed").Because(err)
}

// rawContent is the bytes from the first one on.
type rawContent struct {
	b      *body
	r      io.Reader // b, or what it holds decompressed
	length int64
	exact  bool // fewer bytes than length are an error
}

func (c *rawContent) size() int64 { return c.length }

var zeros [copyChunk]byte

var errTooMuch = errors.New("more data than the VDI holds")

// write writes at most have bytes. In a fresh volume zeros stay holes.
func (c *rawContent) write(_ context.Context, f *os.File, have int64, fresh bool) error {
	buf := make([]byte, copyChunk)
	for at := int64(0); ; {
		n, err := fill(c.r, buf)
		if at+int64(n) > have {
			return errTooMuch
		}
		if n > 0 && !(fresh && bytes.Equal(buf[:n], zeros[:n])) {
			if _, werr := f.WriteAt(buf[:n], at); werr != nil {
				return fmt.Errorf("write VDI: %w", werr)
			}
		}
		at += int64(n)
		if err == io.EOF && c.exact && at < c.length {
			err = io.ErrUnexpectedEOF
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return decoded(c.b, err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync VDI: %w", err)
	}
	return nil
}

// fill reads until p is full or r fails; unlike with io.ReadFull, the error is r's own.
func fill(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var k int
		k, err = r.Read(p[n:])
		n += k
	}
	return n, err
}

// frameContent is a stream of frames.
type frameContent struct {
	b      *body
	r      io.Reader
	frames *vdi.FrameReader
}

func (c *frameContent) size() int64 { return c.frames.Size }

func (c *frameContent) write(ctx context.Context, f *os.File, _ int64, fresh bool) error {
	if err := c.frames.Apply(ctx, f, fresh); errors.Is(err, vdi.ErrFrames) {
		return decoded(c.b, err)
	} else if err != nil {
		return err
	}
	var one [1]byte
	switch n, err := fill(c.r, one[:]); {
	case n > 0:
		return xapi.NewError(xapi.ImportError, "data after the end of the frames")
	case err != io.EOF:
		return decoded(c.b, err)
	}
	return nil
}

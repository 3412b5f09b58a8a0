package upload

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// maxBlockList is the largest list of blocks in a body, in bytes.
const maxBlockList = 16 * mib

// export is what was asked for of a VDI.
type export struct {
	vdi    string
	format string
	list   string           // of blocks, from the query
	blocks []vdi.BlockRange // from the body
	zstd   bool
}

// exportRaw serves GET /export_raw_vdi?vdi=…, and POST where a list of blocks is
// long. With format=raw it gives all bytes, or the range that is asked for; with
// format=extents the data as vdi's frames; with format=blocks those blocks of
// 1 MiB that blocks=0-3,17 names, or a JSON array of numbers in the body. A
// client that accepts zstd and asks for no range gets it compressed.
//
// 400 without a VDI or a list that makes sense, 404 for another format.
func (h *Handler) exportRaw(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "export_raw_vdi", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	if r.Method == http.MethodPost {
		c.rc.SetReadDeadline(time.Now().Add(h.Stall)) //nolint:errcheck // a server without deadlines does not stall out
	}
	e, status, err := judgeExport(r)
	if err != nil {
		err := xapi.NewError(xapi.InvalidValue, "vdi", err.Error())
		c.failTask(err)
		c.reply(status, problem{Code: xapi.InvalidValue, Params: []string{err.Params[1]}, Message: err.Params[1]})
		return
	}
	open := func(ctx context.Context) (*os.File, func(), error) {
		ref, err := h.vdiRef(e.vdi)
		if err != nil {
			return nil, nil, err
		}
		return h.Pool.VDIForExport(ctx, string(ref))
	}
	if e.format == formRaw && !e.zstd {
		c.send(open)
		return
	}
	c.sendBy(open, func(ctx context.Context, t *task.Handle, f *os.File) error { return c.sendForm(ctx, t, f, e) })
}

// judgeExport reads what is asked for.
func judgeExport(r *http.Request) (e export, status int, err error) {
	format, known := formOf(r)
	e = export{vdi: param(r, "vdi"), format: format, list: param(r, "blocks")}
	e.zstd = acceptsZstd(r) && (r.Header.Get("Range") == "" || format != formRaw)
	switch {
	case e.vdi == "":
		return e, http.StatusBadRequest, errors.New("name the VDI (vdi)")
	case !known:
		return e, http.StatusNotFound, fmt.Errorf("format %.32q is not supported, only raw, extents and blocks are", param(r, "format"))
	case r.Method == http.MethodPost && format != formBlocks:
		return e, http.StatusBadRequest, errors.New("only format=blocks takes a body")
	case r.Method == http.MethodPost:
		if e.blocks, err = readBlockList(r.Body); err != nil {
			return e, http.StatusBadRequest, err
		}
	case format == formBlocks && e.list == "":
		return e, http.StatusBadRequest, errors.New("name the blocks (blocks=0-3,17)")
	}
	return e, http.StatusOK, nil
}

// maxBlockRanges is how many stretches of blocks a list may have once it is in
// order: they are held in memory.
const maxBlockRanges = 256 << 10

// readBlockList reads a JSON array of numbers of blocks.
func readBlockList(r io.Reader) ([]vdi.BlockRange, error) {
	bad := errors.New("the body is not a JSON array of numbers of blocks")
	d := json.NewDecoder(io.LimitReader(r, maxBlockList))
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return nil, bad
	}
	var out []vdi.BlockRange
	for d.More() {
		var i int64
		if err := d.Decode(&i); err != nil || i < 0 || i == math.MaxInt64 {
			return nil, bad
		}
		if n := len(out); n > 0 && i >= out[n-1].First && i <= out[n-1].Last+1 {
			out[n-1].Last = max(out[n-1].Last, i)
			continue
		}
		if len(out) == 2*maxBlockRanges {
			if out = vdi.SortBlocks(out); len(out) > maxBlockRanges {
				return nil, fmt.Errorf("more than %d stretches of blocks: ask for them in parts", maxBlockRanges)
			}
		}
		out = append(out, vdi.BlockRange{First: i, Last: i})
	}
	if _, err := d.Token(); err != nil {
		return nil, bad
	}
	if out = vdi.SortBlocks(out); len(out) > maxBlockRanges {
		return nil, fmt.Errorf("more than %d stretches of blocks: ask for them in parts", maxBlockRanges)
	}
	return out, nil
}

// acceptsZstd tells whether a client takes Content-Encoding zstd.
func acceptsZstd(r *http.Request) bool {
	for one := range strings.SplitSeq(strings.Join(r.Header.Values("Accept-Encoding"), ","), ",") {
		coding, parameters, _ := strings.Cut(one, ";")
		if !strings.EqualFold(strings.TrimSpace(coding), "zstd") {
			continue
		}
		q, given := strings.CutPrefix(strings.ToLower(strings.ReplaceAll(parameters, " ", "")), "q=")
		weight, err := strconv.ParseFloat(q, 64)
		return !given || err == nil && weight > 0
	}
	return false
}

// sendForm sends a VDI in another form than byte by byte. When it fails after
// the first byte, what was sent has no proper end.
func (c *call) sendForm(ctx context.Context, t *task.Handle, f *os.File, e export) (err error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size of VDI: %w", err)
	}
	if e.format == formBlocks && e.list != "" {
		e.blocks, err = vdi.ParseBlocks(e.list, size)
	} else {
		e.blocks, err = vdi.JoinBlocks(e.blocks, size)
	}
	if err != nil {
		return xapi.NewError(xapi.InvalidValue, "blocks", err.Error())
	}
	unhook := context.AfterFunc(ctx, func() { c.rc.SetWriteDeadline(time.Unix(1, 0)) })
	defer unhook()
	c.w.Header().Set("Vary", "Accept-Encoding")
	out := c.outgoing(ctx, t, 0)
	progress := func(done int64) { t.Progress(float64(done) / float64(max(size, 1))) }
	defer func() {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		if err != nil {
			c.rc.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // the end that the client waits for must not come
		}
	}()
	if !e.zstd {
		return e.write(ctx, out, f, size, progress)
	}
	c.w.Header().Set("Content-Encoding", "zstd")
	z, err := zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2),
		zstd.WithWindowSize(mib), zstd.WithLowerEncoderMem(true), zstd.WithZeroFrames(true))
	if err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	if err := e.write(ctx, z, f, size, progress); err != nil {
		z.Reset(nil) // its goroutine ends, and the end of the stream is not written
		return err
	}
	return z.Close()
}

// write writes the form into w.
func (e export) write(ctx context.Context, w io.Writer, f *os.File, size int64, progress func(done int64)) error {
	b := bufio.NewWriterSize(w, 256<<10)
	var err error
	switch e.format {
	case formExtents:
		err = vdi.WriteExtents(ctx, b, f, size, progress)
	case formBlocks:
		err = vdi.WriteBlocks(ctx, b, f, size, e.blocks, progress)
	default:
		err = writeRaw(ctx, b, f, size, progress)
	}
	if err != nil {
		return fmt.Errorf("send VDI: %w", err)
	}
	return b.Flush()
}

// writeRaw writes every byte.
func writeRaw(ctx context.Context, w io.Writer, f *os.File, size int64, progress func(done int64)) error {
	for at := int64(0); at < size; at += sendChunk {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(sendChunk, size-at)
		if _, err := io.Copy(w, io.NewSectionReader(f, at, n)); err != nil {
			return err
		}
		progress(at + n)
	}
	return nil
}

// blockMap serves GET /vdi_block_map?vdi=…: the encoded block map of a VDI.
// VDI_NOT_AVAILABLE and 404 when it has none.
func (h *Handler) blockMap(w http.ResponseWriter, r *http.Request) {
	c, done, ok := h.accept(w, r, "vdi_block_map", session.PoolOperator)
	if !ok {
		return
	}
	defer done()
	if !c.begin() {
		return
	}
	_, err := c.run(func(ctx context.Context, t *task.Handle) (string, error) {
		ref, err := h.vdiRef(param(r, "vdi"))
		if err != nil {
			return "", err
		}
		m, err := h.Pool.VDIMap(ctx, ref)
		if err == nil && m == nil {
			err = xapi.NewError(xapi.VDINotAvailable, string(ref), "it has no block map")
		}
		if err != nil {
			return "", err
		}
		out := c.outgoing(ctx, t, m.EncodedSize())
		w.Header().Set("Content-Length", strconv.FormatInt(m.EncodedSize(), 10))
		w.Header().Set("ETag", `"`+m.Digest()+`"`)
		return "<value></value>", m.Encode(out)
	})
	if err != nil {
		c.refuse(err)
	}
}

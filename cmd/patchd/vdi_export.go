package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// vdiExport is one export of a disk image.
type vdiExport struct {
	format string
	zstd   bool
}

func newVDIExport(g *global) *cobra.Command {
	var e vdiExport
	cmd := &cobra.Command{
		Use: "export VDI [FILE|-]", Short: "write a disk image into a file", Args: cobra.RangeArgs(1, 2), ValidArgsFunction: g.complete("VDI"),
		Long: "Writes the content of a disk image into FILE, by default <uuid>.img or <uuid>.frames; - is the standard\n" +
			"output. With --format raw it is every byte, and holes stay holes; with --format extents only what is data,\n" +
			"in a form that `patchd vdi import` reads. With --zstd the file is compressed.\n\n" +
			"An export into a file that was interrupted leaves <FILE>.<uuid>.part. The next one goes on there when it is\n" +
			"raw, not compressed, and the image of a patch: what is in the file is held against the image's block map.",
		PreRunE: func(_ *cobra.Command, args []string) error {
			if e.format != "raw" && e.format != "extents" {
				return usagef("--format: %q is neither raw nor extents", e.format)
			}
			if len(args) == 2 && args[1] == "-" && term.IsTerminal(int(os.Stdout.Fd())) {
				return usagef("a disk image is not for a terminal: name a file")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				ref, rec, err := c.find(ctx, "VDI", args[0])
				if err != nil {
					return err
				}
				path := rec.text("uuid") + map[string]string{"raw": ".img", "extents": ".frames"}[e.format]
				if e.zstd {
					path += ".zst"
				}
				if len(args) == 2 {
					path = args[1]
				}
				if err := c.exportVDI(ctx, e, ref, rec, path); err != nil {
					return fmt.Errorf("export of vdi %s (%s): %w", rec.text("name_label"), rec.text("uuid"), explain(ctx, c, err))
				}
				if path == "-" {
					return nil
				}
				return g.printText("file", path)
			})
		},
	}
	cmd.Flags().StringVar(&e.format, "format", "raw", "raw or extents")
	cmd.Flags().BoolVar(&e.zstd, "zstd", false, "compress")
	completeWords(cmd, "format", "raw", "extents")
	return cmd
}

// exportVDI writes into a file, which gets its name when it is whole, or the
// standard output.
func (c *client) exportVDI(ctx context.Context, e vdiExport, ref string, rec record, path string) error {
	if path == "-" {
		return c.fetchVDI(ctx, e, ref, rec, os.Stdout, 0)
	}
	part := path + "." + rec.text("uuid") + ".part"
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	from, m, err := c.resumeAt(ctx, e, ref, f)
	if err == nil {
		err = f.Truncate(from)
	}
	if err != nil {
		return err
	}
	out := &sparseFile{f: f, at: from}
	err = errors.Join(c.fetchVDI(ctx, e, ref, rec, out, from), out.end())
	if err != nil {
		return fmt.Errorf("%w; what came is in %s", err, part)
	}
	if m != nil {
		if err := m.Verify(ctx, f, nil); err != nil {
			return errors.Join(fmt.Errorf("what was in %s is of something else: export again: %w", part, err), os.Remove(part))
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(part, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// resumeAt tells from where on an earlier export is to go on, and the map that
// its result must be held against.
func (c *client) resumeAt(ctx context.Context, e vdiExport, ref string, f *os.File) (int64, *vdi.Map, error) {
	st, err := f.Stat()
	if err != nil || st.Size() == 0 || e.format != "raw" || e.zstd {
		return 0, nil, err
	}
	res, err := c.getVDI(ctx, "/vdi_block_map?"+url.Values{"vdi": {ref}}.Encode(), nil)
	if xapi.Is(err, xapi.VDINotAvailable) {
		return 0, nil, nil // the image may have changed meanwhile
	}
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	m, err := vdi.ReadMap(res.Body, "")
	if err != nil || st.Size() >= m.Size {
		return 0, nil, err
	}
	return st.Size(), m, nil
}

// fetchVDI copies what the server gives, from byte from on, into w.
func (c *client) fetchVDI(ctx context.Context, e vdiExport, ref string, rec record, w io.Writer, from int64) error {
	header := http.Header{"Accept-Encoding": {"identity"}}
	if e.zstd {
		header.Set("Accept-Encoding", "zstd")
	}
	if from > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	res, err := c.getVDI(ctx, "/export_raw_vdi?"+url.Values{"vdi": {ref}, "format": {e.format}}.Encode(), header)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if from > 0 && !strings.HasPrefix(res.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", from)) {
		return fmt.Errorf("the server gives %q of what was asked for", res.Header.Get("Content-Range"))
	}
	if (res.Header.Get("Content-Encoding") == "zstd") != e.zstd {
		return errors.New("the server does not give the form that was asked for")
	}
	size := rec.text("physical_utilisation")
	if e.format == "raw" && !e.zstd {
		size = rec.text("virtual_size")
	}
	total, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return err
	}
	b := newBar(rec.text("name_label"), max(total, 1))
	defer b.done()
	b.add(int(from))
	_, err = io.CopyBuffer(w, struct{ io.Reader }{&counted{res.Body, b.add}}, make([]byte, 1<<20))
	if err != nil && ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return err
}

// counted tells of every read.
type counted struct {
	r    io.Reader
	tell func(n int)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.tell(n)
	return n, err
}

// getVDI makes one request for bytes.
func (c *client) getVDI(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return nil, err
	}
	if header != nil {
		req.Header = header
	}
	req.AddCookie(&http.Cookie{Name: "session_id", Value: c.session})
	res, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, errors.New("interrupted")
		}
		return nil, unreachableError{reason(err)}
	}
	if res.StatusCode < http.StatusBadRequest {
		return res, nil
	}
	defer res.Body.Close()
	return nil, refusalOf(res)
}

// refusalOf reads why a request was refused.
func refusalOf(res *http.Response) error {
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	var fail struct {
		Code   string   `json:"code"`
		Params []string `json:"params"`
	}
	if err == nil && json.Unmarshal(b, &fail) == nil && fail.Code != "" {
		return xapi.NewError(fail.Code, fail.Params...)
	}
	return fmt.Errorf("the server answers %s: %.200s", res.Status, b)
}

// sparseFile writes on and leaves out zeros.
type sparseFile struct {
	f  *os.File
	at int64
}

var noBytes [64 << 10]byte

func (s *sparseFile) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		b := p[done:min(len(p), done+len(noBytes))]
		if !bytes.Equal(b, noBytes[:len(b)]) {
			if _, err := s.f.WriteAt(b, s.at); err != nil {
				return done, err
			}
		}
		done, s.at = done+len(b), s.at+int64(len(b))
	}
	return len(p), nil
}

// end gives the file the length of what was written.
func (s *sparseFile) end() error { return s.f.Truncate(s.at) }

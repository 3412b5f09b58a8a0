package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/xapi"
)

// The values of --base that are no patch.
const (
	baseAuto = "auto"
	baseNone = "none"
)

// uploadOptions are the flags of `patchd patch upload`.
type uploadOptions struct {
	sr       string
	base     string
	retryFor time.Duration
	noResume bool
}

func newPatchUpload(g *global) *cobra.Command {
	o := uploadOptions{}
	cmd := &cobra.Command{
		Use: "upload FILE…", Short: "stream signed patches into VDIs of the pool", Args: cobra.MinimumNArgs(1),
		Long: "Streams each signed patch into a fresh VDI: on --sr, else on the pool's default SR, else on an SR of the\n" +
			"coordinator that can clone. Prints the patch's uuid. A FILE of - is the standard input.\n\n" +
			"A patch that the pool has is not sent again. An upload that was interrupted, by ^C, a lost connection or a\n" +
			"restart of either side, goes on where it was when the same command is given again. What an earlier revision\n" +
			"of the patch holds, the newest of the same name or --base, is not sent where that halves the upload.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.retryFor < 0 {
				return usagef("--retry-for: %s is less than nothing", o.retryFor)
			}
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error { return g.upload(ctx, c, args, o) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.sr, "sr", "", "SR (uuid or name) to put it on; there is no fallback then")
	f.StringVar(&o.base, "base", baseAuto, "patch (uuid or name) that the new one is a revision of; auto: the newest of the same name; none")
	f.DurationVar(&o.retryFor, "retry-for", 5*time.Minute, "go on trying that long when the server does not answer")
	f.BoolVar(&o.noResume, "no-resume", false, "send everything in one request, which cannot be gone on with")
	g.completeFlag(cmd, "sr", "SR")
	g.completeFlag(cmd, "base", "pool_patch")
	return cmd
}

// upload uploads every file, and tells of each that fails.
func (g *global) upload(ctx context.Context, c *client, paths []string, o uploadOptions) error {
	var failed error
	made := []record{}
	for _, path := range paths {
		rec, err := c.upload(ctx, path, o)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("upload of %s: %w", path, explain(ctx, c, err)))
			if ctx.Err() != nil {
				break
			}
			continue
		}
		made = append(made, rec)
		if !g.json() {
			fmt.Println(rec.text("uuid"))
		}
	}
	switch {
	case !g.json():
	case len(paths) > 1:
		failed = errors.Join(failed, printJSON(os.Stdout, made))
	case len(made) == 1:
		failed = errors.Join(failed, printJSON(os.Stdout, made[0]))
	}
	return failed
}

// upload uploads one file and gives the record of the patch.
func (c *client) upload(ctx context.Context, path string, o uploadOptions) (record, error) {
	in, length, err := openInput(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	ref, sr := "", record{}
	if o.sr != "" {
		if ref, sr, err = c.find(ctx, "SR", o.sr); err != nil {
			return nil, err
		}
	}
	name := filepath.Base(path)
	if length < 0 || o.noResume {
		return c.put(ctx, in, length, name, ref)
	}
	file, ok := in.(*os.File)
	if !ok {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	s := &sending{c: c, o: o, file: file, name: name, sr: sr.text("uuid")}
	rec, err := s.run(ctx)
	if errors.Is(err, errNotResumable) {
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		return c.put(ctx, file, length, name, ref)
	}
	return rec, err
}

// outline reads the file for what can be known before it is sent.
func outline(ctx context.Context, f *os.File, name string) (patch.Outline, error) {
	st, err := f.Stat()
	if err != nil {
		return patch.Outline{}, err
	}
	b := newTransfer(name, "checking", st.Size(), 0)
	defer b.done()
	return patch.ReadOutline(ctx, struct {
		io.Reader
		io.Seeker
	}{&shown{f, b}, f})
}

// put sends a file or the standard input in one request.
func (c *client) put(ctx context.Context, in io.Reader, length int64, name, sr string) (record, error) {
	query := url.Values{}
	if sr != "" {
		query.Set("sr_id", sr)
	}
	b := newTransfer(name, "", max(length, 0), 0)
	defer b.done()
	body := &shown{in, b}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, c.base+"/pool_patch_upload?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = length
	req.Header.Set("Expect", "100-continue")
	req.AddCookie(&http.Cookie{Name: "session_id", Value: c.session})
	res, err := c.send(ctx, req)
	if err != nil {
		switch {
		case ctx.Err() != nil && b.sent() == length:
			return nil, errors.New("interrupted " + afterTheLastByte)
		case ctx.Err() != nil:
			return nil, errors.New("interrupted: nothing is stored")
		}
		return nil, unreachableError{reason(err)}
	}
	defer res.Body.Close()
	return decodeUpload(res)
}

const afterTheLastByte = "after the last byte: `patchd patch list` tells whether the patch was taken"

// send is http.Client.Do that ends with ctx also while the body waits for a
// standard input that does not go on: the connection ends with the process.
func (c *client) send(ctx context.Context, req *http.Request) (*http.Response, error) {
	type answer struct {
		res *http.Response
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		res, err := c.http.Do(req)
		answered <- answer{res, err}
	}()
	select {
	case a := <-answered:
		return a.res, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// maxReply bounds what is read of an answer to an upload, in bytes.
const maxReply = 1 << 20

func decodeUpload(res *http.Response) (record, error) {
	b, err := io.ReadAll(io.LimitReader(res.Body, maxReply))
	if err != nil {
		return nil, err
	}
	if res.StatusCode == http.StatusCreated || res.StatusCode == http.StatusOK {
		rec := record{}
		return rec, json.Unmarshal(b, &rec)
	}
	return nil, refusal(res, b)
}

// refusal is the error in an answer.
func refusal(res *http.Response, body []byte) error {
	var fail struct {
		Code   string   `json:"code"`
		Params []string `json:"params"`
	}
	if json.Unmarshal(body, &fail) == nil && fail.Code != "" {
		return xapi.NewError(fail.Code, fail.Params...)
	}
	return fmt.Errorf("the server answers %s: %.200s", res.Status, body)
}

// openInput opens a file, or the standard input, whose length is unknown.
func openInput(path string) (io.ReadCloser, int64, error) {
	if path == "-" {
		return io.NopCloser(os.Stdin), -1, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	if !st.Mode().IsRegular() {
		return f, -1, nil
	}
	if st.Size() == 0 {
		f.Close()
		return nil, 0, fmt.Errorf("%s is empty", path)
	}
	return f, st.Size(), nil
}

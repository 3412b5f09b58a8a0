package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

const uploadsPath = "/pool_patch_uploads"

var (
	// errNotResumable: the server is older than resumable uploads.
	errNotResumable = errors.New("the server has no resumable uploads")
	// errGone: the server does not know the upload any more.
	errGone = errors.New("the server does not know the upload any more")
)

// passing is a failure that may be over soon.
type passing struct{ error }

func (p passing) Unwrap() error { return p.error }

// raw makes one request of the resumable wire. A connection that fails is
// passing; a session that has ended is begun again.
func (c *client) raw(ctx context.Context, method, path string, header http.Header, body io.Reader, length int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.ContentLength = length
		req.Header.Set("Expect", "100-continue")
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.Header.Set("Tus-Resumable", "1.0.0")
	req.AddCookie(&http.Cookie{Name: "session_id", Value: c.session})
	res, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, passing{unreachableError{fmt.Errorf("the server does not answer: %w", reason(err))}}
	}
	if res.StatusCode != http.StatusUnauthorized {
		return res, nil
	}
	res.Body.Close()
	if err := c.again(ctx); err != nil {
		var unreachable unreachableError
		if errors.As(err, &unreachable) {
			return nil, passing{err}
		}
		return nil, err
	}
	return nil, passing{errors.New("the session had ended")}
}

// judge gives the error of an answer that is no success, and closes it.
func judge(res *http.Response) error {
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxReply))
	if err != nil {
		return passing{err}
	}
	err = refusal(res, b)
	var coded *xapi.Error
	isCoded := errors.As(err, &coded)
	if code := res.Header.Get("Patchd-Error"); code != "" && !isCoded {
		coded, isCoded = xapi.NewError(code), true // an answer to HEAD has no body
		err = coded
	}
	switch status := res.StatusCode; {
	case status == http.StatusGone, status == http.StatusNotFound && (!isCoded || coded.Code == xapi.UUIDInvalid):
		return errors.Join(errGone, err)
	case status == http.StatusServiceUnavailable, status == http.StatusLocked, status == http.StatusTooManyRequests, status == statusChecksum:
		return passing{err}
	case isCoded && !mayPass[coded.Code]:
		return err
	case isCoded, status >= http.StatusInternalServerError, status == http.StatusRequestTimeout:
		return passing{err}
	}
	return err
}

// statusChecksum is that of a body that was changed on its way.
const statusChecksum = 460

// mayPass are the codes of refusals that are worth another attempt.
var mayPass = map[string]bool{
	xapi.HostStillBooting: true, xapi.Timeout: true, xapi.OtherOperationInProgress: true, xapi.InternalError: true,
}

// announcement is what an upload is announced to be.
type announcement struct {
	length   int64 // of what will be sent, in bytes
	metadata map[string]string
}

// announced is where an upload stands on the server, or the record of the patch
// when the pool has it.
type announced struct {
	location, task string
	expires        time.Time
	have           record
}

// announce makes an upload.
func (c *client) announce(ctx context.Context, a announcement) (announced, error) {
	h := http.Header{"Upload-Length": {strconv.FormatInt(a.length, 10)}, "Upload-Metadata": {encodeMetadata(a.metadata)}}
	res, err := c.raw(ctx, http.MethodPost, uploadsPath, h, nil, 0)
	if err != nil {
		return announced{}, err
	}
	switch res.StatusCode {
	case http.StatusOK:
		defer res.Body.Close()
		rec, err := decodeUpload(res)
		return announced{have: rec}, err
	case http.StatusCreated:
		defer res.Body.Close()
		return readAnnounced(res)
	}
	err = judge(res)
	var coded *xapi.Error
	if status := res.StatusCode; !errors.As(err, &coded) &&
		(status == http.StatusNotFound || status == http.StatusMethodNotAllowed || status == http.StatusNotImplemented) {
		return announced{}, errNotResumable
	}
	if errors.Is(err, errGone) { // what is gone is not this upload, but what it named
		return announced{}, coded
	}
	return announced{}, err
}

func readAnnounced(res *http.Response) (announced, error) {
	u, err := url.Parse(res.Header.Get("Location"))
	if err != nil || !strings.HasPrefix(u.Path, uploadsPath+"/") {
		return announced{}, fmt.Errorf("the server names the upload %.200q", res.Header.Get("Location"))
	}
	return announced{location: u.Path, task: res.Header.Get("Task-Id"), expires: readExpires(res)}, nil
}

// readExpires is when the server forgets the upload; a day from now when it does
// not say.
func readExpires(res *http.Response) time.Time {
	if t, err := http.ParseTime(res.Header.Get("Upload-Expires")); err == nil {
		return t
	}
	return time.Now().Add(24 * time.Hour)
}

// encodeMetadata writes the pairs that are not empty, in order.
func encodeMetadata(m map[string]string) string {
	var pairs []string
	for key, value := range m {
		if value != "" {
			pairs = append(pairs, key+" "+base64.StdEncoding.EncodeToString([]byte(value)))
		}
	}
	sort.Strings(pairs)
	return strings.Join(pairs, ",")
}

// progress is how far an upload is on the server.
type progress struct {
	offset, length int64
	patch          string // ref, once it is done
	expires        time.Time
}

// endedError is how an upload has ended that is not there any more; its task
// tells more.
type endedError struct{ error }

func (e endedError) Unwrap() error { return e.error }

// look asks how far an upload is. errGone: it is not there; endedError: the server
// has given it up.
func (c *client) look(ctx context.Context, location string) (progress, error) {
	res, err := c.raw(ctx, http.MethodHead, location, nil, nil, 0)
	if err != nil {
		return progress{}, err
	}
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusNoContent {
		err := judge(res)
		var coded *xapi.Error
		if errors.As(err, &coded) && res.StatusCode != http.StatusServiceUnavailable && !errors.Is(err, errGone) {
			err = endedError{coded}
		}
		return progress{}, err
	}
	res.Body.Close()
	p := progress{patch: res.Header.Get("Patchd-Pool-Patch"), expires: readExpires(res)}
	var lengthErr error
	p.offset, err = strconv.ParseInt(res.Header.Get("Upload-Offset"), 10, 64)
	p.length, lengthErr = strconv.ParseInt(res.Header.Get("Upload-Length"), 10, 64)
	if err = errors.Join(err, lengthErr); err != nil || p.offset < 0 || p.offset > p.length {
		return progress{}, fmt.Errorf("the server says that the upload is at %.32q of %.32q", res.Header.Get("Upload-Offset"), res.Header.Get("Upload-Length"))
	}
	return p, nil
}

// push sends what follows offset and gives the ref of the patch, "" when more is
// wanted.
func (c *client) push(ctx context.Context, location string, offset int64, body io.Reader, length int64) (string, error) {
	h := http.Header{"Content-Type": {"application/offset+octet-stream"}, "Upload-Offset": {strconv.FormatInt(offset, 10)}}
	if length == 0 {
		body = http.NoBody
	}
	res, err := c.raw(ctx, http.MethodPatch, location, h, body, length)
	if err != nil {
		return "", err
	}
	if res.StatusCode != http.StatusNoContent && res.StatusCode != http.StatusOK {
		err := judge(res)
		var coded *xapi.Error
		if res.StatusCode == http.StatusConflict && (!errors.As(err, &coded) || coded.Code == xapi.InvalidValue) {
			err = passing{err} // it is at another offset
		}
		return "", err
	}
	res.Body.Close()
	return res.Header.Get("Patchd-Pool-Patch"), nil
}

// drop removes an upload from the server, if it is there.
func (c *client) drop(ctx context.Context, location string) error {
	res, err := c.raw(ctx, http.MethodDelete, location, nil, nil, 0)
	if err != nil {
		return err
	}
	if res.StatusCode == http.StatusNoContent || res.StatusCode == http.StatusOK {
		return res.Body.Close()
	}
	if err := judge(res); !errors.Is(err, errGone) {
		return err
	}
	return nil
}

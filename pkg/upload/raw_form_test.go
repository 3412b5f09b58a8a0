package upload

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// sparseImage is 5 MiB with data at both ends and in the middle.
func sparseImage() []byte {
	b := make([]byte, 5*mib)
	copy(b, program(xapi.NewUUID(), 70000))
	copy(b[2*mib+4096:], program(xapi.NewUUID(), 1<<20))
	copy(b[5*mib-10:], "the end")
	return b
}

// importBody sends a body and gives the outcome of its task.
func (e *env) importBody(body []byte, encoding string, query ...string) (task.Record, string) {
	e.t.Helper()
	ref := e.newTask()
	status, _, _ := e.put(e.url("/import_raw_vdi", append(query, "task_id", string(ref))...), bytes.NewReader(body), func(r *http.Request) {
		r.Header.Set("Content-Encoding", encoding)
	})
	if status != http.StatusOK {
		e.t.Fatalf("status %d", status)
	}
	rec := e.outcome(ref)
	return rec, strings.TrimSuffix(strings.TrimPrefix(rec.Result, "<value>"), "</value>")
}

// exported is the answer to an export.
func (e *env) exported(method, address, accept, body string) (int, http.Header, []byte) {
	e.t.Helper()
	r, err := http.NewRequest(method, address, strings.NewReader(body))
	if err != nil {
		e.t.Fatal(err)
	}
	r.Header.Set("Accept-Encoding", accept)
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, b
}

func compress(t *testing.T, b []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	return z.EncodeAll(b, nil)
}

// made imports an image as raw bytes.
func (e *env) made(data []byte) string {
	e.t.Helper()
	rec, ref := e.importBody(data, "", "sr_id", string(e.pool.sr))
	if rec.Status != task.Success {
		e.t.Fatalf("task %v %v", rec.Status, rec.ErrorInfo)
	}
	return ref
}

func (e *env) holds(ref string, want []byte) {
	e.t.Helper()
	if _, _, got := e.get(e.url("/export_raw_vdi", "vdi", ref)); !bytes.Equal(got, want) {
		e.t.Errorf("%s holds other bytes (%d, want %d)", ref, len(got), len(want))
	}
}

func TestEveryFormGivesTheVDIBack(t *testing.T) {
	e := newEnv(t)
	data := sparseImage()
	ref := e.made(data)
	sevens := bytes.Repeat([]byte{7}, len(data))
	someOfSevens, someOfZeros := bytes.Clone(sevens), make([]byte, len(data))
	for _, i := range []int{0, 2, 3} {
		copy(someOfSevens[i<<20:(i+1)<<20], data[i<<20:])
		copy(someOfZeros[i<<20:(i+1)<<20], data[i<<20:])
	}
	for _, c := range []struct {
		form         []string
		inOld, inNew []byte // what a VDI of sevens, and a new one, hold then
	}{
		{[]string{"format", "raw"}, data, data},
		{[]string{"format", "extents"}, data, data},
		{[]string{"format", "blocks", "blocks", "0,2-3"}, someOfSevens, someOfZeros},
		{[]string{"format", "blocks", "blocks", "0-4"}, data, data},
	} {
		for _, encoding := range []string{"identity", "zstd"} {
			t.Run(strings.Join(c.form, " ")+" "+encoding, func(t *testing.T) {
				e.t = t
				status, h, body := e.exported(http.MethodGet, e.url("/export_raw_vdi", append([]string{"vdi", ref}, c.form...)...), encoding, "")
				if status != 200 || (h.Get("Content-Encoding") == "zstd") != (encoding == "zstd") {
					t.Fatalf("%d %v", status, h)
				}
				if (encoding == "zstd" || c.form[1] != "raw") && len(body) > len(data)*4/5 {
					t.Errorf("%d bytes for an image that is mostly holes", len(body))
				}
				old := e.made(sevens)
				if rec, _ := e.importBody(body, encoding, append([]string{"vdi", old}, c.form[:2]...)...); rec.Status != task.Success {
					t.Fatalf("over a VDI: %v %v", rec.Status, rec.ErrorInfo)
				}
				e.holds(old, c.inOld)
				rec, fresh := e.importBody(body, encoding, append([]string{"sr_id", string(e.pool.sr), "virtual_size", fmt.Sprint(len(data))}, c.form[:2]...)...)
				if rec.Status != task.Success {
					t.Fatalf("a new VDI: %v %v", rec.Status, rec.ErrorInfo)
				}
				e.holds(fresh, c.inNew)
			})
		}
	}
}

func TestExportForms(t *testing.T) {
	e := newEnv(t)
	data := sparseImage()
	ref := e.made(data)
	at := func(more ...string) string { return e.url("/export_raw_vdi", append([]string{"vdi", ref}, more...)...) }
	t.Run("a long list of blocks goes in the body", func(t *testing.T) {
		_, _, want := e.exported("GET", at("format", "blocks", "blocks", "0,2-3"), "", "")
		status, _, got := e.exported("POST", at("format", "blocks"), "", "[3, 2, 0, 2]")
		if status != 200 || !bytes.Equal(got, want) {
			t.Errorf("%d, %d bytes, want %d", status, len(got), len(want))
		}
	})
	t.Run("a range is of the bytes, never of what is compressed", func(t *testing.T) {
		r, _ := http.NewRequest("GET", at("format", "raw"), nil)
		r.Header.Set("Range", "bytes=100-199")
		r.Header.Set("Accept-Encoding", "zstd")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 206 || resp.Header.Get("Content-Encoding") != "" || !bytes.Equal(b, data[100:200]) {
			t.Errorf("%d %v, %d bytes", resp.StatusCode, resp.Header, len(b))
		}
	})
	for accept, want := range map[string]bool{"gzip, zstd": true, "zstd;q=0": false, "zstd; q=0.5": true, "*": false, "": false, "zstd;q=x": false} {
		if _, h, _ := e.exported("GET", at("format", "extents"), accept, ""); (h.Get("Content-Encoding") == "zstd") != want {
			t.Errorf("Accept-Encoding %q gives %q", accept, h.Get("Content-Encoding"))
		}
	}
	for name, c := range map[string]struct {
		method, body string
		query        []string
		status       int
	}{
		"no list":                   {"GET", "", []string{"format", "blocks"}, 400},
		"a list that is none":       {"GET", "", []string{"format", "blocks", "blocks", "x"}, 400},
		"a block that is not there": {"GET", "", []string{"format", "blocks", "blocks", "5"}, 400},
		"a body that is no list":    {"POST", "{}", []string{"format", "blocks"}, 400},
		"numbers that are none":     {"POST", "[-1]", []string{"format", "blocks"}, 400},
		"a body without blocks":     {"POST", "[]", []string{"format", "raw"}, 400},
		"an unknown format":         {"GET", "", []string{"format", "vhd"}, 404},
	} {
		if status, _, _ := e.exported(c.method, at(c.query...), "", c.body); status != c.status {
			t.Errorf("%s: %d, want %d", name, status, c.status)
		}
	}
}

func TestABadStreamLeavesNothing(t *testing.T) {
	e := newEnv(t)
	data := sparseImage()
	ref := e.made(data)
	_, _, frames := e.exported("GET", e.url("/export_raw_vdi", "vdi", ref, "format", "extents"), "", "")
	flipped := bytes.Clone(frames)
	flipped[len(flipped)/2] ^= 1
	bomb := compress(t, make([]byte, 64*mib))
	sr := []string{"sr_id", string(e.pool.sr)}
	for name, c := range map[string]struct {
		body     []byte
		encoding string
		query    []string
		code     string
	}{
		"cut off":                     {frames[:len(frames)-1], "", []string{"format", "extents"}, xapi.VDIIOError},
		"a bit":                       {flipped, "", []string{"format", "extents"}, xapi.ImportError},
		"more after its end":          {append(bytes.Clone(frames), 0), "", []string{"format", "extents"}, xapi.ImportError},
		"of another form":             {frames, "", []string{"format", "blocks"}, xapi.ImportError},
		"no frames":                   {data, "", []string{"format", "extents"}, xapi.ImportError},
		"compressed, cut off":         {compress(t, frames)[:1000], "zstd", []string{"format", "extents"}, xapi.VDIIOError},
		"not compressed":              {frames, "zstd", []string{"format", "extents"}, xapi.ImportError},
		"more than was said":          {bomb, "zstd", []string{"format", "raw", "virtual_size", fmt.Sprint(mib)}, xapi.ImportError},
		"less than was said":          {compress(t, data), "zstd", []string{"format", "raw", "virtual_size", fmt.Sprint(9 * mib)}, xapi.VDIIOError},
		"a frame beyond a small size": {bomb, "zstd", []string{"format", "extents"}, xapi.ImportError},
	} {
		t.Run(name, func(t *testing.T) {
			e.t = t
			if rec, _ := e.importBody(c.body, c.encoding, append(c.query, sr...)...); rec.Status != task.Failure || rec.ErrorInfo[0] != c.code {
				t.Errorf("task %v %v, want %s", rec.Status, rec.ErrorInfo, c.code)
			}
			if vols, _ := e.pool.repo.Scan(context.Background()); len(vols) != 1 {
				t.Errorf("left: %v", vols)
			}
		})
	}
	e.t = t
	t.Run("a bomb for a VDI that is there", func(t *testing.T) {
		if rec, _ := e.importBody(bomb, "zstd", "vdi", ref); rec.Status != task.Failure || rec.ErrorInfo[0] != xapi.VDITooSmall {
			t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
		}
	})
	for name, c := range map[string]struct {
		encoding string
		query    []string
		status   int
	}{
		"another encoding":           {"gzip", []string{"format", "raw"}, 415},
		"compressed of unknown size": {"zstd", []string{"format", "raw"}, 400},
		"a size that is none":        {"zstd", []string{"format", "raw", "virtual_size", "x"}, 400},
	} {
		status, p, _ := e.put(e.url("/import_raw_vdi", append(c.query, sr...)...), bytes.NewReader(data), func(r *http.Request) { r.Header.Set("Content-Encoding", c.encoding) })
		if status != c.status || p.Message == "" {
			t.Errorf("%s: %d %+v", name, status, p)
		}
	}
}

func TestFramesComeInChunksOfUnknownLength(t *testing.T) {
	e := newEnv(t)
	data := sparseImage()
	_, _, frames := e.exported("GET", e.url("/export_raw_vdi", "vdi", e.made(data), "format", "extents"), "", "")
	ref := e.newTask()
	e.put(e.url("/import_raw_vdi", "format", "extents", "sr_id", string(e.pool.sr), "task_id", string(ref)), io.MultiReader(bytes.NewReader(frames)))
	rec := e.outcome(ref)
	if rec.Status != task.Success {
		t.Fatalf("task %v %v", rec.Status, rec.ErrorInfo)
	}
	e.holds(strings.TrimSuffix(strings.TrimPrefix(rec.Result, "<value>"), "</value>"), data)
}

func TestTheBlockMapOfAVDI(t *testing.T) {
	e := newEnv(t)
	data := sparseImage()
	ref := e.made(data)
	if status, _, b := e.get(e.url("/vdi_block_map", "vdi", ref)); status != 404 || !bytes.Contains(b, []byte(xapi.VDINotAvailable)) {
		t.Errorf("a VDI without a map: %d %s", status, b)
	}
	if status, _, _ := e.get(e.url("/vdi_block_map")); status != 404 {
		t.Errorf("no VDI: %d", status)
	}
	e.pool.mapped = true
	status, h, b := e.get(e.url("/vdi_block_map", "vdi", ref))
	m, err := vdi.ReadMap(bytes.NewReader(b), strings.Trim(h.Get("ETag"), `"`))
	if status != 200 || err != nil || m.Size != 5*mib || len(m.Blocks) != 4 || fmt.Sprint(len(b)) != h.Get("Content-Length") {
		t.Errorf("%d %v %v: %+v", status, h, err, m)
	}
}

package upload

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/patchd/patchd/pkg/delta"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// uploaded puts a patch with that payload.
func (e *env) uploaded(uuid xapi.UUID, payload []byte) pool.Patch {
	e.t.Helper()
	if status, p, _ := e.put(e.url("/pool_patch_upload"), bytes.NewReader(sign(e.t, payload, "-z", "0"))); status != http.StatusCreated {
		e.t.Fatalf("upload: %d %+v", status, p)
	}
	_, rec := e.patchOf(uuid)
	return rec
}

func (e *env) chunks(query ...string) (status int, base string, body []byte) {
	e.t.Helper()
	res, err := http.Get(e.url("/pool_patch_chunks", query...))
	if err != nil {
		e.t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err = io.ReadAll(res.Body); err != nil {
		e.t.Fatal(err)
	}
	return res.StatusCode, res.Header.Get(baseHeader), body
}

func TestChunksAreThoseOfThePayload(t *testing.T) {
	e := newEnv(t)
	uuid := xapi.NewUUID()
	payload := program(uuid, 3<<20)
	rec := e.uploaded(uuid, payload)
	want, err := delta.BuildIndex(bytes.NewReader(payload), int64(len(payload)))
	if err != nil {
		t.Fatal(err)
	}
	for _, query := range [][]string{{"uuid", string(uuid)}, {"name_label", rec.NameLabel}, {"uuid", string(uuid)}} {
		status, base, body := e.chunks(query...)
		got, err := delta.ReadIndex(bytes.NewReader(body))
		if status != http.StatusOK || base != string(uuid) || err != nil || got.Size != want.Size || len(got.Chunks) != len(want.Chunks) {
			t.Fatalf("%v: %d %s %v", query, status, base, err)
		}
		for i, c := range got.Chunks {
			if c != want.Chunks[i] {
				t.Fatalf("chunk %d is %+v", i, c)
			}
		}
	}
}

func TestChunksAreRefused(t *testing.T) {
	e := newEnv(t)
	uuid := xapi.NewUUID()
	rec := e.uploaded(uuid, program(uuid, 100))
	change := func(f func(v *pool.VDI)) {
		t.Helper()
		err := e.store.Update(context.Background(), func(tx *store.Tx) error {
			image, err := store.Read[pool.VDI](tx, pool.ClassVDI, rec.VDI)
			f(&image)
			tx.Put(pool.ClassVDI, rec.VDI, image)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	damaged := func() { change(func(v *pool.VDI) { v.Damage = "a byte is wrong" }) }
	gone := func() {
		err := e.store.Update(context.Background(), func(tx *store.Tx) error { tx.Delete(pool.ClassVDI, rec.VDI); return nil })
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		before func()
		query  []string
		status int
		code   string
	}{
		{"nothing is named", nil, nil, http.StatusBadRequest, xapi.InvalidValue},
		{"no uuid", nil, []string{"uuid", "x"}, http.StatusBadRequest, xapi.InvalidValue},
		{"an unknown uuid", nil, []string{"uuid", string(xapi.NewUUID())}, http.StatusNotFound, xapi.UUIDInvalid},
		{"an unknown name", nil, []string{"name_label", "x"}, http.StatusNotFound, xapi.CannotFindPatch},
		{"a damaged image", damaged, []string{"uuid", string(uuid)}, http.StatusConflict, xapi.VDIContentChanged},
		{"a name with a damaged image only", damaged, []string{"name_label", rec.NameLabel}, http.StatusNotFound, xapi.CannotFindPatch},
		{"the image is gone", gone, []string{"uuid", string(uuid)}, http.StatusNotFound, xapi.CannotFindPatch},
		{"a name without an image", nil, []string{"name_label", rec.NameLabel}, http.StatusNotFound, xapi.CannotFindPatch},
	} {
		if c.before != nil {
			c.before()
		}
		status, _, body := e.chunks(c.query...)
		if status != c.status || !strings.Contains(string(body), `"`+c.code+`"`) {
			t.Errorf("%s: %d %s", c.name, status, body)
		}
	}
	if res, err := http.Get(e.server.URL + "/pool_patch_chunks?uuid=" + string(uuid)); err != nil || res.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a session: %v %v", res, err)
	}
}

// An index is made once, also when many want it; the next makes it when the one
// who did goes away or fails.
func TestAnIndexIsMadeOnce(t *testing.T) {
	c := newChunkCache()
	ctx, cancel := context.WithCancel(context.Background())
	begun := make(chan struct{})
	first := make(chan error, 1)
	go func() {
		_, err := c.get(ctx, "a", func(ctx context.Context) ([]byte, error) {
			close(begun)
			<-ctx.Done()
			return nil, context.Cause(ctx)
		})
		first <- err
	}()
	<-begun
	made := 0
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			text, err := c.get(context.Background(), "a", func(context.Context) ([]byte, error) {
				made++
				return []byte("index"), nil
			})
			if string(text) != "index" || err != nil {
				t.Errorf("%q, %v", text, err)
			}
		})
	}
	gone, stop := context.WithCancel(context.Background())
	stop()
	if _, err := c.get(gone, "a", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("who does not wait: %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("who went away: %v", err)
	}
	wg.Wait()
	if made != 1 || len(c.turns) != 0 {
		t.Errorf("made %d times, %d turns are left", made, len(c.turns))
	}
}

func TestFewIndexesAreKept(t *testing.T) {
	c := newChunkCache()
	get := func(digest string, n int) (made bool) {
		text, err := c.get(context.Background(), digest, func(context.Context) ([]byte, error) { made = true; return make([]byte, n), nil })
		if len(text) != n || err != nil {
			t.Fatalf("%d bytes, %v", len(text), err)
		}
		return made
	}
	const third = maxKeptChunks/3 + 1
	for _, step := range []struct {
		digest string
		n      int
		made   bool
	}{
		{"a", third, true}, {"b", third, true}, {"a", third, false}, {"c", third, true}, {"b", third, true}, {"c", third, false}, {"a", third, true},
		{"large", maxKeptChunks + 1, true}, {"large", maxKeptChunks + 1, true}, {"a", third, false},
	} {
		if made := get(step.digest, step.n); made != step.made {
			t.Errorf("%+v: made %v", step, made)
		}
	}
	if c.size > maxKeptChunks || len(c.kept) != c.used.Len() {
		t.Errorf("%d bytes, %d and %d", c.size, len(c.kept), c.used.Len())
	}
}

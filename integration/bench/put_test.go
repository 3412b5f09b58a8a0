//go:build bench

package bench

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// rawHandler is the baseline: a PUT into a raw file, io.Copy and fsync.
func rawHandler(path string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f, err := os.Create(path)
		if err == nil {
			defer f.Close()
			if _, err = io.Copy(f, r.Body); err == nil {
				err = f.Sync()
			}
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
	})
}

// benchPut uploads 1 GiB over plain HTTP, and looks at what lies on the SR.
func benchPut(b *bench) []row {
	raw := filepath.Join(b.dir, "raw")
	server := httptest.NewServer(rawHandler(raw))
	defer server.Close()
	h := lab.Start(b, lab.Options{Dir: b.dir})
	s := h.Root()
	p := &lab.Patch{}
	path := b.signedFile(p, noise(1, gib))
	onSR := row{name: "BytesOnSR", what: "bytes on the SR after an upload of 1 GiB, less 4 MiB", baseline: "payload", target: 1.02}
	put := b.pairs(row{name: "Put1GiB", what: "PUT of 1 GiB: signature, SHA-256, block map, fsync", baseline: "PUT into a raw file, io.Copy, fsync", target: 1.0},
		func() time.Duration {
			defer os.Remove(raw)
			b.run("sync") // the disk is idle on both sides
			return b.curlPut(server.URL, "-", path)
		},
		func() time.Duration {
			b.run("sync")
			took := b.curlPut(h.URL+"/pool_patch_upload", s.Ref, path)
			onSR.figures = append(onSR.figures, float64(b.blocksBelow(filepath.Join(h.StateDir, "sr"))-4*mib)/float64(gib))
			destroyPatch(s, p)
			return took
		})
	return []row{put, onSR}
}

// blocksBelow is the room that the files of a folder take, in bytes.
func (b *bench) blocksBelow(dir string) (n int64) {
	b.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) == 0 {
		b.Fatalf("nothing lies in %s: %v", dir, err)
	}
	for _, f := range files {
		n += allocated(b, f)
	}
	return n
}

// benchPutTLS is the same over TLS.
func benchPutTLS(b *bench) []row {
	raw := filepath.Join(b.dir, "raw")
	server := httptest.NewTLSServer(rawHandler(raw))
	defer server.Close()
	h := lab.Start(b, lab.Options{Dir: b.dir})
	s := h.Root()
	p := &lab.Patch{}
	path := b.signedFile(p, noise(1, gib))
	return []row{b.pairs(row{name: "Put1GiBTLS", what: "the same over TLS", baseline: "the raw file over TLS", target: 1.05},
		func() time.Duration {
			defer os.Remove(raw)
			b.run("sync")
			return b.curlPut(server.URL, "-", path, "-k", "--http1.1")
		},
		func() time.Duration {
			b.run("sync")
			took := b.curlPut(h.TLSURL+"/pool_patch_upload", s.Ref, path, "-k", "--http1.1")
			destroyPatch(s, p)
			return took
		})}
}

// benchMemory uploads 8 GiB to a fresh daemon and reads its peak.
func benchMemory(b *bench) []row {
	h := lab.Start(b, lab.Options{Dir: b.dir})
	s := h.Root()
	p := &lab.Patch{}
	path := b.signedFile(p, noise(1, 8*gib))
	b.curlPut(h.URL+"/pool_patch_upload", s.Ref, path)
	return []row{{name: "Memory8GiB", what: "resident memory at an upload of 8 GiB", target: 100, unit: "MB", figures: []float64{float64(peakRSS(b, h.Pid())) / 1e6}}}
}

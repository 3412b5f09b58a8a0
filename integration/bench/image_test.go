//go:build bench

package bench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/vdi"
)

// allocated is the room a file takes, in bytes.
func allocated(t testing.TB, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

func (b *bench) system() dom0.Dom0 {
	b.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	d, err := dom0.New(dom0.Options{Log: log, CgroupPrefix: fmt.Sprintf("patchd-bench-%d", os.Getpid())})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { d.Close() })
	return d
}

// image makes an image with a payload of n bytes of noise.
func (b *bench) image(d dom0.Dom0, path string, n int64) vdi.Written {
	b.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	size := vdi.Size(n)
	if err := f.Truncate(size); err != nil {
		b.Fatal(err)
	}
	w, err := vdi.NewWriter(b.Context(), f, size, n, vdi.Options{Dom0: d})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Abort()
	if _, err := io.Copy(w, io.MultiReader(bytes.NewReader([]byte("#!/bin/sh\nexit 0\n")), noise(2, n-17))); err != nil {
		b.Fatal(err)
	}
	done, err := w.Finish(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	return done
}

// benchLayout makes images with hardly anything in them: what is measured is
// what the filesystem around the payload costs.
func benchLayout(b *bench) []row {
	d := b.system()
	var rows []row
	for _, size := range []int64{4 * gib, 32 * gib} {
		r := row{name: fmt.Sprintf("Layout%dGiB", size/gib), what: fmt.Sprintf("layout of an image of %d GiB, first to last step", size/gib), target: 50, unit: "ms"}
		for range benchRounds {
			f, err := os.CreateTemp(b.dir, "layout")
			if err == nil {
				err = f.Truncate(size)
			}
			if err != nil {
				b.Fatal(err)
			}
			r.figures = append(r.figures, float64(timed(func() {
				w, err := vdi.NewWriter(b.Context(), f, size, size/4, vdi.Options{Dom0: d})
				if err == nil {
					_, err = w.Write(make([]byte, 4096))
				}
				if err == nil {
					_, err = w.Finish(b.Context())
				}
				if err != nil {
					b.Fatal(err)
				}
			}).Microseconds())/1000)
			f.Close()
			os.Remove(f.Name())
		}
		rows = append(rows, r)
	}
	return rows
}

// benchVerify holds an image against its map, with the file in the page cache.
func benchVerify(b *bench) []row {
	path := filepath.Join(b.dir, "image")
	done := b.image(b.system(), path, gib)
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	plain := func() time.Duration {
		return timed(func() {
			h := sha256.New()
			// The image's data lies at its front.
			if _, err := io.Copy(h, io.NewSectionReader(f, 0, gib)); err != nil {
				b.Fatal(err)
			}
		})
	}
	return []row{b.pairs(row{name: "Verify1GiB", what: "digest check of 1 GiB, two cores free", baseline: "reading the file into SHA-256", target: 0.6}, plain,
		func() time.Duration {
			return timed(func() {
				if err := done.Map.Verify(b.Context(), f, nil); err != nil {
					b.Fatal(err)
				}
			})
		})}
}

package vdi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/patchd/patchd/pkg/xapi"
)

func TestPayloadReadsAnywhere(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		const n = 140*mib + 5 // beyond the first group
		f, _ := writeWith(t, o, 200*mib, n, io.MultiReader(payload(mib), io.LimitReader(zeroReader{}, n-2*mib), payload(mib)))
		p, err := OpenPayload(f)
		if err != nil {
			t.Fatal(err)
		}
		if p.Size() != n {
			t.Fatalf("%d bytes", p.Size())
		}
		same(t, io.NewSectionReader(p, 0, n), io.MultiReader(payload(mib), io.LimitReader(zeroReader{}, n-2*mib), payload(mib)))
		for _, c := range []struct {
			off, want int64
			err       error
		}{{n - 10, 10, io.EOF}, {n, 0, io.EOF}, {n + 1, 0, io.EOF}, {n - 100, 100, nil}, {7, 100, nil}} {
			if got, err := p.ReadAt(make([]byte, 100), c.off); int64(got) != c.want || err != c.err {
				t.Errorf("at %d: %d, %v; want %d, %v", c.off, got, err, c.want, c.err)
			}
		}
		if _, err := p.ReadAt(nil, -1); err == nil {
			t.Error("a negative offset is taken")
		}
	})
}

// Whatever is in an image, opening it ends with an error or with a payload that
// can be read or not; it never panics and never goes on for ever.
func TestADamagedImageIsAnError(t *testing.T) {
	f, _ := write(t, 8*mib, -1, payload(mib))
	whole := make([]byte, 8*mib)
	if _, err := f.ReadAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		b := bytes.Clone(whole)
		for range rapid.IntRange(1, 20).Draw(rt, "bytes") {
			at := rapid.IntRange(1024, 200<<10).Draw(rt, "at")
			b[at] = rapid.Byte().Draw(rt, "value")
		}
		p := &pages{size: int64(len(b)), m: map[int64][]byte{}, base: bytes.NewReader(b)}
		l, err := openFileLayout(p)
		if err == nil && countBlocks(l.rows) > 8*gib/blockSize {
			rt.Fatal("more blocks than the image has")
		}
		if err == nil && len(l.rows) > 0 {
			if err := l.take(min(l.rows[0].count, 3)); err == nil {
				l.finish(2*blockSize+1, timeOf(rt)) //nolint:errcheck // either way
			}
		}
	})
}

// over writes n bytes of r over a copy of base, as tests of Over need it.
func over(t *testing.T, f *os.File, size, expect int64, r io.Reader) (Written, error) {
	t.Helper()
	w, err := NewWriter(context.Background(), f, size, expect, Options{Over: true})
	if err != nil {
		return Written{}, err
	}
	defer w.Abort()
	if _, err := io.Copy(w, r); err != nil {
		return Written{}, err
	}
	return w.Finish(context.Background())
}

func TestOverWritesOnlyWhatChanged(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		dir := mountXFS(t)
		const n, size = 40*mib - 100, 160 * mib
		base := createIn(t, dir, "base", size)
		writeTo(t, base, o, size, n, payload(n))
		clone := createIn(t, dir, "clone", size)
		if err := unix.IoctlFileClone(int(clone.Fd()), int(base.Fd())); err != nil {
			t.Fatal(err)
		}
		if ok, err := Fits(clone, size, n+50); !ok || err != nil {
			t.Fatalf("Fits: %v, %v", ok, err)
		}
		data, _ := io.ReadAll(payload(n))
		changed, _ := io.ReadAll(payload(mib))
		copy(data[11*mib+77:], changed)
		clear(data[20*mib : 20*mib+300<<10])
		data = append(data, "fifty more bytes"...)
		before := freeRoom(t, dir)
		done, err := over(t, clone, size, int64(len(data)), bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if done.Size != int64(len(data)) {
			t.Fatalf("%d bytes", done.Size)
		}
		if used := before - freeRoom(t, dir); used > 2*mib {
			t.Errorf("a change of 1.3 MiB takes %d bytes: blocks that are the same were written", used)
		}
		checkMap(t, clone, done.Map, size)
		fsck(t, clone.Name())
		checkMounted(t, clone.Name(), done.Size, bytes.NewReader(data))
		fsck(t, base.Name())
		checkMounted(t, base.Name(), n, payload(n))
	})
}

// Fewer bytes than were expected: the blocks at the end become free, and zeros.
func TestOverCutsAndRefuses(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		const n, size = 10*mib + 1, 40 * mib
		f, _ := writeWith(t, o, size, n, payload(n))
		if ok, err := Fits(f, size, n+blockSize); ok || err != nil {
			t.Errorf("a payload of a block more fits: %v", err)
		}
		if ok, err := Fits(f, size+mib, n); ok || err != nil {
			t.Errorf("a larger image fits: %v", err)
		}
		if ok, err := Fits(fresh(t, size), size, n); ok || err != nil {
			t.Errorf("an empty image fits: %v", err)
		}
		if _, err := over(t, f, size, n-blockSize, payload(1)); err == nil || !strings.Contains(err.Error(), "blocks") {
			t.Errorf("another count of blocks: %v", err)
		}
		if _, err := over(t, f, size, n, payload(n+blockSize)); !xapi.Is(err, xapi.MessageTooLarge) {
			t.Errorf("more bytes than blocks: %v", err)
		}
		done, err := over(t, f, size, n, payload(3*mib+9))
		if err != nil {
			t.Fatal(err)
		}
		checkMap(t, f, done.Map, size)
		fsck(t, f.Name())
		checkMounted(t, f.Name(), 3*mib+9, payload(3*mib+9))
		if a, err := Allocated(f); err != nil || a > 4*mib {
			t.Errorf("the image takes %d bytes, %v", a, err)
		}
	})
}

// mountXFS mounts a fresh xfs filesystem.
func mountXFS(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "xfs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 400*mib); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.xfs", "-q", "-m", "reflink=1", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.xfs: %v\n%s", err, out)
	}
	dir := t.TempDir()
	busy(func() bool {
		out, err := exec.Command("mount", "-t", "xfs", "-o", "loop", image, dir).CombinedOutput()
		if err != nil && !bytes.Contains(out, []byte("busy")) {
			t.Fatalf("mount: %v\n%s", err, out)
		}
		return err != nil
	})
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// createIn makes a fresh image in a folder.
func createIn(t *testing.T, dir, name string, size int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func freeRoom(t *testing.T, dir string) int64 {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}

// interrupt writes the first part of a payload and gives the image as a crash
// at that moment leaves it, and how much of the payload is safe.
func interrupt(t *testing.T, o Options, size, expect int64, first []byte, spoil func(f *os.File)) (*os.File, int64) {
	t.Helper()
	f := fresh(t, size)
	w, err := NewWriter(context.Background(), f, size, expect, o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if _, err := w.Write(first); err != nil {
		t.Fatal(err)
	}
	if err := w.Sync(); err != nil {
		t.Fatal(err)
	}
	done := w.Flushed()
	if done != int64(len(first))/blockSize*blockSize {
		t.Errorf("after Sync %d bytes of %d are flushed", done, len(first))
	}
	crashed := fresh(t, size)
	if err := Copy(context.Background(), crashed, f, nil); err != nil {
		t.Fatal(err)
	}
	spoil(crashed)
	return crashed, done
}

func TestAnInterruptedImageIsGoneOnWith(t *testing.T) {
	const n = 140*mib + 4321
	data, _ := io.ReadAll(payload(n))
	clear(data[3*mib+5 : 6*mib])
	clear(data[60*mib : 100*mib])
	for _, c := range []struct {
		name  string
		first int64
		spoil func(f *os.File, o Options)
	}{
		{"after nothing", 0, nil},
		{"after a part of a block", 100, nil},
		{"in the first rows", 5*mib + 77, nil},
		{"in the second group", 135 * mib, nil},
		{"at the end", n, nil},
		{"with later bytes on the disk already", 5*mib + 77, func(f *os.File, _ Options) {
			f.WriteAt(data[:mib], 70*mib)
			f.WriteAt(data[:mib], 150*mib)
		}},
		{"while it was finished", 50 * mib, func(f *os.File, o Options) {
			l, err := newLayout(context.Background(), 560*mib, o)
			if err == nil {
				_, err = l.next()
			}
			if err == nil {
				err = l.take(1000)
			}
			end, ferr := l.finish(1000*blockSize, timeOf(nil))
			if errors.Join(err, ferr, end.pages.writeTo(f)) != nil {
				panic("cannot spoil")
			}
		}},
	} {
		eachLayout(t, func(t *testing.T, o Options) {
			t.Run(c.name, func(t *testing.T) {
				const size = 560 * mib
				f, done := interrupt(t, o, size, n, data[:c.first], func(f *os.File) {
					if c.spoil != nil {
						c.spoil(f, o)
					}
				})
				o.Done = done
				goOn(t, f, o, size, data)
				fsck(t, f.Name())
				checkMounted(t, f.Name(), n, bytes.NewReader(data))
			})
		})
	}
}

// goOn finishes an interrupted image.
func goOn(t *testing.T, f *os.File, o Options, size int64, data []byte) {
	t.Helper()
	w, err := NewWriter(context.Background(), f, size, int64(len(data)), o)
	if err != nil {
		if o.Done == 0 && strings.Contains(err.Error(), "not fresh") {
			t.Fatal(err)
		}
		t.Fatal(err)
	}
	defer w.Abort()
	if got := w.Flushed(); got != o.Done {
		t.Errorf("a new Writer has %d bytes flushed, not %d", got, o.Done)
	}
	n, err := io.Copy(w, w.Resume())
	if err != nil || n != o.Done {
		t.Fatalf("%d bytes to go on with, %v", n, err)
	}
	if _, err := w.Write(data[n:]); err != nil {
		t.Fatal(err)
	}
	done, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	checkMap(t, f, done.Map, size)
}

// The bytes that are said to stand in the image must be given again.
func TestFinishRefusesAPayloadShorterThanWhatIsThere(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		data, _ := io.ReadAll(payload(mib))
		f, done := interrupt(t, o, 8*mib, mib, data, func(*os.File) {})
		o.Done = done
		w, err := NewWriter(context.Background(), f, 8*mib, mib, o)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		w.Write(data[:5000])
		if _, err := w.Finish(context.Background()); err == nil {
			t.Error("an image with less than it had is finished")
		}
	})
}

// However a payload is written, synced and broken off, it can be gone on with.
func TestResumeAnywhere(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		rapid.Check(t, func(rt *rapid.T) {
			n := rapid.IntRange(1, 600<<10).Draw(rt, "payload")
			data := make([]byte, n)
			rand.NewChaCha8([32]byte{byte(n)}).Read(data)
			o := o
			o.Buffer = blockSize * rapid.IntRange(1, 100).Draw(rt, "buffer")
			f := memoryImage(rt, 12*mib)
			defer f.Close()
			o.Done = 0
			for round := 0; ; round++ {
				w, err := NewWriter(context.Background(), f, 12*mib, int64(n), o)
				if err != nil {
					rt.Fatal(err)
				}
				if _, err := io.Copy(w, w.Resume()); err != nil {
					rt.Fatal(err)
				}
				until := n
				if round < 3 {
					until = rapid.IntRange(int(o.Done), n).Draw(rt, "until")
				}
				for i, at := 0, int(o.Done); at < until; i++ {
					k := until - at
					if i < 6 {
						k = rapid.IntRange(1, k).Draw(rt, "piece")
					}
					w.Write(data[at : at+k])
					at += k
					if rapid.Bool().Draw(rt, "sync") {
						if err := w.Sync(); err != nil {
							rt.Fatal(err)
						}
					}
				}
				if until == n {
					done, err := w.Finish(context.Background())
					if err != nil {
						rt.Fatal(err)
					}
					want, err := BuildMap(context.Background(), f, 12*mib)
					if err != nil || !done.Map.Equal(want) {
						rt.Fatalf("another map than that of the image: %v", err)
					}
					break
				}
				w.Abort()
				o.Done = w.Flushed() / blockSize * blockSize
				if o.Done == 0 { // a new draft then
					f.Close()
					f = memoryImage(rt, 12*mib)
				}
			}
			p, err := OpenPayload(f)
			if err != nil {
				rt.Fatal(err)
			}
			got, err := io.ReadAll(io.NewSectionReader(p, 0, p.Size()))
			if err != nil || !bytes.Equal(got, data) {
				rt.Fatalf("other bytes than were written: %v", err)
			}
		})
	})
}

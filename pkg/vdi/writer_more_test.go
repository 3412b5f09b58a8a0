package vdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/patchd/patchd/pkg/xapi"
)

func timeOf(*rapid.T) time.Time { return time.Unix(1<<33, 999) }

// memoryImage is a fresh image that needs no disk.
func memoryImage(t rapid.TB, size int64) *os.File {
	f, err := memoryFile("image", size, nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// quiet fails the test when goroutines are left.
func quiet(t testing.TB, before int) {
	t.Helper()
	for range 200 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	buf := make([]byte, 64<<10)
	t.Errorf("goroutines are left:\n%s", buf[:runtime.Stack(buf, true)])
}

// The whole way of a payload longer than 4 GiB.
func TestWriteMoreThan4GiB(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		const n = 1<<32 + 1
		f, got := writeWith(t, o, 5*gib, -1, io.MultiReader(io.LimitReader(zeroReader{}, n-9000), payload(9000)))
		if got != n {
			t.Fatalf("%d bytes", got)
		}
		fsck(t, f.Name())
		checkEnd(t, f.Name(), n, 9000)
	})
}

func TestWriteToABlockDevice(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		const n, size = 9*mib + 5, 40 * mib
		image := fresh(t, size)
		dev := loop(t, image.Name())
		writeTo(t, dev, o, size, n, payload(n))
		data, _ := io.ReadAll(payload(n))
		o.Done = 3 * mib
		goOn(t, dev, o, size, data) // clears by the device's own means
		dev.Close()
		fsck(t, image.Name())
		checkMounted(t, image.Name(), n, payload(n))
	})
}

func TestReadFromHandsOnErrors(t *testing.T) {
	broken := errors.New("connection lost")
	f := fresh(t, 8*mib)
	w, err := NewWriter(context.Background(), f, 8*mib, -1, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	n, err := w.ReadFrom(iotest.DataErrReader(io.MultiReader(payload(mib), iotest.ErrReader(broken))))
	if n != mib || !errors.Is(err, broken) {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := w.ReadFrom(idle{}); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("a reader that gives nothing: %v", err)
	}
	if n, err := w.ReadFrom(iotest.HalfReader(payload(2 * mib))); n != 2*mib || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	done, err := w.Finish(context.Background())
	if err != nil || done.Size != 3*mib {
		t.Fatalf("%+v, %v", done, err)
	}
	p, err := OpenPayload(f)
	if err != nil {
		t.Fatal(err)
	}
	same(t, io.NewSectionReader(p, 0, 3*mib), io.MultiReader(payload(mib), payload(2*mib)))
	if _, err := w.ReadFrom(payload(1)); err == nil {
		t.Error("a finished writer reads")
	}
}

type idle struct{}

func (idle) Read([]byte) (int, error) { return 0, nil }

func TestABufferIsRefused(t *testing.T) {
	for _, o := range []Options{{Buffer: 100}, {Buffer: -4096}, {Buffer: 1 << 30}, {Done: 100}, {Done: -4096}, {Done: 9 * mib}} {
		if _, err := NewWriter(context.Background(), fresh(t, 8*mib), 8*mib, -1, o); err == nil {
			t.Errorf("%+v is taken", o)
		}
	}
}

// A disk that gets full a little later each time: at the data, at the
// filesystem around them; until it is large enough.
func TestAFullDiskAtEveryStep(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		before := runtime.NumGoroutine()
		for room := 64 << 10; ; room += 256 << 10 {
			err := writeIntoRoom(t, o, room)
			quiet(t, before)
			if err == nil {
				return
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("with room for %d bytes: %v", room, err)
			}
			if room > 16<<20 {
				t.Fatalf("not even %d bytes are enough for 3 MiB", room)
			}
		}
	})
}

func writeIntoRoom(t *testing.T, o Options, room int) error {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+strconv.Itoa(room)); err != nil {
		t.Fatal(err)
	}
	defer unmount(t, dir)
	f, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(200 * mib); err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(context.Background(), f, 200*mib, -1, o)
	if err != nil {
		return err
	}
	defer w.Abort()
	if _, err := io.Copy(w, payload(3*mib)); err != nil {
		return err
	}
	if err := w.Sync(); err != nil {
		return err
	}
	_, err = w.Finish(context.Background())
	return err
}

// Abort and the end of the context leave nothing, whatever is going on.
func TestNothingRunsOnAfterAbort(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		before := runtime.NumGoroutine()
		for _, n := range []int64{0, 100, mib, 30 * mib} {
			ctx, cancel := context.WithCancel(context.Background())
			w, err := NewWriter(ctx, fresh(t, 300*mib), 300*mib, -1, o)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(w, payload(n)); err != nil {
				t.Fatal(err)
			}
			if n == mib {
				cancel()
				if err := w.Sync(); !errors.Is(err, context.Canceled) {
					t.Errorf("Sync after cancel: %v", err)
				}
			}
			w.Abort()
			if err := w.Sync(); err == nil {
				t.Error("Sync after Abort")
			}
			cancel()
			quiet(t, before)
		}
	})
}

// A payload that ends around the end of a row of free blocks: of the first
// group, and after the fifth, where the extent tree gets a block of its own.
func TestWriteEndsAtTheEdgeOfARow(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		l, err := newLayout(context.Background(), gib, o)
		if err != nil {
			t.Fatal(err)
		}
		var edges []int64
		taken := int64(0)
		for len(edges) < 6 {
			r, err := l.next()
			if errors.Is(err, errNoBlocks) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := l.take(r.count); err != nil {
				t.Fatal(err)
			}
			taken += r.count
			edges = append(edges, taken*blockSize)
		}
		edges[len(edges)-1] -= 2 * blockSize // of the last row there may be no more
		for _, i := range []int{0, len(edges) - 3, len(edges) - 2, len(edges) - 1} {
			for _, d := range []int64{-blockSize - 1, -1, 0, 1, blockSize} {
				n := edges[i] + d
				t.Run(fmt.Sprintf("row %d %+d", i, d), func(t *testing.T) {
					f, _ := writeWith(t, o, gib, -1, io.MultiReader(io.LimitReader(zeroReader{}, n-9000), payload(9000)))
					fsck(t, f.Name())
					checkEnd(t, f.Name(), n, 9000)
				})
			}
		}
	})
}

// capacity is how many bytes an image of size bytes holds.
func capacity(t *testing.T, o Options, size int64) int64 {
	t.Helper()
	l, err := newLayout(context.Background(), size, o)
	taken := int64(0)
	for err == nil {
		var r run
		if r, err = l.next(); err == nil {
			taken += r.count
			err = l.take(r.count)
		}
	}
	if !errors.Is(err, errNoBlocks) {
		t.Fatal(err)
	}
	return taken * blockSize
}

func TestWriteFillsTheWholeImageAndRefusesMore(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		for _, size := range []int64{4 * mib, 200 * mib, 700 * mib} {
			t.Run(fmt.Sprint(size/mib, " MiB"), func(t *testing.T) {
				f := fresh(t, size)
				w, err := NewWriter(context.Background(), f, size, -1, o)
				if err != nil {
					t.Fatal(err)
				}
				defer w.Abort()
				held := capacity(t, o, size)
				_, err = io.Copy(w, io.LimitReader(zeroReader{}, held+1))
				if err == nil {
					_, err = w.Finish(context.Background())
				}
				if !xapi.Is(err, xapi.MessageTooLarge) || !strings.Contains(err.Error(), "gpg -z 0") {
					t.Fatalf("one byte too much for the image gives %v", err)
				}
				if held < size*9/10 && size > 4*mib {
					t.Errorf("an image of %d bytes holds only %d", size, held)
				}
				g, _ := writeWith(t, o, size, -1, io.MultiReader(io.LimitReader(zeroReader{}, held-5000), payload(5000)))
				fsck(t, g.Name())
				checkEnd(t, g.Name(), held, 5000)
			})
		}
	})
}

// A storage that gives back something else than what was written to it does not
// get that into the map: a host takes the payload of an image with this map for
// verified.
func TestTheMapIsOfWhatWasWritten(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		const size, n = 24 * mib, 5*mib + 70000
		plain, _ := writeWith(t, o, size, n, payload(n))
		p, err := OpenPayload(plain)
		if err != nil {
			t.Fatal(err)
		}
		start := p.runs[0].start * blockSize
		for what, at := range map[string]int64{"the first byte": start, "the last whole block": start + n/blockSize*blockSize - 1, "behind the payload": start + n + 2*blockSize} {
			f := fresh(t, size)
			w, err := NewWriter(t.Context(), f, size, n, o)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(w, payload(n)); err != nil {
				t.Fatal(err)
			}
			if err := w.Sync(); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 1)
			if _, err := f.ReadAt(b, at); err != nil {
				t.Fatal(err)
			}
			b[0] ^= 1
			if _, err := f.WriteAt(b, at); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Finish(t.Context()); !xapi.Is(err, xapi.VDIIOError) {
				t.Errorf("%s changed: %v", what, err)
			}
		}
	})
}

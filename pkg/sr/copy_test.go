package sr_test

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/memory"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// goldenVolume makes a volume of 8 MiB with 3 MiB of data, and its map.
func goldenVolume(t *testing.T, r sr.Repository) (sr.Name, *vdi.Map) {
	t.Helper()
	n := sr.Live(xapi.NewUUID())
	_, err := r.Create(t.Context(), n, 8<<20)
	must(t, err)
	f := opened(t, r, n, sr.ReadWrite)
	for i := range int64(3) {
		_, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 1<<20), 2*i<<20)
		must(t, err)
	}
	m, err := vdi.BuildMap(t.Context(), f, 8<<20)
	must(t, err)
	return n, m
}

func opened(t *testing.T, r sr.Repository, n sr.Name, mode sr.Mode) *os.File {
	t.Helper()
	f, err := r.Open(t.Context(), n, mode)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func volumes(t *testing.T, r sr.Repository) int {
	t.Helper()
	list, err := r.Scan(t.Context())
	must(t, err)
	return len(list)
}

func TestCopyVerified(t *testing.T) {
	for name, clones := range map[string]bool{"by bytes": false, "by a clone": true} {
		t.Run(name, func(t *testing.T) {
			src := attached(t, &memory.Driver{Clones: clones})
			dst := src
			if !clones {
				dst = attached(t, &memory.Driver{})
			}
			golden, m := goldenVolume(t, src)
			made := sr.Live(xapi.NewUUID())
			must(t, sr.CopyVerified(t.Context(), dst, made, src, golden, m, false, nil))
			must(t, m.Verify(t.Context(), opened(t, dst, made, sr.ReadOnly), nil))

			_, err := opened(t, src, golden, sr.ReadWrite).WriteAt([]byte{9}, 100)
			must(t, err)
			before := volumes(t, dst)
			err = sr.CopyVerified(t.Context(), dst, sr.Live(xapi.NewUUID()), src, golden, m, false, nil)
			var d *vdi.DamageError
			if !errors.As(err, &d) || d.Total != 1 || d.Blocks[0] != 0 {
				t.Errorf("a damaged source: %v", err)
			}
			if after := volumes(t, dst); after != before {
				t.Errorf("%d volumes, %d before", after, before)
			}
		})
	}
}

// A copy that fails at effect 0, 1, 2 … goes on when it is called again, and
// keeps what it has.
func TestCopyVerifiedResumesAfterEveryEffect(t *testing.T) {
	ctx := t.Context()
	src := attached(t, &memory.Driver{})
	golden, m := goldenVolume(t, src)
	for n := 0; ; n++ {
		point, fired := fail(n)
		plain := attached(t, &memory.Driver{})
		made := sr.Live(xapi.NewUUID())
		err := sr.CopyVerified(ctx, sr.FaultyAt(plain, point), made, src, golden, m, true, nil)
		if !*fired {
			must(t, err)
			if n < 4 {
				t.Errorf("only %d points", n)
			}
			return
		}
		if err == nil {
			t.Fatalf("point %d: no error", n)
		}
		must(t, sr.CopyVerified(ctx, plain, made, src, golden, m, true, nil))
		must(t, m.Verify(ctx, opened(t, plain, made, sr.ReadOnly), nil))
	}
}

func TestCopyVerifiedKeepsWhatIsThere(t *testing.T) {
	ctx := t.Context()
	src, dst := attached(t, &memory.Driver{}), attached(t, &memory.Driver{})
	golden, m := goldenVolume(t, src)
	made := sr.Live(xapi.NewUUID())
	_, err := dst.Create(ctx, made, 8<<20)
	must(t, err)
	f := opened(t, dst, made, sr.ReadWrite)
	_, err = f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0) // right
	must(t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte("x"), 3<<20), 5<<20) // wrong, also where nothing is to be
	must(t, err)
	// The block that is there already need not be good in the source.
	_, err = opened(t, src, golden, sr.ReadWrite).WriteAt([]byte{9}, 100)
	must(t, err)
	must(t, sr.CopyVerified(ctx, dst, made, src, golden, m, true, nil))
	must(t, m.Verify(ctx, f, nil))

	if err := sr.CopyVerified(ctx, dst, made, src, golden, m, false, nil); !errors.Is(err, os.ErrExist) {
		t.Errorf("without resume a volume that is there: %v", err)
	}
	must(t, m.Verify(ctx, f, nil))
}

func TestCopyVerifiedIsRefusedWithoutRoom(t *testing.T) {
	src := attached(t, &memory.Driver{})
	golden, m := goldenVolume(t, src)
	dst := attached(t, &memory.Driver{Capacity: 2 << 20})
	err := sr.CopyVerified(t.Context(), dst, sr.Live(xapi.NewUUID()), src, golden, m, true, nil)
	if !xapi.Is(err, xapi.OutOfSpace) || !strings.Contains(err.Error(), "3145728") || volumes(t, dst) > 0 {
		t.Errorf("%v", err)
	}
}

//go:build bench

package bench

import (
	"os"
	"path/filepath"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/vdi"
)

// benchCopy copies an uploaded patch of 1 GiB between two ext SRs, and counts
// the bytes that such a copy moves.
func benchCopy(b *bench) []row {
	h := lab.Start(b, lab.Options{Dir: b.dir})
	s := h.Root()
	from, to := b.loopSR(s, "ext", 8*gib), b.loopSR(s, "ext", 8*gib)
	setDefault(s, from)
	p := &lab.Patch{}
	b.curlPut(h.URL+"/pool_patch_upload", s.Ref, b.signedFile(p, noise(1, gib)))
	ref := s.Call("pool_patch.get_VDI", s.Call("pool_patch.get_by_uuid", string(p.UUID)))
	golden := filepath.Join(mountOf(h, s, from), s.Call("VDI.get_uuid", ref).(string)+".img")
	plain := filepath.Join(mountOf(h, s, to), "plain")
	r := b.pairs(row{name: "CopyExt", what: "VDI.copy of 1 GiB between ext SRs", baseline: "cp --sparse=always, fsync", target: 1.1},
		func() time.Duration {
			defer os.Remove(plain)
			dropCache(b)
			return timed(func() { b.run("sh", "-c", `cp --sparse=always "$1" "$2" && sync "$2"`, "sh", golden, plain) })
		},
		func() time.Duration {
			dropCache(b)
			var twin any
			took := timed(func() { twin = s.Call("VDI.copy", ref, to) })
			s.Call("VDI.destroy", twin)
			return took
		})
	return []row{r, b.moved(golden)}
}

// dropCache makes both sides read from the disk.
func dropCache(b *bench) {
	b.Helper()
	b.run("sync")
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		b.Fatal(err)
	}
}

// moved counts the bytes that a verified copy writes.
func (b *bench) moved(golden string) row {
	b.Helper()
	src, err := os.Open(golden)
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		b.Fatal(err)
	}
	m, err := vdi.BuildMap(b.Context(), src, st.Size())
	if err != nil {
		b.Fatal(err)
	}
	dst, err := os.Create(filepath.Join(b.dir, "copy"))
	if err == nil {
		err = dst.Truncate(st.Size())
	}
	if err != nil {
		b.Fatal(err)
	}
	defer dst.Close()
	n, err := vdi.CopyVerified(b.Context(), dst, src, m, vdi.CopyOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return row{name: "CopyMoved", what: "bytes moved by a copy", baseline: "allocated bytes", target: 1.02, figures: []float64{float64(n) / float64(allocated(b, golden))}}
}

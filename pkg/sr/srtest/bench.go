package srtest

import (
	"testing"

	"github.com/patchd/patchd/pkg/sr"
)

// Bench measures what an upload and an apply ask of a driver: the life of a
// part volume, and the clone, or copy, of a golden image with 64 MiB in it.
func Bench(b *testing.B, make func(b *testing.B) (sr.Driver, sr.Config)) {
	d, c := make(b)
	must(b, d.Create(b.Context(), c))
	r, err := d.Attach(b.Context(), c)
	must(b, err)
	defer r.Detach(b.Context())
	golden := live()
	filled(b, r, golden, 256*mib, pattern(1, 64*mib))
	b.Run("LifeCycle", func(b *testing.B) {
		for b.Loop() {
			p, l := part(), live()
			_, err := r.Create(b.Context(), p, 1<<30)
			must(b, err)
			must(b, r.Rename(b.Context(), p, l))
			must(b, r.Destroy(b.Context(), l))
		}
	})
	b.Run("CloneOrCopy", func(b *testing.B) {
		for b.Loop() {
			w := work()
			must(b, sr.Copy(b.Context(), r, w, r, golden, nil))
			must(b, r.Destroy(b.Context(), w))
		}
	})
}

package vdi

import (
	"context"
	"fmt"
	"io"
	"os"
	"testing"
)

func BenchmarkFill1GiB(b *testing.B) {
	chunk, _ := io.ReadAll(payload(mib))
	b.Run("image", func(b *testing.B) {
		b.SetBytes(gib)
		for range b.N {
			f := fresh(b, 4*gib)
			w, err := NewWriter(context.Background(), f, 4*gib, gib, Options{})
			if err != nil {
				b.Fatal(err)
			}
			for range gib / mib {
				if _, err := w.Write(chunk); err != nil {
					b.Fatal(err)
				}
			}
			if _, err := w.Finish(context.Background()); err != nil {
				b.Fatal(err)
			}
			os.Remove(f.Name())
		}
	})
	b.Run("raw file", func(b *testing.B) {
		b.SetBytes(gib)
		for range b.N {
			f := fresh(b, 4*gib)
			for i := range gib / mib {
				if _, err := f.WriteAt(chunk, i*mib); err != nil {
					b.Fatal(err)
				}
			}
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
			os.Remove(f.Name())
		}
	})
}

func BenchmarkLayout(b *testing.B) {
	for _, size := range []int64{4 * mib, 4 * gib, 32 * gib} {
		b.Run(fmt.Sprintf("%d MiB", size/mib), func(b *testing.B) {
			for range b.N {
				if _, err := newLayout(context.Background(), size, Options{Layout: LayoutGo}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

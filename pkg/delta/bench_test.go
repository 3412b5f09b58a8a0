package delta

import (
	"bytes"
	"io"
	"testing"
)

const benchSize = 64 << 20

func BenchmarkBuildIndex(b *testing.B) {
	base := noise(1, benchSize)
	b.SetBytes(benchSize)
	for b.Loop() {
		if _, err := BuildIndex(bytes.NewReader(base), benchSize); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	base := noise(1, benchSize)
	ix := index(b, base, defaultBits)
	f := framed(splice(base, benchSize/3, benchSize/100, noise(2, benchSize/100)))
	what := file(f)
	b.SetBytes(benchSize)
	for b.Loop() {
		what.Source = &pieces{list: f}
		if err := Encode(io.Discard, what, ix); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	base := noise(1, benchSize)
	d := encode(b, framed(splice(base, benchSize/3, benchSize/100, noise(2, benchSize/100))), index(b, base, defaultBits))
	b.SetBytes(benchSize)
	for b.Loop() {
		if _, err := io.Copy(io.Discard, NewDecoder(bytes.NewReader(d), bytes.NewReader(base), benchSize)); err != nil {
			b.Fatal(err)
		}
	}
}

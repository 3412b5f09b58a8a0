package delta

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noise is n bytes that do not compress.
func noise(seed uint64, n int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// pieces is a Source of a list of segments; odd ones are payload.
type pieces struct {
	list [][]byte
	next int
	r    io.Reader
	slow bool // a byte at a time
}

func (p *pieces) Next() (bool, error) {
	if p.next == len(p.list) {
		return false, io.EOF
	}
	p.r = bytes.NewReader(p.list[p.next])
	if p.slow {
		p.r = iotest.OneByteReader(p.r)
	}
	p.next++
	return p.next%2 == 0, nil
}

func (p *pieces) Read(b []byte) (int, error) { return p.r.Read(b) }

// framed cuts a payload as gpg does: a head, then parts of 8 KiB, each with a
// byte before it, and a tail.
func framed(payload []byte) [][]byte {
	list := [][]byte{[]byte("one-pass signature and literal header\xed")}
	for len(payload) > 8192 {
		list = append(list, payload[:8192], []byte{0xed})
		payload = payload[8192:]
	}
	return append(list, payload, []byte("signature"))
}

func file(list [][]byte) File {
	all := bytes.Join(list, nil)
	return File{&pieces{list: list}, int64(len(all)), sha256.Sum256(all)}
}

// index is that of a base, sent and received.
func index(t rapid.TB, base []byte, bits int) *Index {
	t.Helper()
	ix, err := buildIndex(bytes.NewReader(base), int64(len(base)), bits)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := ix.Encode(&b); err != nil {
		t.Fatal(err)
	}
	if ix, err = ReadIndex(&b); err != nil {
		t.Fatal(err)
	}
	return ix
}

func encode(t rapid.TB, list [][]byte, ix *Index) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Encode(&b, file(list), ix); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func decode(delta, base []byte) ([]byte, error) {
	return io.ReadAll(NewDecoder(bytes.NewReader(delta), bytes.NewReader(base), int64(len(base))))
}

// roundTrip checks that the delta gives the file, and gives its length.
func roundTrip(t rapid.TB, base []byte, list [][]byte, bits int) int {
	t.Helper()
	d := encode(t, list, index(t, base, bits))
	got, err := decode(d, base)
	if err != nil || !bytes.Equal(got, bytes.Join(list, nil)) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	return len(d)
}

func splice(b []byte, at, remove int, insert []byte) []byte {
	return append(append(bytes.Clone(b[:at]), insert...), b[at+remove:]...)
}

func TestADeltaHasWhatTheBaseHasNot(t *testing.T) {
	const size = 32 << 20
	base := noise(1, size)
	const mean = 2 << defaultBits // twice the wanted length of a chunk
	for _, c := range []struct {
		name    string
		payload []byte
		most    int
	}{
		{"the same", base, 4 << 10},
		{"one percent in one place is other", splice(base, size/3, size/100, noise(2, size/100)), size/100 + 4*mean},
		{"a KiB is inserted near the start", splice(base, 4096, 0, noise(3, 1024)), 4 * mean},
		{"a KiB is removed near the start", splice(base, 4096, 1024, nil), 4 * mean},
		{"the halves are exchanged", append(bytes.Clone(base[size/2:]), base[:size/2]...), 6 * mean},
		{"it is doubled", append(bytes.Clone(base), base...), 4 * mean},
		{"another KiB at the end", splice(base, size, 0, noise(4, 1024)), 4 * mean},
		{"nothing is the same", noise(5, size/4), size/4 + size/400},
		{"it is empty", nil, 1 << 10},
		{"zeros that the base has not", make([]byte, size), 32 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := roundTrip(t, base, framed(c.payload), defaultBits); got > c.most {
				t.Errorf("%d bytes, at most %d are right", got, c.most)
			}
		})
	}
	for name, base := range map[string][]byte{"an empty base": nil, "a base of zeros": make([]byte, 1<<20)} {
		t.Run(name, func(t *testing.T) { roundTrip(t, base, framed(noise(6, 100<<10)), defaultBits) })
	}
}

// An index costs less than a thousandth of what it lists, also where chunks are
// as short as they get in data that is random.
func TestAnIndexIsSmall(t *testing.T) {
	base := noise(7, 64<<20)
	ix, err := BuildIndex(bytes.NewReader(base), int64(len(base)))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := ix.Encode(&b); err != nil {
		t.Fatal(err)
	}
	if b.Len() > len(base)/1000 {
		t.Errorf("%d bytes list %d", b.Len(), len(base))
	}
	if n := len(ix.Chunks); n < 700 || n > 1400 {
		t.Errorf("%d chunks", n)
	}
}

// The places of the cuts are part of the format: other ones would still give
// right deltas, but long ones between a client and a server of two versions.
func TestChunksAreCutWhereTheyHaveAlwaysBeen(t *testing.T) {
	h := sha256.New()
	for seed, size := range []int{0, 1, 100, 16 << 10, 16<<10 + 1, 1 << 20, 5 << 20} {
		ix, err := BuildIndex(bytes.NewReader(noise(uint64(seed), size)), int64(size))
		if err != nil {
			t.Fatal(err)
		}
		if err := ix.Encode(h); err != nil {
			t.Fatal(err)
		}
	}
	const want = "ebd54650be267053317093208e64fb1cdd8087bab767e11bda43e62916d4a9c8"
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		t.Errorf("the sum of the indexes is %s", got)
	}
}

func TestTheSameFileGivesTheSameDelta(t *testing.T) {
	base := noise(8, 3<<20)
	list := framed(splice(base, 1<<20, 300<<10, noise(9, 500<<10)))
	ix := index(t, base, defaultBits)
	want := encode(t, list, ix)
	f := file(list)
	f.Source = &pieces{list: list, slow: true}
	var b bytes.Buffer
	if err := Encode(&b, f, ix); err != nil || !bytes.Equal(b.Bytes(), want) {
		t.Errorf("read in small pieces it gives %d bytes and not %d, %v", b.Len(), len(want), err)
	}
	r := NewDecoder(iotest.OneByteReader(bytes.NewReader(want)), bytes.NewReader(base), int64(len(base)))
	if err := iotest.TestReader(r, bytes.Join(list, nil)); err != nil {
		t.Error(err)
	}
	if n, err := r.Size(); err != nil || n != f.Size {
		t.Errorf("size %d, %v", n, err)
	}
}

func TestRandomEditsComeOutRight(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const bits = 10
		base := noise(rapid.Uint64().Draw(t, "seed"), rapid.IntRange(0, 200<<10).Draw(t, "size"))
		payload := bytes.Clone(base)
		added := 0
		edits := rapid.IntRange(0, 6).Draw(t, "edits")
		for i := range edits {
			at := rapid.IntRange(0, len(payload)).Draw(t, "at")
			remove := rapid.IntRange(0, min(len(payload)-at, 5000)).Draw(t, "remove")
			insert := noise(uint64(i), rapid.IntRange(0, 5000).Draw(t, "insert"))
			added += len(insert)
			payload = splice(payload, at, remove, insert)
		}
		var list [][]byte
		for rest := payload; ; {
			list = append(list, noise(1, rapid.IntRange(0, 5).Draw(t, "framing")))
			n := rapid.IntRange(0, 60<<10).Draw(t, "part")
			if n >= len(rest) {
				list = append(list, rest, []byte("end"))
				break
			}
			list = append(list, rest[:n])
			rest = rest[n:]
		}
		n := roundTrip(t, base, list, bits)
		// Around each edit a chunk or two are sent again, and some more until the
		// cuts fall on the same places.
		if most := added + edits*8*maxChunk(bits) + 16*len(list) + len(base)/50 + 1024; n > most {
			t.Errorf("%d bytes for %d edits with %d new bytes", n, edits, added)
		}
	})
}

func TestAWrongBaseIsFound(t *testing.T) {
	base := noise(10, 1<<20)
	d := encode(t, framed(base), index(t, base, defaultBits))
	other := bytes.Clone(base)
	other[500_000] ^= 1
	if _, err := decode(d, other); !errors.Is(err, ErrBase) {
		t.Errorf("a byte flipped: %v", err)
	}
	if got, err := decode(d, base[1:]); !errors.Is(err, ErrBase) || len(got) > 0 {
		t.Errorf("another size: %d bytes, %v", len(got), err)
	}
	r := NewDecoder(bytes.NewReader(d), bytes.NewReader(base[:1000]), int64(len(base)))
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a base that ends early: %v", err)
	}
	broken := errors.New("broken")
	r = NewDecoder(io.MultiReader(bytes.NewReader(d[:len(d)/2]), iotest.ErrReader(broken)), bytes.NewReader(base), int64(len(base)))
	for range 2 {
		if _, err := io.Copy(io.Discard, r); !errors.Is(err, broken) {
			t.Errorf("a broken stream: %v", err)
		}
	}
}

// stream is a delta of such operations.
func stream(t testing.TB, ops ...any) []byte {
	t.Helper()
	var plain []byte
	for _, op := range ops {
		switch v := op.(type) {
		case uint64:
			plain = binary.AppendUvarint(plain, v)
		case int64:
			plain = binary.AppendVarint(plain, v)
		case string:
			plain = append(plain, v...)
		}
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	return z.EncodeAll(plain, []byte(deltaMagic))
}

func TestADamagedDeltaIsRefused(t *testing.T) {
	const u = uint64(1)
	base := []byte("0123456789")
	sum := func(s string) string { h := sha256.Sum256([]byte(s)); return string(h[:]) }
	if got, err := decode(stream(t, u*10, u*5, u*3<<2|opCopy, int64(4), u*2<<2|opData, "ab", u*5<<2|opEnd, sum("456ab")), base); string(got) != "456ab" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	for _, c := range []struct {
		name  string
		delta []byte
		want  string
	}{
		{"nothing", nil, "cut short"},
		{"something else", []byte(strings.Repeat("x", 100)), "begins otherwise"},
		{"no zstd", []byte(deltaMagic + "more"), "damaged"},
		{"no operation", stream(t, u*10, u*5), "cut short"},
		{"too large", stream(t, u*10, u<<50), "too large"},
		{"more than it says", stream(t, u*10, u*5, u*6<<2|opData, "abcdef"), "6 bytes at byte 0 of 5"},
		{"less than it says", stream(t, u*10, u*5, u*1<<2|opData, "a", u*1<<2|opEnd, sum("a")), "1 bytes of 5"},
		{"another length at the end", stream(t, u*10, u*1, u*1<<2|opData, "a", u*2<<2|opEnd, sum("a")), "ends at byte 1, not 2"},
		{"an empty operation", stream(t, u*10, u*5, u*0<<2|opData), "0 bytes"},
		{"an unknown operation", stream(t, u*10, u*5, u*1<<2|3), "no operation 3"},
		{"a copy behind the end", stream(t, u*10, u*5, u*2<<2|opCopy, int64(9)), "outside"},
		{"a copy before the beginning", stream(t, u*10, u*5, u*2<<2|opCopy, int64(-1)), "outside"},
		{"a copy from far away", stream(t, u*10, u*5, u*2<<2|opCopy, int64(-1<<63)), "outside"},
		{"a copy to far away", stream(t, u*10, u*5, u*2<<2|opCopy, int64(1<<63-1)), "outside"},
		{"data that ends", stream(t, u*10, u*5, u*5<<2|opData, "ab"), "cut short"},
		{"another sum", stream(t, u*10, u*1, u*1<<2|opData, "a", u*1<<2|opEnd, sum("b")), "another SHA-256"},
		{"more behind the end", stream(t, u*10, u*1, u*1<<2|opData, "a", u*1<<2|opEnd, sum("a"), "x"), "after its end"},
		{"rubbish behind the end", append(stream(t, u*10, u*1, u*1<<2|opData, "a", u*1<<2|opEnd, sum("a")), "rubbish"...), "damaged"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := decode(c.delta, base); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// Many small copies from all over do not read the base again and again.
func TestSmallCopiesReadLittle(t *testing.T) {
	base := noise(11, 1<<20)
	const n = 2000
	ops := []any{uint64(len(base)), uint64(2 * n)}
	for i := range n { // a step to and fro, then on from there
		ops = append(ops, uint64(1)<<2|opCopy, int64(9973)*int64(1-i%2*2), uint64(1)<<2|opCopy, int64(0))
	}
	counted := &countingAt{r: bytes.NewReader(base)}
	r := NewDecoder(bytes.NewReader(stream(t, ops...)), counted, int64(len(base)))
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err) // the delta has no end
	}
	if counted.n > 2*n*readLeast {
		t.Errorf("%d bytes of the base were read for %d", counted.n, 2*n)
	}
}

type countingAt struct {
	r io.ReaderAt
	n int64
}

func (c *countingAt) ReadAt(p []byte, off int64) (int, error) {
	c.n += int64(len(p))
	return c.r.ReadAt(p, off)
}

func TestADamagedIndexIsRefused(t *testing.T) {
	base := noise(12, 200<<10)
	var b bytes.Buffer
	if err := index(t, base, defaultBits).Encode(&b); err != nil {
		t.Fatal(err)
	}
	good := b.Bytes()
	for name, bad := range map[string][]byte{
		"nothing": nil, "cut short": good[:len(good)-1], "longer": append(bytes.Clone(good), 0),
		"a byte of a sum flipped": splice(good, 60, 1, []byte{good[60] ^ 1}),
		"another length":          splice(good, len(indexMagic), 1, []byte{maxBits + 1}),
		"no index":                []byte(strings.Repeat("x", 100)),
	} {
		if _, err := ReadIndex(bytes.NewReader(bad)); !errors.Is(err, errIndex) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := BuildIndex(bytes.NewReader(base), int64(len(base))+1); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a base that ends early: %v", err)
	}
	if _, err := BuildIndex(bytes.NewReader(base), maxBase+1); err == nil {
		t.Error("a base that is too large is listed")
	}
	broken := errors.New("broken")
	if _, err := BuildIndex(iotest.ErrReader(broken), 1); !errors.Is(err, broken) {
		t.Errorf("a broken base: %v", err)
	}
}

// What Encode cannot read, or write, is an error; a file that is not as long as
// was said as well.
func TestEncodeSaysWhatFails(t *testing.T) {
	base := noise(13, 100<<10)
	ix := index(t, base, defaultBits)
	f := file(framed(base))
	f.Size++
	if err := Encode(io.Discard, f, ix); err == nil || !strings.Contains(err.Error(), "changed") {
		t.Errorf("another size: %v", err)
	}
	broken := errors.New("broken")
	f = file(nil)
	f.Source = failing{broken}
	if err := Encode(io.Discard, f, ix); !errors.Is(err, broken) {
		t.Errorf("a broken file: %v", err)
	}
	r, w := io.Pipe()
	r.CloseWithError(broken)
	if err := Encode(w, file(framed(base)), ix); !errors.Is(err, broken) {
		t.Errorf("a broken writer: %v", err)
	}
	if err := Encode(io.Discard, file([][]byte{make([]byte, maxFraming+1)}), ix); err == nil {
		t.Error("endless framing is taken")
	}
}

type failing struct{ err error }

func (f failing) Next() (bool, error)      { return true, nil }
func (f failing) Read([]byte) (int, error) { return 0, f.err }

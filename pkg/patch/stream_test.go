package patch

import (
	"bytes"
	"io"
	"runtime"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// zeroMessage streams a message of n zero bytes, signed by a fresh key.
func zeroMessage(t testing.TB, n int64, algo packet.CompressionAlgo) (io.Reader, *Keyring) {
	t.Helper()
	e, err := openpgp.NewEntity("zero", "", "zero@patch.test", nil)
	if err != nil {
		t.Fatal(err)
	}
	var public bytes.Buffer
	if err := e.Serialize(&public); err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	t.Cleanup(func() { r.Close() })
	go func() {
		var out io.WriteCloser = closer{w}
		var err error
		if algo != packet.CompressionNone {
			out, err = packet.SerializeCompressed(closer{w}, algo, nil)
		}
		if err == nil {
			err = signZeros(out, e, n)
		}
		if err == nil {
			err = out.Close()
		}
		w.CloseWithError(err)
	}()
	return r, NewKeyring("zero", public.Bytes())
}

func signZeros(out io.Writer, e *openpgp.Entity, n int64) error {
	in, err := openpgp.SignWithParams(out, []*openpgp.Entity{e}, nil)
	if err != nil {
		return err
	}
	if _, err := io.CopyN(in, zeros{}, n); err != nil {
		return err
	}
	return in.Close()
}

func TestDecompressionBomb(t *testing.T) {
	r, keys := zeroMessage(t, 64<<20, packet.CompressionZLIB)
	m, err := Open(r, keys, Options{Limits: Limits{Decompressed: 1 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	if !m.Compressed() {
		t.Fatal("not compressed")
	}
	n, err := io.Copy(io.Discard, m)
	refused(t, err)
	if n > 1<<20 {
		t.Errorf("%d bytes came out", n)
	}
}

func TestMemoryIsConstant(t *testing.T) {
	for _, algo := range []packet.CompressionAlgo{packet.CompressionNone, packet.CompressionZLIB} {
		const size = 96 << 20
		r, keys := zeroMessage(t, size, algo)
		m, err := Open(r, keys, Options{})
		if err != nil {
			t.Fatal(err)
		}
		var most, base uint64
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		base = stats.HeapAlloc
		var n int64
		buf := make([]byte, 64<<10)
		for step := 0; ; step++ {
			k, err := m.Read(buf)
			n += int64(k)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if step%512 == 0 {
				runtime.ReadMemStats(&stats)
				most = max(most, stats.HeapAlloc)
			}
		}
		if n != size || m.Signature().Signer == "" {
			t.Errorf("%d bytes, %+v", n, m.Signature())
		}
		if most > base+24<<20 {
			t.Errorf("heap grew from %d to %d bytes", base, most)
		}
	}
}

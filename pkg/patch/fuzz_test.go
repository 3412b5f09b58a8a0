package patch

import (
	"bytes"
	"context"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

func FuzzParseInfo(f *testing.F) {
	f.Add([]byte(goodInfo))
	f.Fuzz(func(t *testing.T, text []byte) {
		i, err := ParseInfo(text)
		if err != nil {
			if e := xapi.AsError(err); e.Code != xapi.InvalidPatch || len(e.Params) != 1 || !utf8.ValidString(e.Params[0]) {
				t.Fatalf("%q", e.Description())
			}
			return
		}
		again, err := ParseInfo([]byte(i.Encode()))
		if err != nil {
			t.Fatalf("%q: %v", i.Encode(), err)
		}
		if again.UUID != i.UUID || again.NameLabel != i.NameLabel || again.NameDescription != i.NameDescription || again.Version != i.Version ||
			again.ScratchSize != i.ScratchSize || len(again.Guidance) != len(i.Guidance) {
			t.Fatalf("%+v\n%+v", i, again)
		}
	})
}

func FuzzPrecheckError(f *testing.F) {
	f.Add(1, `<error errorcode="PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"><info>x</info></error>`, "output")
	f.Fuzz(func(t *testing.T, exit int, stdout, output string) {
		for _, err := range []error{PrecheckError(ref, exit, stdout, output), ApplyError(exit, output), InfoError(exit, output)} {
			if (err == nil) != (exit == 0) {
				t.Fatalf("exit %d: %v", exit, err)
			}
			if err == nil {
				continue
			}
			for _, p := range description(err) {
				if !utf8.ValidString(p) || len(p) > 2*MaxOutput || bytes.IndexByte([]byte(p), 0) >= 0 {
					t.Fatalf("%q", p)
				}
			}
		}
	})
}

// fuzzKeys is the key that signed the corpus of FuzzOpen.
func fuzzKeys(t testing.TB) *Keyring {
	data, err := os.ReadFile("testdata/fuzz.key")
	if err != nil {
		t.Fatal(err)
	}
	return NewKeyring("fuzz.key", data).WithClock(func() time.Time { return time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC) })
}

// FuzzOpen takes messages apart. Whatever is accepted must have the payload
// that was signed.
func FuzzOpen(f *testing.F) {
	keys := fuzzKeys(f)
	signed := map[string]bool{sum([]byte(sample)): true, sum([]byte("a\n-b\n")): true}
	f.Fuzz(func(t *testing.T, file []byte) {
		o := Options{Limits: Limits{Cleartext: 1 << 20, Decompressed: 1 << 20}}
		m, err := Open(bytes.NewReader(file), keys, o)
		if err == nil {
			_, err = io.Copy(io.Discard, m)
		}
		if err != nil {
			if e := xapi.AsError(err); e.Code != xapi.InvalidPatch || len(e.Params) != 0 {
				t.Fatal(err)
			}
			return
		}
		if !signed[m.Digest()] {
			t.Fatalf("accepted %s", m.Digest())
		}
	})
}

// TestFuzzCorpus makes sure that the corpus of FuzzOpen is what its names say:
// a corpus of which nothing is accepted would test little.
func TestFuzzCorpus(t *testing.T) {
	good := map[string]bool{"binary": true, "zip": true, "zlib": true, "bzip2": true, "armoured": true, "cleartext": true, "oldstyle": true}
	files, err := os.ReadDir("testdata/fuzz/FuzzOpen")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile("testdata/fuzz/FuzzOpen/" + f.Name())
		if err != nil {
			t.Fatal(err)
		}
		_, quoted, _ := strings.Cut(string(text), "[]byte(")
		data, err := strconv.Unquote(strings.TrimSuffix(quoted, ")\n"))
		if err != nil {
			t.Fatal(f.Name(), err)
		}
		_, _, err = readMessage([]byte(data), fuzzKeys(t), Options{})
		if (err == nil) != good[f.Name()] {
			t.Errorf("%s: %v", f.Name(), err)
		}
		delete(good, f.Name())
	}
	if len(good) > 0 {
		t.Error("missing:", good)
	}
}

func FuzzKeyring(f *testing.F) {
	key, err := os.ReadFile("testdata/fuzz.key")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(key, []byte{0x88, 0})
	f.Fuzz(func(t *testing.T, key, sig []byte) {
		k := NewKeyring("x", key)
		for _, key := range k.Keys() {
			k.Trusts(key.Fingerprint, time.Now())
		}
		_, err := VerifyDetached(context.Background(), bytes.NewReader([]byte(sample)), Signature{Kind: Inline, Packet: sig}, k, nil)
		if err == nil && len(k.Keys()) == 0 {
			t.Fatal("accepted without a key")
		}
	})
}

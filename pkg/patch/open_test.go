package patch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

const sample = "#!/bin/sh\n# a patch\ncase $1 in info) echo '<info/>' ;; esac\n"

// refused makes sure that err is INVALID_PATCH [] with a cause for the log.
func refused(t testing.TB, err error) {
	t.Helper()
	var e *xapi.Error
	if !errors.As(err, &e) || e.Code != xapi.InvalidPatch || len(e.Params) != 0 {
		t.Errorf("got %v, want INVALID_PATCH []", err)
		return
	}
	if e.Unwrap() == nil {
		t.Error("no cause for the log")
	}
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func TestOpenWhatGPGSigns_S1_01(t *testing.T) {
	random := bytes.Repeat([]byte{0, 1, 2, 3, 0xff, '\r', '\n'}, 40000)
	keys := ringOf(t, keyA, keyB, keySub)
	for name, c := range map[string]struct {
		key        string
		payload    []byte
		args       []string
		compressed bool
	}{
		"uncompressed":         {keyA, []byte(sample), []string{"-z", "0", "--sign"}, false},
		"as gpg compresses":    {keyA, []byte(sample), []string{"--sign"}, true},
		"zip":                  {keyA, random, []string{"--compress-algo", "zip", "--sign"}, true},
		"zlib":                 {keyB, random, []string{"--compress-algo", "zlib", "--sign"}, true},
		"bzip2":                {keyB, random, []string{"--compress-algo", "bzip2", "--sign"}, true},
		"armoured":             {keyA, random, []string{"--armor", "-z", "0", "--sign"}, false},
		"armoured, compressed": {keyB, random, []string{"--armor", "--comment", "hello: world", "--sign"}, true},
		"empty":                {keyA, nil, []string{"-z", "0", "--sign"}, false},
		"RSA, SHA-512":         {keyB, random, []string{"--digest-algo", "SHA512", "-z", "0", "--sign"}, false},
		"by a subkey":          {keySub, random, []string{"-z", "0", "--sign"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			file := gpg_(t, c.payload, append([]string{"--local-user", c.key}, c.args...)...)
			m, err := Open(iotest.HalfReader(bytes.NewReader(file)), keys, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if m.Compressed() != c.compressed || m.Kind() != Inline {
				t.Error(m.Compressed(), m.Kind())
			}
			if m.Digest() != "" || m.Signature().Signer != "" {
				t.Error("verified before it was read")
			}
			got, err := io.ReadAll(m)
			if err != nil || !bytes.Equal(got, c.payload) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			checkSignature(t, m, c.key, c.payload, keys)
		})
	}
}

// checkSignature makes sure that what is kept describes the signer and
// verifies the stored payload and no other.
func checkSignature(t *testing.T, m *Message, key string, payload []byte, keys *Keyring) {
	t.Helper()
	s := m.Signature()
	fp, err := gpgFingerprint(key)
	if err != nil {
		t.Fatal(err)
	}
	if s.Primary != fp || s.Kind != m.Kind() || s.UserID != key || time.Since(s.Created).Abs() > time.Minute {
		t.Errorf("%+v", s)
	}
	if (s.Signer == s.Primary) != (key != keySub) {
		t.Errorf("signed by %s of %s", s.Signer, s.Primary)
	}
	if m.Digest() != sum(payload) || m.Size() != int64(len(payload)) {
		t.Error(m.Digest(), m.Size())
	}
	if err := keys.Trusts(s.Signer, time.Now()); err != nil {
		t.Error(err)
	}
	ctx := context.Background()
	digest, err := VerifyDetached(ctx, iotest.OneByteReader(bytes.NewReader(payload)), s, keys, nil)
	if err != nil || digest != sum(payload) {
		t.Errorf("stored payload: %s, %v", digest, err)
	}
	changed := append(bytes.Clone(payload), 'x')
	digest, err = VerifyDetached(ctx, bytes.NewReader(changed), s, keys, nil)
	refused(t, err)
	if digest != sum(changed) {
		t.Error("the digest of a changed payload is not told")
	}
	_, err = VerifyDetached(ctx, bytes.NewReader(payload), s, ringOf(t, keyDSA), nil)
	refused(t, err)
}

func TestOpenCleartext(t *testing.T) {
	keys := ringOf(t, keyA)
	for name, text := range map[string]string{
		"script":            sample,
		"dashes":            "-\n--\n- a\n- - b\n-----BEGIN PGP SIGNATURE-----\n-----END PGP SIGNATURE-----\n",
		"blanks at the end": "a  \nb\t\n c\n\t\n",
		"no final newline":  "a\nb",
		"many final lines":  "a\n\n\n\n",
		"empty":             "",
		"one empty line":    "\n",
		"From":              "From x\n",
		"carriage in line":  "a\rb\n",
		"not UTF-8":         "\xff\x00\x01\n",
		"a long line":       strings.Repeat("x", 15000) + "\nb\n",
		"looks like armour": "- -----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\nx\n",
	} {
		t.Run(name, func(t *testing.T) {
			file := gpg_(t, []byte(text), "--local-user", keyA, "--clearsign")
			payload, m, err := readMessage(file, keys, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if want := gpg_(t, file, "--decrypt"); !bytes.Equal(payload, want) {
				t.Errorf("payload %q\ngpg    %q", payload, want)
			}
			checkSignature(t, m, keyA, payload, keys)
		})
	}
}

func TestCleartextLineEndsAreNotPartOfThePayload(t *testing.T) {
	keys := ringOf(t, keyA)
	file := gpg_(t, []byte(sample), "--local-user", keyA, "--clearsign")
	for name, changed := range map[string][]byte{
		"carriage returns":  bytes.ReplaceAll(file, []byte("\n"), []byte("\r\n")),
		"trailing blanks":   bytes.ReplaceAll(file, []byte("a patch\n"), []byte("a patch \t \n")),
		"empty lines after": append(bytes.Clone(file), "\n \n"...),
	} {
		payload, _, err := readMessage(changed, keys, Options{})
		if err != nil || string(payload) != sample {
			t.Errorf("%s: %q, %v", name, payload, err)
		}
	}
}

func TestVerifyDetachedRefusesUnsignedBlanks(t *testing.T) {
	keys := ringOf(t, keyA)
	file := gpg_(t, []byte(sample), "--local-user", keyA, "--clearsign")
	_, m, err := readMessage(file, keys, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, stored := range map[string]string{
		"carriage returns":     strings.ReplaceAll(sample, "\n", "\r\n"),
		"one carriage return":  strings.Replace(sample, "\n", "\r\n", 1),
		"another last byte":    strings.TrimSuffix(sample, "\n") + "x",
		"a trailing blank":     strings.Replace(sample, "patch\n", "patch \n", 1),
		"blank at the end":     strings.TrimSuffix(sample, "\n") + " \n",
		"no final newline":     strings.TrimSuffix(sample, "\n"),
		"another empty line":   sample + "\n",
		"one line feed missed": strings.Replace(sample, "\n", "", 1),
		"nothing":              "",
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(stored), iotest.OneByteReader(strings.NewReader(stored))} {
				_, err := VerifyDetached(context.Background(), r, m.Signature(), keys, nil)
				refused(t, err)
			}
		})
	}
}

func TestOldStyleSignatureFirst(t *testing.T) {
	keys := ringOf(t, keyA)
	sig := gpg_(t, []byte(sample), "--local-user", keyA, "--detach-sign")
	literal := append([]byte{0xaf, 'b', 1, 'x', 0, 0, 0, 0}, sample...) // to the end of the data
	payload, m, err := readMessage(append(bytes.Clone(sig), literal...), keys, Options{})
	if err != nil || string(payload) != sample {
		t.Fatal(err)
	}
	checkSignature(t, m, keyA, payload, keys)
	_, _, err = readMessage(append(append(bytes.Clone(sig), literal...), 'x'), keys, Options{})
	refused(t, err)
	_, _, err = readMessage(append(append(bytes.Clone(sig), sig...), literal...), keys, Options{})
	if err != nil {
		t.Error("the same signature twice:", err)
	}
}

func TestTwoSigners(t *testing.T) {
	both := gpg_(t, []byte(sample), "--local-user", keyA, "--local-user", keyB, "-z", "0", "--sign")
	text := gpg_(t, []byte(sample), "--local-user", keyA, "--local-user", keyB, "--clearsign")
	for _, file := range [][]byte{both, text} {
		for _, key := range []string{keyA, keyB} {
			keys := ringOf(t, key)
			payload, m, err := readMessage(file, keys, Options{})
			if err != nil {
				t.Fatal(err)
			}
			checkSignature(t, m, key, payload, keys)
		}
		_, m, err := readMessage(file, ringOf(t, keyA, keyB), Options{})
		if err != nil {
			t.Fatal(err)
		}
		// Both verified, so a host that trusts only one of them can verify too.
		for _, key := range []string{keyA, keyB} {
			if _, err := VerifyDetached(context.Background(), strings.NewReader(sample), m.Signature(), ringOf(t, key), nil); err != nil {
				t.Error(err)
			}
		}
		_, _, err = readMessage(file, ringOf(t, keySub), Options{})
		refused(t, err)
	}
}

func TestEmptyKeyringRefusesAll(t *testing.T) {
	keys, err := LoadKeyring(t.TempDir() + "/missing")
	if err != nil || len(keys.Problems()) != 1 {
		t.Fatal(err, keys)
	}
	for _, args := range [][]string{{"-z", "0", "--sign"}, {"--clearsign"}} {
		_, _, err := readMessage(gpg_(t, []byte(sample), append([]string{"--local-user", keyA}, args...)...), keys, Options{})
		refused(t, err)
	}
}

func TestPinnedUnsignedFile(t *testing.T) {
	keys := ringOf(t, keyA)
	o := Options{Pinned: []string{strings.Repeat("0", 64), strings.ToUpper(sum([]byte(sample)))}}
	payload, m, err := readMessage([]byte(sample), keys, o)
	if err != nil || string(payload) != sample || m.Signature().Kind != Pinned || m.Digest() != sum([]byte(sample)) {
		t.Fatal(err, m.Signature())
	}
	if _, err := VerifyDetached(context.Background(), strings.NewReader(sample), m.Signature(), keys, o.Pinned); err != nil {
		t.Error(err)
	}
	_, err = VerifyDetached(context.Background(), strings.NewReader(sample), m.Signature(), keys, nil)
	refused(t, err)
	_, _, err = readMessage([]byte(sample+"x"), keys, o)
	refused(t, err)
	_, _, err = readMessage([]byte(sample), keys, Options{Pinned: []string{""}})
	refused(t, err)
	// A message that is signed by a stranger is not saved by a pin.
	stranger := gpg_(t, []byte(sample), "--local-user", keyB, "-z", "0", "--sign")
	_, _, err = readMessage(stranger, keys, Options{Pinned: []string{sum(stranger), sum([]byte(sample))}})
	refused(t, err)
}

func TestReaderErrors(t *testing.T) {
	keys := ringOf(t, keyA)
	file := gpg_(t, []byte(sample), "--local-user", keyA, "-z", "0", "--sign")
	own := xapi.NewError(xapi.TaskCancelled, "OpaqueRef:x")
	for n := range len(file) {
		m, err := Open(io.MultiReader(bytes.NewReader(file[:n]), iotest.ErrReader(own)), keys, Options{})
		if err == nil {
			_, err = io.ReadAll(m)
		}
		if !errors.Is(err, own) || !xapi.Is(err, xapi.TaskCancelled) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	m, err := Open(io.MultiReader(bytes.NewReader(file[:60]), iotest.ErrReader(io.ErrUnexpectedEOF)), keys, Options{})
	if err == nil {
		_, err = io.ReadAll(m)
	}
	refused(t, err)
	if _, again := m.Read(make([]byte, 1)); again != err {
		t.Error("the error did not stay:", again)
	}
	broken := errors.New("disk on fire")
	_, err = VerifyDetached(context.Background(), iotest.ErrReader(broken), Signature{Kind: Inline, Packet: []byte{0x88, 0}}, keys, nil)
	if !errors.Is(err, broken) || xapi.Is(err, xapi.InvalidPatch) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(own)
	if _, err = VerifyDetached(ctx, strings.NewReader(sample), Signature{Kind: Inline}, keys, nil); !errors.Is(err, own) {
		t.Error(err)
	}
}

func TestVerifyDetachedRefusesRubbish(t *testing.T) {
	keys := ringOf(t, keyA)
	sig := gpg_(t, []byte(sample), "--local-user", keyA, "--detach-sign")
	for name, s := range map[string]Signature{
		"no kind":        {Packet: sig},
		"no packet":      {Kind: Inline},
		"rubbish":        {Kind: Inline, Packet: []byte("rubbish")},
		"more behind":    {Kind: Inline, Packet: append(bytes.Clone(sig), 0)},
		"cut":            {Kind: Inline, Packet: sig[:len(sig)-1]},
		"as cleartext":   {Kind: Cleartext, Packet: sig},
		"many":           {Kind: Inline, Packet: bytes.Repeat(sig, 9)},
		"a key":          {Kind: Inline, Packet: export(t, keyA)},
		"pinned instead": {Kind: Pinned, Packet: sig},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := VerifyDetached(context.Background(), strings.NewReader(sample), s, keys, nil)
			refused(t, err)
		})
	}
	if _, err := VerifyDetached(context.Background(), strings.NewReader(sample), Signature{Kind: Inline, Packet: sig}, keys, nil); err != nil {
		t.Error(err)
	}
}

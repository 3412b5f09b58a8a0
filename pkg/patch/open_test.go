package patch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

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

func TestOpenCleartextRefuses(t *testing.T) {
	keys := ringOf(t, keyA)
	file := string(gpg_(t, []byte("a\n-b\nc\n"), "--local-user", keyA, "--clearsign"))
	if _, _, err := readMessage([]byte(file), keys, Options{}); err != nil {
		t.Fatal(err)
	}
	replace := func(old, new string) string {
		if !strings.Contains(file, old) {
			t.Fatalf("no %q", old)
		}
		return strings.Replace(file, old, new, 1)
	}
	for name, changed := range map[string]string{
		"text changed":            replace("\na\n", "\nb\n"),
		"text lengthened":         replace("\nc\n", "\nc\nd\n"),
		"line dropped":            replace("\na\n", "\n"),
		"dash not escaped":        replace("- -b", "-b"),
		"text before":             "x\n" + file,
		"text after":              file + "x\n",
		"another message after":   file + file,
		"a header":                replace("Hash: SHA256", "Hash: SHA256\nCharset: UTF-8"),
		"not dash escaped":        replace("Hash: SHA256", "NotDashEscaped: yes"),
		"end missing":             file[:strings.Index(file, "-----END")],
		"signature missing":       file[:strings.Index(file, "-----BEGIN PGP SIGNATURE")],
		"other block":             strings.ReplaceAll(file, "PGP SIGNATURE", "PGP MESSAGE"),
		"first line longer":       replace(cleartextBegin, cleartextBegin+"x"),
		"checksum wrong":          replaceLine(file, "=", "=AAAA"),
		"signature damaged":       replace(signatureBegin+"\n\ni", signatureBegin+"\n\nj"),
		"begins and ends":         cleartextBegin,
		"empty line before armor": replace(signatureBegin+"\n", signatureBegin+"\nx\n"),
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := readMessage([]byte(changed), keys, Options{})
			refused(t, err)
		})
	}
	_, _, err := readMessage([]byte(file), keys, Options{Limits: Limits{Cleartext: 4}})
	refused(t, err)
	_, _, err = readMessage([]byte(file), ringOf(t, keyB), Options{})
	refused(t, err)
}

func replaceLine(text, prefix, line string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		if strings.HasPrefix(lines[i], prefix) {
			lines[i] = line
		}
	}
	return strings.Join(lines, "\n")
}

func TestOpenRefuses_S1_01(t *testing.T) {
	keys := ringOf(t, keyA, keyB)
	signed := gpg_(t, []byte(sample), "--local-user", keyA, "-z", "0", "--sign")
	compressed := gpg_(t, []byte(sample), "--local-user", keyA, "--sign")
	armoured := gpg_(t, []byte(sample), "--local-user", keyA, "--armor", "-z", "0", "--sign")
	binaryInText := gpg_(t, []byte(sample), "--local-user", keyA, "--textmode", "-z", "0", "--sign")
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for name, file := range map[string][]byte{
		"nothing":                      nil,
		"a plain script":               []byte(sample),
		"one byte":                     {0xa3},
		"ELF":                          []byte("\x7fELF\x02\x01\x01"),
		"stored, not signed":           gpg_(t, []byte(sample), "-z", "0", "--store"),
		"stored and compressed":        gpg_(t, []byte(sample), "--store"),
		"encrypted":                    gpg_(t, []byte(sample), "--passphrase", "x", "--symmetric"),
		"signed and encrypted":         gpg_(t, []byte(sample), "--passphrase", "x", "--local-user", keyA, "--sign", "--symmetric"),
		"a detached signature":         gpg_(t, []byte(sample), "--local-user", keyA, "--detach-sign"),
		"an armoured signature":        gpg_(t, []byte(sample), "--local-user", keyA, "--armor", "--detach-sign"),
		"a public key":                 export(t, keyA),
		"an armoured key":              gpg_(t, nil, "--armor", "--export", keyA),
		"by a key that is not trusted": gpg_(t, []byte(sample), "--local-user", keySub, "-z", "0", "--sign"),
		"a text signature":             binaryInText,
		"SHA-1":                        gpg_(t, []byte(sample), "--local-user", keyA, "--digest-algo", "SHA1", "-z", "0", "--sign"),
		"SHA-1 in cleartext":           gpg_(t, []byte(sample), "--local-user", keyB, "--digest-algo", "SHA1", "--clearsign"),
		"of the future":                gpg_(t, []byte(sample), at(time.Now().Add(24*time.Hour)), "--local-user", keyA, "-z", "0", "--sign"),
		"a byte after":                 cat(signed, []byte{0}),
		"a line feed after":            cat(signed, []byte{'\n'}),
		"a marker after":               cat(signed, []byte{0xca, 3, 'P', 'G', 'P'}),
		"a marker before":              cat([]byte{0xca, 3, 'P', 'G', 'P'}, signed),
		"padding after":                cat(signed, []byte{0xd5, 4, 1, 2, 3, 4}),
		"a private packet after":       cat(signed, []byte{0xfc, 1, 0}),
		"trust packet after":           cat(signed, []byte{0xcc, 1, 0}),
		"another literal after":        cat(signed, []byte{0xcb, 7, 'b', 0, 0, 0, 0, 0, 'x'}),
		"another signature after":      cat(signed, signed[bytes.LastIndexByte(signed, 0x88):]),
		"another message after":        cat(signed, signed),
		"a byte after a compressed":    cat(compressed, []byte{0}),
		"a message after a compressed": cat(compressed, signed),
		"a byte after the armour":      cat(armoured, []byte{'x'}),
		"a message after the armour":   cat(armoured, armoured),
		"text before the armour":       cat([]byte("\n"), armoured),
		"armour without its end":       armoured[:bytes.Index(armoured, []byte("-----END"))],
		"armour without empty line":    bytes.Replace(armoured, []byte("\n\n"), []byte("\n"), 1),
		"armour checksum":              []byte(replaceLine(string(armoured), "=", "=AAAA")),
		"armour of another end":        bytes.Replace(armoured, []byte("END PGP MESSAGE"), []byte("END PGP SIGNATURE"), 1),
		"data after padding":           bytes.Replace(armoured, []byte("=\n="), []byte("=\nAAAA\n="), 1),
		"compressed in compressed":     compress(t, compressed),
		"a signature in compressed":    cat(compress(t, signed[:len(signed)-10])),
		"an endless compressed packet": {0xa3, 1},
		"unknown compression":          {0xa3, 9, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := readMessage(file, keys, Options{})
			refused(t, err)
		})
	}
	for _, file := range [][]byte{signed, compressed, armoured, compress(t, signed)} {
		if _, _, err := readMessage(file, keys, Options{}); err != nil {
			t.Error("the model itself is refused:", err)
		}
	}
}

// compress puts a message into a compressed packet.
func compress(t testing.TB, message []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := packet.SerializeCompressed(closer{&b}, packet.CompressionZLIB, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(message)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type closer struct{ io.Writer }

func (closer) Close() error { return nil }

func TestTruncatedAnywhere_S1_01(t *testing.T) {
	keys := ringOf(t, keyA)
	for name, args := range map[string][]string{
		"binary": {"-z", "0", "--sign"}, "compressed": {"--sign"}, "armoured": {"--armor", "-z", "0", "--sign"}, "cleartext": {"--clearsign"},
	} {
		t.Run(name, func(t *testing.T) {
			file := gpg_(t, []byte(sample), append([]string{"--local-user", keyA}, args...)...)
			whole := len(bytes.TrimRight(file, "\n"))
			for n := range whole {
				if _, _, err := readMessage(file[:n], keys, Options{}); !xapi.Is(err, xapi.InvalidPatch) {
					t.Fatalf("%d of %d bytes: %v", n, len(file), err)
				}
			}
		})
	}
}

// Not every bit of a message is signed: the name and date in the literal
// packet, the comment of armour. A flip there changes nothing that is used.
func TestFlippedBitAnywhere_S1_01(t *testing.T) {
	keys := ringOf(t, keyA)
	for name, args := range map[string][]string{
		"binary": {"-z", "0", "--sign"}, "compressed": {"--sign"}, "armoured": {"--armor", "-z", "0", "--sign"}, "cleartext": {"--clearsign"},
	} {
		t.Run(name, func(t *testing.T) {
			file := gpg_(t, []byte(sample), append([]string{"--local-user", keyA}, args...)...)
			_, m, err := readMessage(file, keys, Options{})
			if err != nil {
				t.Fatal(err)
			}
			accepted := 0
			for bit := range len(file) * 8 {
				file[bit/8] ^= 1 << (bit % 8)
				payload, got, err := readMessage(file, keys, Options{})
				file[bit/8] ^= 1 << (bit % 8)
				if err == nil {
					accepted++
					if string(payload) != sample || got.Signature().Signer != m.Signature().Signer {
						t.Fatalf("bit %d: %q", bit, payload)
					}
				} else if !xapi.Is(err, xapi.InvalidPatch) {
					t.Fatalf("bit %d: %v", bit, err)
				}
			}
			t.Logf("%d of %d flips change nothing that is signed or used", accepted, len(file)*8)
			if accepted > 150 {
				t.Errorf("%d flips are accepted", accepted)
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

func TestWeakKeys(t *testing.T) {
	for _, key := range []string{keyWeak, keyDSA} {
		file := gpg_(t, []byte(sample), "--local-user", key, "--digest-algo", "SHA256", "-z", "0", "--sign")
		keys := ringOf(t, key)
		_, _, err := readMessage(file, keys, Options{})
		refused(t, err)
		if k := keys.Keys()[0]; k.Usable || k.Reason == "" {
			t.Errorf("%s: %+v", key, k)
		}
	}
}

func TestExpiredKey(t *testing.T) {
	file := gpg_(t, []byte(sample), at(longAgo.Add(time.Hour)), "--local-user", keyOld, "-z", "0", "--sign")
	keys := ringOf(t, keyOld)
	_, _, err := readMessage(file, keys, Options{})
	refused(t, err)
	if k := keys.Keys()[0]; k.Usable || !k.Expires.Equal(longAgo.Add(24*time.Hour)) {
		t.Errorf("%+v", k)
	}
	then := keys.WithClock(func() time.Time { return longAgo.Add(2 * time.Hour) })
	payload, m, err := readMessage(file, then, Options{})
	if err != nil {
		t.Fatal("was good while the key was:", err)
	}
	if _, err := VerifyDetached(context.Background(), bytes.NewReader(payload), m.Signature(), then, nil); err != nil {
		t.Error(err)
	}
	_, err = VerifyDetached(context.Background(), bytes.NewReader(payload), m.Signature(), keys, nil)
	refused(t, err)
	if keys.Trusts(m.Signature().Signer, time.Now()) == nil || then.Trusts(m.Signature().Signer, longAgo.Add(time.Hour)) != nil {
		t.Error("Trusts")
	}
}

func TestClockOfTheSignerMayBeALittleAhead(t *testing.T) {
	file := gpg_(t, []byte(sample), "--local-user", keyA, "-z", "0", "--sign")
	keys := ringOf(t, keyA)
	for ahead, ok := range map[time.Duration]bool{time.Minute: true, 10 * time.Minute: false} {
		_, _, err := readMessage(file, keys.WithClock(func() time.Time { return time.Now().Add(-ahead) }), Options{})
		if (err == nil) != ok {
			t.Errorf("%s ahead: %v", ahead, err)
		}
	}
}

func TestRevokedKey(t *testing.T) {
	fp, err := gpgFingerprint(keyGone)
	if err != nil {
		t.Fatal(err)
	}
	file := gpg_(t, []byte(sample), "--local-user", keyGone, "-z", "0", "--sign")
	before := export(t, keyGone)
	_, m, err := readMessage(file, NewKeyring("before", before), Options{})
	if err != nil {
		t.Fatal(err)
	}
	// gpg puts a colon before its ready-made certificate against accidents.
	script := `sed s/^:-----/-----/ "$0/openpgp-revocs.d/$1.rev"`
	certificate, err := exec.Command("sh", "-c", script, gpgHome, fp).Output()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	writeFile(t, dir+"/1-key", before)
	writeFile(t, dir+"/2-revocation", certificate)
	loose, err := LoadKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	gpg_(t, certificate, "--import")
	after := ringOf(t, keyGone)
	both := NewKeyring("both", append(bytes.Clone(before), export(t, keyGone)...))
	for name, keys := range map[string]*Keyring{"revoked key": after, "old and revoked copy": both, "certificate beside the key": loose} {
		t.Run(name, func(t *testing.T) {
			if len(keys.Problems()) > 0 {
				t.Error(keys.Problems())
			}
			k := keys.Keys()
			if len(k) != 1 || !k[0].Revoked || k[0].Usable || k[0].Reason == "" {
				t.Errorf("%+v", k)
			}
			_, _, err := readMessage(file, keys, Options{})
			refused(t, err)
			_, err = VerifyDetached(context.Background(), strings.NewReader(sample), m.Signature(), keys, nil)
			refused(t, err)
			if keys.Trusts(fp, time.Now()) == nil {
				t.Error("trusted")
			}
		})
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

package patch

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/patchd/patchd/pkg/xapi"
)

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
		"first line longer":       replace(CleartextBegin, CleartextBegin+"x"),
		"checksum wrong":          replaceLine(file, "=", "=AAAA"),
		"signature damaged":       replace(signatureBegin+"\n\ni", signatureBegin+"\n\nj"),
		"begins and ends":         CleartextBegin,
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

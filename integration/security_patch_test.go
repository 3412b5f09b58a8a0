package integration

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// packets are the borders of the packets in a message of gpg's with whole
// lengths: one-pass signature, literal data, signature.
func packets(t testing.TB, msg []byte) (borders []int) {
	t.Helper()
	for at := 0; at < len(msg); {
		borders = append(borders, at)
		n, head := 0, 0
		switch c := msg[at]; {
		case c&0x40 == 0: // old form
			size := 1 << (c & 3)
			for _, b := range msg[at+1 : at+1+size] {
				n = n<<8 | int(b)
			}
			head = 1 + size
		case msg[at+1] < 192:
			n, head = int(msg[at+1]), 2
		case msg[at+1] < 224:
			n, head = (int(msg[at+1])-192)<<8+int(msg[at+2])+192, 3
		case msg[at+1] == 255:
			n, head = int(msg[at+2])<<24|int(msg[at+3])<<16|int(msg[at+4])<<8|int(msg[at+5]), 6
		default:
			return borders // partial lengths: enough is known
		}
		borders = append(borders, at+head)
		at += head + n
	}
	return append(borders, len(msg))
}

// signedFile signs a payload in a message of three packets with whole lengths.
func signedFile(t testing.TB, payload []byte) []byte {
	t.Helper()
	name := filepath.Join(t.TempDir(), "payload")
	if err := os.WriteFile(name, payload, 0o600); err != nil {
		t.Fatal(err)
	}
	return lab.DefaultKey(t).GPG(t, nil, "--sign", "-z", "0", "--output", "-", name)
}

// TestSecurity_signature_bypass sends what is almost a signed patch. Nothing of
// it may become a patch, but for changes that leave the signed payload as it was.
func TestSecurity_signature_bypass(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	evil := (&lab.Patch{Pad: 3000}).Payload()
	good := signedFile(t, (&lab.Patch{Pad: 3000}).Payload())
	stranger := lab.NewKey(t, "Stranger <stranger@example.test>")
	key := lab.DefaultKey(t)
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	border := packets(t, good)
	tries := map[string][]byte{
		"unsigned":                        evil,
		"an ELF that is unsigned":         cat([]byte("\x7fELF"), evil),
		"by a stranger":                   stranger.Sign(t, evil),
		"by a stranger, armoured":         stranger.GPG(t, evil, "--sign", "--armor", "-z", "0"),
		"by a stranger, clear":            stranger.GPG(t, []byte("#!/bin/sh\necho\n"), "--clearsign"),
		"by a stranger, compressed":       stranger.GPG(t, evil, "--sign"),
		"a signature alone":               key.GPG(t, evil, "--detach-sign"),
		"stored but not signed":           key.GPG(t, evil, "--store", "-z", "0"),
		"encrypted to a phrase":           key.GPG(t, evil, "--symmetric", "--passphrase", "x"),
		"two messages":                    cat(good, good),
		"a stranger's message behind":     cat(good, stranger.Sign(t, evil)),
		"a stranger's message before":     cat(stranger.Sign(t, evil), good),
		"unsigned literal behind":         cat(good, key.GPG(t, evil, "--store", "-z", "0")),
		"unsigned literal before":         cat(key.GPG(t, evil, "--store", "-z", "0"), good),
		"garbage behind":                  cat(good, []byte("x")),
		"zeros behind":                    cat(good, make([]byte, 4096)),
		"garbage before":                  cat([]byte("x"), good),
		"by SHA-1":                        key.GPG(t, evil, "--sign", "-z", "0", "--digest-algo", "SHA1", "--weak-digest", "MD5"),
		"the signature's type is text":    key.GPG(t, evil, "--sign", "-z", "0", "--textmode"),
		"one byte":                        {0x90},
		"an endless packet":               cat([]byte{0xcb, 0xff, 0xff, 0xff, 0xff, 0xff}, evil),
		"a patch inside a signed patch":   key.Sign(t, stranger.Sign(t, evil)),
		"signed twice, one by a stranger": cat(good[:border[1]], good),
	}
	// The packets in other orders, left out, and doubled.
	part := func(i int) []byte { return good[border[2*i]:border[2*i+2]] }
	if len(border) == 7 {
		tries["no one-pass packet"] = cat(part(1), part(2))
		tries["no literal data"] = cat(part(0), part(2))
		tries["no signature"] = cat(part(0), part(1))
		tries["literal data twice"] = cat(part(0), part(1), part(1), part(2))
		tries["signature first, unsigned then"] = cat(part(0), part(1), part(2), part(1))
		tries["another's payload"] = cat(part(0), key.GPG(t, evil, "--store", "-z", "0"), part(2))
	} else {
		t.Errorf("a signed patch has borders %v", border)
	}
	for _, at := range border {
		for _, cut := range []int{at - 1, at, at + 1} {
			if cut >= 0 && cut < len(good) {
				tries[fmt.Sprintf("cut at %d of %d", cut, len(good))] = good[:cut]
			}
		}
	}
	for name, body := range tries {
		if err := uploadErr(s, body); !isCode(err, xapi.InvalidPatch) && !isCode(err, xapi.InvalidPatchWithLog) {
			if !(len(body) == 0 && err != nil) { // the probe of a client
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if n := len(s.All("pool_patch")); n != 0 {
		t.Errorf("%d records", n)
	}
}

// TestSecurity_bit_flips flips one bit at 200 places. What is accepted all the
// same has the payload that was signed.
func TestSecurity_bit_flips(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	payload := (&lab.Patch{Pad: 500}).Payload()
	good, sum := signedFile(t, payload), fmt.Sprintf("%x", sha256.Sum256(payload))
	r := rand.New(rand.NewPCG(7, 7))
	border := packets(t, good)
	for i := range 200 {
		at := r.IntN(len(good))
		if i < 80 { // the frame is small: look at it more closely than chance would
			b := border[r.IntN(len(border)-1)]
			at = min(len(good)-1, b+r.IntN(90))
		}
		bad := bytes.Clone(good)
		bad[at] ^= 1 << r.IntN(8)
		a, err := s.Put("/pool_patch_upload", nil, bytes.NewReader(bad), int64(len(bad)))
		if err != nil {
			t.Fatal(err)
		}
		if a.Status == http.StatusUnprocessableEntity {
			continue
		}
		if a.Status != http.StatusCreated {
			t.Errorf("bit flipped at %d: %d %s", at, a.Status, a.Body)
			continue
		}
		ref := a.Record()["ref"].(string)
		got := digest(s, ref)
		s.Call("pool_patch.destroy", ref)
		if got != sum {
			t.Errorf("bit flipped at %d: accepted with payload %s instead of %s", at, got, sum)
		}
	}
	h.CheckNothingLeft()
}

// digest is the SHA-256 of the payload in the image of a patch, read by a tool
// that is not ours.
func digest(s *lab.Session, patch string) string {
	s.H.T.Helper()
	out, err := exec.Command("debugfs", "-R", "cat patch", image(s, vdiOf(s, patch))).Output()
	if err != nil {
		s.H.T.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(out))
}

// TestSecurity_keys_in_time: what counts is which keys are trusted at the moment.
func TestSecurity_keys_in_time(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{}
	ref := s.MustUpload(p)
	if _, err := apply(s, ref); err != nil {
		t.Fatal(err)
	}
	other := lab.NewKey(t, "Other <other@example.test>")
	q := &lab.Patch{}
	signed := other.Sign(t, q.Payload())
	hasCode(t, uploadErr(s, signed), xapi.InvalidPatch)
	h.Trust(other)
	if a := s.Upload(signed); a.Status != http.StatusCreated {
		t.Fatalf("with its key trusted: %d %s", a.Status, a.Body)
	}
	second := s.Call("pool_patch.get_by_uuid", string(q.UUID)).(string)
	if _, err := precheck(s, second); err != nil {
		t.Error(err)
	}
	h.Distrust(other)
	_, err := precheck(s, second)
	hasCode(t, err, xapi.InvalidPatch)
	_, err = apply(s, second)
	hasCode(t, err, xapi.InvalidPatch)

	// A revocation that is dropped in counts at once, whatever else is there.
	h.Trust(other)
	cert, err := os.ReadFile(filepath.Join(other.Home(), "openpgp-revocs.d", other.Fingerprint+".rev"))
	if err != nil {
		t.Fatal(err)
	}
	late := other.Sign(t, (&lab.Patch{}).Payload())
	revocation := strings.Replace(string(cert), ":-----BEGIN", "-----BEGIN", 1)
	other.GPG(t, []byte(revocation), "--import")
	revoked := filepath.Join(h.StateDir, "trusted-keys", "a name\twith \u202e and no suffix")
	if err := os.WriteFile(revoked, other.GPG(t, nil, "--armor", "--export"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = apply(s, second)
	hasCode(t, err, xapi.InvalidPatch)
	hasCode(t, uploadErr(s, late), xapi.InvalidPatch)

	// What lies there and is no key hides none, and is never waited for.
	dir := filepath.Join(h.StateDir, "trusted-keys")
	run(t, "mkfifo", filepath.Join(dir, "pipe"))
	os.Symlink("/dev/zero", filepath.Join(dir, "endless"))
	os.Symlink("loop", filepath.Join(dir, "loop"))
	os.Mkdir(filepath.Join(dir, "folder"), 0o755)
	os.WriteFile(filepath.Join(dir, strings.Repeat("n", 255)), []byte("no key"), 0o644)
	os.WriteFile(filepath.Join(dir, "two\nlines"), bytes.Repeat([]byte{0x99}, 1<<20), 0)
	began := time.Now()
	s.MustUpload(&lab.Patch{})
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("an upload took %s", took)
	}
}

// TestSecurity_bomb sends a small message that unpacks to more than an image holds.
func TestSecurity_bomb(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	good := (&lab.Patch{}).Signed(t)
	bomb := bytes.NewBuffer([]byte{0xa3, 1}) // a compressed packet to the end of the file, ZIP
	var out bytes.Buffer
	z, err := flate.NewWriter(&out, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	z.Write(good[:packets(t, good)[2]])                       // the one-pass packet
	z.Write([]byte{0xaf, 'b', 0, 0, 0, 0, 0, '#', '!', '\n'}) // literal data to the end
	z.Write(make([]byte, 1<<20))
	z.Flush()
	bomb.Write(out.Bytes())
	out.Reset()
	z.Write(make([]byte, 1<<20))
	z.Flush()
	for range 4200 {
		bomb.Write(out.Bytes())
	}
	before, began := free(t, h.StateDir), time.Now()
	err = uploadErr(s, bomb.Bytes())
	t.Logf("%d bytes were refused after %s: %v", bomb.Len(), time.Since(began), err)
	hasCode(t, err, xapi.MessageTooLarge)
	if n := before - free(t, h.StateDir); n > 64*mib {
		t.Errorf("%d MiB are gone", n/mib)
	}
	if n := rss(t, h.Pid()); n > 200*mib {
		t.Errorf("the daemon holds %d MiB", n>>20)
	}
}

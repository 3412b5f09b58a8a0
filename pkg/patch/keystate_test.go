package patch

import (
	"bytes"
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"
)

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

func TestKeyHeldTogetherBySHA1(t *testing.T) {
	const name = "sha1@patch.test"
	gpg_(t, nil, "--cert-digest-algo", "SHA1", "--quick-generate-key", name, "rsa2048", "sign", "0")
	file := gpg_(t, []byte(sample), "--local-user", name, "--digest-algo", "SHA256", "-z", "0", "--sign")
	keys := ringOf(t, name)
	_, _, err := readMessage(file, keys, Options{})
	refused(t, err)
	if k := keys.Keys()[0]; k.Usable || k.Reason == "" {
		t.Errorf("%+v", k)
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
	blob, err := dearmourKeys(certificate)
	if err != nil {
		t.Fatal(err)
	}
	joined := NewKeyring("joined", append(bytes.Clone(blob[0]), before...))
	for name, keys := range map[string]*Keyring{"certificate and key in one": joined, "revoked key": after, "old and revoked copy": both, "certificate beside the key": loose} {
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

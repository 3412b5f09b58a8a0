package patch

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
	"golang.org/x/sys/unix"
)

func TestLoadKeyringReadsEveryFile(t *testing.T) {
	dir := t.TempDir()
	armoured := gpg_(t, nil, "--armor", "--export", keyB)
	writeFile(t, dir+"/.hidden name without ending", export(t, keyA))
	writeFile(t, dir+"/b.asc", append(append([]byte("some text\n"), armoured...), gpg_(t, nil, "--armor", "--export", keySub)...))
	writeFile(t, dir+"/copy", bytes.ReplaceAll(armoured, []byte("\n"), []byte("\r\n")))
	writeFile(t, dir+"/empty", nil)
	writeFile(t, dir+"/rubbish", []byte("this is no key"))
	writeFile(t, dir+"/binary rubbish", []byte{0xff, 0xfe, 0xfd})
	writeFile(t, dir+"/a signature", gpg_(t, []byte("x"), "--local-user", keyA, "--detach-sign"))
	writeFile(t, dir+"/cut", export(t, keyDSA)[:100])
	writeFile(t, dir+"/cut.asc", armoured[:len(armoured)-60])
	writeFile(t, dir+"/big", make([]byte, maxKeyFileSize+1))
	writeFile(t, dir+"/secret.key", gpg_(t, nil, "--export-secret-keys", keyGone))
	if err := os.Mkdir(dir+"/folder", 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/folder/key", export(t, keyWeak))
	if err := os.Symlink(writeFile(t, t.TempDir()+"/key", export(t, keyWeak)), dir+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(dir+"/pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/sock", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	k, err := LoadKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, key := range k.Keys() {
		ids = append(ids, key.UserIDs...)
	}
	for _, want := range []string{keyA, keyB, keySub, keyGone} {
		if strings.Count(strings.Join(ids, " "), want) != 1 {
			t.Errorf("%s not once in %v", want, ids)
		}
	}
	if len(ids) != 4 {
		t.Errorf("keys: %v", ids)
	}
	problems := map[string]string{}
	for _, p := range k.Problems() {
		problems[p.File] = p.String()
	}
	for file, text := range map[string]string{
		"empty": "empty", "rubbish": "neither", "binary rubbish": "", "a signature": "cannot be read", "cut": "", "cut.asc": "end",
		"big": "more than", "secret.key": "secret", "folder": "regular", "link": "symbolic", "pipe": "regular", "sock": "regular",
	} {
		if got, ok := problems[file]; !ok || !strings.Contains(got, text) {
			t.Errorf("%s: %q", file, got)
		}
		delete(problems, file)
	}
	if len(problems) > 0 {
		t.Error("more problems:", problems)
	}
}

func TestKeyringIsReadAfresh(t *testing.T) {
	dir := t.TempDir()
	file := gpg_(t, []byte(sample), "--local-user", keyA, "-z", "0", "--sign")
	try := func() error {
		k, err := LoadKeyring(dir)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = readMessage(file, k, Options{})
		return err
	}
	refused(t, try())
	name := writeFile(t, filepath.Join(dir, "new"), export(t, keyA))
	if err := try(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	refused(t, try())
}

func TestKeysDescribe(t *testing.T) {
	k := ringOf(t, keyA, keyB, keySub)
	for _, key := range k.Keys() {
		if !key.Usable || key.Revoked || key.Reason != "" || !key.Expires.IsZero() || time.Since(key.Created) > time.Hour || key.File != "test" {
			t.Errorf("%+v", key)
		}
		fp, err := gpgFingerprint(key.UserIDs[0])
		if err != nil || fp != key.Fingerprint {
			t.Error(fp, err)
		}
		switch key.UserIDs[0] {
		case keyB:
			if key.Algorithm != "RSA 2048" {
				t.Error(key.Algorithm)
			}
		case keySub:
			if len(key.Subkeys) != 1 || k.Trusts(strings.ToLower(key.Subkeys[0]), time.Now()) != nil {
				t.Errorf("%+v", key)
			}
		}
	}
	if k.Trusts("0123456789ABCDEF0123456789ABCDEF01234567", time.Now()) == nil || k.Trusts("", time.Now()) == nil {
		t.Error("trusts a stranger")
	}
}

func TestRevokedSubkey(t *testing.T) {
	file := gpg_(t, []byte(sample), "--local-user", keySub, "-z", "0", "--sign")
	good := export(t, keySub)
	_, m, err := readMessage(file, NewKeyring("good", good), Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := "key 1\nrevkey\ny\n1\n\ny\nsave\n"
	if _, err := runGPG([]byte(c), "--no-batch", "--command-fd", "0", "--edit-key", keySub); err != nil {
		t.Fatal(err)
	}
	bad := ringOf(t, keySub)
	_, _, err = readMessage(file, bad, Options{})
	refused(t, err)
	if bad.Trusts(m.Signature().Signer, time.Now()) == nil {
		t.Error("a revoked subkey is trusted")
	}
	// The good copy beside it does not bring it back, whichever is read first.
	for _, data := range [][]byte{append(bytes.Clone(good), export(t, keySub)...), append(export(t, keySub), good...)} {
		_, _, err = readMessage(file, NewKeyring("both", data), Options{})
		refused(t, err)
	}
	fp, err := gpgFingerprint(keySub)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := runGPG(nil, "--quick-add-key", fp, "ed25519", "sign", "0"); err != nil {
		t.Fatal(err) // for the tests after this one
	}
}

func TestLateSubkeyOfAKnownKey(t *testing.T) {
	// An old copy without the subkey, and a new one with it.
	full := export(t, keySub)
	list, errs := parseKeys(full)
	if len(list) != 1 || len(errs) > 0 {
		t.Fatal(list, errs)
	}
	list[0].Subkeys = nil
	var b bytes.Buffer
	if err := list[0].Serialize(&b); err != nil {
		t.Fatal(err)
	}
	bare := b.Bytes()
	file := gpg_(t, []byte(sample), "--local-user", keySub, "-z", "0", "--sign")
	k := NewKeyring("both", append(bytes.Clone(bare), full...))
	if len(k.Keys()) != 1 || k.Keys()[0].File != "both" {
		t.Errorf("%+v", k.Keys())
	}
	if _, _, err := readMessage(file, k, Options{}); err != nil {
		t.Error(err)
	}
	_, _, err := readMessage(file, NewKeyring("bare", bare), Options{})
	refused(t, err)
}

// A certificate may name another's key as its subkey; without a binding of that
// key this means nothing, and must not get in the way of the owner.
func TestClaimedSubkeyDoesNotHideItsOwner(t *testing.T) {
	owner, errs := parseKeys(export(t, keyA))
	thief, more := parseKeys(export(t, keySub))
	if len(owner) != 1 || len(thief) != 1 || len(errs)+len(more) > 0 {
		t.Fatal(errs, more)
	}
	stolen := thief[0].Subkeys[0]
	pub := *owner[0].PrimaryKey
	pub.IsSubkey = true
	stolen.PublicKey = &pub
	thief[0].Subkeys = append(thief[0].Subkeys, stolen)
	file := gpg_(t, []byte(sample), "--local-user", keyA, "-z", "0", "--sign")
	for _, list := range [][]*openpgp.Entity{{thief[0], owner[0]}, {owner[0], thief[0]}} {
		var b bytes.Buffer
		for _, e := range list {
			if err := e.Serialize(&b); err != nil {
				t.Fatal(err)
			}
		}
		_, m, err := readMessage(file, NewKeyring("x", b.Bytes()), Options{})
		if err != nil || m.Signature().UserID != keyA {
			t.Errorf("%v", err)
		}
	}
	var b bytes.Buffer
	if err := thief[0].Serialize(&b); err != nil {
		t.Fatal(err)
	}
	_, _, err := readMessage(file, NewKeyring("x", b.Bytes()), Options{})
	refused(t, err)
}

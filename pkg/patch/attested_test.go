package patch

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestAttestationHoldsOnlyForItsMapPayloadAndTrustedKey(t *testing.T) {
	keys, others := ringOf(t, keyA), ringOf(t, keyB)
	fp := keys.Keys()[0].Fingerprint
	m, payload := strings.Repeat("a", 64), strings.Repeat("b", 64)
	dir := Attestations(filepath.Join(t.TempDir(), "attested"))
	if dir.Holds(m, payload, keys, nil) {
		t.Error("nothing was attested")
	}
	if err := dir.Remember(Attestation{Map: m, Digest: payload, Kind: Inline, Signer: fp}); err != nil {
		t.Fatal(err)
	}
	if !dir.Holds(m, payload, keys, nil) {
		t.Error("what was attested does not hold")
	}
	for what, holds := range map[string]bool{
		"another payload":    dir.Holds(m, m, keys, nil),
		"no payload":         dir.Holds(m, "", keys, nil),
		"another map":        dir.Holds(payload, payload, keys, nil),
		"no map":             dir.Holds("", payload, keys, nil),
		"a path":             dir.Holds("../attested/"+m, payload, keys, nil),
		"a key that is gone": dir.Holds(m, payload, others, nil),
		"no folder":          Attestations("").Holds(m, payload, keys, nil),
	} {
		if holds {
			t.Error("holds for", what)
		}
	}
	// A file that was put in another's place attests nothing.
	if err := os.Rename(filepath.Join(string(dir), m), filepath.Join(string(dir), payload)); err != nil {
		t.Fatal(err)
	}
	if dir.Holds(payload, payload, keys, nil) {
		t.Error("a renamed attestation holds")
	}
	if err := os.WriteFile(filepath.Join(string(dir), m), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if dir.Holds(m, payload, keys, nil) {
		t.Error("a damaged attestation holds")
	}
}

func TestPinnedAttestationHoldsWhileThePinDoes(t *testing.T) {
	m, payload := strings.Repeat("a", 64), strings.Repeat("b", 64)
	dir := Attestations(t.TempDir())
	if err := dir.Remember(Attestation{Map: m, Digest: payload, Kind: Pinned}); err != nil {
		t.Fatal(err)
	}
	if !dir.Holds(m, payload, ringOf(t), []string{payload}) || dir.Holds(m, payload, ringOf(t), nil) {
		t.Error("it must hold by the pin, and only by the pin")
	}
}

func TestAttestationsOfUnwantedMapsAreForgottenInTime(t *testing.T) {
	kept, gone := strings.Repeat("1", 64), strings.Repeat("2", 64)
	dir := Attestations(t.TempDir())
	for _, m := range []string{kept, gone} {
		if err := dir.Remember(Attestation{Map: m, Digest: kept, Kind: Pinned}); err != nil {
			t.Fatal(err)
		}
	}
	wanted := func(m string) bool { return m == kept }
	if err := dir.Forget(time.Now().Add(-time.Hour), wanted); err != nil || !dir.Holds(gone, kept, nil, []string{kept}) {
		t.Errorf("a young attestation is gone, %v", err)
	}
	if err := dir.Forget(time.Now().Add(time.Hour), wanted); err != nil || dir.Holds(gone, kept, nil, []string{kept}) || !dir.Holds(kept, kept, nil, []string{kept}) {
		t.Errorf("forgetting: %v", err)
	}
}

package patch

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/dom0"
)

func TestVerifyReports(t *testing.T) {
	dir := t.TempDir()
	keys := ringOf(t, keyA)
	fp, err := gpgFingerprint(keyA)
	if err != nil {
		t.Fatal(err)
	}
	fpB, err := gpgFingerprint(keyB)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		file       []byte
		kind       SignatureKind
		compressed bool
		accepted   bool
		claimed    string
		reason     string
		digest     bool
	}{
		"inline":           {gpg_(t, []byte(sample), "-u", keyA, "-z", "0", "--sign"), Inline, false, true, fp, "", true},
		"compressed":       {gpg_(t, []byte(sample), "-u", keyA, "--sign"), Inline, true, true, fp, "", true},
		"cleartext":        {gpg_(t, []byte(sample), "-u", keyA, "--clearsign"), Cleartext, false, true, fp, "", true},
		"stranger":         {gpg_(t, []byte(sample), "-u", keyB, "-z", "0", "--sign"), Inline, false, false, fpB, "unknown", true},
		"strange text":     {gpg_(t, []byte(sample), "-u", keyB, "--clearsign"), Cleartext, false, false, fpB, "unknown", false},
		"unsigned":         {[]byte(sample), "", false, false, "", "not signed", false},
		"stored":           {gpg_(t, []byte(sample), "-z", "0", "--store"), Inline, false, false, "", "not signed", false},
		"terminal escapes": {[]byte(CleartextBegin + "\n\x1b[31m\n\n"), Cleartext, false, false, "", "header", false},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, dir+"/"+name, c.file)
			r, err := Verify(context.Background(), VerifyOptions{Path: path, Keys: keys})
			if err != nil {
				t.Fatal(err)
			}
			if r.Kind != c.kind || r.Compressed != c.compressed || r.Accepted != c.accepted || strings.Join(r.Claimed, " ") != c.claimed {
				t.Errorf("%+v", r)
			}
			if !strings.Contains(r.Reason, c.reason) || (r.Reason == "") != c.accepted || strings.Contains(r.Reason, "\x1b") || r.Info != nil {
				t.Errorf("%+v", r)
			}
			if (r.Digest == sum([]byte(sample))) != c.digest || r.Size != int64(len(c.file)) || c.digest && r.PayloadSize != int64(len(sample)) {
				t.Errorf("%+v", r)
			}
			if c.accepted != (r.Signature.Primary == fp) {
				t.Errorf("%+v", r.Signature)
			}
		})
	}
	if _, err := Verify(context.Background(), VerifyOptions{Path: dir + "/missing", Keys: keys}); err == nil {
		t.Error("a missing file is a report")
	}
	if _, err := Verify(context.Background(), VerifyOptions{Path: dir, Keys: keys}); err == nil {
		t.Error("a folder is a report")
	}
}

func TestVerifyAsksAnAcceptedPatch(t *testing.T) {
	removed := 0
	o := VerifyOptions{
		Path: writeFile(t, t.TempDir()+"/p", gpg_(t, []byte(sample), "-u", keyA, "--sign")),
		Keys: ringOf(t, keyA),
		Dom0: runner{run: func(_ context.Context, c dom0.Cmd) (dom0.Result, error) {
			if data, err := os.ReadFile(c.Sandbox.Image); err != nil || string(data) != sample {
				t.Error(string(data), err)
			}
			io.WriteString(c.Stdout, goodInfo)
			return dom0.Result{}, nil
		}},
		Image: func(_ context.Context, payload io.Reader, size int64) (string, func() error, error) {
			data, err := io.ReadAll(payload)
			if err != nil || size != int64(len(sample)) {
				t.Error(size, err)
			}
			return writeFile(t, t.TempDir()+"/image", data), func() error { removed++; return nil }, nil
		},
	}
	r, err := Verify(context.Background(), o)
	if err != nil || r.Info == nil || r.Info.NameLabel != "XS1" || removed != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	o.Dom0 = runner{run: func(context.Context, dom0.Cmd) (dom0.Result, error) { return dom0.Result{ExitCode: 1}, nil }}
	r, err = Verify(context.Background(), o)
	if err != nil || !r.Accepted || r.Info != nil || !strings.Contains(r.InfoProblem, "exit status 1") || removed != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	o.Keys = ringOf(t, keyB)
	o.Dom0 = runner{} // a run would panic
	if r, err = Verify(context.Background(), o); err != nil || r.Accepted || r.Info != nil {
		t.Fatalf("%+v, %v", r, err)
	}
}

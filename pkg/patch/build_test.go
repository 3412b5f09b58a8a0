package patch

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/xapi"
)

const infoTOMLText = `uuid = "0A1B2C3D-0000-4000-8000-00000000000F"
version = "1.0"
name-label = "Fix \\n it's <all> & $(more) ` + "`x`" + `"
name-description = "é"
after-apply-guidance = ["restartXAPI", "RebootHost"]
scratch-size = 1000
`

// patchFolder makes a folder with the usual things in it.
func patchFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, dir+"/info.toml", []byte(infoTOMLText))
	writeFile(t, dir+"/README.md", []byte("hello"))
	writeFile(t, dir+"/.git/config", []byte("hello"))
	writeFile(t, dir+"/precheck", []byte("#!/bin/sh\n[ ! -e files ] || exit 9\necho checked $PATCHD_VERB\nexit ${PRECHECK_EXIT-0}\n"))
	writeFile(t, dir+"/apply", []byte("#!/bin/sh\ncat files/deep/data files/run.sh | cksum; files/run.sh; readlink files/link; echo 0.5 half >&3; exit ${APPLY_EXIT-0}\n"))
	writeFile(t, dir+"/files/deep/data", bytes.Repeat([]byte("data\x00\n"), 100000))
	writeFile(t, dir+"/files/run.sh", []byte("#!/bin/sh\necho ran\n"))
	writeFile(t, dir+"/files/"+strings.Repeat("long/", 30)+"name with blank", []byte("x"))
	if err := os.Chmod(dir+"/files/run.sh", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("deep/data", dir+"/files/link"); err != nil {
		t.Fatal(err)
	}
	return dir
}

func secretKey(t *testing.T, key string, args ...string) string {
	t.Helper()
	return writeFile(t, t.TempDir()+"/key", gpg_(t, nil, append(args, "--export-secret-keys", key)...))
}

// payloadOf verifies a built file and writes its payload down, executable.
func payloadOf(t *testing.T, file string, keys *Keyring) (string, []byte) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	payload, m, err := readMessage(data, keys, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if m.Compressed() {
		t.Error("compressed")
	}
	name := writeFile(t, t.TempDir()+"/patch", payload)
	if err := os.Chmod(name, 0o755); err != nil {
		t.Fatal(err)
	}
	return name, payload
}

// runVerb runs a payload and gives stdout, stderr, what came on descriptor 3
// and the exit status.
func runVerb(t *testing.T, patch, verb string, env ...string) (stdout, stderr, progress string, exit int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var out, errs bytes.Buffer
	c := exec.Command(patch, verb)
	c.Env = append([]string{"PATH=/usr/bin:/bin", "PATCHD_VERB=" + verb}, env...)
	c.Stdout, c.Stderr, c.ExtraFiles = &out, &errs, []*os.File{w}
	err = c.Run()
	w.Close()
	if err != nil && c.ProcessState == nil {
		t.Fatal(err)
	}
	p, _ := io.ReadAll(r)
	return out.String(), errs.String(), string(p), c.ProcessState.ExitCode()
}

func TestBuild(t *testing.T) {
	dir := patchFolder(t)
	out := t.TempDir() + "/fix.patch"
	b, err := Build(context.Background(), BuildOptions{Dir: dir, Out: out, SecretKey: secretKey(t, keyA, "--armor")})
	if err != nil {
		t.Fatal(err)
	}
	keys := ringOf(t, keyA)
	patch, payload := payloadOf(t, out, keys)
	st, err := os.Stat(out)
	if err != nil || b.Size != st.Size() || b.PayloadSize != int64(len(payload)) || b.Digest != sum(payload) || b.NewUUID || st.Mode() != 0o644 {
		t.Errorf("%+v %v %v", b, st, err)
	}
	// gpg agrees, and is given the same bytes.
	if got := gpg_(t, nil, "--decrypt", out); !bytes.Equal(got, payload) {
		t.Error("gpg reads another payload")
	}

	stdout, stderr, _, exit := runVerb(t, patch, "info")
	i, err := ParseInfo([]byte(stdout))
	if err != nil || exit != 0 || stderr != "" {
		t.Fatal(err, exit, stderr)
	}
	want := Info{UUID: "0a1b2c3d-0000-4000-8000-00000000000f", Version: "1.0", NameLabel: "Fix \\n it's <all> & $(more) `x`", NameDescription: "é"}
	if i.UUID != want.UUID || i.NameLabel != want.NameLabel || i.NameDescription != want.NameDescription || i.Version != want.Version {
		t.Errorf("%+v", i)
	}
	if len(i.Guidance) != 2 || i.Guidance[0] != xapi.RestartXAPI || i.Guidance[1] != xapi.RestartHost || i.ScratchSize < 600000+1000 {
		t.Errorf("%+v", i)
	}

	scratch := t.TempDir()
	for _, env := range []string{"PATCHD_SCRATCH=" + scratch, "X=y"} {
		stdout, stderr, _, exit = runVerb(t, patch, "precheck", env)
		if stdout != "checked precheck\n" || stderr != "" || exit != 0 {
			t.Errorf("precheck: %q %q %d", stdout, stderr, exit)
		}
		if _, _, _, exit = runVerb(t, patch, "precheck", env, "PRECHECK_EXIT=1"); exit != 1 {
			t.Error("precheck:", exit)
		}
		stdout, stderr, progress, exit := runVerb(t, patch, "apply", env, "APPLY_EXIT=7")
		if !strings.HasSuffix(stdout, "ran\ndeep/data\n") || stderr != "" || exit != 7 || progress != "0.5 half\n" {
			t.Errorf("apply: %q %q %q %d", stdout, stderr, progress, exit)
		}
	}
	for _, d := range []string{scratch, filepath.Dir(patch)} {
		if left, err := filepath.Glob(d + "/patch.*"); err != nil || len(left) > 0 {
			t.Error("left behind:", left, err)
		}
	}
	if _, stderr, _, exit := runVerb(t, patch, "sing"); exit != 64 || !strings.Contains(stderr, "usage") {
		t.Error(exit, stderr)
	}
	if _, stderr, _, exit := runVerb(t, patch, "apply", "PATCHD_SCRATCH=/nowhere"); exit != 1 || !strings.Contains(stderr, "/nowhere") {
		t.Error(exit, stderr)
	}
}

func TestBuildPrecheckFindsTheScratchTooSmall(t *testing.T) {
	dir := patchFolder(t)
	writeFile(t, dir+"/info.toml", []byte(strings.Replace(infoTOMLText, "1000", "1000000000000000", 1)))
	out := t.TempDir() + "/fix.patch"
	if _, err := Build(context.Background(), BuildOptions{Dir: dir, Out: out, SecretKey: secretKey(t, keyA)}); err == nil {
		t.Fatal("more than any image can hold, and not refused")
	}
	writeFile(t, dir+"/info.toml", []byte(strings.Replace(infoTOMLText, "1000", "60000000000000", 1)))
	if _, err := Build(context.Background(), BuildOptions{Dir: dir, Out: out, SecretKey: secretKey(t, keyA)}); err != nil {
		t.Fatal(err)
	}
	patch, _ := payloadOf(t, out, ringOf(t, keyA))
	stdout, _, _, exit := runVerb(t, patch, "precheck")
	got := description(PrecheckError(ref, exit, stdout, stdout))
	if exit != 1 || len(got) != 4 || got[0] != xapi.PrecheckFailedOutOfSpace || len(got[3]) != len("60000000000000") {
		t.Error(exit, got)
	}
}

func TestBuildIsReproducible(t *testing.T) {
	one, two := patchFolder(t), patchFolder(t)
	if err := os.Chmod(two+"/files/deep/data", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(two+"/apply", 0o755); err != nil {
		t.Fatal(err)
	}
	outs := t.TempDir()
	a, err := Build(context.Background(), BuildOptions{Dir: one, Out: outs + "/a", SecretKey: secretKey(t, keyA)})
	if err != nil {
		t.Fatal(err)
	}
	b, err := Build(context.Background(), BuildOptions{Dir: two, Out: outs + "/b", SecretKey: secretKey(t, keyB)})
	if err != nil {
		t.Fatal(err)
	}
	if a.Digest != b.Digest || a.Signature.Signer == b.Signature.Signer {
		t.Errorf("%+v\n%+v", a, b)
	}
}

func TestBuildByGPG(t *testing.T) {
	if err := gpgKeys(); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GNUPGHOME", gpgHome)
	dir := patchFolder(t)
	os.Remove(dir + "/precheck")
	os.RemoveAll(dir + "/files")
	out := t.TempDir() + "/fix.patch"
	o := BuildOptions{Dir: dir, Out: out, GPGKey: keyB, Dom0: runner{run: plainRun}}
	b, err := Build(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	if b.Signature.UserID != keyB || b.Signature.Hash != "SHA256" {
		t.Errorf("%+v", b.Signature)
	}
	patch, _ := payloadOf(t, out, ringOf(t, keyB))
	if stdout, _, _, exit := runVerb(t, patch, "precheck"); stdout != "" || exit != 0 {
		t.Error(stdout, exit)
	}
	if _, err := Build(context.Background(), o); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Error(err)
	}
	o.Overwrite = true
	if _, err := Build(context.Background(), o); err != nil {
		t.Error(err)
	}
	d, err := dom0.New(dom0.Options{CgroupPrefix: "patchd-patch-test-gpg", AllowNoCgroup: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	o.Dom0 = d
	if again, err := Build(context.Background(), o); err != nil || again.Digest != b.Digest {
		t.Error(again, err)
	}
	o.GPGKey = "nobody@patch.test"
	if _, err := Build(context.Background(), o); err == nil || !strings.Contains(err.Error(), "nobody") {
		t.Error(err)
	}
	o.GPGKey = keyWeak
	if _, err := Build(context.Background(), o); err == nil || !strings.Contains(err.Error(), "would not be accepted") {
		t.Error(err)
	}
}

func TestBuildByALockedKey(t *testing.T) {
	folder := patchFolder(t)
	if err := gpgKeys(); err != nil {
		t.Fatal(err)
	}
	home := gpgHome
	defer func() { gpgHome = home }()
	var err error
	if gpgHome, err = os.MkdirTemp("", "gpg"); err != nil {
		t.Fatal(err)
	}
	defer removeHome(gpgHome)
	gpg_(t, nil, "--passphrase", "open sesame", "--quick-generate-key", "locked@patch.test", "ed25519", "sign", "0")
	key := secretKey(t, "locked@patch.test", "--passphrase", "open sesame")
	o := BuildOptions{Dir: folder, Out: t.TempDir() + "/out", SecretKey: key}
	for pass, want := range map[string]string{"": "passphrase is needed", "wrong": "does not unlock"} {
		o.Passphrase = []byte(pass)
		if _, err := Build(context.Background(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", pass, err)
		}
	}
	o.Passphrase = []byte("open sesame")
	if _, err := Build(context.Background(), o); err != nil {
		t.Error(err)
	}
	t.Setenv("GNUPGHOME", gpgHome)
	exec.Command("gpgconf", "--homedir", gpgHome, "--kill", "all").Run() // forget the passphrase
	o.SecretKey, o.GPGKey, o.Dom0, o.Overwrite = "", "locked@patch.test", runner{run: plainRun}, true
	if _, err := Build(context.Background(), o); err != nil {
		t.Error(err)
	}
}

func TestBuildTakesAFreshUUID(t *testing.T) {
	dir := patchFolder(t)
	_, rest, _ := strings.Cut(infoTOMLText, "\n")
	writeFile(t, dir+"/info.toml", []byte(rest))
	b, err := Build(context.Background(), BuildOptions{Dir: dir, Out: t.TempDir() + "/out", SecretKey: secretKey(t, keyA)})
	if err != nil || !b.NewUUID || !b.Info.UUID.Valid() {
		t.Error(b, err)
	}
}

func TestBuildErrorsNameFileAndCure(t *testing.T) {
	key := secretKey(t, keyA)
	info := func(old, new string) func(string) {
		return func(dir string) { writeFile(t, dir+"/info.toml", []byte(strings.Replace(infoTOMLText, old, new, 1))) }
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		change func(dir string)
		want   string
	}{
		"apply missing":     {func(dir string) { must(os.Remove(dir + "/apply")) }, "apply is missing"},
		"apply a folder":    {func(dir string) { must(os.Remove(dir + "/apply")); must(os.Mkdir(dir+"/apply", 0o755)) }, "must be a file"},
		"apply no program":  {func(dir string) { writeFile(t, dir+"/apply", []byte("echo")) }, "begins with #!"},
		"apply empty":       {func(dir string) { writeFile(t, dir+"/apply", nil) }, "begins with #!"},
		"carriage returns":  {func(dir string) { writeFile(t, dir+"/precheck", []byte("#!/bin/sh\r\nexit\r\n")) }, "carriage returns"},
		"info.toml missing": {func(dir string) { must(os.Remove(dir + "/info.toml")) }, "info.toml is missing"},
		"stray file":        {func(dir string) { writeFile(t, dir+"/data.rpm", nil) }, "belong into files/"},
		"unknown key":       {info("version", "colour = 1\nversion"), `line 2: unknown key "colour"`},
		"unknown table":     {info("scratch-size = 1000", "[more]\nx = 1"), "line 6: unknown key"},
		"syntax":            {info(`"1.0"`, "1.0.0"), "line 2"},
		"wrong type":        {info(`"1.0"`, "1"), "version"},
		"key missing":       {info("version", "#version"), "version is missing"},
		"guidance":          {info("restartXAPI", "restartWorld"), "restartWorld"},
		"uuid":              {info("0A1B", "xxxx"), "uuid"},
		"label empty":       {info(`name-label = "Fix \\n it's <all> & $(more) `+"`x`"+`"`, `name-label = ""`), "name-label"},
		"label of lines":    {info(`\\n`, `\n`), "one line"},
		"scratch negative":  {info("1000", "-1"), "negative"},
		"pipe among files":  {func(dir string) { must(exec.Command("mkfifo", dir+"/files/pipe").Run()) }, "leave it out"},
		"set-uid":           {func(dir string) { must(os.Chmod(dir+"/files/run.sh", 0o755|os.ModeSetuid)) }, "set-uid"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := patchFolder(t)
			c.change(dir)
			outs := t.TempDir()
			_, err := Build(context.Background(), BuildOptions{Dir: dir, Out: outs + "/out", SecretKey: key})
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%v", err)
			}
			if left, _ := os.ReadDir(outs); len(left) > 0 {
				t.Error("left behind:", left)
			}
		})
	}
	dir := patchFolder(t)
	for name, c := range map[string]struct {
		o    BuildOptions
		want string
	}{
		"nobody signs": {BuildOptions{}, "nobody signs"},
		"two sign":     {BuildOptions{SecretKey: key, GPGKey: keyA}, "not by both"},
		"public key":   {BuildOptions{SecretKey: writeFile(t, t.TempDir()+"/key", export(t, keyA))}, "0 secret keys"},
		"two keys":     {BuildOptions{SecretKey: writeFile(t, t.TempDir()+"/key", gpg_(t, nil, "--export-secret-keys", keyA, keyB))}, "2 secret keys"},
		"weak key":     {BuildOptions{SecretKey: secretKey(t, keyWeak)}, "cannot sign"},
		"expired key":  {BuildOptions{SecretKey: secretKey(t, keyOld)}, "cannot sign"},
		"no key":       {BuildOptions{SecretKey: "/nowhere"}, "/nowhere"},
		"gpg nowhere":  {BuildOptions{GPGKey: keyA}, "gpg cannot be run"},
		"no folder":    {BuildOptions{SecretKey: key, Dir: "/nowhere"}, "/nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.o.Dir == "" {
				c.o.Dir = dir
			}
			c.o.Out = t.TempDir() + "/out"
			if _, err := Build(context.Background(), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Error(err)
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	outs := t.TempDir()
	if _, err := Build(ctx, BuildOptions{Dir: dir, Out: outs + "/out", SecretKey: key}); err == nil {
		t.Error("built under a dead context")
	}
	if left, _ := os.ReadDir(outs); len(left) > 0 {
		t.Error("left behind:", left)
	}
}

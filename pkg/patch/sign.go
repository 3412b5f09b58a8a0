package patch

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/patchd/patchd/pkg/dom0"
)

// signer signs one payload. keys holds its public key.
type signer struct {
	sign func(ctx context.Context, out *os.File, payload func(io.Writer) error) error
	keys *Keyring
}

func newSigner(ctx context.Context, o BuildOptions) (*signer, error) {
	switch {
	case o.SecretKey != "" && o.GPGKey != "":
		return nil, errors.New("sign by a secret key file or by gpg, not by both")
	case o.SecretKey != "":
		return fileSigner(o)
	case o.GPGKey != "":
		return gpgSigner(ctx, o)
	}
	return nil, errors.New("nobody signs the patch: name a secret key file or a key of gpg")
}

// fileSigner signs with an exported secret key, without any other program.
func fileSigner(o BuildOptions) (*signer, error) {
	e, err := readSecretKey(o.SecretKey, o.Passphrase)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.SecretKey, err)
	}
	now := o.Now()
	config := policy(now)
	key, ok := e.SigningKeyById(now, 0, config)
	if !ok {
		return nil, fmt.Errorf("%s: the key cannot sign: %w", o.SecretKey, checkKey(e, 0, now))
	}
	if key.PrivateKey == nil || key.PrivateKey.Dummy() {
		return nil, fmt.Errorf("%s: the secret part of the signing key %s is not in the file", o.SecretKey, fingerprint(key.PublicKey))
	}
	var public bytes.Buffer
	if err := e.Serialize(&public); err != nil {
		return nil, fmt.Errorf("%s: %w", o.SecretKey, err)
	}
	config.DefaultHash = crypto.SHA256
	config.DefaultCompressionAlgo = packet.CompressionNone
	config.SigningKeyId = key.PublicKey.KeyId
	sign := func(_ context.Context, out *os.File, payload func(io.Writer) error) error {
		buffered := bufio.NewWriterSize(out, 256<<10)
		w, err := openpgp.SignWithParams(buffered, []*openpgp.Entity{e}, &openpgp.SignParams{Config: config})
		if err != nil {
			return fmt.Errorf("sign: %w", err)
		}
		if err := payload(w); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return fmt.Errorf("sign: %w", err)
		}
		return buffered.Flush()
	}
	return &signer{sign, NewKeyring(o.SecretKey, public.Bytes())}, nil
}

// readSecretKey reads the one secret key of a file and unlocks it.
func readSecretKey(name string, passphrase []byte) (*openpgp.Entity, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := readAtMost(file, maxKeyFileSize)
	if err != nil {
		return nil, err
	}
	blobs, err := dearmourKeys(data)
	if err != nil {
		return nil, err
	}
	var secret []*openpgp.Entity
	for _, b := range blobs {
		found, errs := parseKeys(b)
		if len(errs) > 0 {
			return nil, errors.Join(errs...)
		}
		for _, e := range found {
			if holdsSecret(e) {
				secret = append(secret, e)
			}
		}
	}
	if len(secret) != 1 {
		return nil, fmt.Errorf("holds %d secret keys where one is wanted (gpg --export-secret-keys KEY)", len(secret))
	}
	return secret[0], unlock(secret[0], passphrase)
}

func unlock(e *openpgp.Entity, passphrase []byte) error {
	locked := e.PrivateKey != nil && e.PrivateKey.Encrypted
	for i := range e.Subkeys {
		locked = locked || e.Subkeys[i].PrivateKey != nil && e.Subkeys[i].PrivateKey.Encrypted
	}
	if !locked {
		return nil
	}
	if len(passphrase) == 0 {
		return errors.New("the key is locked: a passphrase is needed")
	}
	if err := e.DecryptPrivateKeys(passphrase); err != nil {
		return fmt.Errorf("the passphrase does not unlock the key: %w", err)
	}
	return nil
}

// gpgFolders are where gpg is looked for.
var gpgFolders = []string{"/usr/bin/gpg", "/usr/local/bin/gpg", "/bin/gpg", "/opt/homebrew/bin/gpg"}

// gpgVariables are passed on: gpg and its agent find the user's keys by them.
var gpgVariables = []string{
	"PATH", "HOME", "GNUPGHOME", "GPG_TTY", "TERM", "LANG", "LC_ALL", "DISPLAY", "WAYLAND_DISPLAY",
	"XAUTHORITY", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "USER", "LOGNAME",
}

// gpg runs the gpg program.
type gpg struct {
	d          dom0.Dom0
	path       string
	passphrase []byte
}

// gpgSigner signs with the user's own gpg.
func gpgSigner(ctx context.Context, o BuildOptions) (*signer, error) {
	g := gpg{d: o.Dom0, path: o.GPG, passphrase: o.Passphrase}
	if g.d == nil {
		return nil, errors.New("gpg cannot be run here: sign with a secret key file")
	}
	for _, p := range gpgFolders {
		if _, err := os.Stat(p); err == nil && g.path == "" {
			g.path = p
		}
	}
	if g.path == "" {
		return nil, errors.New("the program gpg was not found: install it, or sign with a secret key file")
	}
	public := &head{most: maxKeyFileSize}
	if err := g.run(ctx, nil, public, "--export", "--", o.GPGKey); err != nil {
		return nil, err
	}
	if public.Len() == 0 || public.cut {
		return nil, fmt.Errorf("gpg has no key %q, or it is too long", o.GPGKey)
	}
	sign := func(ctx context.Context, out *os.File, payload func(io.Writer) error) error {
		r, w := io.Pipe()
		wrote := make(chan error, 1)
		go func() {
			err := payload(w)
			w.CloseWithError(err)
			wrote <- err
		}()
		err := g.run(ctx, r, out, "--sign", "--local-user", o.GPGKey, "--digest-algo", "SHA256",
			"--compress-algo", "none", "--no-armor", "--no-textmode", "--output", "-")
		r.CloseWithError(errors.New("gpg has ended"))
		if werr := <-wrote; werr != nil && err == nil {
			err = werr
		}
		return err
	}
	return &signer{sign, NewKeyring("gpg", public.Bytes())}, nil
}

func (g gpg) run(ctx context.Context, stdin io.Reader, stdout io.Writer, args ...string) error {
	c := dom0.Cmd{Path: g.path, Args: []string{"--batch", "--quiet", "--no-tty"}, Stdin: stdin, Stdout: stdout}
	stderr := &tail{most: maxInfoErrors}
	c.Stderr = stderr
	for _, name := range gpgVariables {
		if value, ok := os.LookupEnv(name); ok {
			c.Env = append(c.Env, name+"="+value)
		}
	}
	if len(g.passphrase) > 0 {
		r, err := passphrasePipe(g.passphrase)
		if err != nil {
			return err
		}
		defer r.Close()
		c.ExtraFiles = []dom0.File{r}
		c.Args = append(c.Args, "--pinentry-mode", "loopback", "--passphrase-fd", "3")
	}
	c.Args = append(c.Args, args...)
	res, err := g.d.Run(ctx, c)
	if err != nil {
		return fmt.Errorf("run gpg: %w", err)
	}
	if res.ExitCode != 0 {
		return fmt.Errorf("gpg ended with exit status %d: %s", res.ExitCode, stderr)
	}
	return nil
}

// passphrasePipe gives a descriptor to read the passphrase from: no argument
// and no file ever holds it.
func passphrasePipe(passphrase []byte) (*os.File, error) {
	if len(passphrase) > 4000 {
		return nil, errors.New("the passphrase is too long")
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_, err = w.Write(append(bytes.Clone(passphrase), '\n')) // fits into the pipe
	if err = errors.Join(err, w.Close()); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

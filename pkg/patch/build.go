package patch

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
)

// BuildOptions say what to build a patch of and who signs it. Of SecretKey and
// GPGKey exactly one is given.
type BuildOptions struct {
	// Dir is the folder: info.toml, apply, optionally precheck and files/.
	Dir string
	// Out is the patch file to write. It must not exist unless Overwrite.
	Out       string
	Overwrite bool

	// SecretKey is a file with one exported secret key, armoured or binary.
	SecretKey string
	// Passphrase unlocks the key. Nil: it has none (or the agent of gpg asks).
	Passphrase []byte

	// GPGKey names a key of the user's gpg, which then signs. It is run through
	// Dom0.
	GPGKey string
	// GPG is the program; empty: the gpg found in the usual folders.
	GPG  string
	Dom0 dom0.Dom0

	// Now is the clock; nil: the real one.
	Now func() time.Time
}

// Built is a patch that was made.
type Built struct {
	Info        Info
	NewUUID     bool   // the folder named no uuid: a fresh one was taken
	Digest      string // SHA-256 of the payload, as records have it
	PayloadSize int64
	Size        int64 // of the file
	Signature   Signature
}

// Build makes one signed patch of a folder: a shell script with two tar
// archives behind it, inside an OpenPGP message that is binary, uncompressed
// and signed over SHA-256 or better. The same folder with a uuid in it makes
// the same payload, whoever signs. It streams: memory is constant. The file
// appears under its name only when it was read back and verified.
//
// Errors are for people: they name the file and the cure.
func Build(ctx context.Context, o BuildOptions) (Built, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	f, err := readFolder(o.Dir)
	if err != nil {
		return Built{}, err
	}
	s, err := newSigner(ctx, o)
	if err != nil {
		return Built{}, err
	}
	if _, err := os.Lstat(o.Out); err == nil && !o.Overwrite {
		return Built{}, fmt.Errorf("%s exists already (--force overwrites it)", o.Out)
	}
	out, err := os.CreateTemp(filepath.Dir(o.Out), ".patch-*")
	if err != nil {
		return Built{}, err
	}
	defer os.Remove(out.Name()) // gone already after the rename
	defer out.Close()
	b, err := f.build(ctx, out, s)
	if err != nil {
		return Built{}, err
	}
	if err := b.readBack(ctx, out, s.keys.WithClock(o.Now)); err != nil {
		return Built{}, fmt.Errorf("the patch was built but would not be accepted: %w", err)
	}
	return b, publish(out, o)
}

// build writes the signed payload.
func (f *folder) build(ctx context.Context, out *os.File, s *signer) (Built, error) {
	hash := sha256.New()
	var size counter
	err := s.sign(ctx, out, func(w io.Writer) error {
		buffered := bufio.NewWriterSize(io.MultiWriter(w, hash, &size), 256<<10)
		if err := f.writePayload(ctx, buffered); err != nil {
			return err
		}
		return buffered.Flush()
	})
	if err != nil {
		return Built{}, err
	}
	info := f.info
	info.XML = encodeInfo(f.info, f.guidance)
	return Built{Info: info, NewUUID: f.newUUID, Digest: hex.EncodeToString(hash.Sum(nil)), PayloadSize: int64(size)}, nil
}

// readBack verifies the file as an upload would.
func (b *Built) readBack(ctx context.Context, out *os.File, keys *Keyring) error {
	size, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		return err
	}
	m, err := Open(&contextReader{ctx, out}, keys, Options{})
	if err != nil {
		return err
	}
	if _, err := drain(m); err != nil {
		return err
	}
	if m.Digest() != b.Digest {
		return errors.New("the payload reads back different")
	}
	b.Size, b.Signature = size, m.Signature()
	return nil
}

// publish gives the finished file its name, durably.
func publish(out *os.File, o BuildOptions) error {
	if err := out.Chmod(0o644); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	if o.Overwrite {
		if err := os.Rename(out.Name(), o.Out); err != nil {
			return err
		}
	} else if err := os.Link(out.Name(), o.Out); err != nil { // fails when it exists by now
		if !errors.Is(err, fs.ErrExist) {
			return os.Rename(out.Name(), o.Out) // a filesystem without links
		}
		return err
	}
	dir, err := os.Open(filepath.Dir(o.Out))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

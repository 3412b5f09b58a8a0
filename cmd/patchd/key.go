package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/patch"
)

// maxKeyFile bounds a file of keys, in bytes.
const maxKeyFile = 1 << 20

// newKey works on the folder of trusted keys itself: what lies there is
// trusted, from the next check on, and nothing else is.
func newKey(g *global) *cobra.Command {
	cmd := &cobra.Command{
		Use: "key", Short: "the keys whose patches this host accepts",
		Long: "Works on the folder trusted-keys in --state-dir: a file with public keys that lies there is trusted,\n" +
			"from the next check on. A running patchd need not be told.",
	}
	cmd.AddCommand(newKeyTrust(g), newKeyList(g), newKeyRevoke(g))
	return cmd
}

func newKeyTrust(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "trust FILE", Short: "trust the public keys in a file (- for the standard input)", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in, _, err := openInput(args[0])
			if err != nil {
				return err
			}
			defer in.Close()
			b, err := io.ReadAll(io.LimitReader(in, maxKeyFile+1))
			if err != nil {
				return err
			}
			if len(b) > maxKeyFile {
				return fmt.Errorf("%s is larger than %d bytes: that is no key", args[0], maxKeyFile)
			}
			ring := patch.NewKeyring(args[0], b)
			keys := ring.Keys()
			if len(keys) == 0 {
				return fmt.Errorf("%s holds no public key (export one with gpg --export)", args[0])
			}
			for _, p := range ring.Problems() {
				if strings.Contains(fmt.Sprint(p), "secret") {
					return fmt.Errorf("%s holds a secret key: trust only the public one (gpg --export)", args[0])
				}
			}
			if err := os.MkdirAll(keysDir(g), 0o755); err != nil {
				return err
			}
			name := keys[0].Fingerprint + ".gpg"
			if err := writeKey(filepath.Join(keysDir(g), name), b); err != nil {
				return err
			}
			for i := range keys {
				keys[i].File = name
			}
			return g.printKeys(keys)
		},
	}
}

// writeKey puts a key file in place in one step, durably.
func writeKey(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(filepath.Dir(path)), ".key-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func newKeyList(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "list the trusted keys", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			ring, err := g.keyring()
			if err != nil {
				return err
			}
			for _, p := range ring.Problems() {
				fmt.Fprintf(os.Stderr, "patchd: %v\n", p)
			}
			return g.printKeys(ring.Keys())
		},
	}
}

func (g *global) keyring() (*patch.Keyring, error) {
	if _, err := os.Stat(keysDir(g)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no folder %s: is --state-dir right, and has patchd been started once?", keysDir(g))
	}
	return patch.LoadKeyring(keysDir(g))
}

func (g *global) printKeys(keys []patch.Key) error {
	if g.json() {
		return printJSON(os.Stdout, keyShapes(keys))
	}
	rows := make([][]string, len(keys))
	for i, k := range keys {
		state := "usable"
		if !k.Usable {
			state = k.Reason
		}
		expires := "never"
		if !k.Expires.IsZero() {
			expires = k.Expires.Format(time.DateOnly)
		}
		rows[i] = []string{k.Fingerprint, strings.Join(k.UserIDs, "; "), k.Algorithm, expires, state, k.File}
	}
	printTable(os.Stdout, []string{"FINGERPRINT", "NAME", "ALGORITHM", "EXPIRES", "STATE", "FILE"}, rows)
	return nil
}

func newKeyRevoke(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "revoke FINGERPRINT", Short: "trust a key no longer", Args: cobra.ExactArgs(1),
		Long: "Removes the file of the key from trusted-keys. Patches it signed are refused from then on, also those\n" +
			"that were uploaded before.",
		RunE: func(_ *cobra.Command, args []string) error {
			ring, err := g.keyring()
			if err != nil {
				return err
			}
			want := strings.ToUpper(strings.ReplaceAll(args[0], " ", ""))
			files := map[string]int{}
			var file string
			for _, k := range ring.Keys() {
				files[k.File]++
				if k.Fingerprint == want {
					file = k.File
				}
			}
			switch {
			case file == "":
				return fmt.Errorf("no trusted key has the fingerprint %s; `patchd key list` shows them", want)
			case files[file] > 1:
				return fmt.Errorf("the file %s holds %d keys: remove the one you mean from it by hand", filepath.Join(keysDir(g), file), files[file])
			}
			if err := os.Remove(filepath.Join(keysDir(g), filepath.Base(file))); err != nil {
				return err
			}
			if g.json() {
				return printJSON(os.Stdout, map[string]string{"fingerprint": want})
			}
			fmt.Printf("no longer trusted: key %s\n", want)
			return nil
		},
	}
}

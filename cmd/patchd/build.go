package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/server"
	"github.com/patchd/patchd/pkg/vdi"
)

func quietDom0() (*dom0.System, error) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return dom0.New(dom0.Options{Log: log, CgroupPrefix: fmt.Sprintf("patchd-cli-%d", os.Getpid())})
}

func newPatchBuild(g *global) *cobra.Command {
	var o patch.BuildOptions
	var passphraseFile string
	cmd := &cobra.Command{
		Use: "build DIR", Short: "make a signed patch from a folder", Args: cobra.ExactArgs(1),
		Long: "Makes a signed patch from a folder with info.toml, an executable called apply, optionally one called\n" +
			"precheck, and payload files under files/. See docs/patch-protocol.md. It is signed with an exported\n" +
			"secret key (--secret-key) or by gpg with a key of its own (--gpg-key).",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Dir = args[0]
			if (o.SecretKey == "") == (o.GPGKey == "") {
				return usagef("give either --secret-key or --gpg-key: every patch is signed")
			}
			if o.Out == "" {
				o.Out = strings.TrimSuffix(filepath.Base(filepath.Clean(args[0])), ".d") + ".xsupdate"
			}
			if passphraseFile != "" {
				b, err := os.ReadFile(passphraseFile)
				if err != nil {
					return err
				}
				o.Passphrase = []byte(strings.TrimRight(string(b), "\r\n"))
			}
			d, err := quietDom0()
			if err != nil {
				return err
			}
			defer d.Close()
			o.Dom0 = d
			built, err := patch.Build(cmd.Context(), o)
			if err != nil {
				return err
			}
			if g.json() {
				return printJSON(os.Stdout, builtShape(o.Out, built))
			}
			fmt.Printf("%s: patch %s %s (%s), signed by %s\n", o.Out, built.Info.NameLabel, built.Info.Version, built.Info.UUID, built.Signature.Signer)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Out, "out", "", "file to write; default: the folder's name with .xsupdate")
	f.BoolVar(&o.Overwrite, "force", false, "overwrite the file")
	f.StringVar(&o.SecretKey, "secret-key", "", "file with an exported secret key")
	f.StringVar(&passphraseFile, "passphrase-file", "", "file with the passphrase of the secret key")
	f.StringVar(&o.GPGKey, "gpg-key", "", "key of your gpg, by fingerprint, id or address")
	return cmd
}

func newPatchVerify(g *global) *cobra.Command {
	var keys, config string
	var ask bool
	cmd := &cobra.Command{
		Use: "verify FILE", Short: "say what a patch file is, and whether it would be accepted", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if keys == "" {
				keys = keysDir(g)
			}
			ring, err := patch.LoadKeyring(keys)
			if err != nil {
				return err
			}
			c, err := loadConfig(config, nil)
			if err != nil {
				return usageError{err}
			}
			o := patch.VerifyOptions{Path: args[0], Keys: ring, Options: patch.Options{
				Pinned: c.PinnedSHA256, Limits: patch.Limits{Cleartext: c.MaxCleartext},
			}}
			if ask && os.Geteuid() == 0 {
				d, err := quietDom0()
				if err != nil {
					return err
				}
				defer d.Close()
				layout, err := vdi.ParseLayout(c.ImageLayout)
				if err == nil {
					err = vdi.CheckLayout(layout, d)
				}
				if err != nil {
					return usageError{fmt.Errorf("image-layout: %w", err)}
				}
				o.Dom0, o.Image = d, temporaryImage(vdi.Options{Layout: layout, Dom0: d})
			}
			report, err := patch.Verify(cmd.Context(), o)
			if err != nil {
				return err
			}
			return g.printReport(report, keys)
		},
	}
	cmd.Flags().StringVar(&keys, "keys", "", "folder of trusted keys; default: trusted-keys in --state-dir")
	cmd.Flags().StringVar(&config, "config", "", "TOML file with pinned-sha256")
	cmd.Flags().BoolVar(&ask, "info", true, "ask an accepted patch who it is, in the sandbox (needs root)")
	return cmd
}

// temporaryImage lays a payload into an image that goes when it was asked.
func temporaryImage(o vdi.Options) func(ctx context.Context, payload io.Reader, size int64) (string, func() error, error) {
	return func(ctx context.Context, payload io.Reader, size int64) (string, func() error, error) {
		f, err := os.CreateTemp("", "patchd-verify-*.img")
		if err != nil {
			return "", nil, err
		}
		remove := func() error { return os.Remove(f.Name()) }
		err = fillImage(ctx, f, payload, size, o)
		if err = errors.Join(err, f.Close()); err != nil {
			return "", nil, errors.Join(err, remove())
		}
		return f.Name(), remove, nil
	}
}

func fillImage(ctx context.Context, f *os.File, payload io.Reader, size int64, o vdi.Options) error {
	virtual := vdi.Size(size)
	if err := f.Truncate(virtual); err != nil {
		return err
	}
	w, err := vdi.NewWriter(ctx, f, virtual, size, o)
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, payload); err != nil {
		w.Abort()
		return err
	}
	_, err = w.Finish(ctx)
	return err
}

// printReport shows what a patch file is. A file that would not be accepted
// makes the command fail.
func (g *global) printReport(r patch.Report, keys string) error {
	if g.json() {
		if err := printJSON(os.Stdout, reportShape(r)); err != nil {
			return err
		}
	} else {
		rows := [][]string{{"file", r.Path}, {"size", bytesText(fmt.Sprint(r.Size))}, {"kind", string(r.Kind)}}
		if r.Accepted {
			rows = append(rows, []string{"signed by", r.Signature.Signer + " " + r.Signature.UserID}, []string{"signed at", r.Signature.Created.UTC().Format("2006-01-02 15:04:05Z")})
		}
		if len(r.Claimed) > 0 && !r.Accepted {
			rows = append(rows, []string{"claims to be signed by", strings.Join(r.Claimed, ", ")})
		}
		if r.Digest != "" {
			rows = append(rows, []string{"SHA-256 of the payload", r.Digest})
		}
		rows = append(rows, []string{"trusted keys", keys})
		if r.Info != nil {
			rows = append(rows, []string{"uuid", string(r.Info.UUID)}, []string{"name", r.Info.NameLabel},
				[]string{"version", r.Info.Version}, []string{"description", r.Info.NameDescription}, []string{"guidance", strings.Trim(fmt.Sprint(r.Info.Guidance), "[]")})
		}
		if r.InfoProblem != "" {
			rows = append(rows, []string{"info", r.InfoProblem})
		}
		for _, row := range rows {
			fmt.Printf("%-24s %s\n", row[0], row[1])
		}
	}
	if !r.Accepted {
		return fmt.Errorf("%s would be refused: %s", r.Path, r.Reason)
	}
	if r.InfoProblem != "" && os.Geteuid() == 0 {
		return fmt.Errorf("%s would be refused: %s", r.Path, r.InfoProblem)
	}
	if !g.json() {
		fmt.Println("it would be accepted")
	}
	return nil
}

func keysDir(g *global) string {
	dir := g.stateDir
	if dir == "" {
		dir = server.DefaultConfig().StateDir
	}
	return filepath.Join(dir, "trusted-keys")
}

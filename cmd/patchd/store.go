package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/server"
)

// newStore works on the pool database itself, with the daemon stopped.
func newStore() *cobra.Command {
	cmd := &cobra.Command{
		Use: "store", Short: "back up, restore and move the pool database",
		Long: "Works on the pool database of --state-dir while no daemon uses it, or on that of --store,\n" +
			"which may be backed up while daemons do. A restored or moved database has a new identity:\n" +
			"clients that follow events begin afresh.",
	}
	cmd.AddCommand(
		storeCommand("backup FILE", "write all records to a file (- for the standard output)", backup),
		storeCommand("restore FILE", "put the records of a backup into an empty database", func(ctx context.Context, db *server.Database, path string) error {
			in, _, err := openInput(path)
			if err != nil {
				return err
			}
			defer in.Close()
			return db.Restore(ctx, in)
		}),
		storeCommand("migrate URL", "copy all records into the empty cluster at URL (etcd://host:port,…)", func(ctx context.Context, db *server.Database, url string) error {
			return db.Migrate(ctx, url)
		}),
	)
	return cmd
}

func storeCommand(use, short string, f func(ctx context.Context, db *server.Database, arg string) error) *cobra.Command {
	var file string
	flags := server.DefaultConfig()
	cmd := &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			given := map[string]string{}
			for _, s := range flags.Settings() {
				if f := cmd.Flags().Lookup(s.Name); f != nil && f.Changed {
					given[s.Name] = f.Value.String()
				}
			}
			c, err := loadConfig(file, given)
			if err != nil {
				return usageError{err}
			}
			log := logrus.New()
			log.SetLevel(logrus.WarnLevel)
			db, err := server.OpenDatabase(c, log)
			if err != nil {
				return err
			}
			if err := errors.Join(f(cmd.Context(), db, args[0]), db.Close()); err != nil {
				return err
			}
			if args[0] != "-" {
				fmt.Fprintf(os.Stderr, "done: %s %s\n", cmd.Name(), args[0])
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "TOML file with settings")
	for _, s := range flags.Settings() {
		if len(s.Name) >= 5 && s.Name[:5] == "store" {
			cmd.Flags().Var(s, s.Name, s.Help)
		}
	}
	return cmd
}

// backup writes to a new name first: an old backup is replaced by a whole one
// or not at all.
func backup(ctx context.Context, db *server.Database, path string) error {
	if path == "-" {
		return db.Backup(ctx, os.Stdout)
	}
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = db.Backup(ctx, io.Writer(f))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, path)
}

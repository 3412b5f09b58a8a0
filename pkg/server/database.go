package server

import (
	"context"
	"errors"
	"io"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/store"
)

// Database is the pool database without a daemon: for backup, restore and
// moving it. While it is open no daemon can use the state directory.
type Database struct {
	state  stateDir
	config Config
	log    logrus.FieldLogger
}

// OpenDatabase takes the lock of the state directory.
func OpenDatabase(c Config, log logrus.FieldLogger) (*Database, error) {
	s, err := openStateDir(c.StateDir)
	if err != nil {
		return nil, err
	}
	return &Database{state: s, config: c, log: log}, nil
}

// storeOptions say where the database of a configuration lies.
func storeOptions(c Config, s stateDir, log logrus.FieldLogger) store.Options {
	return store.Options{
		Dir: s.path("db"), URL: c.Store, Prefix: c.StorePrefix,
		CA: c.StoreCA, Cert: c.StoreCert, Key: c.StoreKey, Log: log,
	}
}

// Backup writes all records as of one revision.
func (d *Database) Backup(ctx context.Context, w io.Writer) error {
	st, err := store.Open(ctx, storeOptions(d.config, d.state, d.log))
	if err != nil {
		return err
	}
	return errors.Join(st.Backup(ctx, w), st.Close())
}

// Restore puts the records of a backup into an empty database. It gets a new
// identity, so that no event token of the old one is taken for its own.
func (d *Database) Restore(ctx context.Context, r io.Reader) error {
	return store.Restore(ctx, storeOptions(d.config, d.state, d.log), r)
}

// Migrate copies all records into the empty database at url.
func (d *Database) Migrate(ctx context.Context, url string) error {
	target := storeOptions(d.config, d.state, d.log)
	target.URL = url
	r, w := io.Pipe()
	go func() { w.CloseWithError(d.Backup(ctx, w)) }()
	return errors.Join(store.Restore(ctx, target, r), r.Close())
}

// Close gives the lock back.
func (d *Database) Close() error { return d.state.close() }

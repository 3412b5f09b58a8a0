package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/store"
)

// Database is the pool database without a daemon: for backup, restore and
// moving it. While an embedded one is open no daemon can use the state
// directory; a cluster may be in use.
type Database struct {
	state  stateDir
	config Config
	log    logrus.FieldLogger
}

// OpenDatabase takes the lock of the state directory, where the database lies
// in it.
func OpenDatabase(c Config, log logrus.FieldLogger) (*Database, error) {
	d := &Database{state: stateDir{dir: c.StateDir}, config: c, log: log}
	if c.Store != "" {
		return d, nil
	}
	s, err := openStateDir(c.StateDir)
	if err != nil {
		return nil, err
	}
	d.state = s
	return d, d.state.assertNotMoved()
}

// movedFile in the state directory holds the URL of the cluster that the
// database was moved to.
const movedFile = "store-moved"

// assertNotMoved refuses an embedded database that lives on elsewhere: two of
// them would each lead a pool of the same hosts.
func (s stateDir) assertNotMoved() error {
	b, err := os.ReadFile(s.path(movedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("the pool database was moved to %s: use --store with that URL, or remove %s to go back to what it was before", strings.TrimSpace(string(b)), s.path(movedFile))
}

// storeOptions say where the database of a configuration lies.
func storeOptions(c Config, s stateDir, log logrus.FieldLogger) store.Options {
	return store.Options{
		Dir: s.path("db"), URL: c.Store, Prefix: c.StorePrefix,
		CA: c.StoreCA, Cert: c.StoreCert, Key: c.StoreKey, Log: log,
	}
}

// openTime is how long a database may take to be read.
const openTime = time.Minute

// Backup writes all records as of one revision.
func (d *Database) Backup(ctx context.Context, w io.Writer) error {
	limit, cancel := context.WithTimeout(ctx, openTime)
	st, err := store.Open(limit, storeOptions(d.config, d.state, d.log))
	cancel()
	if err != nil && ctx.Err() == nil && store.Unreachable(err) {
		return fmt.Errorf("the store %s does not answer: is etcd running there, and does this host reach it? %w", d.config.Store, err)
	}
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

// Migrate copies all records into the empty database at url. An embedded one
// is marked as moved then, and no daemon starts on it any more.
func (d *Database) Migrate(ctx context.Context, url string) error {
	target := storeOptions(d.config, d.state, d.log)
	target.URL = url
	r, w := io.Pipe()
	go func() { w.CloseWithError(d.Backup(ctx, w)) }()
	if err := errors.Join(store.Restore(ctx, target, r), r.Close()); err != nil {
		return err
	}
	if d.config.Store != "" {
		return nil
	}
	return d.state.write(movedFile, []byte(url+"\n"))
}

// Close gives the lock back.
func (d *Database) Close() error {
	if d.state.lock == nil {
		return nil
	}
	return d.state.close()
}

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/sirupsen/logrus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Sizes of the embedded etcd, in bytes or entries: small, for one pool.
const (
	walSegment   = 4 << 20
	quota        = 2 << 30
	snapshots    = 2000 // entries between two snapshots
	catchUp      = 200  // entries kept in memory after one
	retention    = "5000"
	defragAbove  = 64 // MiB that a defragmentation at start would free
	maxEtcdBytes = 3 << 20
)

// smallSegments sets the one knob of etcd that is a variable.
var smallSegments = sync.OnceFunc(func() { wal.SegmentSizeBytes = walSegment })

// startEmbedded starts an etcd without listeners on dir and makes it ready:
// leases and candidates of earlier processes are gone, a full database that
// can be shrunk is shrunk.
func startEmbedded(ctx context.Context, dir string, lg *zap.Logger) (*embed.Etcd, *clientv3.Client, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("make store folder: %w", err)
	}
	if err := probeLock(dir); err != nil {
		return nil, nil, err
	}
	smallSegments()
	etcd, err := embed.StartEtcd(embeddedConfig(dir, lg))
	if err != nil {
		return nil, nil, fmt.Errorf("start the embedded etcd in %s: %w", dir, err)
	}
	select {
	case <-etcd.Server.ReadyNotify():
	case <-etcd.Server.StopNotify():
		err = errors.New("it stopped while starting")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		etcd.Close()
		return nil, nil, fmt.Errorf("start the embedded etcd in %s: %w", dir, err)
	}
	client := v3client.New(etcd.Server)
	if err := tidy(ctx, client); err != nil {
		client.Close()
		etcd.Close()
		return nil, nil, err
	}
	return etcd, client, nil
}

func embeddedConfig(dir string, lg *zap.Logger) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	cfg.ListenClientHttpUrls, cfg.ListenMetricsUrls = nil, nil
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(lg)
	cfg.TickMs, cfg.ElectionMs = 50, 250
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = snapshots, catchUp
	cfg.MaxSnapFiles, cfg.MaxWalFiles = 2, 2
	cfg.QuotaBackendBytes = quota
	cfg.MaxRequestBytes = maxEtcdBytes
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, retention
	cfg.BootstrapDefragThresholdMegabytes = defragAbove
	return cfg
}

// probeLock finds out whether another process has the database open: etcd
// itself would wait for it for ever.
func probeLock(dir string) error {
	path := filepath.Join(dir, "member", "snap", "db")
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("the store in %s is in use by another process: %w", dir, err)
	}
	return nil
}

// tidy ends what earlier processes left: leases, and the alarm of a full
// database, after room was made.
func tidy(ctx context.Context, c *clientv3.Client) error {
	leases, err := c.Leases(ctx)
	if err != nil {
		return fmt.Errorf("list old leases: %w", err)
	}
	for _, l := range leases.Leases {
		if _, err := c.Revoke(ctx, l.ID); err != nil {
			return fmt.Errorf("revoke an old lease: %w", err)
		}
	}
	alarms, err := c.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("list alarms of the store: %w", err)
	}
	for _, a := range alarms.Alarms {
		if a.Alarm != pb.AlarmType_NOSPACE {
			return fmt.Errorf("the store raised the alarm %s: restore it from a backup", a.Alarm)
		}
		if err := shrink(ctx, c, (*clientv3.AlarmMember)(a)); err != nil {
			return fmt.Errorf("make room in the full store: %w", err)
		}
	}
	return nil
}

func shrink(ctx context.Context, c *clientv3.Client, a *clientv3.AlarmMember) error {
	now, err := c.Get(ctx, "/", clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	if _, err := c.Compact(ctx, now.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		return err
	}
	if _, err := c.Defragment(ctx, ""); err != nil {
		return err
	}
	_, err = c.AlarmDisarm(ctx, a)
	return err
}

// quiet is a zap logger that hands errors on to log, warnings as debug text,
// and drops the rest.
func quiet(log logrus.FieldLogger) *zap.Logger {
	if log == nil {
		return zap.NewNop()
	}
	return zap.New(core{log: log})
}

// tooEarly is what etcd calls an error when it ends soon after its first start:
// its monitor looked before there was anything to see. It looks again later.
const tooEarly = "failed to update storage version"

type core struct {
	log    logrus.FieldLogger
	fields []zapcore.Field
}

func (c core) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c core) With(fields []zapcore.Field) zapcore.Core {
	return core{c.log, append(c.fields[:len(c.fields):len(c.fields)], fields...)}
}

func (c core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(c.fields[:len(c.fields):len(c.fields)], fields...) {
		f.AddTo(enc)
	}
	log := c.log.WithFields(logrus.Fields(enc.Fields)).WithField("etcd", e.Message)
	if e.Level > zapcore.WarnLevel && e.Message != tooEarly {
		log.Error("etcd reports an error")
	} else {
		log.Debug("etcd warns")
	}
	return nil
}

func (c core) Sync() error { return nil }

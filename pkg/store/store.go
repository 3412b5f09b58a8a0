package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/xapi"
)

// What callers may have to tell apart with errors.Is.
var (
	// ErrClosed is the answer of a store that was closed.
	ErrClosed = errors.New("the store is closed")
	// ErrDeposed is the answer to a write of a leader that is leader no more:
	// nothing was written.
	ErrDeposed = errors.New("this host is not the leader of the store any more")
	// ErrUnknown is the answer when a write may have happened or not, because
	// the cluster did not answer for longer than the caller wanted to wait.
	ErrUnknown = errors.New("the store did not answer: the write may have happened")
	// ErrTooBig is the answer to a transaction beyond MaxOps or MaxBytes.
	ErrTooBig = errors.New("the transaction is too big")
)

// closeGrace is how long Close tries to leave the cluster in order.
const closeGrace = 2 * time.Second

// Store is an open pool database. Its methods may be called from any
// goroutine.
type Store struct {
	keys   keys
	opts   Options
	decl   *declared
	log    logrus.FieldLogger
	etcd   *embed.Etcd // nil on a cluster
	client *clientv3.Client

	name  string // of this open store, in keys of transactions
	slots chan *slot
	turn  chan struct{} // one transaction at a time that met conflicts

	state atomic.Pointer[state]
	lead  atomic.Pointer[Leadership]

	ctx    context.Context // ends with Close, cause ErrClosed
	cancel context.CancelCauseFunc
	io     context.Context // of requests; ends a little later, when Close has tidied up
	stop   context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
	err    error
}

// state is the newest view, and a channel that is closed when there is a newer.
type state struct {
	view *View
	next chan struct{}
}

// Open opens the pool database, and makes it where there is none. It returns
// when the view shows at least what was written before the call. Data of a
// newer schema version is refused with a text that says so. ctx bounds Open
// only.
func Open(ctx context.Context, o Options) (*Store, error) {
	s, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := s.start(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// connect reaches the data but reads nothing yet.
func connect(ctx context.Context, o Options) (*Store, error) {
	to, err := o.resolve()
	if err != nil {
		return nil, err
	}
	s := &Store{
		keys: keys{to.prefix}, opts: o, decl: declare(o.Indexes), log: o.Log,
		name: string(xapi.NewUUID()), turn: make(chan struct{}, 1),
	}
	s.slots = newSlots(s.keys, s.name)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.io, s.stop = context.WithCancel(context.Background())
	lg := quiet(o.Log)
	if o.URL == "" {
		s.etcd, s.client, err = startEmbedded(ctx, o.Dir, lg)
		return s, err
	}
	cfg := clientv3.Config{
		Endpoints: to.endpoints, Logger: lg,
		DialTimeout: 5 * time.Second, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 3 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithDisableServiceConfig()},
	}
	if to.tls {
		if cfg.TLS, err = o.tlsConfig(); err != nil {
			return nil, err
		}
	}
	if s.client, err = clientv3.New(cfg); err != nil {
		return nil, fmt.Errorf("connect to the store %s: %w", o.URL, err)
	}
	return s, nil
}

// start checks what is there, loads the view and begins to follow.
func (s *Store) start(ctx context.Context) error {
	if err := s.initialise(ctx); err != nil {
		return err
	}
	forget := s.sweepSlots
	if s.etcd != nil {
		forget = s.forgetOwn
	}
	if err := forget(ctx); err != nil {
		return err
	}
	b, orphans, err := s.load(ctx)
	if err != nil {
		return fmt.Errorf("read the store: %w", err)
	}
	s.state.Store(&state{view: b.view(), next: make(chan struct{})})
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		s.follow(b)
	}()
	if err := s.Sync(ctx); err != nil {
		return err
	}
	return s.sweep(ctx, orphans)
}

// Close resigns, lets transactions that are committing finish, stops following
// and closes the database. Whoever waits gets ErrClosed. A second call returns
// what the first did.
func (s *Store) Close() error {
	s.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeGrace)
		defer cancel()
		s.cancel(ErrClosed)
		s.wg.Wait()
		if s.client != nil {
			s.err = s.disconnect(ctx)
		}
		s.stop()
		if s.etcd != nil {
			s.etcd.Close()
		}
	})
	return s.err
}

// disconnect leaves the data in order and closes the client.
func (s *Store) disconnect(ctx context.Context) error {
	errs := []error{s.drain(ctx)}
	if l := s.lead.Load(); l != nil {
		errs = append(errs, l.Resign(ctx))
	}
	s.stop()
	if err := s.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// ID is the identity of the data: it stays as long as the data does, and a
// restored copy has another. It is part of every event token.
func (s *Store) ID() string { return s.state.Load().view.store }

// View runs f on the newest view. The view stays as it is for as long as f, or
// whoever it gives the view to, wants to look at it. The error is that of f,
// or ErrClosed.
func (s *Store) View(f func(v *View) error) error {
	if s.ctx.Err() != nil {
		return ErrClosed
	}
	return f(s.state.Load().view)
}

// Wait returns when the view is newer than rev. The error is the cause of ctx,
// or ErrClosed.
func (s *Store) Wait(ctx context.Context, rev int64) error {
	return s.Until(ctx, func(v *View) (bool, error) { return v.rev > rev, nil })
}

// Until runs f on the newest view, and again whenever there is a newer one,
// until f is done or fails. Views may be left out when changes come quickly.
// The error is that of f, the cause of ctx, or ErrClosed.
func (s *Store) Until(ctx context.Context, f func(v *View) (done bool, err error)) error {
	for {
		now := s.state.Load()
		if s.ctx.Err() != nil {
			return ErrClosed
		}
		if done, err := f(now.view); done || err != nil {
			return err
		}
		select {
		case <-now.next:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.ctx.Done():
			return ErrClosed
		}
	}
}

// Sync returns when the view shows everything that was written, on any host,
// before the call.
func (s *Store) Sync(ctx context.Context) error {
	last, err := s.client.Get(ctx, s.keys.all(), append(clientv3.WithLastRev(), clientv3.WithKeysOnly())...)
	if err != nil {
		return fmt.Errorf("ask the store for its revision: %w", err)
	}
	if len(last.Kvs) == 0 {
		return nil
	}
	return s.Wait(ctx, last.Kvs[0].ModRevision-1)
}

// publish makes v the newest view.
func (s *Store) publish(v *View) {
	old := s.state.Swap(&state{view: v, next: make(chan struct{})})
	close(old.next)
}

package agent

import (
	"context"
	"sync"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// identity names one state of a golden file: any write to it changes ctime.
type identity struct {
	dev, ino   uint64
	size       int64
	sec, nanos int64
}

// clockTick is longer than the clocks of filesystems take from one value to the
// next: 10 ms at most.
const clockTick = 100 * time.Millisecond

// settled tells whether a file's ctime is old enough to show the next write:
// two writes in one tick of the filesystem's clock leave the same ctime.
func (id identity) settled(now time.Time) bool {
	return now.Sub(time.Unix(id.sec, id.nanos)) > clockTick
}

// identify looks at a volume; only regular files have an identity that a
// change voids, anything else gives the zero identity, which never passes.
func identify(ctx context.Context, repo sr.Repository, n sr.Name) (identity, error) {
	f, err := repo.Open(ctx, n, sr.ReadOnly)
	if err != nil {
		return identity{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return identity{}, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || !st.Mode().IsRegular() {
		return identity{}, nil
	}
	return identity{dev: sys.Dev, ino: sys.Ino, size: sys.Size, sec: sys.Ctim.Sec, nanos: sys.Ctim.Nsec}, nil
}

// checks remembers, for as long as this process lives, which golden files were
// verified. A clone of one that has not changed since is not read again.
type checks struct {
	mu      sync.Mutex
	good    map[identity]string   // identity to digest
	waiting map[xapi.UUID]pending // by job
}

type pending struct {
	id     identity
	digest string
}

func (c *checks) passed(id identity, digest string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return id != identity{} && digest != "" && c.good[id] == digest
}

// await notes that job verifies a clone of id.
func (c *checks) await(job xapi.UUID, id identity, digest string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting == nil {
		c.waiting, c.good = map[xapi.UUID]pending{}, map[identity]string{}
	}
	c.waiting[job] = pending{id, digest}
}

// maxGood bounds the memory: beyond it all is verified afresh.
const maxGood = 10000

// confirm remembers what job has verified.
func (c *checks) confirm(job xapi.UUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.waiting[job]
	delete(c.waiting, job)
	if !ok || (p.id == identity{}) {
		return
	}
	if len(c.good) >= maxGood {
		clear(c.good)
	}
	c.good[p.id] = p.digest
}

// forget drops what job was to verify and did not.
func (c *checks) forget(job xapi.UUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, job)
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// resultRoom is what a result takes at most, in bytes: its texts are bounded.
const resultRoom = 256 << 10

// reserveResult takes the room of result.json before anything runs: a disk
// that is full in the end must not hide how the patch has ended.
func reserveResult(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "."+fileResult+".*")
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(make([]byte, resultRoom)); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make room for the result: %w", err), f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// writeResult makes the result durable in the room that was reserved.
func writeResult(f *os.File, dir string, b []byte) error {
	_, err := f.WriteAt(b, 0)
	err = errors.Join(err, f.Truncate(int64(len(b))), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, fileResult))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(dir)
}

// guardEvery is how often the room is looked at while a patch runs: what a
// fast disk takes meanwhile is a part of what is kept free.
const guardEvery = 30 * time.Millisecond

// guard kills the patch when it has left less room on the filesystem of its
// image than must stay there. stop ends the watch, and tells whether it did.
func (r *runner) guard(ctx context.Context) (stop func() (full bool)) {
	if r.run.KeepFree <= 0 {
		return func() bool { return false }
	}
	ctx, cancel := context.WithCancel(ctx)
	full := make(chan bool, 1)
	before := roomOf(r.run.Image)
	go func() { full <- r.watchRoom(ctx, before) }()
	return func() bool {
		cancel()
		return <-full
	}
}

// ownShare is how much an image must have grown for its patch to be the cause
// of a full disk: one that somebody else fills is not the patch's fault.
const ownShare = 16 << 20

// roomOf is the room a file takes, in bytes; 0 when that cannot be learned.
func roomOf(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return sys.Blocks * 512
}

func (r *runner) watchRoom(ctx context.Context, before int64) (full bool) {
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		space, err := r.dom0.Space(filepath.Dir(r.run.Image))
		if err != nil || space.Free >= r.run.KeepFree || roomOf(r.run.Image)-before < ownShare {
			continue // without a number nothing is killed
		}
		// An error shows as a patch that goes on; its deadline ends it.
		r.dom0.Kill(context.WithoutCancel(ctx), patchGroup(r.run.Job), 0)
		return true
	}
}

// filled is the error of a patch that guard has killed.
func (r *runner) filled(verb string) error {
	text := fmt.Sprintf("%s was killed: the filesystem of its scratch room got full, and the %d MiB that patchd itself needs there were touched: %s",
		verb, r.run.KeepFree>>20, r.out.Text())
	if r.run.Kind == pool.JobApply && verb == "apply" {
		return xapi.NewError(xapi.PatchApplyFailed, text)
	}
	return xapi.NewError(xapi.PrecheckFailedUnknownError, string(r.run.PatchRef), text)
}

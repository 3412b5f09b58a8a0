package vdi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// span is a stretch of an image that one worker works on, in bytes.
type span struct {
	off, n int64
	kind   int
}

// workers is how many goroutines read an image: more than there are cores, so
// that while some hash, others wait for the disk.
func workers() int { return min(max(2*runtime.GOMAXPROCS(0), 4), 16) }

// work gives what emit emits to goroutines of its own, each with a buffer of at
// most largest bytes, aligned for O_DIRECT. The first error ends it. It returns
// when all of them have ended.
func work(ctx context.Context, largest int64, emit func(emit func(span) error) error, do func(ctx context.Context, s span, buf []byte) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	spans := make(chan span)
	var wg sync.WaitGroup
	for range workers() {
		buf, err := unix.Mmap(-1, 0, int(largest), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			stop(fmt.Errorf("memory for an image: %w", err))
			break
		}
		wg.Go(func() {
			defer unix.Munmap(buf) //nolint:errcheck // it is our own mapping
			for s := range spans {
				if ctx.Err() != nil {
					continue
				}
				if err := do(ctx, s, buf[:s.n]); err != nil {
					stop(err)
				}
			}
		})
	}
	err := emit(func(s span) error {
		select {
		case spans <- s:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(spans)
	wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// eachData gives every stretch of blocks that have data in them, in order and
// no block twice.
func eachData(f *os.File, size int64, visit func(first, end int64) error) error {
	next := int64(0)
	for at := int64(0); at < size; {
		from, to, err := dataAfter(f, at, size)
		if err != nil {
			return err
		}
		if from >= size {
			return nil
		}
		first, end := max(from/MapBlock, next), blocksOf(to)
		if first < end {
			if err := visit(first, end); err != nil {
				return err
			}
			next = end
		}
		at = to
	}
	return nil
}

// divide gives, in order, the stretches of blocks of f that have data in them,
// and those that the map has and f has not.
func (m *Map) divide(f *os.File, size int64, data, missing func(first, end int64) error) error {
	next := 0
	gone := func(until int64) error {
		for next < len(m.Blocks) && m.Blocks[next].Index < until {
			first := m.Blocks[next].Index
			end := first
			for next < len(m.Blocks) && m.Blocks[next].Index == end && end < until {
				next, end = next+1, end+1
			}
			if err := missing(first, end); err != nil {
				return err
			}
		}
		return nil
	}
	err := eachData(f, size, func(first, end int64) error {
		if err := gone(first); err != nil {
			return err
		}
		for next < len(m.Blocks) && m.Blocks[next].Index < end {
			next++
		}
		return data(first, end)
	})
	if err != nil {
		return err
	}
	return gone(blocksOf(m.Size))
}

// spans cuts a stretch of blocks into pieces of at most count blocks.
func (m *Map) spans(first, end, count int64, emit func(span) error) error {
	for ; first < end; first += count {
		off := first * MapBlock
		if err := emit(span{off: off, n: min(min(count, end-first)*MapBlock, m.Size-off)}); err != nil {
			return err
		}
	}
	return nil
}

// dataAfter finds the next stretch of data at or after at; from == to == total
// when there is none. What cannot tell holes is data from end to end.
func dataAfter(f *os.File, at, total int64) (from, to int64, err error) {
	from, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return total, total, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ESPIPE):
		return at, total, nil
	case err != nil:
		return 0, 0, fmt.Errorf("find data: %w", err)
	case from >= total:
		return total, total, nil
	}
	to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, fmt.Errorf("find hole: %w", err)
	}
	return from, min(to, total), nil
}

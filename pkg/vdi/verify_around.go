package vdi

import (
	"context"
	"fmt"
	"os"
)

// VerifyAround holds against the map what an image has around its payload: every
// block of the map that is not wholly `patch`. With it a copy can be written
// over (Options.Over) and its filesystem is the one that was made here. Damage
// is a *DamageError.
func (m *Map) VerifyAround(ctx context.Context, f *os.File) error {
	end, _, err := measure(f)
	if err != nil {
		return err
	}
	if end < m.Size {
		return &DamageError{Blocks: []int64{end / MapBlock}, Total: 1, Size: end, Want: m.Size}
	}
	l, err := openFileLayout(&pages{size: min(m.Size, maxSize), m: map[int64][]byte{}, base: f})
	if err != nil {
		return err
	}
	payload := wholly(l.rows)
	var damage DamageError
	buf := make([]byte, MapBlock)
	around := func(check func(index int64) (good bool, err error)) func(first, end int64) error {
		return func(first, end int64) error {
			for i := first; i < end; i++ {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if payload[i] {
					continue
				}
				if good, err := check(i); err != nil {
					return err
				} else if !good {
					damage.add(i)
				}
			}
			return nil
		}
	}
	err = m.divide(f, m.Size, around(func(index int64) (bool, error) {
		off, n := m.Span(index)
		if _, err := f.ReadAt(buf[:n], off); err != nil {
			return false, fmt.Errorf("read block %d: %w", index, err)
		}
		return m.check(index, buf[:n]), nil
	}), around(func(int64) (bool, error) { return false, nil }))
	if err == nil && damage.Total > 0 {
		err = &damage
	}
	return err
}

// wholly gives the blocks of a map that lie in the runs with all they have.
func wholly(runs []run) map[int64]bool {
	const most = MapBlock / blockSize
	held, out := map[int64]int64{}, map[int64]bool{}
	for _, r := range runs {
		for at := r.start; at < r.start+r.count; {
			n := min(most-at%most, r.start+r.count-at)
			held[at/most] += n
			if held[at/most] == most {
				out[at/most] = true
			}
			at += n
		}
	}
	return out
}

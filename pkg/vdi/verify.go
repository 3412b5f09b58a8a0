package vdi

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
)

// maxDamage is how many damaged blocks a DamageError names.
const maxDamage = 16

// DamageError says which blocks of an image are not as its map says.
type DamageError struct {
	Blocks []int64 // the first ones, in order; at most 16
	Total  int64
	// Size is the length of the image and Want that of its map, in bytes, where
	// they differ; else both are 0.
	Size, Want int64
}

// Error names the blocks.
func (e *DamageError) Error() string {
	if e.Want != 0 {
		return fmt.Sprintf("the image is %d bytes long, not %d; %s", e.Size, e.Want, e.which())
	}
	return e.which()
}

// which counts the blocks and names the first ones.
func (e *DamageError) which() string {
	numbers := strings.Trim(fmt.Sprint(e.Blocks), "[]")
	switch {
	case e.Total == 1:
		return "one block of 1 MiB is damaged: number " + numbers
	case e.Total > int64(len(e.Blocks)):
		return fmt.Sprintf("%d blocks of 1 MiB are damaged, the first of them: numbers %s", e.Total, numbers)
	}
	return fmt.Sprintf("%d blocks of 1 MiB are damaged: numbers %s", e.Total, numbers)
}

// add counts a damaged block.
func (e *DamageError) add(index int64) {
	e.Total++
	i, _ := slices.BinarySearch(e.Blocks, index)
	if i < maxDamage {
		e.Blocks = slices.Insert(e.Blocks, i, index)
		e.Blocks = e.Blocks[:min(len(e.Blocks), maxDamage)]
	}
}

// BuildMap reads the first size bytes of an image and makes their map.
func BuildMap(ctx context.Context, f *os.File, size int64) (*Map, error) {
	m := &Map{Size: size}
	in := openImage(f, os.O_RDONLY)
	defer in.close()
	var mu sync.Mutex
	emit := func(emit func(span) error) error {
		return eachData(f, size, func(first, end int64) error { return m.spans(first, end, 1, emit) })
	}
	err := work(ctx, MapBlock, emit, func(_ context.Context, s span, buf []byte) error {
		if err := in.readAt(buf, s.off); err != nil {
			return fmt.Errorf("read block %d: %w", s.off/MapBlock, err)
		}
		if isZero(buf) {
			return nil
		}
		b := Block{s.off / MapBlock, sha256.Sum256(buf)}
		mu.Lock()
		defer mu.Unlock()
		m.Blocks = append(m.Blocks, b)
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(m.Blocks, func(a, b Block) int { return cmp.Compare(a.Index, b.Index) })
	return m, nil
}

// Verify holds an image against the map: every block that the map has must be
// as it says, everything else zeros or a hole, and the length the map's. A
// block device may be longer, for volumes are rounded up: the rest of it must
// be zeros, too. Damage is a *DamageError. Only data is read, each block once,
// by several goroutines, and what the page cache does not have is not put there.
//
// progress, when not nil, hears of the bytes that were read and of those that
// are to be read; its calls do not overlap.
func (m *Map) Verify(ctx context.Context, f *os.File, progress func(done, total int64)) error {
	v := &verifier{m: m, in: openImage(f, os.O_RDONLY), progress: newProgress(m, progress)}
	defer v.in.close()
	if err := v.measure(); err != nil {
		return err
	}
	if err := work(ctx, MapBlock, v.emit, v.check); err != nil {
		return err
	}
	if err := v.rest(ctx); err != nil {
		return err
	}
	if v.damage.Want != 0 && v.damage.Total == 0 {
		v.damage.add(min(v.damage.Size, m.Size) / MapBlock)
	}
	if v.damage.Total > 0 {
		return &v.damage
	}
	return nil
}

// verifier holds one image against its map.
type verifier struct {
	m        *Map
	in       *image
	size     int64 // of what there is of the image
	extra    int64 // end of the block device
	progress *progress

	mu     sync.Mutex
	damage DamageError
}

// measure compares the lengths.
func (v *verifier) measure() error {
	end, longer, err := measure(v.in.f)
	if err != nil {
		return err
	}
	v.size, v.extra = min(end, v.m.Size), v.m.Size
	switch {
	case end > v.m.Size && longer:
		v.extra = end
	case end != v.m.Size:
		v.damage.Size, v.damage.Want = end, v.m.Size
	}
	return nil
}

// measure gives the length of f, and whether it may be longer than its map.
func measure(f *os.File) (end int64, longer bool, err error) {
	st, err := f.Stat()
	if err != nil {
		return 0, false, fmt.Errorf("stat image: %w", err)
	}
	end, err = f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, false, fmt.Errorf("length of image: %w", err)
	}
	return end, !st.Mode().IsRegular(), nil
}

// emit gives every block that must be read; what the map has in a hole is damaged.
func (v *verifier) emit(emit func(span) error) error {
	return v.m.divide(v.in.f, v.size, func(first, end int64) error {
		return v.m.spans(first, end, 1, emit)
	}, func(first, end int64) error {
		for i := first; i < end; i++ {
			v.bad(i)
		}
		return nil
	})
}

func (v *verifier) bad(index int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.damage.add(index)
}

func (v *verifier) check(_ context.Context, s span, buf []byte) error {
	index := s.off / MapBlock
	err := v.in.readAt(buf, s.off)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		v.bad(index)
	case err != nil:
		return fmt.Errorf("read block %d: %w", index, err)
	case !v.m.check(index, buf):
		v.bad(index)
	}
	v.progress.add(s.n)
	return nil
}

// rest makes sure that a block device holds nothing after the image.
func (v *verifier) rest(ctx context.Context) error {
	buf := make([]byte, MapBlock)
	for at := v.m.Size; at < v.extra; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := buf[:min(MapBlock, v.extra-at)]
		if _, err := v.in.f.ReadAt(b, at); err != nil {
			return fmt.Errorf("read behind the image: %w", err)
		}
		if !isZero(b) {
			v.bad(at / MapBlock)
		}
		at += int64(len(b))
	}
	return nil
}

// progress counts bytes; its calls come from many goroutines and go out one
// after the other.
type progress struct {
	mu          sync.Mutex
	done, total int64
	tell        func(done, total int64)
}

// newProgress expects as many bytes as the map has blocks; more may come.
func newProgress(m *Map, tell func(done, total int64)) *progress {
	return &progress{total: int64(len(m.Blocks)) * MapBlock, tell: tell}
}

func (p *progress) add(n int64) {
	if p.tell == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	p.total = max(p.total, p.done)
	p.tell(p.done, p.total)
}

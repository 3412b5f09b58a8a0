package vdi

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// Finish waits until every byte is written, writes the filesystem around them
// and syncs the image. Whatever it returns, the Writer is done.
//
// Codes: MESSAGE_TOO_LARGE.
func (w *Writer) Finish(ctx context.Context) (Written, error) {
	if w.ended {
		return Written{}, errAborted
	}
	w.ended = true
	if w.cur != nil && w.cur.n > 0 {
		w.send()
	}
	w.wait()
	defer w.release()
	if err := w.failure(); err != nil {
		return Written{}, err
	}
	if err := context.Cause(ctx); err != nil {
		return Written{}, err
	}
	if len(w.prior) > 0 {
		return Written{}, fmt.Errorf("%d bytes of the payload were given, %d of it stand in the image", w.total, w.o.Done)
	}
	if err := w.layout.take(w.used); err != nil {
		return Written{}, w.layoutError(err)
	}
	end, err := w.layout.finish(w.total, time.Now())
	if err != nil {
		return Written{}, err
	}
	if err := w.writeEnding(end); err != nil {
		return Written{}, fmt.Errorf("write filesystem: %w", err)
	}
	synced := make(chan error, 1)
	go func() { synced <- effect("vdi.sync", w.f.Sync) }()
	m, err := w.finishMap(ctx, end)
	if serr := <-synced; serr != nil {
		return Written{}, fmt.Errorf("sync image: %w", serr)
	}
	if err != nil {
		return Written{}, err
	}
	return Written{w.total, m}, nil
}

// writeEnding writes the metadata, and zeros where blocks became free that held
// something else.
func (w *Writer) writeEnding(end ending) error {
	return effect("vdi.metadata", func() error {
		if w.o.Over {
			for _, r := range end.freed {
				if err := zeroRange(w.f, r.start*blockSize, r.count*blockSize); err != nil {
					return err
				}
			}
		}
		return end.pages.writeTo(w.f)
	})
}

// makeMap is the goroutine that hashes what is written.
func (w *Writer) makeMap() {
	defer close(w.mapped)
	for b := range w.hash {
		at := 0
		for _, r := range b.parts {
			n := int(r.count) * blockSize
			w.sums.add(r.start*blockSize, b.mem[at:at+n])
			at += n
		}
		w.free(b)
	}
}

// finishMap adds to the map the blocks of the image that are not wholly payload:
// metadata, and where payload and something else meet.
func (w *Writer) finishMap(ctx context.Context, end ending) (*Map, error) {
	s := &w.sums
	s.close()
	m := &Map{Size: w.length, Blocks: s.blocks}
	add := func(index int64, sum [sha256.Size]byte) { m.Blocks = append(m.Blocks, Block{index, sum}) }
	var err error
	if w.o.Over {
		err = w.readOthers(ctx, add)
	} else {
		err = w.readMixed(ctx, end.pages, add)
	}
	slices.SortFunc(m.Blocks, func(a, b Block) int { return cmp.Compare(a.Index, b.Index) })
	return m, err
}

// readMixed hashes the blocks with metadata or with a part of the payload in
// them. All others of a fresh image are zeros. Those with payload are read back;
// that they are still what was written is made sure, for the map vouches for
// what the signature was verified over, whatever the storage does.
func (w *Writer) readMixed(ctx context.Context, p *pages, add func(int64, [sha256.Size]byte)) error {
	known := map[string][sha256.Size]byte{}
	buf := make([]byte, MapBlock)
	for index, meta := range w.mixed(p) {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		data := buf[:min(MapBlock, w.length-index*MapBlock)]
		if w.sums.mixed[index] == nil {
			add(index, p.sum(data, index, meta, known))
			continue
		}
		if _, err := w.f.ReadAt(data, index*MapBlock); err != nil {
			return fmt.Errorf("read block %d back: %w", index, err)
		}
		if !w.unchanged(p, index, meta, data) {
			return xapi.NewError(xapi.VDIIOError, fmt.Sprintf("block %d of the image is not what was written to it a moment ago", index))
		}
		if !isZero(data) {
			add(index, sha256.Sum256(data))
		}
	}
	return nil
}

// unchanged tells whether data, which was read back, is what was written to a
// block of the map: its stretches of the payload, those pages, and zeros else.
func (w *Writer) unchanged(p *pages, index int64, held []int64, data []byte) bool {
	known := make([]bool, MapBlock/blockSize)
	for _, c := range w.sums.mixed[index] {
		if !c.holds(data) {
			return false
		}
		for b := c.from / blockSize; b < blocksFor(c.to); b++ {
			known[b] = true
		}
	}
	for _, b := range held {
		at := b*blockSize - index*MapBlock
		if known[at/blockSize] || !bytes.Equal(data[at:at+blockSize], p.m[b]) {
			return false
		}
		known[at/blockSize] = true
	}
	for b := range blocksFor(int64(len(data))) {
		if !known[b] && !isZero(data[b*blockSize:min((b+1)*blockSize, int64(len(data)))]) {
			return false
		}
	}
	return true
}

// mixed gives the blocks of the map that are not wholly payload, and which
// pages of metadata they hold.
func (w *Writer) mixed(p *pages) map[int64][]int64 {
	out := map[int64][]int64{}
	for index := range w.sums.mixed {
		out[index] = nil
	}
	for _, b := range p.blocks() {
		index := b * blockSize / MapBlock
		out[index] = append(out[index], b)
	}
	return out
}

// sum hashes a block of the map that holds nothing but those pages; data is
// room for it. Groups of blocks look alike, so what was hashed once is known.
func (m *pages) sum(data []byte, index int64, held []int64, known map[string][sha256.Size]byte) [sha256.Size]byte {
	key := sha256.New()
	fmt.Fprint(key, len(data))
	for _, b := range held {
		fmt.Fprintf(key, " %d ", b-index*(MapBlock/blockSize))
		key.Write(m.m[b])
	}
	k := string(key.Sum(nil))
	if s, ok := known[k]; ok {
		return s
	}
	clear(data)
	for _, b := range held {
		copy(data[b*blockSize-index*MapBlock:], m.m[b])
	}
	known[k] = sha256.Sum256(data)
	return known[k]
}

// readOthers hashes every block with data in it that was not hashed on its way:
// an image that was not fresh may hold data anywhere.
func (w *Writer) readOthers(ctx context.Context, add func(int64, [sha256.Size]byte)) error {
	buf := make([]byte, MapBlock)
	return eachData(w.f, w.length, func(first, end int64) error {
		for index := first; index < end; index++ {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if w.sums.covers(index) {
				continue
			}
			data := buf[:min(MapBlock, w.length-index*MapBlock)]
			if _, err := w.f.ReadAt(data, index*MapBlock); err != nil {
				return fmt.Errorf("read block %d back: %w", index, err)
			}
			if !isZero(data) {
				add(index, sha256.Sum256(data))
			}
		}
		return nil
	})
}

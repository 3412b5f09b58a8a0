package vdi

import (
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/diskfs/go-diskfs/filesystem"
	"github.com/diskfs/go-diskfs/filesystem/ext4"
)

// goLayout is the layouter of go-diskfs. A row is the first row of free blocks
// of the image, in the order of the disk.
//
// That works because go-diskfs gives a request the first row of free blocks
// that is long enough. A request that is no longer than the very first row gets
// its beginning; since no earlier gap is left, a shorter request gets the same
// place. So blocks may be filled before they are reserved, and a stream of
// unknown length ends with exactly as many as it needs. What really was
// reserved is read back and compared, never assumed.
//
// Steered around in go-diskfs v1.9.4: it chooses 1 KiB blocks for small images
// (SectorsPerBlock), a broken layout with few inodes (128 a group), extent blocks
// without checksum (no metadata_csum), panics on writes of odd length (only whole
// blocks are written), Truncate that frees nothing (only ever by less than a block).
type goLayout struct {
	pages *pages
	fs    *ext4.FileSystem
	file  filesystem.File
	inode int64

	group int64 // where the search for free blocks goes on
	ready run   // handed out by next, not yet taken
	runs  []run // taken, neighbours joined
	taken int64 // blocks
}

const (
	inodesPerGroup = 128
	groupBytes     = 8 * blockSize * blockSize // what one group describes: 128 MiB
)

var _ layouter = (*goLayout)(nil)

// guard turns a panic of the layout writer into an error.
func guard(doing string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: the layout writer panicked: %v", doing, p)
		}
	}()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

// newGoLayout makes the filesystem of an image of size bytes with an empty `patch`.
func newGoLayout(size int64) (*goLayout, error) {
	l := &goLayout{pages: &pages{size: size, m: map[int64][]byte{}}}
	return l, guard("lay out ext4", func() error { return l.create(size) })
}

func (l *goLayout) create(size int64) error {
	groups := (size + groupBytes - 1) / groupBytes
	fs, err := ext4.Create(l.pages, size, 0, 512, &ext4.Params{
		SectorsPerBlock: blockSize / 512,
		InodeCount:      uint32(groups) * inodesPerGroup,
		VolumeName:      "patchd",
		Features: []ext4.FeatureOpt{
			ext4.WithFeatureHasJournal(false),
			ext4.WithFeatureReservedGDTBlocksForExpansion(false),
			ext4.WithFeatureMetadataChecksums(false),
		},
	})
	if err != nil {
		return err
	}
	l.fs = fs
	if err := fs.Mkdir("lost+found"); err != nil {
		return fmt.Errorf("make lost+found: %w", err)
	}
	if l.file, err = fs.OpenFile("/"+FileName, os.O_CREATE|os.O_RDWR); err != nil {
		return err
	}
	info, err := l.file.Stat()
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*ext4.StatT)
	if !ok || st.Ino <= 10 {
		return fmt.Errorf("`patch` has no inode of its own: %+v", info.Sys())
	}
	l.inode = int64(st.Ino)
	return nil
}

// next gives the row of blocks that come next, at most 32768. errNoBlocks when
// the image is full.
func (l *goLayout) next() (run, error) {
	v, err := openExt4(l.pages)
	if err != nil {
		return run{}, err
	}
	r, group, ok, err := v.firstFree(l.group)
	if err != nil {
		return run{}, err
	}
	r.count = min(r.count, maxInitialised, v.free-keepBlocks)
	if !ok || r.count <= 0 {
		return run{}, errNoBlocks
	}
	l.group, l.ready = group, r
	return r, nil
}

// take reserves the first n blocks of what next gave.
func (l *goLayout) take(n int64) error {
	if n == 0 {
		return nil
	}
	err := guard("reserve blocks", func() error {
		if _, err := l.file.Seek((l.taken+n-1)*blockSize, io.SeekStart); err != nil {
			return err
		}
		_, err := l.file.Write(zeroBlock[:])
		return err
	})
	if err != nil {
		return err
	}
	l.taken += n
	l.runs = appendRun(l.runs, run{l.ready.start, n})
	return nil
}

// finish gives the file its size, mode and times, and checks that it has the
// blocks that were filled.
func (l *goLayout) finish(size int64, now time.Time) (ending, error) {
	if blocksFor(size) != l.taken {
		return ending{}, fmt.Errorf("file of %d bytes in %d blocks", size, l.taken)
	}
	err := guard("finish ext4", func() error {
		if err := l.fs.Truncate("/"+FileName, size); err != nil {
			return err
		}
		if err := l.fs.Chmod(FileName, 0o755); err != nil {
			return err
		}
		return l.fs.Chtimes("/"+FileName, now, now, now)
	})
	if err != nil {
		return ending{}, err
	}
	return ending{pages: l.pages}, checkFile(l.pages, l.inode, size, l.runs)
}

// checkFile reads the filesystem back: `patch` must have size bytes in those blocks.
func checkFile(p *pages, inode, size int64, want []run) error {
	v, err := openExt4(p)
	if err != nil {
		return err
	}
	runs, got, err := v.extents(inode)
	if err != nil {
		return err
	}
	if got != size || !slices.Equal(runs, want) {
		return fmt.Errorf("the layout writer reserved other blocks than were filled: %v, not %v", runs, want)
	}
	return nil
}

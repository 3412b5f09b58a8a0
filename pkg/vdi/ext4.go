package vdi

import (
	"encoding/binary"
	"fmt"
	"io"
)

// blocksFor is how many blocks size bytes take.
func blocksFor(size int64) int64 { return (size + blockSize - 1) / blockSize }

// run is a row of blocks.
type run struct {
	start int64 // block number in the image
	count int64
}

// ext4View reads the few structures of an ext4 filesystem that tell where free
// blocks and the blocks of a file are. It reads what the layout writer wrote: 4
// KiB blocks, 64-bit descriptors, extents.
type ext4View struct {
	r              io.ReaderAt
	blocks         int64
	free           int64
	blocksPerGroup int64
	inodesPerGroup int64
	inodeSize      int64
	descSize       int64
}

const (
	superblockAt    = 1024
	superblockMagic = 0xef53
	extentMagic     = 0xf30a
	// maxInitialised is the longest extent whose blocks count as written; longer
	// lengths mark blocks that read as zeros whatever is in them.
	maxInitialised = 32768
	maxTreeDepth   = 5
	// maxNodes bounds the blocks of one extent tree that are read.
	maxNodes = 1024

	rootInode   = 2
	extentsFlag = 0x80000
	rootAt      = 0x28 // of the extent tree, in the inode
	rootSize    = 60
)

// openExt4 reads the superblock.
func openExt4(r io.ReaderAt) (*ext4View, error) {
	sb := make([]byte, 1024)
	if _, err := r.ReadAt(sb, superblockAt); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	le := binary.LittleEndian
	v := &ext4View{
		r:              r,
		blocks:         int64(le.Uint32(sb[0x4:])) | int64(le.Uint32(sb[0x150:]))<<32,
		free:           int64(le.Uint32(sb[0xc:])) | int64(le.Uint32(sb[0x158:]))<<32,
		blocksPerGroup: int64(le.Uint32(sb[0x20:])),
		inodesPerGroup: int64(le.Uint32(sb[0x28:])),
		inodeSize:      int64(le.Uint16(sb[0x58:])),
		descSize:       int64(le.Uint16(sb[0xfe:])),
	}
	switch {
	case le.Uint16(sb[0x38:]) != superblockMagic:
		return nil, fmt.Errorf("no ext4 superblock")
	case le.Uint32(sb[0x18:]) != 2:
		return nil, fmt.Errorf("ext4 blocks are not of 4 KiB")
	case le.Uint32(sb[0x14:]) != 0, v.blocksPerGroup != 8*blockSize, v.inodesPerGroup < 16, v.inodeSize != 256, v.descSize != 64:
		return nil, fmt.Errorf("ext4 geometry is not the one asked for: %+v", *v)
	}
	return v, nil
}

func (v *ext4View) groups() int64 { return (v.blocks + v.blocksPerGroup - 1) / v.blocksPerGroup }

// descriptor gives the blocks of a group's block bitmap and inode table.
func (v *ext4View) descriptor(group int64) (bitmap, inodes int64, err error) {
	d := make([]byte, v.descSize)
	if _, err := v.r.ReadAt(d, blockSize+group*v.descSize); err != nil {
		return 0, 0, fmt.Errorf("read descriptor of group %d: %w", group, err)
	}
	le := binary.LittleEndian
	bitmap = int64(le.Uint32(d[0:])) | int64(le.Uint32(d[0x20:]))<<32
	inodes = int64(le.Uint32(d[8:])) | int64(le.Uint32(d[0x28:]))<<32
	return bitmap, inodes, nil
}

// firstFree gives the first row of free blocks in group or after it. A row ends
// at the end of its group. ok is false when there is none.
func (v *ext4View) firstFree(group int64) (r run, in int64, ok bool, err error) {
	bits := make([]byte, blockSize)
	for ; group < v.groups(); group++ {
		at, _, err := v.descriptor(group)
		if err != nil {
			return run{}, 0, false, err
		}
		if _, err := v.r.ReadAt(bits, at*blockSize); err != nil {
			return run{}, 0, false, fmt.Errorf("read block bitmap of group %d: %w", group, err)
		}
		first := group * v.blocksPerGroup
		n := min(v.blocksPerGroup, v.blocks-first)
		if s, c := firstClear(bits, n); c > 0 {
			return run{first + s, c}, group, true, nil
		}
	}
	return run{}, group, false, nil
}

// firstClear finds the first row of clear bits among the first n.
func firstClear(bits []byte, n int64) (start, count int64) {
	set := func(i int64) bool { return bits[i/8]>>(i%8)&1 == 1 }
	for start < n && set(start) {
		if start%8 == 0 && bits[start/8] == 0xff {
			start += 8
			continue
		}
		start++
	}
	end := start
	for end < n && !set(end) {
		end++
	}
	return min(start, n), max(end-start, 0)
}

// extents gives the blocks of an inode in the order of the file, neighbours
// joined, and its size in bytes. A file with holes or uninitialised extents is
// an error: its blocks would not read as what is written to them.
func (v *ext4View) extents(inode int64) (runs []run, size int64, err error) {
	b, _, err := v.readInode(inode)
	if err != nil {
		return nil, 0, err
	}
	t, err := v.tree(b)
	if err != nil {
		return nil, 0, fmt.Errorf("inode %d: %w", inode, err)
	}
	for _, r := range t.extents {
		runs = appendRun(runs, r)
	}
	le := binary.LittleEndian
	return runs, int64(le.Uint32(b[4:])) | int64(le.Uint32(b[0x6c:]))<<32, nil
}

// readInode gives the bytes of an inode and where they are.
func (v *ext4View) readInode(inode int64) (b []byte, at int64, err error) {
	if inode < 1 || (inode-1)/v.inodesPerGroup >= v.groups() {
		return nil, 0, fmt.Errorf("there is no inode %d", inode)
	}
	_, table, err := v.descriptor((inode - 1) / v.inodesPerGroup)
	if err != nil {
		return nil, 0, err
	}
	b = make([]byte, v.inodeSize)
	at = table*blockSize + (inode-1)%v.inodesPerGroup*v.inodeSize
	if _, err := v.r.ReadAt(b, at); err != nil {
		return nil, 0, fmt.Errorf("read inode %d: %w", inode, err)
	}
	return b, at, nil
}

// tree is the extent tree of a file: its extents in order, and the blocks that
// the tree itself takes.
type tree struct {
	extents []run
	nodes   []int64
}

// tree reads the extent tree of an inode. A file with holes is an error.
func (v *ext4View) tree(inode []byte) (t tree, err error) {
	if binary.LittleEndian.Uint32(inode[0x20:])&extentsFlag == 0 {
		return t, fmt.Errorf("its blocks are not in extents")
	}
	next := int64(0)
	err = v.walk(inode[rootAt:rootAt+rootSize], maxTreeDepth, &t.nodes, func(at int64, r run) error {
		if at != next {
			return fmt.Errorf("extent for block %d where block %d is due", at, next)
		}
		next += r.count
		t.extents = append(t.extents, r)
		return nil
	})
	return t, err
}

// lookup gives the inode of a name in the root directory.
func (v *ext4View) lookup(name string) (int64, error) {
	runs, size, err := v.extents(rootInode)
	if err != nil {
		return 0, fmt.Errorf("root directory: %w", err)
	}
	if size > mib {
		return 0, fmt.Errorf("root directory of %d bytes", size)
	}
	le := binary.LittleEndian
	b := make([]byte, blockSize)
	left := blocksFor(size)
	for _, r := range runs {
		for i := range min(r.count, left) {
			left--
			if _, err := v.r.ReadAt(b, (r.start+i)*blockSize); err != nil {
				return 0, fmt.Errorf("read root directory: %w", err)
			}
			for e := b; len(e) >= 8; {
				inode, length, n := int64(le.Uint32(e)), int(le.Uint16(e[4:])), int(e[6])
				if length < 8+n || length > len(e) {
					break
				}
				if inode != 0 && string(e[8:8+n]) == name {
					return inode, nil
				}
				e = e[length:]
			}
		}
	}
	return 0, fmt.Errorf("no file %q in the image", name)
}

// appendRun adds r, joined to the last run where it goes on from there.
func appendRun(runs []run, r run) []run {
	if n := len(runs); n > 0 && runs[n-1].start+runs[n-1].count == r.start {
		runs[n-1].count += r.count
		return runs
	}
	return append(runs, r)
}

// walk visits the extents below one node of an extent tree, in order, and
// collects the blocks of the nodes.
func (v *ext4View) walk(node []byte, depth int, nodes *[]int64, visit func(at int64, r run) error) error {
	le := binary.LittleEndian
	if le.Uint16(node) != extentMagic {
		return fmt.Errorf("extent node without its magic number")
	}
	entries, level := int(le.Uint16(node[2:])), int(le.Uint16(node[6:]))
	if level > depth || 12+12*entries > len(node) {
		return fmt.Errorf("extent node of depth %d with %d entries", level, entries)
	}
	for i := range entries {
		e := node[12+12*i:]
		if level == 0 {
			r := run{int64(le.Uint16(e[6:]))<<32 | int64(le.Uint32(e[8:])), int64(le.Uint16(e[4:]))}
			if r.count == 0 || r.count > maxInitialised || r.start+r.count > v.blocks {
				return fmt.Errorf("extent of %d blocks at %d", r.count, r.start)
			}
			if err := visit(int64(le.Uint32(e)), r); err != nil {
				return err
			}
			continue
		}
		child := make([]byte, blockSize)
		at := int64(le.Uint32(e[4:])) | int64(le.Uint16(e[8:]))<<32
		if _, err := v.r.ReadAt(child, at*blockSize); err != nil {
			return fmt.Errorf("read extent node: %w", err)
		}
		if *nodes = append(*nodes, at); len(*nodes) > maxNodes {
			return fmt.Errorf("extent tree of more than %d blocks", maxNodes)
		}
		if err := v.walk(child, level-1, nodes, visit); err != nil {
			return err
		}
	}
	return nil
}

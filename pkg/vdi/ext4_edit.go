package vdi

import (
	"encoding/binary"
	"fmt"
	"time"
)

const (
	fileMode    = 0x8000 | 0o755 // an ordinary file, rwxr-xr-x
	nodeEntries = (blockSize - 12) / 12
	rootEntries = 4

	compatJournal    = 0x4
	incompatAllowed  = 0x2 | 0x40 | 0x80 | 0x200 // file types, extents, 64 bits, flexible groups
	roCompatRefused  = 0x10 | 0x100 | 0x200 | 0x400
	filesystemIsOkay = 1
)

// cutFile gives a file its last form: size bytes, mode 0755, times. Blocks at its
// end that it no longer needs become free; those that held its bytes are the
// result. It works only on filesystems as the layout writers make them: no
// journal, no checksums, clean.
func cutFile(p *pages, inode, size int64, now time.Time) (freed []run, err error) {
	v, err := openExt4(p)
	if err != nil {
		return nil, err
	}
	if err := v.editable(); err != nil {
		return nil, err
	}
	b, at, err := v.readInode(inode)
	if err != nil {
		return nil, err
	}
	t, err := v.tree(b)
	if err != nil {
		return nil, err
	}
	kept, freed, err := cutRuns(t.extents, blocksFor(size))
	if err != nil {
		return nil, err
	}
	used := len(t.nodes)
	if len(freed) > 0 {
		root, n, err := writeTree(p, kept, t.nodes)
		if err != nil {
			return nil, err
		}
		copy(b[rootAt:], root)
		used = n
	}
	unused := freed
	for _, node := range t.nodes[used:] {
		unused = append(unused[:len(unused):len(unused)], run{node, 1})
		if _, err := p.WriteAt(zeroBlock[:], node*blockSize); err != nil {
			return nil, err
		}
	}
	if err := v.release(p, unused); err != nil {
		return nil, err
	}
	setInode(b, size, blocksFor(size)+int64(used), now)
	_, err = p.WriteAt(b, at)
	return freed, err
}

// editable refuses a filesystem that holds more than cutFile takes care of.
func (v *ext4View) editable() error {
	sb := make([]byte, 1024)
	if _, err := v.r.ReadAt(sb, superblockAt); err != nil {
		return fmt.Errorf("read superblock: %w", err)
	}
	le := binary.LittleEndian
	compat, incompat, ro := le.Uint32(sb[0x5c:]), le.Uint32(sb[0x60:]), le.Uint32(sb[0x64:])
	if compat&compatJournal != 0 || incompat&^incompatAllowed != 0 || ro&roCompatRefused != 0 {
		return fmt.Errorf("filesystem has features that no layout writer gives it: %#x %#x %#x", compat, incompat, ro)
	}
	if state := le.Uint16(sb[0x3a:]); state != filesystemIsOkay {
		return fmt.Errorf("filesystem is not clean: state %d", state)
	}
	return nil
}

// cutRuns divides the extents of a file after n blocks.
func cutRuns(extents []run, n int64) (kept, rest []run, err error) {
	for _, r := range extents {
		k := min(r.count, n)
		if k > 0 {
			kept = append(kept, run{r.start, k})
		}
		if k < r.count {
			rest = append(rest, run{r.start + k, r.count - k})
		}
		n -= k
	}
	if n > 0 {
		return nil, nil, fmt.Errorf("the file has %d blocks too few", n)
	}
	return kept, rest, nil
}

// writeTree writes the extent tree of a file into the first of nodes, and gives
// its root and how many nodes it took.
func writeTree(p *pages, extents []run, nodes []int64) (root []byte, used int, err error) {
	le := binary.LittleEndian
	entries := make([]byte, 0, 12*len(extents))
	at := int64(0)
	for _, r := range extents {
		e := make([]byte, 12)
		le.PutUint32(e, uint32(at))
		le.PutUint16(e[4:], uint16(r.count))
		le.PutUint16(e[6:], uint16(r.start>>32))
		le.PutUint32(e[8:], uint32(r.start))
		entries = append(entries, e...)
		at += r.count
	}
	depth := 0
	for ; len(entries) > 12*rootEntries; depth++ {
		var above []byte
		for len(entries) > 0 {
			if used == len(nodes) {
				return nil, 0, fmt.Errorf("extent tree needs more than its %d blocks", len(nodes))
			}
			k := min(len(entries), 12*nodeEntries)
			node := treeNode(entries[:k], nodeEntries, depth, blockSize)
			if _, err := p.WriteAt(node, nodes[used]*blockSize); err != nil {
				return nil, 0, err
			}
			e := make([]byte, 12)
			copy(e[:4], entries)
			le.PutUint32(e[4:], uint32(nodes[used]))
			le.PutUint16(e[8:], uint16(nodes[used]>>32))
			above = append(above, e...)
			entries = entries[k:]
			used++
		}
		entries = above
	}
	return treeNode(entries, rootEntries, depth, rootSize), used, nil
}

func treeNode(entries []byte, most, depth, size int) []byte {
	le := binary.LittleEndian
	b := make([]byte, size)
	le.PutUint16(b, extentMagic)
	le.PutUint16(b[2:], uint16(len(entries)/12))
	le.PutUint16(b[4:], uint16(most))
	le.PutUint16(b[6:], uint16(depth))
	copy(b[12:], entries)
	return b
}

// release makes blocks free: in the bitmaps, and in the counts of groups and superblock.
func (v *ext4View) release(p *pages, runs []run) error {
	total := int64(0)
	for _, r := range runs {
		total += r.count
		for r.count > 0 {
			group := r.start / v.blocksPerGroup
			first := r.start % v.blocksPerGroup
			n := min(r.count, v.blocksPerGroup-first)
			if err := v.releaseInGroup(p, group, first, n); err != nil {
				return err
			}
			r.start, r.count = r.start+n, r.count-n
		}
	}
	return addFree(p, superblockAt, 0xc, 0x158, 4, total)
}

func (v *ext4View) releaseInGroup(p *pages, group, first, n int64) error {
	at, _, err := v.descriptor(group)
	if err != nil {
		return err
	}
	bits := make([]byte, blockSize)
	if _, err := p.ReadAt(bits, at*blockSize); err != nil {
		return err
	}
	for i := first; i < first+n; {
		if i%8 == 0 && first+n-i >= 8 && bits[i/8] == 0xff {
			bits[i/8] = 0
			i += 8
			continue
		}
		if bits[i/8]>>(i%8)&1 == 0 {
			return fmt.Errorf("block %d of group %d is free already", i, group)
		}
		bits[i/8] &^= 1 << (i % 8)
		i++
	}
	if _, err := p.WriteAt(bits, at*blockSize); err != nil {
		return err
	}
	return addFree(p, blockSize+group*v.descSize, 0xc, 0x2c, 2, n)
}

// addFree adds to a count whose halves, of width bytes, are at lo and hi of the
// structure at off.
func addFree(p *pages, off, lo, hi int64, width int, n int64) error {
	l, h := make([]byte, 4), make([]byte, 4)
	if _, err := p.ReadAt(l[:width], off+lo); err != nil {
		return err
	}
	if _, err := p.ReadAt(h[:width], off+hi); err != nil {
		return err
	}
	le := binary.LittleEndian
	bits := 8 * width
	sum := uint64(le.Uint32(l)) | uint64(le.Uint32(h))<<bits
	sum += uint64(n)
	le.PutUint32(l, uint32(sum&(1<<bits-1)))
	le.PutUint32(h, uint32(sum>>bits))
	if _, err := p.WriteAt(l[:width], off+lo); err != nil {
		return err
	}
	_, err := p.WriteAt(h[:width], off+hi)
	return err
}

// setInode sets size, mode, times and the count of blocks in the bytes of an inode.
func setInode(b []byte, size, blocks int64, now time.Time) {
	le := binary.LittleEndian
	le.PutUint16(b[0x0:], fileMode)
	le.PutUint32(b[0x4:], uint32(size))
	le.PutUint32(b[0x6c:], uint32(size>>32))
	sectors := blocks * blockSize / 512
	le.PutUint32(b[0x1c:], uint32(sectors))
	le.PutUint16(b[0x74:], uint16(sectors>>32))
	sec := now.Unix()
	extra := uint32(now.Nanosecond())<<2 | uint32(sec>>32)&3
	for _, t := range []struct{ sec, extra int }{{0x8, 0x8c}, {0xc, 0x84}, {0x10, 0x88}} {
		le.PutUint32(b[t.sec:], uint32(sec))
		le.PutUint32(b[t.extra:], extra)
	}
}

package vdi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/dom0"
)

// mke2fsConfig makes mke2fs lay out `patch` over every free block, in extents
// that count as written. Metadata come first, so that the file lies in one
// stretch but for the copies of the superblock.
const mke2fsConfig = `[defaults]
	base_features = sparse_super,large_file,filetype,extent,64bit,flex_bg,dir_index,ext_attr,extra_isize,huge_file
	default_mntopts = ""
	blocksize = 4096
	inode_size = 256
	reserved_ratio = 0
	discard = 0
	packed_meta_blocks = 1
[fs_types]
	small = {
	}
	big = {
	}
	huge = {
	}
	patchd = {
		make_hugefiles = 1
		num_hugefiles = 1
		hugefiles_dir = /
		hugefiles_name = ` + FileName + `
		hugefiles_digits = 0
		hugefiles_size = 0
		hugefiles_slack = 0
		hugefiles_umask = 022
		zero_hugefiles = false
		no_zero_hugefiles = true
	}
`

// mke2fsTimeout is for a machine that hangs: mke2fs takes 5 ms for 32 GiB.
const mke2fsTimeout = time.Minute

// fileLayout is the layouter of a filesystem whose `patch` has its blocks
// already: more than it needs. finish cuts it.
type fileLayout struct {
	pages *pages
	inode int64
	rows  []run // not yet taken, neighbours joined
	runs  []run // taken, neighbours joined
	taken int64 // blocks
}

var _ layouter = (*fileLayout)(nil)

// newMke2fsLayout runs mke2fs on a file in memory as large as the image.
func newMke2fsLayout(ctx context.Context, d dom0.Dom0, size int64) (*fileLayout, error) {
	tool := mke2fsPath()
	if tool == "" || d == nil {
		return nil, errors.New("lay out ext4: mke2fs is not installed, or cannot be run here")
	}
	image, err := memoryFile("patchd-layout", size, nil)
	if err != nil {
		return nil, err
	}
	defer image.Close()
	if err := runMke2fs(ctx, d, tool, image, size); err != nil {
		return nil, err
	}
	p := &pages{size: size, m: map[int64][]byte{}}
	if err := p.load(image); err != nil {
		return nil, fmt.Errorf("read what mke2fs made: %w", err)
	}
	l, err := openFileLayout(p)
	if err != nil {
		return nil, fmt.Errorf("what mke2fs made: %w", err)
	}
	return l, nil
}

// runMke2fs gives mke2fs the image as descriptor 3 and its configuration as 4.
func runMke2fs(ctx context.Context, d dom0.Dom0, tool string, image *os.File, size int64) error {
	config, err := memoryFile("patchd-mke2fs", 0, []byte(mke2fsConfig))
	if err != nil {
		return err
	}
	defer config.Close()
	groups := (size + groupBytes - 1) / groupBytes
	said := &limited{}
	r, err := d.Run(ctx, dom0.Cmd{
		Path: tool,
		Args: []string{
			"-q", "-F", "-t", "patchd", "-L", "patchd", "-m", "0", "-b", strconv.Itoa(blockSize),
			"-N", strconv.FormatInt(groups*inodesPerGroup, 10), "-E", "root_owner=0:0,nodiscard,lazy_itable_init=0",
			"/proc/self/fd/3", strconv.FormatInt(size/blockSize, 10),
		},
		Env:        []string{"MKE2FS_CONFIG=/proc/self/fd/4", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Dir:        "/",
		Stdout:     said,
		Stderr:     said,
		ExtraFiles: []dom0.File{image, config},
		Timeout:    mke2fsTimeout,
	})
	if err != nil {
		return fmt.Errorf("lay out ext4: %w", err)
	}
	if r.ExitCode != 0 {
		return fmt.Errorf("lay out ext4: mke2fs ended with %d: %s", r.ExitCode, strings.TrimSpace(said.String()))
	}
	return nil
}

// limited keeps the first bytes of what a program says.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(0, 2048-l.Len()))])
	return len(p), nil
}

// memoryFile makes a file without a name that lives in memory.
func memoryFile(name string, size int64, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, fmt.Errorf("file in memory: %w", err)
	}
	if err := f.Truncate(max(size, int64(len(content)))); err != nil {
		f.Close()
		return nil, fmt.Errorf("file in memory of %d bytes: %w", size, err)
	}
	return f, nil
}

// openFileLayout finds `patch` in a filesystem.
func openFileLayout(p *pages) (*fileLayout, error) {
	v, err := openExt4(p)
	if err != nil {
		return nil, err
	}
	if v.blocks > p.size/blockSize {
		return nil, fmt.Errorf("filesystem of %d blocks in an image of %d bytes", v.blocks, p.size)
	}
	if err := v.editable(); err != nil {
		return nil, err
	}
	inode, err := v.lookup(FileName)
	if err != nil {
		return nil, err
	}
	runs, _, err := v.extents(inode)
	if err != nil {
		return nil, err
	}
	return &fileLayout{pages: p, inode: inode, rows: runs}, nil
}

func (l *fileLayout) next() (run, error) {
	if len(l.rows) == 0 {
		return run{}, errNoBlocks
	}
	return l.rows[0], nil
}

func (l *fileLayout) take(n int64) error {
	if n == 0 {
		return nil
	}
	r := &l.rows[0]
	l.runs = appendRun(l.runs, run{r.start, n})
	l.taken += n
	if r.start, r.count = r.start+n, r.count-n; r.count == 0 {
		l.rows = l.rows[1:]
	}
	return nil
}

func (l *fileLayout) finish(size int64, now time.Time) (ending, error) {
	if blocksFor(size) != l.taken {
		return ending{}, fmt.Errorf("file of %d bytes in %d blocks", size, l.taken)
	}
	freed, err := cutFile(l.pages, l.inode, size, now)
	if err != nil {
		return ending{}, fmt.Errorf("cut `patch` to %d bytes: %w", size, err)
	}
	return ending{l.pages, freed}, checkFile(l.pages, l.inode, size, l.runs)
}

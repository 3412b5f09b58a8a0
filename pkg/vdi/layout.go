package vdi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
)

// LayoutKind says who makes the filesystem of an image.
type LayoutKind string

// The layout writers.
const (
	// LayoutAuto takes mke2fs for large images where it is installed, else go.
	LayoutAuto LayoutKind = ""
	// LayoutGo is go-diskfs, in memory.
	LayoutGo LayoutKind = "go"
	// LayoutMke2fs is mke2fs of e2fsprogs, run on a file in memory.
	LayoutMke2fs LayoutKind = "mke2fs"
)

// autoMke2fs is the smallest image that LayoutAuto leaves to mke2fs: below it
// go-diskfs is as fast.
const autoMke2fs = 128 * mib

// keepBlocks stay free in an image, for the blocks of the extent tree.
const keepBlocks = 8

var errNoBlocks = errors.New("no free blocks left in the image")

// layouter is the filesystem around the bytes of `patch`. It lives in memory and
// never sees the bytes themselves: it hands out rows of blocks one after
// another, in the order of the file.
//
//	r, err := l.next()           // the next row of blocks: fill it, wholly or in part
//	err = l.take(n)              // its first n blocks belong to `patch`
//	…
//	end, err := l.finish(size, now) // the file has size bytes and mode 0755: write end to the image
//
// Rows depend on the size of the image and on nothing else, so that an
// interrupted image can be gone on with.
type layouter interface {
	next() (run, error) // errNoBlocks when the image is full
	take(n int64) error
	finish(size int64, now time.Time) (ending, error)
}

// ending is what the image needs once its payload is in place.
type ending struct {
	pages *pages // to be written
	freed []run  // blocks that were the file's and are to read as zeros
}

// newLayout makes the filesystem of a fresh image of size bytes. The second
// result tells whether the choice was free and fell back to go.
func newLayout(ctx context.Context, size int64, o Options) (layouter, error) {
	switch o.Layout {
	case LayoutGo:
		return newGoLayout(size)
	case LayoutMke2fs:
		return newMke2fsLayout(ctx, o.Dom0, size)
	}
	if o.Layout.For(size, o.Dom0) == LayoutGo {
		return newGoLayout(size)
	}
	l, err := newMke2fsLayout(ctx, o.Dom0, size)
	if err == nil || ctx.Err() != nil || o.Done > 0 {
		return l, err
	}
	// An old mke2fs without hugefiles: what it made is not used.
	return newGoLayout(size)
}

// For is the layout writer that kind means for an image of size bytes on this
// machine: LayoutAuto chooses.
func (kind LayoutKind) For(size int64, d dom0.Dom0) LayoutKind {
	if kind != LayoutAuto {
		return kind
	}
	if size < autoMke2fs || d == nil || mke2fsPath() == "" {
		return LayoutGo
	}
	return LayoutMke2fs
}

// CheckLayout tells whether images can be laid out as kind says on this
// machine. It is asked when the program starts.
func CheckLayout(kind LayoutKind, d dom0.Dom0) error {
	switch kind {
	case LayoutAuto, LayoutGo:
		return nil
	case LayoutMke2fs:
		if mke2fsPath() == "" {
			return fmt.Errorf("mke2fs is not installed (looked in %v): install e2fsprogs, or let the layout be chosen", toolDirs)
		}
		if d == nil {
			return errors.New("mke2fs cannot be run here")
		}
		return nil
	}
	return fmt.Errorf("there is no layout writer %q: auto, go or mke2fs", kind)
}

// ParseLayout reads the name of a layout writer: auto, go or mke2fs.
func ParseLayout(name string) (LayoutKind, error) {
	switch kind := LayoutKind(name); kind {
	case "auto", LayoutAuto:
		return LayoutAuto, nil
	case LayoutGo, LayoutMke2fs:
		return kind, nil
	}
	return "", fmt.Errorf("there is no layout writer %q: auto, go or mke2fs", name)
}

// toolDirs are searched for mke2fs: never the PATH of whoever started us.
var toolDirs = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"}

func mke2fsPath() string {
	for _, dir := range toolDirs {
		if st, err := os.Stat(dir + "/mke2fs"); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return dir + "/mke2fs"
		}
	}
	return ""
}

// Package vdi knows what a disk image is: how large an image a patch gets, how
// a stream of bytes becomes an ext4 filesystem that holds it as the file
// `patch`, and how an image is copied without filling its holes.
//
// # From a stream to an image
//
//	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
//	err = f.Truncate(size)              // a fresh sparse file, or a volume that reads as zeros
//	w, err := vdi.NewWriter(ctx, f, size, length, vdi.Options{})
//	defer w.Abort()
//	_, err = io.Copy(w, payload)
//	done, err := w.Finish(ctx)          // done.Size bytes are durable in the file `patch`
//
// The bytes go straight to their place in the image: neither root nor a mount
// nor a loop device is needed, and memory does not grow with the size. The
// filesystem around them is made in memory, by go-diskfs or by mke2fs (layouter),
// and is written last, so that an image that was not finished holds no filesystem
// at all. While one goroutine receives, a second writes past the page cache and a
// third makes the block map; only blocks with metadata in them are read back.
//
// An interrupted image is gone on with (Options.Done): where the bytes are
// follows from the size of the image and the layout writer alone. A payload much
// like an earlier one is written over a clone of its image (Options.Over), so
// that the blocks that are the same stay shared.
//
// # Blocks, and what is made of them
//
// A Map holds the SHA-256 of each MiB of an image that never changes again.
// Map.Verify holds the image against it, CopyVerified copies only what is as the
// map says, Repair takes damaged blocks from other images. They read only data,
// past the page cache, with a few goroutines that each read and hash a block of
// their own, so that the disk and all cores are at work. Frames are an image, or
// some of its blocks, as a stream for another host.
//
// # What it refuses
//
// A payload that the image cannot hold (MESSAGE_TOO_LARGE), and an image that
// is not fresh. A full disk keeps errors.Is(err, syscall.ENOSPC).
package vdi

// FileName is the name of the patch in its image, at the root of the filesystem.
const FileName = "patch"

const (
	mib = int64(1) << 20
	gib = int64(1) << 30

	// unknownSize is the virtual size for a payload of unknown length.
	unknownSize = 4 * gib
	// minSize is the smallest virtual size.
	minSize = 4 * mib
	// maxSize is the largest filesystem that is made; the rest of a larger image
	// stays unused. Above it the copies of the group descriptors no longer fit a
	// last group of 1 MiB.
	maxSize = 1024 * gib
)

// Size is the virtual size, in bytes, of the image for a signed patch of
// contentLength bytes: four times that, at least 4 MiB, rounded up to 1 MiB;
// 4 GiB when the length is not known (negative).
func Size(contentLength int64) int64 {
	if contentLength < 0 {
		return unknownSize
	}
	if contentLength > maxSize {
		contentLength = maxSize // far beyond what NewWriter takes; no overflow
	}
	n := max(4*contentLength, minSize)
	return (n + mib - 1) / mib * mib
}
